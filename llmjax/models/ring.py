"""Attention around a ring of devices: each holds a part of the sequence, and keys and values travel (arXiv:2310.01889).

With n devices a sequence is cut into 2n pieces, and device r holds pieces r and 2n-1-r, its `low` and its `high`. In
turn j it has the keys of device s = r-j mod n. Whatever s is, `high` may look at all of s's low piece. Beyond that, if
s < r, `low` may look at all of s's low piece too; if s > r, `high` may look at all of s's high piece; and no piece may
look at anything else. So every turn takes two products of whole pieces on every device, nothing that the causal mask
hides is computed, and nothing is idle.
"""

import functools

import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name

from llmjax.models import nn, scores
from llmjax.models.blocked import merge


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    cap: float,
    q_BTGRK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    sinks_GR: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of arrays whose T is cut over `nn.ring()`, in the order of `nn.order`; scores are within ±cap.

    Memory per device: the scores of one pair of pieces, (T / 2n)² per head, and keys and values of one other device.
    """
    return _forward(cap, q_BTGRK, k_BTGK, v_BTGK, segments_BT, sinks_GR)[0]


def _forward(cap, q_BTGRK, k_BTGK, v_BTGK, segments_BT, sinks_GR):
    place = jax.typeof(q_BTGRK).sharding.spec
    places = place, P(*place[:-1])
    call = functools.partial(_forward_on_device, cap, nn.ring())
    o_BTGRK, log_total_BTGR = nn.on_devices(call, places, q_BTGRK, k_BTGK, v_BTGK, segments_BT)
    o_BTGRK, log_total_BTGR = scores.sunk(o_BTGRK, log_total_BTGR, sinks_GR)
    o_BTGRK, log_total_BTGR = (checkpoint_name(x, nn.ATTENTION) for x in (o_BTGRK, log_total_BTGR))
    return o_BTGRK, (q_BTGRK, k_BTGK, v_BTGK, segments_BT, sinks_GR, o_BTGRK, log_total_BTGR)


def _backward(cap, saved, do_BTGRK):
    *inputs, segments_BT, sinks_GR, o_BTGRK, log_total_BTGR = saved
    places = tuple(jax.typeof(x).sharding.spec for x in inputs)
    call = functools.partial(_backward_on_device, cap, nn.ring())
    mean_BTGR = scores.mean(do_BTGRK, o_BTGRK)
    slopes = nn.on_devices(call, places, *inputs, segments_BT, log_total_BTGR, do_BTGRK, mean_BTGR)
    return *slopes, None, scores.of_sinks(sinks_GR, log_total_BTGR, mean_BTGR)


attend.defvjp(_forward, _backward)


def _forward_on_device(cap, axis, q, k, v, segments):
    queries, keys = _pieces((q, segments)), _pieces((k, v, segments))
    low = _look(cap, queries[0], keys[0], diagonal=True)
    high = merge(_look(cap, queries[1], keys[0]), _look(cap, queries[1], keys[1], diagonal=True))

    def turn(carry, j):
        keys, low, high = carry
        keys = _pass_on(keys, axis)
        before = j <= jax.lax.axis_index(axis)  # s < r
        high = merge(high, _look(cap, queries[1], keys[0]))
        seen = _look(cap, _either(before, queries), _either(before, keys))
        low, high = _where(before, merge(low, seen), low), _where(before, high, merge(high, seen))
        return (keys, low, high), None

    (_, low, high), _ = jax.lax.scan(turn, (keys, low, high), jnp.arange(1, jax.lax.axis_size(axis)))
    o, highest, total = jax.tree.map(lambda *pieces: jnp.concatenate(pieces, 1), low, high)
    return (o / total[..., None]).astype(q.dtype), highest + jnp.log(total)


def _backward_on_device(cap, axis, q, k, v, segments, log_total, do, mean):
    queries = _pieces((q, segments, log_total, do, mean))
    keys = _pieces((k, v, segments))
    own, dkeys_low = _slope(cap, queries[0], keys[0], diagonal=True)
    dlow = own
    across, dkeys_across = _slope(cap, queries[1], keys[0])
    own, dkeys_high = _slope(cap, queries[1], keys[1], diagonal=True)
    dhigh, dkeys = across + own, (_sum(dkeys_low, dkeys_across), dkeys_high)

    def turn(carry, j):
        keys, dkeys, dlow, dhigh = carry
        keys, dkeys = _pass_on((keys, dkeys), axis)  # what is owed to a key travels with it
        before = j <= jax.lax.axis_index(axis)
        across, more = _slope(cap, queries[1], keys[0])
        seen, also = _slope(cap, _either(before, queries), _either(before, keys))
        none = jax.tree.map(jnp.zeros_like, also)
        dkeys = (
            _sum(_sum(dkeys[0], more), _where(before, also, none)),
            _sum(dkeys[1], _where(before, none, also)),
        )
        dlow, dhigh = dlow + _where(before, seen, 0 * seen), dhigh + across + _where(before, 0 * seen, seen)
        return (keys, dkeys, dlow, dhigh), None

    carry = keys, dkeys, dlow, dhigh
    (_, dkeys, dlow, dhigh), _ = jax.lax.scan(turn, carry, jnp.arange(1, jax.lax.axis_size(axis)))
    slopes = (dlow, *_pass_on(dkeys[0], axis)), (dhigh, *_pass_on(dkeys[1], axis))  # the last hop is home
    return jax.tree.map(lambda low, high, x: jnp.concatenate((low, high), 1).astype(x.dtype), *slopes, (q, k, v))


def _scores(cap, query, key, diagonal):
    q, q_segment = query[:2]
    k, _, k_segment = key
    score_BTGRS = scores.capped(cap, nn.product("BTGRK,BSGK->BTGRS", q * q.shape[-1] ** -0.5, k))
    if diagonal:
        seen_TS = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        score_BTGRS = jnp.where(seen_TS[None, :, None, None], score_BTGRS, scores.HIDDEN)
    if q_segment is not None:
        same_BTS = q_segment[:, :, None] == k_segment[:, None, :]
        score_BTGRS = jnp.where(same_BTS[:, :, None, None], score_BTGRS, scores.HIDDEN)
    return score_BTGRS


def _look(cap, query, key, diagonal=False):
    """(sum of exp(score - highest) v, highest, sum of exp(score - highest)) over the keys of one piece."""
    score_BTGRS = _scores(cap, query, key, diagonal)
    highest_BTGR = jnp.max(score_BTGRS, -1)
    weight_BTGRS = jnp.exp(score_BTGRS - highest_BTGR[..., None])
    return nn.product("BTGRS,BSGK->BTGRK", weight_BTGRS, key[1]), highest_BTGR, jnp.sum(weight_BTGRS, -1)


def _slope(cap, query, key, diagonal=False):
    """(dq, (dk, dv)) of one pair of pieces, in float32."""
    q, _, log_total_BTGR, do, mean_BTGR = query
    k, v, _ = key
    score_BTGRS = _scores(cap, query, key, diagonal)
    chance_BTGRS = jnp.exp(score_BTGRS - log_total_BTGR[..., None])
    dv = nn.product("BTGRS,BTGRK->BSGK", chance_BTGRS, do)
    dscore_BTGRS = chance_BTGRS * (nn.product("BTGRK,BSGK->BTGRS", do, v) - mean_BTGR[..., None])
    dscore_BTGRS = scores.uncapped(cap, dscore_BTGRS, score_BTGRS)
    scale = q.shape[-1] ** -0.5
    dq = nn.product("BTGRS,BSGK->BTGRK", dscore_BTGRS, k) * scale
    return dq, (nn.product("BTGRS,BTGRK->BSGK", dscore_BTGRS, q) * scale, dv)


def _pieces(tree):
    """The low and the high piece of everything a device holds."""
    low = jax.tree.map(lambda x: x[:, : x.shape[1] // 2], tree)
    return low, jax.tree.map(lambda x: x[:, x.shape[1] // 2 :], tree)


def _either(before, pieces):
    return _where(before, *pieces)


def _where(condition, a, b):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def _sum(a, b):
    return jax.tree.map(jnp.add, a, b)


def _pass_on(tree, axis):
    n = jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)]), tree)
