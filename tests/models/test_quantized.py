"""Products in eight bits are those of qwix, learn as bfloat16's do, and are the same on every mesh."""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import named
from llmjax.checks import check_chip
from llmjax.errors import Refused
from llmjax.models import nn, quantized
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Constant
from llmjax.run import Run
from llmjax.train import step as steps
from llmjax.train.loss import NextToken
from llmjax.train.program import make, resolve
from meshes import chips, cpu8

qwix = pytest.importorskip("qwix", reason="the extra `quantized` is not installed")
TEXT = np.frombuffer((Path(__file__).parents[2] / "LICENSE").read_bytes(), np.uint8).astype(np.int32)
TINY = Llama(vocab=128, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=32)
KINDS = tuple(quantized.TYPES.values())
SOME_CHIP = dataclasses.replace(chips.CPU, fp8=1.0)  # a CPU computes fp8 as well, if it is told that it can


def mesh_of(layout: str, devices: int):
    layout = layouts.preset(layout)
    axes = meshes.fill(meshes.Axes(), devices, used=layout.axes(), rest=layout.rest(), tensor=2)
    return meshes.device_mesh(axes, jax.devices()[:devices]), layout


def rows(step: int, count: int, length: int) -> dict[str, np.ndarray]:
    """Pieces of the licence's text, [count, length]."""
    starts = np.random.default_rng(step).integers(0, len(TEXT) - length - 1, count)
    whole = np.stack([TEXT[start : start + length + 1] for start in starts])
    return dict(tokens=whole[:, :-1], targets=whole[:, 1:], weights=np.ones((count, length), np.float32))


@functools.cache
def gradients(layout: str, devices: int, kind: str, accumulate: int = 1):
    """(loss per token, gradients by name)."""
    mesh, layout = mesh_of(layout, devices)
    cut = {name: x.reshape(accumulate, -1, *x.shape[1:]) for name, x in rows(0, 16, 32).items()}
    with jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layout, rounding=kind)):
        model = jax.jit(TINY.init)(jax.random.key(0))
        batch = jax.device_put(cut, jax.NamedSharding(mesh, jax.P(None, layout.inner["B"])))
        loss, _, found = jax.jit(functools.partial(steps.gradients, loss=NextToken()))(model, batch)
        return float(loss), {name: np.asarray(x) for name, x in named(found).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_the_gradient_of_its_activation_are_those_of_qwix_and_that_of_its_weight_is_not_rounded(kind):
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD, weight_DF = jax.random.normal(keys[0], (2, 6, 32)), jax.random.normal(keys[1], (32, 16))
    slope_BTF = jax.random.normal(keys[2], (2, 6, 16))

    def rounded(x, *kept):
        return qwix.quantize(x, kind, channelwise_axes=kept, calibration_method=quantized.LARGEST[kind])

    def projected(x_BTD, weight_DF):
        return nn.project("BTD,DF->BTF", x_BTD, nnx.Param(weight_DF))

    @jax.jit
    def both(x_BTD, weight_DF, slope_BTF):
        y_BTF, back = jax.vjp(projected, x_BTD, weight_DF)
        return y_BTF, *back(jax.reshard(slope_BTF, jax.typeof(y_BTF).sharding))

    with jax.set_mesh(mesh_of("dp", 1)[0]), nn.compute(nn.Compute(rounding=kind)):
        y_BTF, into_x_BTD, into_weight_DF = both(*map(jax.reshard, (x_BTD, weight_DF, slope_BTF), 3 * [jax.P()]))
    exact = qwix.einsum("BTD,DF->BTF", rounded(x_BTD, 0, 1), rounded(weight_DF, 1))
    np.testing.assert_allclose(y_BTF, exact, rtol=1e-5, atol=1e-5)
    exact = qwix.einsum("BTF,DF->BTD", rounded(slope_BTF, 0, 1), rounded(weight_DF, 0))
    np.testing.assert_allclose(into_x_BTD, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(into_weight_DF, jnp.einsum("BTD,BTF->DF", x_BTD, slope_BTF), rtol=1e-5, atol=1e-5)
    assert np.abs(y_BTF - x_BTD @ weight_DF).max() > 1e-3, "nothing was rounded"


@pytest.mark.parametrize(("kind", "cosine"), [("int8", 0.999), ("float8_e4m3fn", 0.99)])
def test_gradients_point_where_those_of_float32_do(kind, cosine):
    (_, expected), (_, found) = gradients("dp", 1, ""), gradients("dp", 1, kind)
    for name, exact in expected.items():
        along = np.vdot(found[name], exact) / np.linalg.norm(found[name]) / np.linalg.norm(exact)
        assert cosine < along < 1 - 1e-7, f"{name}: {along}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layout", "accumulate"), [("fsdp", 1), ("fsdp", 2), ("fsdp_tp_sp", 1), ("fsdp_tp_sp", 2), ("fsdp_pp", 1)]
)
def test_loss_and_gradients_are_those_of_one_device_on_every_mesh(layout, accumulate, kind):
    (expected, exact), (loss, found) = gradients("dp", 1, kind), gradients(layout, 8, kind, accumulate)
    assert loss == pytest.approx(expected, rel=5e-5)
    for name, grad in exact.items():  # here and there a number lies between two, and float32's last bit decides
        off = np.linalg.norm(found[name] - grad) / np.linalg.norm(grad)
        assert off < 0.01, f"{name} is off by {off}"


def test_only_products_of_layers_take_eight_bits_and_so_do_the_weights_that_are_gathered_for_them():
    mesh, layout = mesh_of("fsdp", 8)
    model = dataclasses.replace(TINY, layers=1)
    with jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layout, rounding="int8")):
        weights = jax.jit(model.init)(jax.random.key(0))
        tokens = jax.device_put(np.zeros((8, 16), np.int32), jax.NamedSharding(mesh, jax.P(layout.inner["B"])))
        lowered = jax.jit(jax.grad(lambda w: jnp.sum(w(tokens) ** 2))).lower(weights)
    products = re.findall(r"dot_general.*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)", lowered.as_text())
    layer = sum(m.count for name in ("attention", "mlp") for m in model.matrices()[name])
    assert products.count(("i8", "i8")) == 2 * layer  # forward, and into what goes in
    assert set(products) == {("i8", "i8"), ("f32", "f32")}  # of these, gradients of weights, the head, and attention's
    gathered = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather\(", lowered.compile().as_text())
    assert gathered.count("s8") == 2 * layer


@functools.cache
def curve(**changes) -> np.ndarray:
    """Losses of 100 steps on the licence's text."""
    model = Llama(vocab=128, layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ff=128, positions=32)
    run = Run(
        model=model, data=None, optimizer=AdamW(lr=1e-3, schedule=Constant(0.1)), loss=NextToken(), mesh=cpu8.cluster,
        batch=16, sequence=32, steps=100, accumulate=1, **changes,
    )  # fmt: skip
    program, losses = make(run, meshes.device_mesh(resolve(run, 1), jax.devices()[:1]), SOME_CHIP), []
    with program.context():
        state = program.init(jax.random.key(0))
        for step in range(run.steps):
            batch = jax.device_put({name: x[None] for name, x in rows(step, 16, 32).items()}, program.batch_sharding())
            state, metrics = program.step(state, batch)
            losses.append(float(metrics["loss"]))
    return np.array(losses)


@pytest.mark.parametrize(("dtype", "apart"), [("int8", 0.002), ("fp8", 0.005)])
def test_a_small_run_on_real_text_reaches_the_loss_of_bfloat16(dtype, apart):
    expected, found = (curve(dtype=each)[-20:].mean() for each in ("bfloat16", dtype))
    assert expected < 0.5 * curve(dtype="bfloat16")[0], "it does not learn, so the loss says nothing"
    assert found == pytest.approx(expected, rel=apart)
    assert found != expected


RUN = Run(TINY, None, AdamW(), NextToken(), cpu8.cluster, dtype="fp8")


@pytest.mark.parametrize("chip", (chips.CPU, chips.A100, chips.TPU_V5P, chips.TPU_V6E))
def test_fp8_is_refused_on_a_chip_without_it(chip):
    with pytest.raises(Refused, match=rf"^dtype is fp8, in which a {chip.name} .*: choose bfloat16 or int8"):
        check_chip(RUN, chip)
    check_chip(dataclasses.replace(RUN, dtype="int8"), chip)


@pytest.mark.parametrize("chip", (chips.H100, chips.H200, chips.B200, chips.TPU_7X))
def test_fp8_is_for_chips_that_multiply_it_faster(chip):
    check_chip(RUN, chip)
    assert chip.fp8 > 1.9 * chip.flops


def test_without_qwix_a_run_in_eight_bits_is_refused_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"^dtype is int8, which takes the package qwix: run pip install 'llmjax\[quant"):
        curve.__wrapped__(dtype="int8")
