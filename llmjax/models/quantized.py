"""Products of factors that are rounded to eight bits, which chips multiply faster than bfloat16.

Every row of a factor, its numbers along the dims that the product sums over, is divided by a scale of its own and
rounded by `qwix`: to a whole number in int8, to three bits behind the leading one in float8_e4m3fn. Sums are int32 or
float32, and times both scales they are the product. A scale is the row's largest number over the largest of the type,
wherever devices hold it, so rounding is the same on any mesh.

So are products of a layer's dense weights computed, forward and for the gradient of what goes in. Gradients of weights
are not (arXiv:2304.13013), nor are embedding, head, router, attention's own products and those of routed experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import P

TYPES = dict(int8="int8", fp8="float8_e4m3fn")  # of a run's dtype
# How qwix finds scales. Left alone, it would bring a row's largest number to 127.5, where the last bit decides between
# the two neighbours, and with it every mesh differently.
LARGEST = dict(int8=f"absmax,{127.5 / 127}", float8_e4m3fn="absmax")


class Factor(NamedTuple):
    """A factor of one product: values times scale."""

    values: jax.Array
    scale: jax.Array  # float32, with size 1 where the product sums


def rounded(x: jax.Array, kind: str, dims: str, out: str) -> Factor:
    """`x` with these dims, for a product with the dims `out`."""
    import qwix

    kept = tuple(i for i, d in enumerate(dims) if d in out)
    found = qwix.quantize(x.astype(jnp.float32), kind, channelwise_axes=kept, calibration_method=LARGEST[kind])
    return Factor(found.qvalue, found.scale)


def moved(factor: Factor, place: P) -> Factor:
    """The factor cut so; what crosses devices has eight bits."""
    cuts = (axes if size > 1 else None for axes, size in zip(place, factor.scale.shape, strict=True))
    return Factor(jax.reshard(factor.values, place), jax.reshard(factor.scale, P(*cuts)))


def einsum(subscripts: str, a: Factor, b: Factor, dtype: str, place: P) -> jax.Array:
    """`jnp.einsum` of the factors in this dtype and place; a sum over devices may be left open there."""
    (a_dims, rest), kind = subscripts.split(","), a.values.dtype
    b_dims, out = rest.split("->")
    total = jnp.int32 if jnp.issubdtype(kind, jnp.integer) else jnp.float32
    sums = jnp.einsum(subscripts, a.values, b.values, preferred_element_type=total, out_sharding=place)
    scaled = sums.astype(jnp.float32) * _beside(a.scale, a_dims, out, place) * _beside(b.scale, b_dims, out, place)
    return scaled.astype(dtype)


def _beside(scale: jax.Array, dims: str, out: str, place: P) -> jax.Array:
    """The scales of a factor, shaped and placed to be multiplied with a product."""
    scale = jnp.squeeze(scale, tuple(i for i, d in enumerate(dims) if d not in out))
    scale = jnp.expand_dims(scale, tuple(i for i, d in enumerate(out) if d not in dims))
    cuts = (axes if d in dims else None for d, axes in zip(out, place.partitions, strict=True))
    return jax.reshard(scale, P(*cuts, reduced=place.unreduced))
