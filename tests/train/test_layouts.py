"""One program, any layout: the same losses, the same gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import like, named
from llmjax.evaluate.parity import Kept, stream
from llmjax.models import nn
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Constant
from llmjax.train import step as steps
from llmjax.train.loss import NextToken

FAMILIES = {
    "gpt2": GPT2(vocab=96, layers=2, width=32, heads=4, head_dim=8, ff=64, positions=32),
    "llama": Llama(vocab=96, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=32),
    "llama tied": Llama(vocab=96, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=32, tied=True),
}
BATCH, SEQUENCE, STEPS = 8, 16, 20


TX, LOSS = Kept(AdamW(lr=1e-2, schedule=Constant()), clip=0).build(STEPS), NextToken()


def context(layout: layouts.Layout, devices: int):
    axes = meshes.fill(meshes.Axes(), devices, used=layout.axes(), rest=layout.rest(), tensor=2)
    return meshes.device_mesh(axes, jax.devices()[:devices]), nn.compute(nn.Compute(layout=layout))


def build(family: str):
    return functools.partial(steps.init, FAMILIES[family].init, TX)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA of jax 0.10 does not say when it copies whole arrays")
def test_a_copy_of_a_whole_array_to_every_device_is_said_on_stderr(capfd):
    """So that its absence, which the next test and others look for, says something."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)

    def rows_used(table, i):
        return jnp.sum(jnp.sin(table.at[i].get(out_sharding=jax.P("fsdp", None, None))))

    with jax.set_mesh(mesh):
        table = jax.device_put(np.zeros((32, 16), np.float32), jax.P("tensor", "fsdp"))
        i = jax.device_put(np.zeros((8, 4), np.int32), jax.P("fsdp", None))
        jax.jit(jax.grad(rows_used)).lower(table, i).compile()
    assert "rematerialization" in capfd.readouterr().err


@functools.cache
def start(family: str):
    """The state before the first step as NumPy; that it is born the same on every mesh is test_step's to show."""
    mesh, compute = context(layouts.dp, 1)
    with jax.set_mesh(mesh), compute:
        return jax.tree.map(np.asarray, jax.jit(build(family))(jax.random.key(0)))


@functools.cache
def curve(family: str, layout: str, devices: int):
    """(losses of 20 steps, gradients at step 0) as NumPy."""
    layout = layouts.preset(layout)
    mesh, compute = context(layout, devices)
    sharding = NamedSharding(mesh, jax.P(None, layout.inner["B"]))

    def batch(step):
        rows = stream(np.random.default_rng(step), BATCH, SEQUENCE + 1, 96)[None]
        parts = dict(tokens=rows[..., :-1], targets=rows[..., 1:], weights=np.ones((1, BATCH, SEQUENCE), np.float32))
        return jax.device_put(parts, sharding)

    step = jax.jit(functools.partial(steps.train_step, loss=LOSS, tx=TX), donate_argnums=0)
    with jax.set_mesh(mesh), compute:
        places = jax.tree.map(lambda x: x.sharding, like(jax.eval_shape(build(family), jax.random.key(0)), mesh))
        state, losses = jax.device_put(start(family), places), []
        for i in range(STEPS):
            state, metrics = step(state, batch(i))
            losses.append(float(metrics["loss"]))
            if i == 0:
                grads = {name: np.asarray(x) for name, x in named(state.opt[0]).items()}
    assert step._cache_size() == 1
    return np.array(losses), grads


@pytest.mark.parametrize("layout", ("dp", "fsdp", "tp", "fsdp_tp", "fsdp_tp_sp"))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_the_losses_and_gradients_of_one_device(family, layout, capfd):
    losses, grads = curve(family, layout, 8)
    expected, expected_grads = curve(family, "dp", 1)
    assert expected[-1] < 0.8 * expected[0], "it does not learn, so the curve says nothing"
    np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=f"losses of {family} under {layout}")
    largest = max(np.abs(grad).max() for grad in expected_grads.values())
    for name, grad in expected_grads.items():  # a key bias has no gradient: there only rounding is left to compare
        scale = max(np.abs(grad).max(), 1e-3 * largest)
        np.testing.assert_allclose(grads[name], grad, rtol=0, atol=1e-4 * scale, err_msg=f"gradient of {name}")
    said = capfd.readouterr().err
    assert "rematerialization" not in said, f"the partitioner copies an array to every device:\n{said}"
