"""What attention makes of the products of queries and keys, alike for every way to compute it.

A sink is one number per query head that takes part in the softmax as the score of a key that is always seen and has no
value (gpt-oss; arXiv:2309.17453). It can be added to what was computed without it, as only the totals change.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HIDDEN = -1e30  # the score of what a query does not see


class Scores(NamedTuple):
    """What kind of scores: part of the program, not of its data."""

    window: int = 0  # positions, one's own among them, that a query sees; 0: all before it
    cap: float = 0.0  # scores are cap · tanh(score / cap) (Gemma 2, arXiv:2408.00118); 0: as they are


def capped(cap: float, score: jax.Array) -> jax.Array:
    """Scores within ±cap."""
    return cap * jnp.tanh(score / cap) if cap else score


def uncapped(cap: float, dscore: jax.Array, score: jax.Array) -> jax.Array:
    """The gradient before `capped`, given that after it and the capped scores; hidden ones have none."""
    if not cap:
        return dscore
    return dscore * jnp.where(score > HIDDEN / 2, 1 - (score / cap) ** 2, 0)


def mean(do_BTGRK: jax.Array, o_BTGRK: jax.Array) -> jax.Array:
    """The mean, by a query's weights, of what each value adds to the loss, [B, T, G, R]."""
    return jnp.sum(do_BTGRK.astype(jnp.float32) * o_BTGRK.astype(jnp.float32), axis=-1)


def sunk(o_BTGRK: jax.Array, log_total_BTGR: jax.Array, sinks_GR: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Attention's result, and the log of its total weight, with sinks added."""
    if sinks_GR is None:
        return o_BTGRK, log_total_BTGR
    whole_BTGR = jnp.logaddexp(log_total_BTGR, sinks_GR[None, None].astype(jnp.float32))
    share_BTGR = jnp.exp(log_total_BTGR - whole_BTGR)
    return (o_BTGRK.astype(jnp.float32) * share_BTGR[..., None]).astype(o_BTGRK.dtype), whole_BTGR


def of_sinks(sinks_GR: jax.Array | None, log_total_BTGR: jax.Array, mean_BTGR: jax.Array) -> jax.Array | None:
    """The gradient in the sinks: their weight times what their value, which is nothing, lacks of the mean."""
    if sinks_GR is None:
        return None
    weight_BTGR = jnp.exp(sinks_GR[None, None].astype(jnp.float32) - log_total_BTGR)
    return -jnp.sum(weight_BTGR * mean_BTGR, (0, 1)).astype(sinks_GR.dtype)
