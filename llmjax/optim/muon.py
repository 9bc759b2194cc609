"""Muon."""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmjax.errors import Refused
from llmjax.optim.adamw import AdamW
from llmjax.optim.moments import Moments, kept
from llmjax.optim.orthogonal import Sides, orthogonal, rows_by_columns
from llmjax.optim.schedules import Cosine, Schedule, rate
from llmjax.optim.weights import Path, hidden, rows_and_columns

TINY = 1e-12  # so that what never moved is divided by more than zero; mean squares of steps are about 0.04


@dataclasses.dataclass(frozen=True)
class Muon:
    """Momentum, orthogonalised, for the matrices between hidden layers; AdamW for everything else (arXiv:2502.16982).

    A step of a matrix is lr * (scale * O + weight_decay * w). O is U V^T of the momentum's singular value decomposition
    U S V^T, nearly: Newton-Schulz iterations, which are products alone, bring all but the smallest singular values to
    0.7 to 1.3; see `llmjax.optim.orthogonal`. With `scale` "rms" it is multiplied by 0.2 * sqrt(max(rows, columns)), so
    that weights move as far as under AdamW and take its rate and weight decay; with "spectral" by
    sqrt(max(1, columns / rows)).

    Each layer and each expert of a stack is a matrix of its own, and heads and their width are one side of it.
    Embeddings, the head, scales and biases are AdamW's; see `llmjax.optim.weights`. One number of state per parameter
    of a matrix and two of any other, placed as the parameter.

    With `b2_neurons` every neuron, which is a column of a matrix, moves about as far (NorMuon, arXiv:2510.05491): a
    column of O is divided by the root of the decayed average of its mean squares, and then all of O by the number that
    gives it its norm back. One number of state more per column, placed as the columns; each device adds up its rows.

    Where a layout cuts matrices over devices, each device orthogonalises whole matrices, its share of those of equal
    shape: it sends its parts of the others and gets the missing ones of its own, in one all-to-all per mesh axis,
    and one back. So it sends about its own share of the parameters twice a step, in the precision of `operands`, and
    no product is computed twice; a stack that the devices do not divide is filled up with zeros. What is held by
    several devices whole, as over axis data, all of these compute, as they do AdamW's step.
    """

    lr: float = 1e-3
    "Peak learning rate of matrices."
    schedule: Schedule = Cosine()
    "Which share of the peak each step takes."
    momentum: float = 0.95
    "Decay of the sum of gradients."
    nesterov: bool = True
    "Look one step of momentum ahead."
    weight_decay: float = 0.1
    "Share of a matrix that is taken off per step, times the learning rate."
    scale: Literal["rms", "spectral"] = "rms"
    "How far an orthogonal step goes: as far as AdamW's, or as far for every shape in the norm from inputs to outputs."
    iterations: int = 4
    "Newton-Schulz iterations: with each more, singular values a quarter as large still count as much as the largest."
    operands: Literal["auto", "float32", "bfloat16"] = "auto"
    "Precision of their products. auto: float32 on CPUs, bfloat16 on accelerators."
    b2_neurons: float = 0.0
    "Decay of the average of squares of each neuron's step, by whose root that is divided, such as 0.95. 0: it is not."
    others_lr: float = 1e-3
    "Peak learning rate of AdamW, for what is not Muon's; b1, b2 and epsilon are AdamW's too, and weight_decay as well."
    b1: float = 0.9
    "Decay of its average of gradients."
    b2: float = 0.95
    "Decay of its average of squared gradients."
    epsilon: float = 1e-8
    "Added to the root of that average."
    moments: Moments = "float32"
    "Precision of momentum and averages between steps; see `llmjax.optim.moments`. bfloat16: half their memory."

    def build(self, steps: int) -> optax.GradientTransformation:
        """See `llmjax.optim.schedules.Optimizer.build`."""
        if self.iterations < 1:
            raise Refused(f"optimizer.iterations is {self.iterations}: give at least 1, such as 4.")
        if not 0 <= self.momentum < 1:
            raise Refused(f"optimizer.momentum is {self.momentum}: give a share from 0 to below 1.")
        if not 0 <= self.others_lr < math.inf:
            raise Refused(f"optimizer.others_lr is {self.others_lr}: give a positive number.")
        if not 0 <= self.b2_neurons < 1:
            raise Refused(f"optimizer.b2_neurons is {self.b2_neurons}: give a share from 0 to below 1, such as 0.95.")
        others = AdamW(self.others_lr, self.schedule, self.b1, self.b2, self.epsilon, self.weight_decay)
        rms = self.scale == "rms"
        matrices = optax.chain(
            scale_by_orthogonal_momentum(self.momentum, self.nesterov, self.iterations, self.operands, rms=rms),
            *([scale_by_neurons(self.b2_neurons)] if self.b2_neurons else []),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(rate(self, steps)),
        )
        tx = optax.partition({"matrices": matrices, "others": others.build(steps)}, _owners)
        return kept(tx, self.moments)


class Momentum(NamedTuple):
    """The decayed sum of gradients of every matrix."""

    momentum: optax.Params


def scale_by_orthogonal_momentum(
    momentum: float, nesterov: bool, iterations: int, operands: str, *, rms: bool
) -> optax.GradientTransformation:
    """The step of a tree of matrices before weight decay and learning rate; see `Muon`."""

    def init(params):
        return Momentum(jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        total = jax.tree.map(lambda g, m: g + momentum * m, grads, state.momentum)
        ahead = jax.tree.map(lambda g, m: g + momentum * m, grads, total) if nesterov else total
        leaves, tree = jax.tree_util.tree_flatten_with_path(ahead)
        sides = [tuple(map(len, rows_and_columns(path, x))) for path, x in leaves]
        steps = orthogonal([x for _, x in leaves], sides, iterations, operands)
        scaled = [_scale(x, side, rms) * step for (_, x), side, step in zip(leaves, sides, steps, strict=True)]
        return jax.tree.unflatten(tree, scaled), Momentum(total)

    return optax.GradientTransformation(init, update)


class Neurons(NamedTuple):
    """The decayed average of mean squares of every neuron's step. Dims of rows stay, with size 1."""

    squares: optax.Params


def scale_by_neurons(decay: float) -> optax.GradientTransformation:
    """Each column of a step over the root of the average of its mean squares; a matrix's step is as long as before.

    Averages begin at zero and are not made up for it: that would be one factor for a whole matrix, which its norm
    takes out.
    """

    def init(params):
        return Neurons(jax.tree.map(jnp.zeros_like, jax.tree_util.tree_map_with_path(_mean_squares, params)))

    def update(steps, state, params=None):
        now = jax.tree_util.tree_map_with_path(_mean_squares, steps)
        squares = jax.tree.map(lambda v, s: decay * v + (1 - decay) * s, state.squares, now)
        return jax.tree_util.tree_map_with_path(_evened, steps, now, squares), Neurons(squares)

    return optax.GradientTransformation(init, update)


def _mean_squares(path: Path, x: jax.Array) -> jax.Array:
    """Of every column."""
    return jnp.mean(x * x, rows_and_columns(path, x)[0], keepdims=True)


def _evened(path: Path, step: jax.Array, now: jax.Array, squares: jax.Array) -> jax.Array:
    """Columns of mean squares `now` over the roots of `squares`, and the matrix back to its norm."""
    share = 1 / (squares + TINY)
    before, after = (jnp.mean(x, rows_and_columns(path, x)[1], keepdims=True) for x in (now, now * share))
    return step * jnp.sqrt(share * before / (after + TINY))


def _scale(x: jax.Array, sides: Sides, rms: bool) -> float:
    rows, columns = rows_by_columns(x, sides)
    return 0.2 * math.sqrt(max(rows, columns)) if rms else math.sqrt(max(1, columns / rows))


def _owners(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda inner: "matrices" if inner else "others", hidden(params))
