"""Attention and rotary positions. `q_BTHK` asks, `k_BSGK` answers, `v_BSGK` is what is passed on."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import P

from llmjax.models import nn, ring


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
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array | None = None
) -> jax.Array:
    """softmax(q·k / sqrt(K)) v over the positions up to one's own; H is a multiple of G (arXiv:2305.13245).

    With `segments_BT`, over those of them in one's own segment. Positions come in the order that `nn.order` says.
    Scores and softmax are float32. The backward pass computes the scores again, so nothing of size T² is kept
    (arXiv:2205.14135). The letter R counts the query heads that share a key head.
    """
    place, (B, T, H, K), G = nn.how().layout.gathered, q_BTHK.shape, k_BTGK.shape[2]
    q_BTGRK = jnp.reshape(q_BTHK, (B, T, G, H // G, K), out_sharding=place("BTGRK"))
    with jax.named_scope("scores"):
        if nn.ring():
            o_BTGRK = ring.attend(q_BTGRK, k_BTGK, v_BTGK, segments_BT)
        else:  # every device sees all keys: no layout cuts the dim "_"
            k_BSGK, v_BSGK = (jax.reshard(x, place("B_GK")) for x in (k_BTGK, v_BTGK))
            segments = None if segments_BT is None else (segments_BT, jax.reshard(segments_BT, place("B_")))
            o_BTGRK = _attend(q_BTGRK, k_BSGK, v_BSGK, segments)
    return jnp.reshape(o_BTGRK, (B, T, H, K), out_sharding=place("BTHK"))


@jax.custom_vjp
def _attend(q_BTGRK, k_BSGK, v_BSGK, segments):
    return _attend_forward(q_BTGRK, k_BSGK, v_BSGK, segments)[0]


def _attend_forward(q_BTGRK, k_BSGK, v_BSGK, segments):
    score_BGRTS = _scores(q_BTGRK, k_BSGK, segments)
    highest_BGRT = jnp.max(score_BGRTS, axis=-1)
    weight_BGRTS = jnp.exp(score_BGRTS - highest_BGRT[..., None])
    total_BGRT = jnp.sum(weight_BGRTS, axis=-1)
    o_BTGRK = nn.product("BGRTS,BSGK->BTGRK", weight_BGRTS, v_BSGK) / jnp.moveaxis(total_BGRT, 3, 1)[..., None]
    o_BTGRK = o_BTGRK.astype(q_BTGRK.dtype)
    return o_BTGRK, (q_BTGRK, k_BSGK, v_BSGK, segments, o_BTGRK, highest_BGRT + jnp.log(total_BGRT))


def _attend_backward(saved, do_BTGRK):
    q_BTGRK, k_BSGK, v_BSGK, segments, o_BTGRK, log_total_BGRT = saved
    chance_BGRTS = jnp.exp(_scores(q_BTGRK, k_BSGK, segments) - log_total_BGRT[..., None])
    place = jax.typeof(k_BSGK).sharding
    dv_BSGK = nn.product("BGRTS,BTGRK->BSGK", chance_BGRTS, do_BTGRK, place)
    mean_BTGR = jnp.sum(do_BTGRK.astype(jnp.float32) * o_BTGRK.astype(jnp.float32), axis=-1)
    dchance_BGRTS = nn.product("BTGRK,BSGK->BGRTS", do_BTGRK, v_BSGK)
    dscore_BGRTS = chance_BGRTS * (dchance_BGRTS - jnp.moveaxis(mean_BTGR, 1, 3)[..., None])
    scale = q_BTGRK.shape[-1] ** -0.5
    dq_BTGRK = nn.product("BGRTS,BSGK->BTGRK", dscore_BGRTS, k_BSGK) * scale
    dk_BSGK = nn.product("BGRTS,BTGRK->BSGK", dscore_BGRTS, q_BTGRK, place) * scale
    return dq_BTGRK.astype(q_BTGRK.dtype), dk_BSGK.astype(k_BSGK.dtype), dv_BSGK.astype(v_BSGK.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(q_BTGRK, k_BSGK, segments):
    score_BGRTS = nn.product("BTGRK,BSGK->BGRTS", q_BTGRK * q_BTGRK.shape[-1] ** -0.5, k_BSGK)
    T, S = score_BGRTS.shape[-2:]
    place = P(*jax.typeof(score_BGRTS).sharding.spec[-2:])
    asks, answers = (jax.lax.broadcasted_iota(jnp.int32, (T, S), dim, out_sharding=place) for dim in (0, 1))
    score_BGRTS = jnp.where((asks >= answers)[None, None, None], score_BGRTS, -1e30)
    if segments is None:
        return score_BGRTS
    same_BTS = segments[0][:, :, None] == segments[1][:, None, :]
    return jnp.where(same_BTS[:, None, None], score_BGRTS, -1e30)
