"""The train step: a pure function of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llmjax.models import nn
from llmjax.optim.parameters import moved
from llmjax.train import pipeline
from llmjax.train.loss import Batch, Sums

Loss = Callable[..., tuple[jax.Array, Sums]]  # of (model, batch) or, where it has a `reference`, of that as well
Point = Callable[[nnx.Module, optax.OptState], nnx.Module]
Part = Callable[[nnx.Module, jax.Array], tuple[Any, Any]]
Whole = Callable[[Any, Any], nnx.Module]

RECENT = 128  # good steps that a spike is measured against
ENOUGH = 64  # with fewer of them nothing is a spike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watch:
    """What tells a bad step, kept with the state so that a resumed run judges as an unbroken one."""

    good: jax.Array  # bool: the last step was; after a bad one, steps change nothing until `passed_over`
    seen: jax.Array  # int32: good steps so far
    recent: jax.Array  # float32 [2, RECENT]: loss and gradient norm of the last good steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that training changes, and what it needs besides."""

    step: jax.Array
    model: Any  # an nnx.Module or, with adapters, these alone (see `train.adapters`)
    opt: optax.OptState
    watch: Watch | None = None  # without it a bad step changes nothing and the next one goes on
    frozen: nnx.Module | None = None  # what adapters stand beside, or a loss's reference; never changed nor saved


def init(
    build: Callable[[jax.Array], nnx.Module],
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    part: Part = lambda model, key: (model, None),
) -> State:
    """The state before step 0. Traced under jit, every array is born where the layout wants it.

    `part` makes (what is trained, what is frozen) of the model.
    """
    model, frozen = part(build(key), key)
    return State(jnp.int32(0), model, tx.init(model), watch(), frozen)


def watch() -> Watch:
    """Before anything was seen."""
    return Watch(jnp.bool(True), jnp.int32(0), jnp.zeros((2, RECENT)))


def gradients(model: nnx.Module, batch: Batch, loss: Loss, *, mean: bool = True) -> tuple[jax.Array, Sums, nnx.Module]:
    """(loss, sums, gradients) of a batch whose arrays lead with [A, B]: a sum over A microbatches, one at a time.

    Gradients of bfloat16 parameters are rounded to bfloat16 once per microbatch, and added up in float32.
    With `mean`, loss and gradients are divided by the weight of the whole batch, so neither masks nor the number of
    microbatches or devices changes them. Without, they are the plain sum over examples, as textbooks write
    w <- w - eta * sum_i(g_i).
    """
    with_gradient = pipeline.value_and_grad(loss) if pipeline.by_hand() else jax.value_and_grad(loss, has_aux=True)
    places = jax.tree.map(lambda weight: jax.typeof(weight).sharding, model)
    if len(jax.tree.leaves(batch)[0]) > 1 and (hasattr(model, "blocks") or isinstance(model, dict)):  # an nn.Decoder
        model = nn.open_sums(model)  # devices exchange gradients once for all microbatches

    def microbatch(total, batch):
        return jax.tree.map(jnp.add, total, with_gradient(model, batch)), None

    zeros = _zeros(with_gradient, model, batch)
    ((total, sums), grads), _ = jax.lax.scan(microbatch, zeros, batch, unroll=nn.how().microbatches)
    grads = jax.tree.map(jax.reshard, grads, places)
    if mean:
        total, grads = jax.tree.map(lambda x: x / jnp.maximum(sums["weight"], 1), (total, grads))
    return total, sums, grads


def _zeros(call: Callable, model: nnx.Module, batch: Batch):
    """Zeros where `call` of one microbatch puts its results, in float32 for those in bfloat16."""

    def of(x):
        return nn.zeros(x.update(dtype=jnp.float32) if x.dtype == jnp.bfloat16 else x)

    return jax.tree.map(of, jax.eval_shape(call, model, jax.tree.map(lambda x: x[0], batch)))


def train_step(
    state: State,
    batch: Batch,
    *,
    loss: Loss,
    tx: optax.GradientTransformation,
    mean: bool = True,
    sigmas: float = 0.0,
    point: Point | None = None,
    whole: Whole | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """One optimizer step; metrics are `loss`, `grad_norm` (before clipping), the loss's sums, and `good`.

    A step is bad, and changes nothing, where loss or gradient norm is not finite or, with `sigmas`, a spike. With a
    watch, the steps after it change nothing either until `passed_over`, so whoever reads the metrics later still has
    the state that the bad step began with. A loss with a method `rebalance` changes by it what no gradient moves, given
    the sums of the whole step. Loss and gradient are those at `point`, where `optim.schedules.Optimizer` has one.
    `whole` makes a model of adapters and what is frozen.
    """
    at = point(state.model, state.opt) if point else state.model
    total, sums, grads = gradients(at, batch, bound(loss, whole, state.frozen), mean=mean)
    norm = optax.tree.norm(grads)
    seen, good = _judged(state.watch, jnp.stack([total, norm]), sigmas)

    def taken(model, opt):
        updates, opt = tx.update(grads, opt, model)
        model = moved(model, updates, state.step)
        rebalance = getattr(loss, "rebalance", None)
        return (rebalance(model, sums) if rebalance else model), opt

    # Not jnp.where of every array: on CPUs that takes 4 % of a step's time, and memory.
    model, opt = jax.lax.cond(good, taken, lambda model, opt: (model, opt), state.model, state.opt)
    step = state.step + (1 if seen is None else good)
    return State(step, model, opt, seen, state.frozen), dict(loss=total, grad_norm=norm, good=good, **sums)


def bound(loss: Loss, whole: Whole | None, frozen: nnx.Module | None) -> Loss:
    """The loss as a function of what is trained and the batch alone."""
    if frozen is None:
        return loss
    besides = (frozen,) if hasattr(loss, "reference") else ()
    return lambda trained, batch: loss(whole(trained, frozen) if whole else trained, batch, *besides)


def _judged(watch: Watch | None, found: jax.Array, sigmas: float) -> tuple[Watch | None, jax.Array]:
    """The watch after a step with this loss and gradient norm, and whether its update counts."""
    good = jnp.all(jnp.isfinite(found))
    if watch is None:
        return None, good
    if sigmas:
        good &= jnp.all(found <= highest(watch, sigmas))
    good &= watch.good
    here = jnp.broadcast_to(jnp.arange(RECENT) == watch.seen % RECENT, watch.recent.shape) & good
    recent = jnp.where(here, jnp.broadcast_to(found[:, None], watch.recent.shape), watch.recent)
    return Watch(good, watch.seen + good, recent), good


def highest(watch: Watch, sigmas: float) -> jax.Array:
    """The largest loss and gradient norm [2] that are no spike: so many deviations above the mean of the last steps."""
    count = jnp.minimum(watch.seen, RECENT)
    counted = jnp.broadcast_to(jnp.arange(RECENT) < count, watch.recent.shape)
    mean = jnp.sum(watch.recent, 1, where=counted) / jnp.maximum(count, 1)
    off = watch.recent - jnp.broadcast_to(mean[:, None], watch.recent.shape)
    deviation = jnp.sqrt(jnp.sum(off**2, 1, where=counted) / jnp.maximum(count, 1))
    return jnp.where(count >= ENOUGH, mean + sigmas * deviation, jnp.inf)


def passed_over(state: State) -> State:
    """The state after a step whose batch is left out: one step on, and nothing else is changed."""
    return dataclasses.replace(ready(state), step=state.step + 1)


def ready(state: State) -> State:
    """The state before a bad step, for the next one to be taken."""
    watch = None if state.watch is None else dataclasses.replace(state.watch, good=jnp.bool(True))
    return dataclasses.replace(state, watch=watch)


def eval_step(
    model: nnx.Module, batch: Batch, reference: nnx.Module | None = None, *, loss: Loss
) -> tuple[jax.Array, Sums]:
    """(sum of the loss, its sums that are one number each) over a batch whose arrays lead with [A, B]."""
    besides = () if reference is None else (reference,)

    def call(model, batch):
        return loss(model, batch, *besides)

    def microbatch(total, batch):
        return jax.tree.map(jnp.add, total, call(model, batch)), None

    total, sums = jax.lax.scan(microbatch, _zeros(call, model, batch), batch)[0]
    return total, {name: x for name, x in sums.items() if not x.ndim}
