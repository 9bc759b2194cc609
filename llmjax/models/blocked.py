"""Attention in blocks: no scores of T² at once, and none of what the causal mask or a window hides (arXiv:2205.14135).

Plain products and loops, so it runs anywhere; on CPUs a block of scores stays in cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name

from llmjax.layout import axes_of
from llmjax.models import nn, scores
from llmjax.models.scores import Scores

BLOCK = 512  # positions; on a CPU, with 4,096 of them, 128 took 1.7 times as long, and with 1,024 as long
LEAST = 32  # smaller blocks cost more than the scores they save


def block(length: int, most: int) -> int:
    """Positions in a block: as many as divide the length, or all of them where only tiny blocks would."""
    found = next(n for n in range(min(length, most), 0, -1) if length % n == 0)
    return found if found >= min(length, LEAST) else length


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    kind: Scores,
    q_BTGRK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    sinks_GR: jax.Array | None = None,
) -> jax.Array:
    """See `llmjax.models.reference.attend`."""
    return _forward(kind, q_BTGRK, k_BSGK, v_BSGK, segments, sinks_GR)[0]


def _forward(kind, q_BTGRK, k_BSGK, v_BSGK, segments, sinks_GR):
    place = jax.typeof(q_BTGRK).sharding.spec
    call = functools.partial(_forward_on_device, kind, axes_of(place[1]))
    o_BTGRK, log_total_BTGR = nn.on_devices(call, (place, P(*place[:-1])), q_BTGRK, k_BSGK, v_BSGK, segments)
    o_BTGRK, log_total_BTGR = scores.sunk(o_BTGRK, log_total_BTGR, sinks_GR)
    o_BTGRK, log_total_BTGR = (checkpoint_name(x, nn.ATTENTION) for x in (o_BTGRK, log_total_BTGR))
    return o_BTGRK, (q_BTGRK, k_BSGK, v_BSGK, segments, sinks_GR, o_BTGRK, log_total_BTGR)


def _backward(kind, saved, do_BTGRK):
    *inputs, segments, sinks_GR, o_BTGRK, log_total_BTGR = saved
    places = tuple(jax.typeof(x).sharding.spec for x in inputs)
    call = functools.partial(_backward_on_device, kind, axes_of(places[0][1]))
    mean_BTGR = scores.mean(do_BTGRK, o_BTGRK)
    slopes = nn.on_devices(call, places, *inputs, segments, log_total_BTGR, do_BTGRK, mean_BTGR)
    return *slopes, None, scores.of_sinks(sinks_GR, log_total_BTGR, mean_BTGR)


attend.defvjp(_forward, _backward)


def _forward_on_device(kind, cut, q, k, v, segments):
    queries, size, first = _queries(cut, q, segments)

    def row(i):
        at = first + i  # the number of this block among those of all devices

        def look(j):
            score_BTGRS, v_BSGK = _scores(kind, queries, k, segments, i, at, j, size), _part(v, j, size)
            highest = jnp.max(score_BTGRS, -1)
            weight_BTGRS = jnp.exp(score_BTGRS - highest[..., None])
            return nn.product("BTGRS,BSGK->BTGRK", weight_BTGRS, v_BSGK), highest, jnp.sum(weight_BTGRS, -1)

        start = _from(kind.window, at, size)
        o, highest, total = jax.lax.fori_loop(start, at, lambda j, a: merge(a, look(j)), look(at))
        return (o / total[..., None]).astype(q.dtype), highest + jnp.log(total)

    return _joined(jax.lax.map(row, jnp.arange(q.shape[1] // size)))


def _backward_on_device(kind, cut, q, k, v, segments, log_total, do, mean):
    queries, size, first = _queries(cut, q, segments)

    def row(sums, i):
        at = first + i
        q_, do_, log_total_, mean_ = (_part(x, i, size) for x in (queries[0], do, log_total, mean))

        def slope(j, carry):
            dq, (dk, dv) = carry
            score_BTGRS = _scores(kind, queries, k, segments, i, at, j, size)
            chance_BTGRS = jnp.exp(score_BTGRS - log_total_[..., None])
            dchance_BTGRS = nn.product("BTGRK,BSGK->BTGRS", do_, _part(v, j, size))
            dscore_BTGRS = chance_BTGRS * (dchance_BTGRS - mean_[..., None])
            dscore_BTGRS = scores.uncapped(kind.cap, dscore_BTGRS, score_BTGRS)
            dk = _added(dk, nn.product("BTGRS,BTGRK->BSGK", dscore_BTGRS, q_), j)
            dv = _added(dv, nn.product("BTGRS,BTGRK->BSGK", chance_BTGRS, do_), j)
            return dq + nn.product("BTGRS,BSGK->BTGRK", dscore_BTGRS, _part(k, j, size)), (dk, dv)

        start = jnp.zeros_like(q_, jnp.float32), sums
        dq, sums = jax.lax.fori_loop(_from(kind.window, at, size), at + 1, slope, start)
        return sums, dq * q.shape[-1] ** -0.5

    zeros = jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    zeros = jax.lax.pcast(zeros, cut, to="varying") if cut else zeros
    sums, dq = jax.lax.scan(row, zeros, jnp.arange(q.shape[1] // size))
    dk, dv = jax.lax.psum(sums, cut) if cut else sums
    return _joined(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _queries(cut, q, segments):
    """((scaled queries, their segments), positions in a block, number of this device's first block)."""
    size = block(q.shape[1], min(BLOCK, nn.how().block))
    first = jax.lax.axis_index(cut) * (q.shape[1] // size) if cut else 0
    return (q * q.shape[-1] ** -0.5, None if segments is None else segments[0]), size, first


def _from(window, at, size):
    """The first block of keys that a block of queries sees."""
    return jnp.maximum(0, (at * size - window + 1) // size) if window else 0


def _scores(kind, queries, k, segments, i, at, j, size):
    score_BTGRS = nn.product("BTGRK,BSGK->BTGRS", _part(queries[0], i, size), _part(k, j, size))
    score_BTGRS = scores.capped(kind.cap, score_BTGRS)
    back_TS = jnp.arange(size)[:, None] - jnp.arange(size)[None] + (at - j) * size  # how far back a key is
    seen_BTS = ((back_TS >= 0) & (back_TS < kind.window) if kind.window else back_TS >= 0)[None]
    if segments is not None:
        seen_BTS = seen_BTS & (_part(queries[1], i, size)[:, :, None] == _part(segments[1], j, size)[:, None, :])
    return jnp.where(seen_BTS[:, :, None, None], score_BTGRS, scores.HIDDEN)


def merge(a, b):
    """(sum of exp(score - highest) v, highest, sum of exp(score - highest)) over the keys of both."""
    highest = jnp.maximum(a[1], b[1])
    a_share, b_share = jnp.exp(a[1] - highest), jnp.exp(b[1] - highest)
    return a[0] * a_share[..., None] + b[0] * b_share[..., None], highest, a[2] * a_share + b[2] * b_share


def _part(x_BT, i, size):
    return jax.lax.dynamic_slice_in_dim(x_BT, i * size, size, 1)


def _added(x_BT, more_BT, i):
    at = i * more_BT.shape[1]
    old_BT = jax.lax.dynamic_slice_in_dim(x_BT, at, more_BT.shape[1], 1)
    return jax.lax.dynamic_update_slice_in_dim(x_BT, old_BT + more_BT, at, 1)


def _joined(tree):
    """Arrays [N, B, T/N, ...] as [B, T, ...]."""

    def joined(x):
        x_BN = jnp.moveaxis(x, 0, 1)
        return x_BN.reshape(x_BN.shape[0], -1, *x_BN.shape[3:])

    return jax.tree.map(joined, tree)
