"""Attention in cuDNN's fused kernel, which skips what the causal mask or a window hides."""

import functools

import jax
import jax.numpy as jnp

from llmjax.errors import Refused
from llmjax.models import blocked, nn
from llmjax.models.scores import Scores

WIDEST = 128  # head dim that cuDNN takes on every GPU from Ampere on


def attend(
    kind: Scores,
    q_BTGRK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    sinks_GR: jax.Array | None = None,
) -> jax.Array:
    """See `llmjax.models.reference.attend`. T is whole; operands are bfloat16 or float16; no caps and no sinks.

    Documents go through `blocked`: cuDNN would take a mask of T² for them, and lose what it is good for.
    """
    if kind.cap or sinks_GR is not None:
        lacks = f"soft-capping of scores (at {kind.cap:g})" if kind.cap else "attention sinks"
        raise Refused(f"attention is cudnn, but cudnn has no {lacks}: use blocked or reference.")
    if segments is not None:
        return blocked.attend(kind, q_BTGRK, k_BSGK, v_BSGK, segments)
    place = jax.typeof(q_BTGRK).sharding.spec
    on_devices = jax.shard_map(
        functools.partial(_on_device, kind.window),
        out_specs=place,
        axis_names=nn.unclaimed(),
        check_vma=False,  # nor does this kernel say over which axes its result varies
    )
    return on_devices(q_BTGRK, k_BSGK, v_BSGK)


def _on_device(window, q_BTGRK, k_BSGK, v_BSGK):
    B, T, G, R, K = q_BTGRK.shape
    o_BTHK = jax.nn.dot_product_attention(
        q_BTGRK.reshape(B, T, G * R, K).astype(nn.how().operands),
        k_BSGK.astype(nn.how().operands),
        v_BSGK.astype(nn.how().operands),
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
    return jnp.reshape(o_BTHK, (*q_BTGRK.shape[:-1], -1)).astype(q_BTGRK.dtype)
