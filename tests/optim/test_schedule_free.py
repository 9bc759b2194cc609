"""Gradients are taken at y, z moves by them, and the model is x, the average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax import mesh as meshes
from llmjax.checks import check
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.mesh import Axes
from llmjax.models.llama import Llama
from llmjax.optim.schedule_free import ScheduleFreeAdamW
from llmjax.optim.schedules import Constant, Linear
from llmjax.run import DiLoCo, Run
from llmjax.train import blackbox
from llmjax.train.loss import NextToken
from llmjax.train.program import make
from meshes import chips, cpu8

ONE, TWO = Axes(1, 1, 1, 1, 1, 1), Axes(2, 1, 1, 1, 1, 1)
RUN = Run(
    model=Llama(vocab=64, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=16),
    data=Synthetic(vocab=64),
    optimizer=ScheduleFreeAdamW(lr=0.1, schedule=Constant()),
    loss=NextToken(),
    mesh=cpu8.cluster,
    steps=4,
    batch=4,
    sequence=16,
    accumulate=1,
)


def test_steps_are_those_of_the_paper():
    random = np.random.default_rng(0)
    w, target, scale = (random.normal(size=(3, 2)) for _ in range(3))

    def slope(y):
        return scale * (y - target)

    free = ScheduleFreeAdamW(lr=0.1, schedule=Linear(warmup=2, final=0.5), b1=0.8, b2=0.7, epsilon=1e-3)
    tx, rates = free.build(5), [0.1 * float(free.schedule.build(5)(t)) for t in range(5)]
    params = {"kernel": jnp.float32(w)}
    state, x, z, v = tx.init(params), w, w, 0
    for t, rate in enumerate(rates, 1):
        y = 0.2 * z + 0.8 * x
        np.testing.assert_allclose(free.point(params, (optax.EmptyState(), state))["kernel"], y, rtol=1e-5)
        updates, state = tx.update({"kernel": jnp.float32(slope(y))}, state, params)
        params = optax.apply_updates(params, updates)
        v = 0.7 * v + 0.3 * slope(y) ** 2
        z = z - rate * (slope(y) / (np.sqrt(v / (1 - 0.7**t)) + 1e-3) + 0.1 * y)
        share = rate**2 / sum(r**2 for r in rates[:t])
        x = (1 - share) * x + share * z
        np.testing.assert_allclose(params["kernel"], x, rtol=1e-5)


def test_a_train_step_takes_its_gradient_between_the_average_and_what_moves():
    program = make(RUN, meshes.device_mesh(ONE, jax.devices()[:1]), chips.CPU)
    tokens = np.random.default_rng(0).integers(0, 64, (1, 4, 17))
    batch = dict(tokens=tokens[..., :-1], targets=tokens[..., 1:], weights=np.ones((1, 4, 16), np.float32))
    batch = jax.tree.map(jnp.asarray, batch)
    with program.context():
        state = program.init(jax.random.key(0))
        for _ in range(3):
            model, at = jax.tree.map(jnp.copy, (state.model, RUN.optimizer.point(state.model, state.opt)))
            state, metrics = program.step(state, batch)
        of_x, of_y = (
            total / sums["weight"] for total, sums in (program.evaluate(where, batch) for where in (model, at))
        )
    assert float(metrics["loss"]) == pytest.approx(float(of_y), rel=1e-5)
    assert abs(float(of_x) - float(of_y)) > 1e-3


def test_workers_of_local_sgd_cannot_have_it():
    local = dataclasses.replace(RUN, local=DiLoCo(every=4))
    with pytest.raises(Refused, match=r"local.every is 4, but ScheduleFreeAdamW keeps .*: use another optimizer"):
        check(local, TWO, 1)
    check(dataclasses.replace(local, local=DiLoCo(every=0)), TWO, 1)


def test_a_share_that_leaves_no_average_is_refused():
    with pytest.raises(Refused, match=r"optimizer.b1 is 1.0: give"):
        ScheduleFreeAdamW(b1=1.0).build(10)


def test_the_norms_that_the_black_box_keeps_are_of_the_gradients_that_the_step_took():
    program = make(RUN, meshes.device_mesh(ONE, jax.devices()[:1]), chips.CPU)
    random = np.random.default_rng(0)
    tokens = random.integers(0, 64, (1, 4, 16)).astype(np.int32)
    batch = dict(tokens=tokens, targets=np.roll(tokens, -1, 2), weights=np.ones(tokens.shape, np.float32))
    with program.context():
        state = program.init(jax.random.key(0))
        for _ in range(2):  # x and z are the same before the second step ends
            state, _ = program.step(state, batch)
        facts = blackbox.contents(program, state, 3, batch, np.arange(4), 0.0, 0.0)
        _, metrics = program.step(state, batch)
    whole = np.sqrt(sum(norm**2 for norm in facts["gradient_norms"].values()))
    np.testing.assert_allclose(whole, metrics["grad_norm"], rtol=1e-5)
