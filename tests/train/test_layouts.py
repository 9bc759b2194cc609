"""One program, any layout: the same losses, the same gradients."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.models import nn
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.train import step as steps
from llmjax.train.loss import NextToken

FAMILIES = {
    "gpt2": GPT2(vocab=96, layers=2, width=32, heads=4, head_dim=8, ff=64, positions=32),
    "llama": Llama(vocab=96, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=32),
    "llama tied": Llama(vocab=96, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=32, tied=True),
}
BATCH, SEQUENCE, STEPS = 8, 16, 20


def tokens(step: int) -> np.ndarray:
    """A stream with something to learn: most tokens follow from the one before."""
    random = np.random.default_rng(step)
    rows = [random.integers(0, 96, (BATCH, 1))]
    for _ in range(SEQUENCE):
        rows.append(
            np.where(random.random((BATCH, 1)) < 0.1, random.integers(0, 96, (BATCH, 1)), (5 * rows[-1] + 3) % 96)
        )
    return np.concatenate(rows, 1).astype(np.int32)


@functools.cache
def curve(family: str, layout: str, devices: int):
    """(losses of 20 steps, gradients at step 0) as NumPy."""
    layout = layouts.PRESETS[layout]
    axes = meshes.fill(meshes.Axes(), devices, used=layout.axes(), rest=layout.rest(), tensor=2)
    mesh = meshes.device_mesh(axes, jax.devices()[:devices])
    sharding = NamedSharding(mesh, jax.P(None, layout.inner["B"]))
    tx, loss = optax.adamw(1e-2), NextToken()

    def batch(step):
        rows = tokens(step)[None]
        parts = dict(tokens=rows[..., :-1], targets=rows[..., 1:], weights=np.ones((1, BATCH, SEQUENCE), np.float32))
        return jax.device_put(parts, sharding)

    with jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layout)):
        state = jax.jit(functools.partial(steps.init, FAMILIES[family].init, tx))(jax.random.key(0))
        grads = jax.jit(functools.partial(steps.gradients, loss=loss))(state.model, batch(0))[2]
        grads = {jax.tree_util.keystr(p): np.asarray(g) for p, g in jax.tree_util.tree_leaves_with_path(grads)}
        step = jax.jit(functools.partial(steps.train_step, loss=loss, tx=tx), donate_argnums=0)
        losses = []
        for i in range(STEPS):
            state, metrics = step(state, batch(i))
            losses.append(float(metrics["loss"]))
    return np.array(losses), grads


@pytest.mark.parametrize("layout", layouts.PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_the_losses_and_gradients_of_one_device(family, layout, capfd):
    losses, grads = curve(family, layout, 8)
    expected, expected_grads = curve(family, "dp", 1)
    assert expected[-1] < 0.8 * expected[0]  # it learns, so the curve says something
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    largest = max(np.abs(grad).max() for grad in expected_grads.values())
    for name, grad in expected_grads.items():  # a key bias has no gradient: there only rounding is left to compare
        scale = max(np.abs(grad).max(), 1e-3 * largest)
        np.testing.assert_allclose(grads[name], grad, rtol=0, atol=1e-4 * scale, err_msg=name)
    assert "rematerialization" not in capfd.readouterr().err
