"""The orthogonal factor of matrices that may be cut over devices, by products alone.

Newton-Schulz: with X scaled so that no singular value is above 1, X <- a X + (b A + c A A) X with A = X X^T keeps the
singular vectors and takes each value s to a s + b s^3 + c s^5 (Keller Jordan, kellerjordan.github.io/posts/muon). Each
iteration has the a, b, c that are best for where the one before it has brought the values (arXiv:2505.16932).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.layout import axes_of

MARGIN = 1.01  # singular values that rounding leaves above the interval of the next iteration may be so much above
CUSHION = 0.024  # share of the largest that none is taken for less than, else some become so small that rounding counts
TOGETHER = 1 << 24  # numbers that an accelerator multiplies at once; small matrices alone would not keep it busy
ABREAST = 1 << 20  # numbers that a CPU has in hand at once, in caches; 16 matrices at most, as each is compiled anew

Sides = tuple[int, int]  # how many of an array's last dims are rows, and columns


class Kind(NamedTuple):
    """What matrices have in common that are orthogonalised together, turned so that rows are no more than columns."""

    rows: int
    columns: int
    row_axes: tuple[str, ...]  # mesh axes that cut them, none of size 1
    column_axes: tuple[str, ...]


def orthogonal(xs: Sequence[jax.Array], sides: Sequence[Sides], iterations: int, operands: str) -> list[jax.Array]:
    """U V^T of every matrix U S V^T, nearly, of arrays of matrices; each placed as it came, in its own dtype.

    Where mesh axes cut matrices, those of one kind are dealt out whole: one all-to-all per axis brings a device the
    missing parts of its share of them, and another takes them back. Neither a product nor a number on the way is
    repeated, but for zeros that make shares equal. With `operands` "auto" both are bfloat16 on accelerators.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    specs = [jax.typeof(x).sharding.spec for x in xs]
    cuts = [[tuple(a for a in axes_of(cut) if sizes.get(a, 1) > 1) for cut in spec] for spec in specs]
    shapes = [x.shape for x in xs]
    call = functools.partial(_on_device, shapes=shapes, cuts=cuts, sides=sides, iterations=iterations)
    call = functools.partial(_in_precision, call, operands)
    if not any(axes for cut in cuts for axes in cut):
        return call(list(xs))
    mine = frozenset(sizes) - frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    return jax.shard_map(call, in_specs=(specs,), out_specs=specs, axis_names=mine)(list(xs))


def rows_by_columns(x: jax.Array, sides: Sides) -> tuple[int, int]:
    """The size of an array's matrices."""
    first, second = x.ndim - sum(sides), x.ndim - sides[1]
    return math.prod(x.shape[first:second]), math.prod(x.shape[second:])


def _in_precision(call, operands: str, xs: list[jax.Array]) -> list[jax.Array]:
    of = {"auto": (jnp.float32, jnp.bfloat16), "float32": (jnp.float32,) * 2, "bfloat16": (jnp.bfloat16,) * 2}
    cpu, default = of[operands]
    return jax.lax.platform_dependent(
        xs,
        cpu=functools.partial(call, each=_abreast, dtype=cpu),
        default=functools.partial(call, each=_together, dtype=default),
    )


def _together(call, x_NRC: jax.Array) -> jax.Array:
    """A function of every matrix, with many of them in one product."""
    return jax.lax.map(call, x_NRC, batch_size=max(1, TOGETHER // math.prod(x_NRC.shape[1:])))


def _abreast(call, x_NRC: jax.Array) -> jax.Array:
    """A function of every matrix, with the products of several side by side: XLA's CPU runtime gives each a core.

    Small matrices take half the time that they take one by one, or in one product: 28 of 128 x 128 and 128 x 352 in
    bfloat16 0.9 ms per iteration in place of 1.6 on two cores. (AMD Zen 5, 2026-11-28, jax 0.10.2)
    """
    count = max(1, min(16, ABREAST // math.prod(x_NRC.shape[1:]), len(x_NRC)))
    return jax.lax.scan(lambda _, x_RC: (None, call(x_RC)), None, x_NRC, unroll=count)[1]


def _on_device(xs, *, shapes, cuts, sides, iterations, each, dtype) -> list[jax.Array]:
    """The parts of all arrays that a device holds, orthogonalised as parts of their matrices."""
    kinds: dict[Kind, list[int]] = {}
    turned = []
    for i, (x, shape, cut, (rows, columns)) in enumerate(zip(xs, shapes, cuts, sides, strict=True)):
        at = x.ndim - columns, x.ndim - columns - rows
        one, other = (
            (math.prod(shape[of]), tuple(axis for axes in cut[of] for axis in axes))
            for of in (slice(at[1], at[0]), slice(at[0], None))
        )
        turned.append(one > other)
        (R, row_axes), (C, column_axes) = sorted((one, other))
        kinds.setdefault(Kind(R, C, row_axes, column_axes), []).append(i)
    out = [None] * len(xs)
    for kind, members in kinds.items():
        flat = [_matrices(xs[i], sides[i], turned[i]).astype(dtype) for i in members]
        found = _share(jnp.concatenate(flat), kind, iterations, each)
        ends = [0]
        for x in flat:
            ends.append(ends[-1] + len(x))
        for i, begin, end in zip(members, ends, ends[1:], strict=False):
            part = found[begin:end]
            part = jnp.swapaxes(part, 1, 2) if turned[i] else part
            out[i] = part.reshape(xs[i].shape).astype(xs[i].dtype)
    return out


def _matrices(x: jax.Array, sides: Sides, turned: bool) -> jax.Array:
    """[N, R, C] of an array, rows no more than columns."""
    x_NRC = x.reshape(-1, *rows_by_columns(x, sides))
    return jnp.swapaxes(x_NRC, 1, 2) if turned else x_NRC


def _share(x_NRC: jax.Array, kind: Kind, iterations: int, each) -> jax.Array:
    """Parts of N matrices, orthogonalised: whole ones of N / n are made, by each of the n devices that share them."""
    count, moves = len(x_NRC), [(axes, dim) for axes, dim in ((kind.row_axes, 1), (kind.column_axes, 2)) if axes]
    ways = math.prod(jax.lax.axis_size(axes) for axes, _ in moves)
    x_NRC = jnp.pad(x_NRC, ((0, -count % ways), (0, 0), (0, 0)))
    if moves:  # else XLA's CPU compiler sends pieces of what was joined, whose layouts differ, and refuses them
        x_NRC = jax.lax.optimization_barrier(x_NRC)
    for axes, dim in moves:
        x_NRC = jax.lax.all_to_all(x_NRC, axes, 0, dim, tiled=True)
    x_NRC = each(functools.partial(newton_schulz, iterations=iterations), x_NRC)
    for axes, dim in reversed(moves):
        x_NRC = jax.lax.all_to_all(x_NRC, axes, dim, 0, tiled=True)
    return x_NRC[:count]


def newton_schulz(x_RC: jax.Array, iterations: int) -> jax.Array:
    """U V^T of U S V^T, nearly, in x's dtype with float32 sums; rows are no more than columns.

    Singular values are first divided by the fourth root of the sum of their fourth powers, which the first Gram matrix
    knows: none is above 1 then, and they are up to the fourth root of their number larger than divided by the root of
    the sum of squares. What is then above 0.64 / 4^iterations, 0.01 of three, comes to 0.7 to 1.3.
    """

    def product(subscripts, p, q):
        return jnp.einsum(subscripts, p, q.astype(p.dtype), preferred_element_type=jnp.float32)

    x = x_RC.astype(jnp.float32)
    x = (x * jax.lax.rsqrt(jnp.sum(x * x) + 1e-30)).astype(x_RC.dtype)  # no product of these overflows
    for i, (a, b, c) in enumerate(polynomials(iterations)):
        gram = product("ik,jk->ij", x, x)
        if not i:
            up = jnp.maximum(jnp.sum(gram * gram), 1e-12) ** -0.25  # a matrix of zeros stays one
            a, b, c = a * up, b * up**3, c * up**5
        gram = gram.astype(x.dtype)
        poly = b * gram + c * product("ij,jk->ik", gram, gram)
        x = (a * x + product("ij,jk->ik", poly.astype(x.dtype), x)).astype(x.dtype)
    return x


@functools.cache
def polynomials(iterations: int) -> list[tuple[float, float, float]]:
    """a, b, c of every iteration: each brings singular values from where they then are as near to 1 as it can.

    MARGIN and CUSHION are for bfloat16, as in the paper. After four iterations matrices whose values span factors of 2,
    10, 100 and 10,000 are 0.19, 0.19, 0.19 and 0.53 of their norm away from U V^T, as after five with Jordan's 3.4445,
    -4.7750, 2.0315 in each: 0.21, 0.19, 0.19 and 0.55.
    """
    low, high, found = 0.64 / 4**iterations, 1.0, []
    for _ in range(iterations):
        (a, b, c), error = nearest_to_one(max(low, CUSHION * high), high)
        low, high = a * low + b * low**3 + c * low**5, 1 + error
        centre = (low + high) / 2
        found.append((a / centre / MARGIN, b / centre / MARGIN**3, c / centre / MARGIN**5))
        low, high = low / centre, high / centre
    return found


def nearest_to_one(low: float, high: float) -> tuple[list[float], float]:
    """([a, b, c], largest error) of the a s + b s^3 + c s^5 that is nearest to 1 on [low, high].

    Its error is as large at both ends and at its two turns between them, with signs in turn; where it turns is found by
    Remez' exchange: solve for these errors, look where that polynomial turns, and again.
    """
    powers, signs = np.array([1, 3, 5]), np.array([1, -1, 1, -1])
    turns = low + (high - low) * np.array([0.25, 0.75])
    for _ in range(30):
        points = np.array([low, *turns, high])
        *abc, error = np.linalg.solve(np.column_stack([points[:, None] ** powers, signs]), np.ones(4)).tolist()
        turns = np.sqrt(np.sort(np.roots((abc * powers)[::-1]).real))
    return abc, error
