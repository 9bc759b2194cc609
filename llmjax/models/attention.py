"""Attention and rotary positions. `q_BTHK` asks, `k_BSGK` answers, `v_BSGK` is what is passed on."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from llmjax.errors import Refused
from llmjax.models import blocked, cudnn, nn, reference, ring, splash


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies for contexts longer than the original (arXiv:2407.21783)."""

    factor: float = 8.0
    "How much longer the context became."
    low: float = 1.0
    "Wavelengths above `original / low` are stretched by the whole factor."
    high: float = 4.0
    "Wavelengths below `original / high` stay."
    original: int = 8192
    "Context length of the first training."


def rope_angles(positions_T: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Rotation angles [T, K/2] in float32 (arXiv:2104.09864)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        turns = scaling.original * frequency / (2 * math.pi)  # over the original context
        keep = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    return positions_T.astype(jnp.float32)[:, None] * frequency[None, :]


def rotate(x_BTHK: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (k, k + K/2) of every head by the angle of their position."""
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHK.dtype)


def attention(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array | None = None, window: int = 0
) -> jax.Array:
    """softmax(q·k / sqrt(K)) v over the positions up to one's own; H is a multiple of G (arXiv:2305.13245).

    With a `window`, over the last so many of them; with `segments_BT`, over those in one's own segment. Positions come
    in the order that `nn.order` says. Scores and softmax are float32. Nothing of size T² is kept for the backward pass
    (arXiv:2205.14135). The letter R counts the query heads that share a key head. `nn.Compute.attention` says how.
    """
    place, (B, T, H, K), G = nn.how().layout.gathered, q_BTHK.shape, k_BTGK.shape[2]
    q_BTGRK = jnp.reshape(q_BTHK, (B, T, G, H // G, K), out_sharding=place("BTGRK"))
    with jax.named_scope("scores"):
        if nn.ring():
            if window:
                raise Refused(f"attention has a window of {window} positions, and a ring has none: use cp instead.")
            o_BTGRK = ring.attend(q_BTGRK, k_BTGK, v_BTGK, segments_BT)
        else:  # every device sees all keys: no layout cuts the dim "_"
            k_BSGK, v_BSGK = (jax.reshard(x, place("B_GK")) for x in (k_BTGK, v_BTGK))
            segments = None if segments_BT is None else (segments_BT, jax.reshard(segments_BT, place("B_")))
            o_BTGRK = _kernel()(window, q_BTGRK, k_BSGK, v_BSGK, segments)
    return jnp.reshape(o_BTGRK, (B, T, H, K), out_sharding=place("BTHK"))


def _kernel():
    match nn.how().attention:
        case "reference":
            return reference.attend
        case "blocked":
            return blocked.attend
        case "splash":
            return splash.attend
        case "cudnn":
            return cudnn.attend
