"""The orthogonal factor of matrices that may be cut over devices, by products alone.

Newton-Schulz: with X scaled so that no singular value is above 1, X <- a X + (b A + c A A) X with A = X X^T keeps the
singular vectors and takes each value s to a s + b s^3 + c s^5 (Keller Jordan, kellerjordan.github.io/posts/muon).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.layout import axes_of

QUINTIC = 3.4445, -4.7750, 2.0315  # a, b, c: steepest at 0, so that few iterations lift small singular values
TOGETHER = 1 << 24  # numbers that an accelerator multiplies at once; small matrices alone would not keep it busy

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
    on_cpu = functools.partial(call, together=1)  # caches hold one matrix, and its products keep all cores busy
    elsewhere = functools.partial(call, together=TOGETHER)
    of = {"auto": (jnp.float32, jnp.bfloat16), "float32": (jnp.float32,) * 2, "bfloat16": (jnp.bfloat16,) * 2}
    cpu, default = of[operands]
    return jax.lax.platform_dependent(
        xs, cpu=functools.partial(on_cpu, dtype=cpu), default=functools.partial(elsewhere, dtype=default)
    )


def _on_device(xs, *, shapes, cuts, sides, iterations, together, dtype) -> list[jax.Array]:
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
        found = _share(jnp.concatenate(flat), kind, iterations, together)
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


def _share(x_NRC: jax.Array, kind: Kind, iterations: int, together: int) -> jax.Array:
    """Parts of N matrices, orthogonalised: whole ones of N / n are made, by each of the n devices that share them."""
    count, moves = len(x_NRC), [(axes, dim) for axes, dim in ((kind.row_axes, 1), (kind.column_axes, 2)) if axes]
    ways = math.prod(jax.lax.axis_size(axes) for axes, _ in moves)
    x_NRC = jnp.pad(x_NRC, ((0, -count % ways), (0, 0), (0, 0)))
    if moves:  # else XLA's CPU compiler sends pieces of what was joined, whose layouts differ, and refuses them
        x_NRC = jax.lax.optimization_barrier(x_NRC)
    for axes, dim in moves:
        x_NRC = jax.lax.all_to_all(x_NRC, axes, 0, dim, tiled=True)
    batch = max(1, together // (kind.rows * kind.columns))
    x_NRC = jax.lax.map(functools.partial(newton_schulz, iterations=iterations), x_NRC, batch_size=batch)
    for axes, dim in reversed(moves):
        x_NRC = jax.lax.all_to_all(x_NRC, axes, dim, 0, tiled=True)
    return x_NRC[:count]


def newton_schulz(x_RC: jax.Array, iterations: int) -> jax.Array:
    """U V^T of U S V^T, nearly, in x's dtype with float32 sums; rows are no more than columns.

    After five iterations all singular values above a five-hundredth of the root of the sum of their squares are in
    0.65 to 1.25.
    """
    a, b, c = QUINTIC

    def product(subscripts, p, q):
        return jnp.einsum(subscripts, p, q.astype(p.dtype), preferred_element_type=jnp.float32)

    x = x_RC.astype(jnp.float32)
    x = (x * jax.lax.rsqrt(jnp.sum(x * x) + 1e-30)).astype(x_RC.dtype)
    for _ in range(iterations):
        gram = product("ik,jk->ij", x, x)
        gram = gram.astype(x.dtype)
        poly = b * gram + c * product("ij,jk->ik", gram, gram)
        x = (a * x + product("ij,jk->ik", poly.astype(x.dtype), x)).astype(x.dtype)
    return x
