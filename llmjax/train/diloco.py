"""Local SGD over the mesh axis `data`: DiLoCo (arXiv:2311.08105) and its streaming form (arXiv:2501.18512).

Each coordinate of `data` is a worker with a model and an optimizer of its own, and takes `steps.train_step` on its own
rows of the global batch inside a shard_map over that axis; the other axes work inside a worker as they always do. Every
H steps, for the whole model at once or for one fragment of it after another,

    change   = model - mean over workers of theirs
    momentum = change + mu * momentum
    model    = model - lr * (change + mu * momentum)       without Nesterov: model - lr * momentum

and every worker goes on from `model`. Only `change` crosses `data`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import P
from jax.sharding import AxisType

from llmjax.models import nn
from llmjax.run import DiLoCo
from llmjax.train import step as steps
from llmjax.train.loss import Batch

WORKERS = "data"  # the axis; W is its size

# Of every parameter of a model, in the tree's order: the layers that belong to the fragment, all of it, or nothing.
Fragment = list[slice | EllipsisType | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outer:
    """What `steps.State` holds as `opt`; its `model` is the one that the workers last agreed on."""

    momentum: nnx.Module
    models: nnx.Module  # every array [W, ...], cut over the workers
    opts: optax.OptState  # the same


def init(build: Callable[[jax.Array], nnx.Module], tx: optax.GradientTransformation, key: jax.Array) -> steps.State:
    """The state before step 0: every worker starts from the same weights."""
    workers = jax.sharding.get_abstract_mesh().shape[WORKERS]

    def one_each(x):
        return jax.lax.broadcast(x, (workers,), out_sharding=P(WORKERS, *jax.typeof(x).sharding.spec))

    with _within_a_worker():
        state = steps.init(build, tx, key)
    models, opts = jax.tree.map(one_each, (state.model, state.opt))
    return steps.State(state.step, state.model, Outer(jax.tree.map(jnp.zeros_like, state.model), models, opts))


def train_step(
    state: steps.State, batch: Batch, *, loss: steps.Loss, tx: optax.GradientTransformation, how: DiLoCo, last: int
) -> tuple[steps.State, dict[str, jax.Array]]:
    """One step of every worker, then the exchange that is due after it; step number `last` ends with one of everything.

    The metrics are those of `steps.train_step`, one of each per worker: [W], as their mean would cost traffic.
    """
    state, metrics = inner_step(state, batch, loss=loss, tx=tx)
    parts = fragments(state.model, how.fragments)
    choice = sum((i + 1) * (state.step % how.every == at) for i, at in enumerate(due(how)))
    if len(parts) > 1:
        parts.append([...] * len(parts[0]))
    choice = jnp.where(state.step == last, len(parts), choice)
    exchanges = [lambda state, part=part: exchange(state, part, how) for part in parts]
    return jax.lax.switch(choice, [lambda state: state, *exchanges], state), metrics


def inner_step(
    state: steps.State, batch: Batch, *, loss: steps.Loss, tx: optax.GradientTransformation
) -> tuple[steps.State, dict[str, jax.Array]]:
    """One step of every worker on its own rows of the batch; nothing crosses `data`."""

    def worker(step, models, opts, batch):
        model, opt = jax.tree.map(lambda x: jnp.squeeze(x, 0), (models, opts))
        with _within_a_worker():
            state, metrics = steps.train_step(steps.State(step, model, opt), batch, loss=loss, tx=tx)
        return state.step, *jax.tree.map(lambda x: x[None], (state.model, state.opt, metrics))

    own = P(WORKERS)
    each = _among_workers(worker, in_specs=(P(), own, own, P(None, WORKERS)), out_specs=(P(), own, own, own))
    step, models, opts, metrics = each(state.step, state.opt.models, state.opt.opts, batch)
    return steps.State(step, state.model, Outer(state.opt.momentum, models, opts)), metrics


def exchange(state: steps.State, part: Fragment, how: DiLoCo) -> steps.State:
    """The outer step of a fragment: the model and all workers' agree on it afterwards, and nothing else changes.

    It is manual over all axes: every device exchanges the parts that it holds with the devices of other workers that
    hold the same ones.
    """
    trees = state.model, state.opt.momentum, state.opt.models
    leaves = [jax.tree.leaves(tree) for tree in trees]
    sent = [i for i, rows in enumerate(part) if rows is not None]

    def on_device(*chosen):
        new = [outer_step(*arrays, part[i], how) for i, *arrays in zip(sent, *chosen, strict=True)]
        return tuple(map(list, zip(*new, strict=True)))

    specs = [jax.typeof(leaves[0][i]).sharding.spec for i in sent]
    places = specs, specs, [P(WORKERS, *spec) for spec in specs]
    call = jax.shard_map(on_device, in_specs=places, out_specs=places, check_vma=False)  # all workers get the same
    for old, new in zip(leaves, call(*([old[i] for i in sent] for old in leaves)), strict=True):
        for i, x in zip(sent, new, strict=True):
            old[i] = x
    model, momentum, models = (
        jax.tree.unflatten(jax.tree.structure(tree), new) for tree, new in zip(trees, leaves, strict=True)
    )
    return steps.State(state.step, model, Outer(momentum, models, state.opt.opts))


def outer_step(model, momentum, models, rows: slice | EllipsisType, how: DiLoCo) -> tuple[jax.Array, ...]:
    """The three after an outer step on these rows of one parameter, on a device, whose `models` is [1, ...]."""
    own = models[0]
    change = average(model[rows] - own[rows], how.delta)
    kept = change + how.momentum * momentum[rows]
    new = model[rows] - how.lr * (change + how.momentum * kept if how.nesterov else kept)
    return _put(model, rows, new), _put(momentum, rows, kept), _put(own, rows, new)[None]


def average(change: jax.Array, wire: str) -> jax.Array:
    """The mean over workers, float32, of what each holds; what crosses `data` has the dtype `wire`.

    In less than float32 it takes two hops, as a sum cannot be taken on the way: each worker gets a W-th of everyone's,
    averages it in float32 and sends that to all. So the bytes are those of a float32 all-reduce, 2 (W - 1) / W per
    number and per byte, times 1/2 or 1/4. An int8 is in units of 1/127 of the largest number of any worker in the whole
    tensor, on whatever devices, and this one scale crosses as a float32.
    """
    if wire == "float32":
        return jax.lax.pmean(change, WORKERS)
    if wire == "int8":
        unit = jax.lax.pmax(jnp.max(jnp.abs(change)), jax.sharding.get_abstract_mesh().axis_names) / 127
        unit = jnp.where(unit == 0, 1.0, unit)

    def packed(x):
        if wire == "int8":
            return jnp.round(x / unit).astype(jnp.int8)
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)  # CPUs would send it as float32

    def unpacked(x):
        if wire == "int8":
            return x.astype(jnp.float32) * unit
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32)

    workers, size = jax.lax.axis_size(WORKERS), change.size
    parts = jnp.pad(jnp.ravel(change), (0, -size % workers)).reshape(workers, -1)
    mine = unpacked(jax.lax.all_to_all(packed(parts), WORKERS, 0, 0))
    mean = jax.lax.all_gather(packed(jnp.mean(mine, 0)), WORKERS, tiled=True)
    return unpacked(mean)[:size].reshape(change.shape)


def due(how: DiLoCo) -> list[int]:
    """After how many steps of every H each fragment is exchanged: evenly spread, the last one after all of them, 0."""
    return [(i + 1) * how.every // how.fragments % how.every for i in range(how.fragments)]


def fragments(model: nnx.Module, count: int) -> list[Fragment]:
    """The layers of a model, its `blocks`, in `count` groups; each other parameter goes where there is least so far."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    if count == 1:
        return [[...] * len(leaves)]
    parts: list[Fragment] = [[None] * len(leaves) for _ in range(count)]
    held = [0] * count
    stacked = [jax.tree_util.keystr(path, simple=True, separator=".").startswith("blocks.") for path, _ in leaves]
    for i in sorted(range(len(leaves)), key=lambda i: (not stacked[i], -leaves[i][1].size)):
        x, smallest = leaves[i][1], held.index(min(held))
        for j in range(count) if stacked[i] else [smallest]:
            rows = slice(len(x) * j // count, len(x) * (j + 1) // count) if stacked[i] else ...
            parts[j][i] = rows
            held[j] += x.size * (rows.stop - rows.start) // len(x) if stacked[i] else x.size
    return parts


def mean(metrics: Mapping[str, jax.Array], name: str) -> float:
    """A metric of a step. Of one number per worker: their mean, by targets, over the workers of this process."""
    if metrics[name].ndim == 0:
        return float(metrics[name])
    values, weights = (np.concatenate([x.data for x in _one_of_each(metrics[m])]) for m in (name, "weight"))
    return float(np.sum(values * weights) / max(np.sum(weights), 1))


def _one_of_each(x: jax.Array):
    """The different pieces of an array that this process holds, in order."""
    shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return [shards[at] for at in sorted(shards)]


def _put(x: jax.Array, rows: slice | EllipsisType, new: jax.Array) -> jax.Array:
    return new if rows is ... else jax.lax.dynamic_update_slice_in_dim(x, new, rows.start, 0)


@contextlib.contextmanager
def _within_a_worker() -> Iterator[None]:
    """What is traced here is the program of one worker, for which `data` does not exist."""
    how = nn.how()
    with nn.compute(dataclasses.replace(how, layout=how.layout.without(WORKERS))):
        yield


def _among_workers(call: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` of `call` over the workers; what the other axes cut stays cut by them, inside and on the way.

    On a mesh whose axes are all explicit, the shard_map of jax 0.10 over some of them gathers its arguments and its
    results over all others. It does not where those are auto, so they are, at the border. Not to be differentiated
    through. The specs name the workers' axis alone, and may be prefixes of the arguments' and the results' trees.
    """

    def over(body: Callable) -> Callable:
        return jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, axis_names={WORKERS}, check_vma=False)

    if jax.__version_info__ >= (0, 11):
        return over(call)

    def inside(x) -> P:
        spec = (part if isinstance(part, tuple) else (part,) for part in jax.typeof(x).sharding.spec)
        return P(*(tuple(a for a in part if a not in (None, WORKERS)) or None for part in spec))

    def mapped(*arguments):
        mesh = jax.sharding.get_abstract_mesh()
        others = tuple(
            a
            for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if a != WORKERS and kind == AxisType.Explicit
        )
        body = jax.sharding.explicit_axes(call, axes=others, in_sharding=jax.tree.map(inside, arguments))
        results = jax.tree.map(lambda x: x.sharding.spec, jax.eval_shape(over(call), *arguments))
        return jax.sharding.auto_axes(over(body), axes=others, out_sharding=results)(*arguments)

    return mapped
