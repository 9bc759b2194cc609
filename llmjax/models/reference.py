"""Attention with all scores at once: what the other ways are held against, and what runs for any shape anywhere."""

import functools

import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name

from llmjax.models import nn


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    window: int, q_BTGRK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, segments: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    """Causal attention to the last `window` positions, or to all if it is 0; T may be cut over devices, S is whole.

    `segments` are those of queries [B, T] and of keys [B, S].
    """
    return _forward(window, q_BTGRK, k_BSGK, v_BSGK, segments)[0]


def _forward(window, q_BTGRK, k_BSGK, v_BSGK, segments):
    score_BGRTS = _scores(window, q_BTGRK, k_BSGK, segments)
    highest_BGRT = jnp.max(score_BGRTS, axis=-1)
    weight_BGRTS = jnp.exp(score_BGRTS - highest_BGRT[..., None])
    total_BGRT = jnp.sum(weight_BGRTS, axis=-1)
    o_BTGRK = nn.product("BGRTS,BSGK->BTGRK", weight_BGRTS, v_BSGK) / jnp.moveaxis(total_BGRT, 3, 1)[..., None]
    o_BTGRK = checkpoint_name(o_BTGRK.astype(q_BTGRK.dtype), nn.ATTENTION)
    log_total_BGRT = checkpoint_name(highest_BGRT + jnp.log(total_BGRT), nn.ATTENTION)
    return o_BTGRK, (q_BTGRK, k_BSGK, v_BSGK, segments, o_BTGRK, log_total_BGRT)


def _backward(window, saved, do_BTGRK):
    q_BTGRK, k_BSGK, v_BSGK, segments, o_BTGRK, log_total_BGRT = saved
    chance_BGRTS = jnp.exp(_scores(window, q_BTGRK, k_BSGK, segments) - log_total_BGRT[..., None])
    place = jax.typeof(k_BSGK).sharding
    dv_BSGK = nn.product("BGRTS,BTGRK->BSGK", chance_BGRTS, do_BTGRK, place)
    mean_BTGR = jnp.sum(do_BTGRK.astype(jnp.float32) * o_BTGRK.astype(jnp.float32), axis=-1)
    dchance_BGRTS = nn.product("BTGRK,BSGK->BGRTS", do_BTGRK, v_BSGK)
    dscore_BGRTS = chance_BGRTS * (dchance_BGRTS - jnp.moveaxis(mean_BTGR, 1, 3)[..., None])
    scale = q_BTGRK.shape[-1] ** -0.5
    dq_BTGRK = nn.product("BGRTS,BSGK->BTGRK", dscore_BGRTS, k_BSGK) * scale
    dk_BSGK = nn.product("BGRTS,BTGRK->BSGK", dscore_BGRTS, q_BTGRK, place) * scale
    return dq_BTGRK.astype(q_BTGRK.dtype), dk_BSGK.astype(k_BSGK.dtype), dv_BSGK.astype(v_BSGK.dtype), None


attend.defvjp(_forward, _backward)


def _scores(window, q_BTGRK, k_BSGK, segments):
    score_BGRTS = nn.product("BTGRK,BSGK->BGRTS", q_BTGRK * q_BTGRK.shape[-1] ** -0.5, k_BSGK)
    T, S = score_BGRTS.shape[-2:]
    place = P(*jax.typeof(score_BGRTS).sharding.spec[-2:])
    asks, answers = (jax.lax.broadcasted_iota(jnp.int32, (T, S), dim, out_sharding=place) for dim in (0, 1))
    seen_TS = asks >= answers
    if window:
        seen_TS &= asks - answers < window
    score_BGRTS = jnp.where(seen_TS[None, None, None], score_BGRTS, -1e30)
    if segments is None:
        return score_BGRTS
    same_BTS = segments[0][:, :, None] == segments[1][:, None, :]
    return jnp.where(same_BTS[:, None, None], score_BGRTS, -1e30)
