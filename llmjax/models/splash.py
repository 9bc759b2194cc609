"""Attention in one TPU kernel that skips what the mask hides: JAX's Pallas splash attention, one call per sequence."""

import math

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import AbstractMesh, NamedSharding

from llmjax.errors import Refused
from llmjax.layout import axes_of
from llmjax.models import nn, pipeline
from llmjax.models.scores import Scores

LANES = 128  # what a block of positions is a multiple of
COMPUTE = 512  # keys that are looked at at once, within a block


def attend(
    kind: Scores,
    q_BTGRK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    sinks_GR: jax.Array | None = None,
) -> jax.Array:
    """See `llmjax.models.reference.attend`. T on one device, and S, are multiples of 128; there are no sinks."""
    if sinks_GR is not None:
        raise Refused("attention is splash, but splash has no attention sinks: use blocked or reference.")
    place = jax.typeof(q_BTGRK).sharding.spec
    kernel, specs = _kernel(kind, q_BTGRK.shape, k_BSGK.shape[1], place)
    keys = jax.typeof(k_BSGK).sharding.spec
    segment_places = None if segments is None else (P(*place[:2]), P(*keys[:2]))
    on_devices = jax.shard_map(
        _on_device,
        in_specs=(specs, place, keys, keys, segment_places),
        out_specs=place,
        axis_names=nn.unclaimed(),
        check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )
    return on_devices(kernel, q_BTGRK, k_BSGK, v_BSGK, segments)


def _kernel(kind: Scores, shape: tuple[int, ...], S: int, place: P):
    """(the kernel, where its mask lives): the mask of a device's queries is that of the part of T that it holds."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mesh = jax.sharding.get_abstract_mesh()
    _, T, G, R, _ = shape
    _, parts, *heads_ways, _ = (pipeline.ways(axes_of(cut)) for cut in place)
    heads = G * R // math.prod(heads_ways)
    mask = masks.LocalMask((T, S), (kind.window - 1, 0), 0) if kind.window else masks.CausalMask((T, S))
    block = largest(T // parts, nn.how().block)
    across = min(block, COMPUTE)
    blocks = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=across, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=across, use_fused_bwd_kernel=True,
    )  # fmt: skip
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=nn.ATTENTION,
        attn_logits_soft_cap=kind.cap or None,
        interpret=nn.how().interpret,
    )
    whole = AbstractMesh(mesh.axis_sizes, mesh.axis_names)  # the mesh may be manual in part, which JAX refuses
    specs = kernel.manual_sharding_spec(NamedSharding(whole, P(None, place[1])))
    return jax.tree.map(jax.reshard, kernel, specs), specs


def largest(length: int, most: int) -> int:
    """The largest block, a power of two times 128 and at most `most`, that divides so many positions; 0: none does."""
    sizes = (LANES << n for n in range(most // LANES))
    return max((size for size in sizes if size <= most and length % size == 0), default=0)


def _on_device(kernel, q_BTGRK, k_BSGK, v_BSGK, segments):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    B, T, G, R, K = q_BTGRK.shape
    q_BHTK = jnp.moveaxis(q_BTGRK * K**-0.5, 1, 3).reshape(B, G * R, T, K)
    k_BGSK, v_BGSK = (jnp.moveaxis(x, 1, 2) for x in (k_BSGK, v_BSGK))
    segment_ids = None if segments is None else splash.SegmentIds(*segments)
    o_BHTK = jax.vmap(kernel)(q_BHTK, k_BGSK, v_BGSK, segment_ids)
    return jnp.moveaxis(o_BHTK.reshape(B, G, R, T, -1), 3, 1)
