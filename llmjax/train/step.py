"""The train step: a pure function of state and batch."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llmjax.models import nn
from llmjax.train import pipeline
from llmjax.train.loss import Batch, Sums

Loss = Callable[[nnx.Module, Batch], tuple[jax.Array, Sums]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that training changes."""

    step: jax.Array
    model: nnx.Module
    opt: optax.OptState


def init(build: Callable[[jax.Array], nnx.Module], tx: optax.GradientTransformation, key: jax.Array) -> State:
    """The state before step 0. Traced under jit, every array is born where the layout wants it."""
    model = build(key)
    return State(jnp.int32(0), model, tx.init(model))


def gradients(model: nnx.Module, batch: Batch, loss: Loss, *, mean: bool = True) -> tuple[jax.Array, Sums, nnx.Module]:
    """(loss, sums, gradients) of a batch whose arrays lead with [A, B]: a sum over A microbatches, one at a time.

    With `mean`, loss and gradients are divided by the weight of the whole batch, so neither masks nor the number of
    microbatches or devices changes them. Without, they are the plain sum over examples, as textbooks write
    w <- w - eta * sum_i(g_i).
    """
    with_gradient = pipeline.value_and_grad(loss) if pipeline.by_hand() else jax.value_and_grad(loss, has_aux=True)
    places = jax.tree.map(lambda weight: jax.typeof(weight).sharding, model)
    if len(jax.tree.leaves(batch)[0]) > 1 and hasattr(model, "blocks"):  # an nn.Decoder
        model = nn.open_sums(model)  # devices exchange gradients once for all microbatches

    def microbatch(total, batch):
        return jax.tree.map(jnp.add, total, with_gradient(model, batch)), None

    ((total, sums), grads), _ = jax.lax.scan(microbatch, _zeros(with_gradient, model, batch), batch)
    grads = jax.tree.map(jax.reshard, grads, places)
    if mean:
        total, grads = jax.tree.map(lambda x: x / jnp.maximum(sums["weight"], 1), (total, grads))
    return total, sums, grads


def _zeros(call: Callable, model: nnx.Module, batch: Batch):
    """Zeros where `call` of one microbatch puts its results."""
    results = jax.eval_shape(call, model, jax.tree.map(lambda x: x[0], batch))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), results)


def train_step(
    state: State, batch: Batch, *, loss: Loss, tx: optax.GradientTransformation, mean: bool = True
) -> tuple[State, dict[str, jax.Array]]:
    """One optimizer step; metrics are `loss`, `grad_norm` (before clipping) and the loss's sums.

    A loss with a method `rebalance` changes by it what no gradient moves, given the sums of the whole step.
    """
    total, sums, grads = gradients(state.model, batch, loss, mean=mean)
    updates, opt = tx.update(grads, state.opt, state.model)
    model = optax.apply_updates(state.model, updates)
    if rebalance := getattr(loss, "rebalance", None):
        model = rebalance(model, sums)
    return State(state.step + 1, model, opt), dict(loss=total, grad_norm=optax.tree.norm(grads), **sums)


def eval_step(model: nnx.Module, batch: Batch, *, loss: Loss) -> tuple[jax.Array, jax.Array]:
    """(sum of the loss, sum of the weights) over a batch whose arrays lead with [A, B]."""

    def microbatch(total, batch):
        return jax.tree.map(jnp.add, total, loss(model, batch)), None

    total, sums = jax.lax.scan(microbatch, _zeros(loss, model, batch), batch)[0]
    return total, sums["weight"]
