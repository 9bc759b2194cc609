"""Mixtures of experts train to the same numbers on any mesh, and their routers become even."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import like, named
from llmjax.data.dataset import Synthetic
from llmjax.mesh import Chip
from llmjax.models import nn
from llmjax.models.llama import Llama
from llmjax.models.mixtral import Mixtral
from llmjax.optim.adamw import AdamW
from llmjax.run import Run
from llmjax.train import step as steps
from llmjax.train.display import Display
from llmjax.train.loop import Ledger, Pending, Reporter
from llmjax.train.loss import NextToken
from llmjax.train.program import make
from llmjax.train.records import Records, read
from llmjax.train.routed import RoutedNextToken
from meshes import cpu8

TINY = Mixtral(
    vocab=96, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=32, positions=16, experts=4, capacity=1.0
)
MODELS = {
    "dropless softmax": dataclasses.replace(TINY, capacity=0.0),
    "capacity softmax": TINY,
    "dropless sigmoid": dataclasses.replace(TINY, capacity=0.0, router="sigmoid", shared=1),
    "capacity sigmoid": dataclasses.replace(TINY, router="sigmoid", shared=1),
}
LOSS = RoutedNextToken(z=1e-3, balance=0.05, router_z=0.01, bias_rate=0.02)
BATCH, SEQUENCE, STEPS = 8, 16, 5


def rows(step: int) -> dict[str, np.ndarray]:
    """[A=1, B, T] of a stream in which most tokens follow from the one before; some targets are left out."""
    random = np.random.default_rng(step)
    tokens = [random.integers(0, 96, (BATCH, 1))]
    for _ in range(SEQUENCE):
        other = random.integers(0, 96, (BATCH, 1))
        tokens.append(np.where(random.random((BATCH, 1)) < 0.1, other, (5 * tokens[-1] + 3) % 96))
    tokens = np.concatenate(tokens, 1)[None].astype(np.int32)
    weights = (random.random((1, BATCH, SEQUENCE)) < 0.8).astype(np.float32)
    return dict(tokens=tokens[..., :-1], targets=tokens[..., 1:], weights=weights)


def keeping_gradients(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with the last gradients in its state."""

    def update(grads, state, model):
        updates, own = tx.update(grads, state[1], model)
        return updates, (grads, own)

    return optax.GradientTransformation(lambda model: (jax.tree.map(jnp.zeros_like, model), tx.init(model)), update)


TX = keeping_gradients(optax.adamw(3e-3))


def on(layout: str, devices: int):
    """(layout, mesh, context)"""
    layout = layouts.preset(layout)
    axes = meshes.fill(meshes.Axes(), devices, used=layout.axes(), rest=layout.rest(), tensor=2)
    mesh, stack = meshes.device_mesh(axes, jax.devices()[:devices]), contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(nn.compute(nn.Compute(layout=layout)))
    return layout, mesh, stack


@functools.cache
def start(model: str):
    """The state before the first step as NumPy."""
    *_, context = on("dp", 1)
    with context:
        build = functools.partial(steps.init, MODELS[model].init, TX)
        return jax.tree.map(np.asarray, jax.jit(build)(jax.random.key(0)))


@functools.cache
def curve(model: str, layout: str, devices: int, accumulate: int = 1):
    """(metrics of every step, gradients at step 0, biases at the end) as NumPy."""
    layout, mesh, context = on(layout, devices)
    step = jax.jit(functools.partial(steps.train_step, loss=LOSS, tx=TX), donate_argnums=0)
    build = functools.partial(steps.init, MODELS[model].init, TX)
    with context:
        places = jax.tree.map(lambda x: x.sharding, like(jax.eval_shape(build, jax.random.key(0)), mesh))
        state, seen = jax.device_put(start(model), places), []
        for i in range(STEPS):
            cut = {name: x.reshape(accumulate, -1, SEQUENCE) for name, x in rows(i).items()}
            batch = jax.device_put(cut, NamedSharding(mesh, jax.P(None, layout.inner["B"])))
            state, metrics = step(state, batch)
            seen.append(jax.device_get(metrics))
            if i == 0:
                grads = {name: np.asarray(x) for name, x in named(state.opt[0]).items()}
        biases = {name: np.asarray(x) for name, x in named(state.model).items() if "router_bias" in name}
    return seen, grads, biases


@pytest.mark.parametrize(
    ("model", "layout", "devices", "accumulate"),
    [
        ("dropless softmax", "ep", 8, 1),
        ("dropless softmax", "fsdp_ep_tp", 8, 1),
        ("dropless softmax", "dp", 1, 4),
        ("capacity softmax", "fsdp_tp", 8, 1),
        ("capacity softmax", "ep_ring", 8, 1),
        ("dropless sigmoid", "ep_ring", 8, 1),
        ("capacity sigmoid", "fsdp_ep", 8, 1),
        ("capacity sigmoid", "ep_tp", 8, 1),
        ("capacity sigmoid", "dp", 1, 4),
    ],
)
def test_every_layout_and_cut_gives_the_numbers_of_one_device(model, layout, devices, accumulate, capfd):
    seen, grads, biases = curve(model, layout, devices, accumulate)
    expected, expected_grads, expected_biases = curve(model, "dp", 1)
    for i, (ours, theirs) in enumerate(zip(seen, expected, strict=True)):
        for name in ("loss", "balance", "router_z"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=f"{name} of step {i}")
        for name in ("load_LE", "dropped", "weight"):
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{name} of step {i}")
    for name, grad in expected_grads.items():
        np.testing.assert_allclose(
            grads[name], grad, rtol=0, atol=1e-4 * np.abs(grad).max(), err_msg=f"gradient of {name}"
        )
    for name, bias in expected_biases.items():
        np.testing.assert_array_equal(biases[name], bias, err_msg=name)
    said = capfd.readouterr().err
    assert "rematerialization" not in said, f"the partitioner copies an array to every device:\n{said}"


def test_what_a_step_counts_is_there_to_compare():
    for model, config in MODELS.items():
        seen, grads, biases = curve(model, "dp", 1)
        assert seen[-1]["loss"] < seen[0]["loss"]
        for metrics in seen:
            np.testing.assert_array_equal(metrics["load_LE"].sum(1), BATCH * SEQUENCE * config.top_k)
            assert (metrics["dropped"] > 0) == (config.capacity > 0)
        assert bool(biases) == (config.router == "sigmoid") == any(np.any(bias) for bias in biases.values())
        for name, grad in grads.items():
            assert np.any(grad) == ("router_bias" not in name), name


def test_the_loss_is_the_cross_entropy_and_what_its_routers_add():
    config, batch = MODELS["dropless softmax"], jax.tree.map(lambda x: x[0], rows(0))
    _, mesh, context = on("dp", 1)
    with context:
        losses = (LOSS, dataclasses.replace(LOSS, balance=0.0, router_z=0.0), NextToken(LOSS.z), LOSS.held_out)
        model = jax.device_put(start("dropless softmax").model, NamedSharding(mesh, jax.P()))
        found = jax.jit(lambda model, batch: [loss(model, batch) for loss in (*losses, NextToken())])(model, batch)
    (whole, sums), (alone, _), (expected, _), (held_out, _), (nats, _) = found
    assert alone == expected and held_out == nats
    more = LOSS.balance * sums["balance"] + LOSS.router_z * sums["router_z"]
    np.testing.assert_allclose(whole - alone, more, rtol=1e-4)
    assert sums["balance"] >= 0.9 * config.layers * BATCH * SEQUENCE  # 1 per token and layer where even


def test_moving_the_bias_alone_makes_the_load_even():
    tx, loss = optax.sgd(0.0), dataclasses.replace(LOSS, balance=0.0)
    step = jax.jit(functools.partial(steps.train_step, loss=loss, tx=tx))
    _, mesh, context = on("dp", 1)
    with context:
        model = jax.device_put(start("dropless sigmoid").model, NamedSharding(mesh, jax.P()))
        model = jax.tree.map(lambda x: x, model)
        model.blocks.router_bias_E[...] = jax.device_put(np.float32([[0.5, 0.5, 0, 0]] * 2), jax.P())
        state, fullest = steps.State(jnp.int32(0), model, tx.init(model)), []
        for _ in range(30):
            state, metrics = step(state, rows(0))
            fullest.append(loss.facts(metrics, BATCH * SEQUENCE)["load_max"])
    assert fullest[0] > 1.6 and max(fullest[-5:]) < 1.2, fullest


def test_records_name_load_and_dropped_tokens_and_only_of_routed_models(tmp_path):
    for name, model, loss in (
        ("routed", TINY, LOSS),
        ("dense", Llama(vocab=96, layers=1, width=32, ff=32), NextToken()),
    ):
        run = Run(
            model=model, data=Synthetic(vocab=96), optimizer=AdamW(), loss=loss, mesh=cpu8.cluster, batch=BATCH,
            sequence=SEQUENCE, accumulate=1,
        )  # fmt: skip
        _, mesh, context = on("dp", 1)
        program = make(run, mesh, Chip("cpu", "cpu"))
        (tmp_path / name).mkdir()
        with context, program.context(), Records(tmp_path / name) as records:
            state = program.init(jax.random.key(0))
            batch = jax.device_put(rows(0), program.batch_sharding())
            _, metrics = program.step(state, batch)
            Reporter(program, None, Ledger(Display(quiet=True), None, records), 0, frozenset()).read(
                Pending(0, batch, metrics, 0.0)
            )
    [routed], [dense] = (read(tmp_path / name / "metrics.jsonl") for name in ("routed", "dense"))
    assert set(routed) - set(dense) == {"dropped", "load_max", "balance", "router_z", "load"}
    load = np.array(routed["load"])
    assert load.shape == (2, 4) and np.all(load.sum(1) == BATCH * SEQUENCE * 2)
    assert routed["load_max"] == (load / load.mean(1, keepdims=True)).max() > 1
    over = np.maximum(load - BATCH * 8, 0).sum() / load.sum()  # at least what is beyond the slots of all sequences
    assert over <= routed["dropped"] < 0.5 and routed["dropped"] > 0
    assert 0.9 < routed["balance"] < 2 and routed["router_z"] > 0
