"""A loss taken piece by piece of the positions, so that the logits of all of them are never there at once.

Each piece goes from the stream through the head to the loss and, where it is differentiated, straight back: gradients
are found in the forward pass and kept in place of logits, of which none are computed again (arXiv:2410.10989). The
head's weights are gathered once for all pieces, and devices sum their gradients once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from llmjax.layout import axes_of
from llmjax.models import nn
from llmjax.models.pipeline import ways

Of = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
Weights = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Head:
    """What is computed of a piece: `of(head(x_BTD), batch)`, without the weights."""

    of: Of
    tree: Any
    "Of the model without its layers."
    met: tuple[bool, ...]
    "Which of its weights the head looks at; it is given no others."
    dims: tuple[str, ...]
    "Letters of those it looks at."
    count: int
    "Pieces."
    how: nn.Compute

    def __call__(self, weights: Weights, x_BTD: jax.Array, batch: Any) -> tuple[jax.Array, Any]:
        given = iter(weights)
        model = jax.tree.unflatten(self.tree, [next(given) if met else None for met in self.met])
        return self.of(model.head(x_BTD), batch)


def of_stream(of: Of, model: nn.Decoder, x_BTD: jax.Array, batch: Any) -> tuple[jax.Array, Any]:
    """`of(model.head(x_BTD), batch)`, in pieces of at most `nn.how().chunk` positions of a sequence; 0: in one.

    `of` gives sums over targets: the loss, and others, through which no gradient goes. Every array of the batch is
    [B, T], in the order of the stream. The weights of two dims and more go through `nn.project`, and their names end in
    their letters, or they are gathered for each piece.
    """
    count = pieces(x_BTD)
    if count == 1:
        return of(model.head(x_BTD), batch)
    ends = jax.tree.map(lambda x: x, model)  # a copy
    ends.blocks = None
    leaves, tree = jax.tree_util.tree_flatten_with_path(ends)
    paths, weights = zip(*leaves, strict=True)
    met = _met(lambda weights, x_BTD: jax.tree.unflatten(tree, weights).head(x_BTD), weights, x_BTD)
    dims = tuple(nn.dims_of(path) for path, is_met in zip(paths, met, strict=True) if is_met)
    given = tuple(weight for weight, is_met in zip(weights, met, strict=True) if is_met)
    return _sum(Head(of, tree, met, dims, count, nn.how()), given, x_BTD, batch)


def pieces(x_BTD: jax.Array) -> int:
    """Into how many pieces the positions of this stream go: as few as are not longer than is asked for."""
    return number(x_BTD.shape[1], nn.how().chunk, ways(axes_of(jax.typeof(x_BTD).sharding.spec[1])))


def number(length: int, chunk: int, parts: int) -> int:
    """Pieces of at most `chunk` positions of a sequence that is cut into so many parts over devices; 0: one piece."""
    own = length // parts
    fitting = (n for n in range(1, own + 1) if own % n == 0 and length <= n * chunk)
    return next(fitting, own) if chunk else 1


def _met(call: Callable, weights: Weights, x_BTD: jax.Array) -> tuple[bool, ...]:
    """Which of the weights `call(weights, x_BTD)` looks at."""
    traced = jax.make_jaxpr(call)(weights, x_BTD).jaxpr
    seen = {id(x) for equation in traced.eqns for x in equation.invars}
    return tuple(id(x) in seen for x in traced.invars[: len(weights)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(head: Head, weights: Weights, x_BTD: jax.Array, batch: Any) -> tuple[jax.Array, Any]:
    with nn.compute(head.how):
        used = nn.gathered_once(weights, head.dims)
        return _over_pieces(head.count, lambda x_BTD, batch: (head(used, x_BTD, batch), ()), x_BTD, batch)[0]


def _forward(head, weights, x_BTD, batch):
    def piece(x_BTD, batch):
        total, back, sums = jax.vjp(lambda *args: head(*args, batch), used, x_BTD, has_aux=True)
        into_weights, into_x = back(jnp.ones_like(total))
        return ((total, sums), into_weights), into_x

    with nn.compute(head.how):
        used = nn.gathered_once(weights, head.dims)
        (results, into_weights), into_x = _over_pieces(head.count, piece, x_BTD, batch)
        # Summed before the layers go back, or the gradient of the whole head waits beside what they take.
        return results, jax.lax.optimization_barrier((nn.summed_once(into_weights, weights), into_x))


def _backward(head, saved, cotangents):
    def scaled(x):  # what is a sum over devices left open is multiplied on each
        by = cotangents[0].astype(x.dtype)
        open_over = jax.typeof(x).sharding.spec.unreduced
        return x * (jax.reshard(by, P(reduced=open_over)) if open_over else by)

    return *jax.tree.map(scaled, saved), None


_sum.defvjp(_forward, _backward)


def _over_pieces(count: int, call: Callable, x_BTD: jax.Array, batch: Any) -> tuple[Any, Any]:
    """(sums of the first, all of the second) of what `call` gives for each piece of the stream and the batch.

    Every device takes a part of the positions that it has anyway, so a piece is as many in a row on each.
    """
    n = ways(axes_of(jax.typeof(x_BTD).sharding.spec[1]))
    cut = functools.partial(jax.tree.map, functools.partial(_cut, n=n, count=count))
    x_BnNtD, batch_BnNt = cut(x_BTD), cut(batch)

    def of(tree, i, like):
        return jax.tree.map(lambda x, whole: _joined(jax.lax.dynamic_index_in_dim(x, i, 2, False), whole), tree, like)

    def turn(carry, i):
        total, into_x = carry
        more, written = call(of(x_BnNtD, i, x_BTD), of(batch_BnNt, i, batch))
        parts = jax.tree.map(lambda x: _cut(x, n, 1), written)
        into_x = jax.tree.map(lambda whole, part: _put(whole, part, i), into_x, parts)
        return (jax.tree.map(jnp.add, total, more), into_x), None

    shapes = jax.eval_shape(lambda *args: call(*args), of(x_BnNtD, 0, x_BTD), of(batch_BnNt, 0, batch))
    zeros = nn.as_varying(jax.tree.map(nn.zeros, shapes[0]), x_BTD)
    into_x = jax.tree.map(lambda _: jnp.zeros_like(x_BnNtD), shapes[1])
    (total, into_x), _ = jax.lax.scan(turn, (zeros, into_x), jnp.arange(count))
    return total, jax.tree.map(lambda x: jnp.reshape(x, x_BTD.shape, out_sharding=jax.typeof(x_BTD).sharding), into_x)


def _cut(x_BT: jax.Array, n: int, count: int) -> jax.Array:
    """[B, T, ...] as [B, n, count, T/n/count, ...], where devices hold n parts of T or fewer."""
    batch, positions, *rest = jax.typeof(x_BT).sharding.spec
    shape = (len(x_BT), n, count, -1, *x_BT.shape[2:])
    return jnp.reshape(x_BT, shape, out_sharding=P(batch, positions, None, None, *rest))


def _joined(x_Bnt: jax.Array, whole: jax.Array) -> jax.Array:
    """[B, n, t, ...] as [B, n t, ...], placed as the whole is."""
    B, n, t, *rest = x_Bnt.shape
    return jnp.reshape(x_Bnt, (B, n * t, *rest), out_sharding=jax.typeof(whole).sharding)


def _put(whole: jax.Array, part: jax.Array, i) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, i, 2)
