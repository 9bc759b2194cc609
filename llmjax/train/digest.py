"""A digest of arrays that any mesh computes alike, and that one flipped bit changes."""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.checkpoint.checkpoints import named


def digest(tree: Any) -> dict[str, jax.Array]:
    """Of every leaf, by name, a uint32 of all its bits and their places, the same however the leaf is cut.

    For use under jit. It is a sum over elements, so devices add theirs up in any order; it finds accidents, and no one
    who means to deceive.
    """
    return {name: _of(leaf) for name, leaf in named(tree).items()}


def text(found: dict[str, Any]) -> dict[str, str]:
    """Digests as hexadecimal text."""
    return {name: f"{int(np.asarray(value)):08x}" for name, value in found.items()}


def one(tree: Any) -> str:
    """One text for a whole tree: the same where all its leaves and their names are."""
    found = text(_digest(tree))
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:32]


_digest = jax.jit(digest)


def words(x: jax.Array) -> jax.Array:
    """The bits of every element as a uint32; of an 8-byte element, both halves mixed."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool:
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    if size == 8:
        low_high = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return mixed(low_high[..., 0]) + low_high[..., 1]
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
    return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which a bit of the argument moves half of the result's: Murmur3's finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _of(x: jax.Array) -> jax.Array:
    bits = words(x)
    place = jnp.full_like(bits, np.uint32(0x9E3779B9))
    for dim in range(bits.ndim):
        stride = math.prod(bits.shape[dim + 1 :]) % 2**32
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim, out_sharding=jax.typeof(bits).sharding)
        place += index * jnp.uint32(stride)
    return jnp.sum(mixed(bits + mixed(place)), dtype=jnp.uint32)
