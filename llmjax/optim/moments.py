"""Averages kept in bfloat16, at half the memory, and right on average."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Moments = Literal["float32", "bfloat16"]


class Rounded(NamedTuple):
    """The state of an optimizer, with its averages in bfloat16."""

    count: jax.Array
    inner: optax.OptState


def kept(inner: optax.GradientTransformation, moments: Moments) -> optax.GradientTransformation:
    """The optimizer, with its averages in this precision between steps."""
    return in_bfloat16(inner) if moments == "bfloat16" else inner


def in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, with float32 state of one dim or more kept as bfloat16 between steps; steps compute in float32.

    A number is rounded up or down at random, as often up as it lies near the upper neighbour. To the nearest, what
    changes by less than half of 1/128 a step would not change at all, such as an average of squares that b2 0.999
    lets decay. The random bits are a hash of step, array and place in it: the same on any mesh and in a resumed run.
    """

    def init(params):
        state = inner.init(params)
        return Rounded(jnp.int32(0), jax.tree.map(lambda x: x.astype(jnp.bfloat16) if _average(x) else x, state))

    def update(grads, state, params=None):
        before = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state.inner)
        updates, after = inner.update(grads, before, params)
        count = optax.safe_increment(state.count)
        leaves, tree = jax.tree.flatten(after)
        seeds = [mixed(count * len(leaves) + i) for i in range(len(leaves))]
        leaves = [round_at_random(x, seed) if _average(x) else x for x, seed in zip(leaves, seeds, strict=True)]
        return updates, Rounded(count, jax.tree.unflatten(tree, leaves))

    return optax.GradientTransformation(init, update)


def round_at_random(x: jax.Array, seed: jax.Array) -> jax.Array:
    """float32 as bfloat16, up or down by chance, so that the mean over seeds (uint32) is x; placed as x."""
    place = jax.typeof(x).sharding
    index, stride = jnp.zeros_like(x, jnp.uint32), 1
    for dim in reversed(range(x.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim, out_sharding=place if place.mesh.shape else None)
        index, stride = index + along * jnp.uint32(stride % 2**32), stride * x.shape[dim]
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (mixed(index ^ seed) >> 16)
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _average(x: jax.Array) -> bool:
    return x.ndim > 0 and x.dtype == jnp.float32


def mixed(x: jax.Array) -> jax.Array:
    """A hash of 32 bits: every bit of the result depends on every bit of x (the finaliser of MurmurHash3)."""
    x = x.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
