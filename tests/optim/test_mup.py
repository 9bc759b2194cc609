"""Under muP a step changes activations by as much at any width, and at the base width it is AdamW."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest

from experiments import coordinates
from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checks import check
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.evaluate import parity
from llmjax.mesh import Axes
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.models.mixtral import Mixtral
from llmjax.optim.adamw import AdamW
from llmjax.optim.mup import MuP
from llmjax.optim.schedules import Constant
from llmjax.plan import memory
from llmjax.run import DiLoCo, Run, from_json, to_json
from llmjax.train.loss import NextToken
from llmjax.train.program import Program, make, resolve
from meshes import chips, cpu8

BASE, WIDTH = 8, 32
SHAPES = dict(vocab=48, layers=2, width=WIDTH, heads=4, kv_heads=2, head_dim=8, ff=64, positions=16)
GPT = GPT2(**{field: size for field, size in SHAPES.items() if field != "kv_heads"})
DENSE, SPARSE = Llama(**SHAPES), Mixtral(**SHAPES, experts=8, top_k=2, shared=1, router="sigmoid")
RUN = Run(
    model=DENSE,
    data=Synthetic(vocab=48),
    optimizer=MuP(base=BASE, lr=1e-2, schedule=Constant()),
    loss=NextToken(),
    mesh=cpu8.cluster,
    steps=4,
    batch=8,
    sequence=16,
    accumulate=1,
)


def program(layout: str = "dp", devices: int = 1, **changes) -> Program:
    run = dataclasses.replace(RUN, layout=layouts.preset(layout), **changes)
    mesh = meshes.device_mesh(resolve(run, devices), jax.devices()[:devices])
    return make(run, mesh, chips.CPU)


def named(tree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").split(".")[-2]: x for path, x in leaves}


@functools.cache
def fresh(model):
    """Weights of this shape, to compute with."""
    with program(model=model, optimizer=AdamW()).context():
        abstract = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), abstract)


def step(optimizer, grads, params):
    tx = optimizer.build(1)
    return jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)[0]


@functools.cache
def powers(optimizer: str) -> dict[str, float]:
    """The power of the width that the change of each kind of activation goes with, in the first steps."""
    widths = (64, 256)
    run = dataclasses.replace(coordinates.run, optimizer=coordinates.OPTIMIZERS[optimizer])
    return {
        kind: coordinates.slope(widths, change) for kind, change in coordinates.measure(run, widths, seeds=1).items()
    }


def test_activations_change_by_as_much_at_any_width():
    found = powers("MuP")
    assert all(abs(found[kind]) < 0.1 for kind in ("attention", "feed-forward", "stream")), found
    assert -0.3 < found["logits"] < 0.1, found  # a fresh head's own, as 1/sqrt(D), are taken back


def test_under_adamw_they_change_by_more_the_wider_the_model():
    found = powers("AdamW")
    assert all(found[kind] > 0.6 for kind in ("attention", "feed-forward", "stream")) and found["logits"] > 0.3, found


@pytest.mark.parametrize("model", (DENSE, SPARSE, GPT))
def test_the_rate_falls_with_the_width_for_matrices_whose_inputs_grow_and_decay_for_none(model):
    params, numbers = fresh(model), dict(lr=1e-2, schedule=Constant())
    gradients, zeros = jax.tree.map(np.sin, params), jax.tree.map(np.zeros_like, params)
    for grads, decay in ((gradients, 0.0), (zeros, 0.5)):
        ours, theirs = (
            named(step(optimizer, grads, params))
            for optimizer in (MuP(BASE, weight_decay=decay, **numbers), AdamW(weight_decay=decay, **numbers))
        )
        for name, x in ours.items():
            slower = not decay and not any(word in name for word in ("embed", "position", "scale", "bias"))
            np.testing.assert_allclose(x, theirs[name] * (BASE / WIDTH if slower else 1), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("model", (DENSE, SPARSE))
def test_the_head_and_routers_start_smaller_and_nothing_else_does(model):
    params = fresh(model)
    started = named(MuP(BASE).start(params))
    for name, x in named(params).items():
        share = math.sqrt(BASE / WIDTH) if name in ("head_DV", "router_DE") else 1
        np.testing.assert_allclose(started[name], x * share, rtol=1e-6, err_msg=name)


def trained(program: Program) -> tuple[list[float], list[np.ndarray]]:
    """(losses of four steps, the weights before them and after)"""
    with program.context():
        state, losses = program.init(jax.random.key(0)), []
        weights = [np.asarray(x) for x in jax.tree.leaves(state.model)]
        for i in range(4):
            state, metrics = program.step(state, parity.batch(program, i))
            losses.append(float(np.mean(metrics["loss"])))
    return losses, weights + [np.asarray(x) for x in jax.tree.leaves(state.model)]


def test_at_the_base_width_it_is_adamw_in_every_bit():
    fields = dict(lr=1e-2, schedule=Constant())
    ours, theirs = (trained(program(optimizer=o)) for o in (MuP(base=WIDTH, **fields), AdamW(**fields)))
    assert ours[0] == theirs[0]
    for x, y in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_array_equal(x, y)


@functools.cache
def alone(model) -> tuple[list[float], list[np.ndarray]]:
    return trained(program(model=model))


@pytest.mark.parametrize(("layout", "model"), [("fsdp_tp", DENSE), ("fsdp_ep", SPARSE), ("fsdp_pp", DENSE)])
def test_eight_devices_begin_with_the_weights_of_one_and_take_its_steps(layout, model, capfd):
    losses, weights = trained(program(layout, 8, model=model))
    np.testing.assert_allclose(losses, alone(model)[0], rtol=1e-5)
    for x, expected in zip(weights[: len(weights) // 2], alone(model)[1], strict=False):
        np.testing.assert_allclose(x, expected, rtol=1e-6)
    assert "rematerialization" not in capfd.readouterr().err


def test_workers_of_local_sgd_begin_with_them_too():
    local = program("dp", 8, local=DiLoCo(every=2))
    with local.context():
        state = local.init(jax.random.key(0))
    for x, expected in zip(jax.tree.leaves(state.model), alone(DENSE)[1], strict=False):
        np.testing.assert_allclose(x, expected, rtol=1e-6)


def test_parity_begins_with_them_too():
    still = dataclasses.replace(RUN, optimizer=MuP(base=BASE, lr=0.0))
    found = parity.trace(still, program().mesh, chips.CPU, steps=1).parameters
    for x, expected in zip(found.values(), alone(DENSE)[1], strict=False):
        np.testing.assert_allclose(x, expected, rtol=1e-6)


@pytest.mark.parametrize("layout", ("fsdp_tp", "fsdp_pp"))
def test_the_state_is_typed_and_placed_as_adamws_and_a_plan_counts_as_much(layout):
    ours, theirs = (program(layout, 8, optimizer=o) for o in (RUN.optimizer, AdamW()))
    states = ours.abstract_state(), ours.abstract_step()[0], theirs.abstract_state()
    before, after, expected = (
        [(x.shape, x.dtype, x.sharding.spec if x.ndim else None) for x in jax.tree.leaves(state)] for state in states
    )
    assert before == after == expected
    counted = [memory.state(p.run, Axes(**dict(p.mesh.shape))) for p in (ours, theirs)]
    assert counted[0] == counted[1]


def test_the_config_comes_back_from_json():
    run = from_json(json.loads(json.dumps(to_json(RUN))))
    assert run == RUN and run.optimizer.base == BASE


@pytest.mark.parametrize("model", (dataclasses.replace(DENSE, tied=True), dataclasses.replace(SPARSE, tied=True)))
def test_a_tied_head_is_refused_before_anything_is_made(model):
    with pytest.raises(Refused, match=r"model.tied is True, but MuP .*: set it to False \(--model.no-tied\)"):
        check(dataclasses.replace(RUN, model=model), Axes(1, 1, 1, 1, 1, 1), 1)
    check(dataclasses.replace(RUN, model=model, optimizer=AdamW()), Axes(1, 1, 1, 1, 1, 1), 1)


def test_a_family_that_always_ties_is_refused_by_its_name():
    with pytest.raises(Refused, match=r"optimizer is MuP, .* and GPT2 always ties the two: use a family"):
        check(dataclasses.replace(RUN, model=GPT), Axes(1, 1, 1, 1, 1, 1), 1)


@pytest.mark.parametrize("weights", ({"embed_VD": np.ones((4, 2))}, {"kernel": np.ones((4, 2))}))
def test_weights_without_a_head_are_refused(weights):
    with pytest.raises(Refused, match=r"has no output head of its own .*: set model.tied to False"):
        MuP(BASE).start(weights)


def test_weights_that_do_not_say_the_width_are_refused():
    with pytest.raises(Refused, match="no weight of the model has a dim called D"):
        step(MuP(BASE), {"kernel": np.ones((4, 2))}, {"kernel": np.ones((4, 2))})


@pytest.mark.parametrize(("field", "value"), [("base", 0), ("base", -64), ("lr", -1.0)])
def test_numbers_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(Refused, match=f"optimizer.{field} is {value}: give"):
        MuP(**{"base": BASE, field: value}).build(10)
