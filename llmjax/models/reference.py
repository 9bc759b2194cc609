"""Attention with all scores at once: what the other ways are held against, and what runs for any shape anywhere."""

import functools

import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name

from llmjax.models import nn, scores
from llmjax.models.scores import Scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    kind: Scores,
    q_BTGRK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    sinks_GR: jax.Array | None = None,
) -> jax.Array:
    """Causal attention with scores of this kind; T may be cut over devices, S is whole.

    `segments` are those of queries [B, T] and of keys [B, S]; `sinks_GR` are described in `llmjax.models.scores`.
    """
    return _forward(kind, q_BTGRK, k_BSGK, v_BSGK, segments, sinks_GR)[0]


def _forward(kind, q_BTGRK, k_BSGK, v_BSGK, segments, sinks_GR):
    score_BGRTS = _scores(kind, q_BTGRK, k_BSGK, segments)
    highest_BGRT = jnp.max(score_BGRTS, axis=-1)
    weight_BGRTS = jnp.exp(score_BGRTS - highest_BGRT[..., None])
    total_BGRT = jnp.sum(weight_BGRTS, axis=-1)
    o_BTGRK = nn.product("BGRTS,BSGK->BTGRK", weight_BGRTS, v_BSGK) / jnp.moveaxis(total_BGRT, 3, 1)[..., None]
    o_BTGRK, log_total_BTGR = o_BTGRK.astype(q_BTGRK.dtype), jnp.moveaxis(highest_BGRT + jnp.log(total_BGRT), 3, 1)
    o_BTGRK, log_total_BTGR = scores.sunk(o_BTGRK, log_total_BTGR, sinks_GR)
    o_BTGRK, log_total_BTGR = (checkpoint_name(x, nn.ATTENTION) for x in (o_BTGRK, log_total_BTGR))
    return o_BTGRK, (q_BTGRK, k_BSGK, v_BSGK, segments, sinks_GR, o_BTGRK, log_total_BTGR)


def _backward(kind, saved, do_BTGRK):
    q_BTGRK, k_BSGK, v_BSGK, segments, sinks_GR, o_BTGRK, log_total_BTGR = saved
    score_BGRTS = _scores(kind, q_BTGRK, k_BSGK, segments)
    chance_BGRTS = jnp.exp(score_BGRTS - jnp.moveaxis(log_total_BTGR, 1, 3)[..., None])
    place = jax.typeof(k_BSGK).sharding
    dv_BSGK = nn.product("BGRTS,BTGRK->BSGK", chance_BGRTS, do_BTGRK, jax.typeof(v_BSGK).sharding)
    mean_BTGR = scores.mean(do_BTGRK, o_BTGRK)
    dchance_BGRTS = nn.product("BTGRK,BSGK->BGRTS", do_BTGRK, v_BSGK)
    dscore_BGRTS = chance_BGRTS * (dchance_BGRTS - jnp.moveaxis(mean_BTGR, 1, 3)[..., None])
    dscore_BGRTS = scores.uncapped(kind.cap, dscore_BGRTS, score_BGRTS)
    scale = q_BTGRK.shape[-1] ** -0.5
    dq_BTGRK = nn.product("BGRTS,BSGK->BTGRK", dscore_BGRTS, k_BSGK) * scale
    dk_BSGK = nn.product("BGRTS,BTGRK->BSGK", dscore_BGRTS, q_BTGRK, place) * scale
    dsinks_GR = scores.of_sinks(sinks_GR, log_total_BTGR, mean_BTGR)
    return (
        dq_BTGRK.astype(q_BTGRK.dtype), dk_BSGK.astype(k_BSGK.dtype), dv_BSGK.astype(v_BSGK.dtype), None, dsinks_GR,
    )  # fmt: skip


attend.defvjp(_forward, _backward)


def _scores(kind, q_BTGRK, k_BSGK, segments):
    score_BGRTS = nn.product("BTGRK,BSGK->BGRTS", q_BTGRK * q_BTGRK.shape[-1] ** -0.5, k_BSGK)
    score_BGRTS = scores.capped(kind.cap, score_BGRTS)
    T, S = score_BGRTS.shape[-2:]
    place = P(*jax.typeof(score_BGRTS).sharding.spec[-2:])
    asks, answers = (jax.lax.broadcasted_iota(jnp.int32, (T, S), dim, out_sharding=place) for dim in (0, 1))
    seen_TS = asks >= answers
    if kind.window:
        seen_TS &= asks - answers < kind.window
    score_BGRTS = jnp.where(seen_TS[None, None, None], score_BGRTS, scores.HIDDEN)
    if segments is None:
        return score_BGRTS
    same_BTS = segments[0][:, :, None] == segments[1][:, None, :]
    return jnp.where(same_BTS[:, None, None], score_BGRTS, scores.HIDDEN)
