"""Adafactor."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmjax.optim.schedules import Cosine, Schedule, rate
from llmjax.optim.weights import matrices, rows_and_columns

TINY = 1e-30  # added to squared gradients: the paper's first epsilon
SMALLEST = 1e-3  # least root mean square that a step is relative to: the paper's second epsilon
LARGEST = 1.0  # root mean square that a step is clipped to: the paper's d


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Steps relative to the size of each weight, with second moments kept as rows and columns (arXiv:1804.04235).

    A matrix of R x C weights has R + C numbers of state, placed as its rows and its columns are, and a step moves it by
    about lr times its own root mean square. Each layer of a stack is a matrix of its own, and heads and their width
    are one side of it; see `llmjax.optim.weights`.

    On plain matrices the numbers are those of optax.adafactor. On arrays with more dims that one factors the two
    largest, if both have 128, and takes root mean squares over all layers, so that attention weights with heads 64 wide
    keep a full second moment: 28.6 M numbers of state for GPT-2 124M, where here there are 0.34 M.
    """

    lr: float = 1e-2
    "Peak learning rate, relative to the root mean square of a weight."
    schedule: Schedule = Cosine()
    "Which share of the peak each step takes."
    exponent: float = 0.8
    "Step t forgets a share t^-exponent of the squared gradients before it."
    weight_decay: float = 0.0
    "Share of a matrix that is taken off per step, times the learning rate."

    def build(self, steps: int) -> optax.GradientTransformation:
        """See `llmjax.optim.schedules.Optimizer.build`."""
        return optax.chain(
            scale_by_rows_and_columns(self.exponent),
            optax.add_decayed_weights(self.weight_decay, matrices),
            optax.scale_by_learning_rate(rate(self, steps)),
        )


class Moments(NamedTuple):
    """Averages of squared gradients. Dims that an average was taken over stay, with size 1."""

    count: jax.Array
    rows: optax.Params
    columns: optax.Params


def scale_by_rows_and_columns(exponent: float) -> optax.GradientTransformation:
    """The step of the paper before the learning rate.

    A vector has one row: the averages of its columns are its whole second moment, so the same lines do for it.
    """

    def init(params):
        def zeros(path, x):
            rows, columns = rows_and_columns(path, x)
            return jnp.zeros_like(_mean(x, columns)), jnp.zeros_like(_mean(x, rows))

        return Moments(jnp.int32(0), *_unzip(params, jax.tree_util.tree_map_with_path(zeros, params)))

    def update(grads, state, params):
        forget = (state.count + 1.0) ** -exponent  # all of it at the first step

        def leaf(path, grad, row, column, param):
            rows, columns = rows_and_columns(path, param)
            square = grad * grad + TINY
            row = (1 - forget) * row + forget * _mean(square, columns)
            column = (1 - forget) * column + forget * _mean(square, rows)
            step = grad * jax.lax.rsqrt(row / _mean(row, rows)) * jax.lax.rsqrt(column)
            step = step / jnp.maximum(1.0, _rms(step, rows + columns) / LARGEST)
            return step * jnp.maximum(_rms(param, rows + columns), SMALLEST), row, column

        leaves = jax.tree_util.tree_map_with_path(leaf, grads, state.rows, state.columns, params)
        steps, rows, columns = _unzip(params, leaves)
        return steps, Moments(optax.safe_increment(state.count), rows, columns)

    return optax.GradientTransformation(init, update)


def _mean(x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    return jnp.mean(x, axis=dims, keepdims=True)


def _rms(x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(_mean(x * x, dims))


def _unzip(like, tree):
    """A tree of tuples, one for each leaf of `like`, as a tuple of trees."""
    return jax.tree.transpose(jax.tree.structure(like), None, tree)
