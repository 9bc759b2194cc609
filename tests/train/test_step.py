"""The step is the textbook's sum of gradients, however the batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import named
from llmjax.models import nn
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.train import step as steps
from llmjax.train.loss import NextToken

TINY = Llama(vocab=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=16)
TINY_GPT2 = GPT2(vocab=64, layers=2, width=32, heads=4, head_dim=8, ff=64, positions=16)


def mesh_of(devices: int, layout=layouts.dp):
    axes = meshes.fill(meshes.Axes(), devices, used=layout.axes(), rest=layout.rest(), tensor=2)
    return meshes.device_mesh(axes, jax.devices()[:devices])


class Weight(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.float32(1.0))


def slope(model, batch):
    """A loss whose gradient on worker i is g_i."""
    return jnp.sum(model.w[...] * batch["g"]), {"weight": jnp.float32(batch["g"].size)}


@pytest.mark.parametrize(("mean", "falls"), [(False, 0.006), (True, 0.002)])
def test_three_workers_step_by_the_sum_of_their_gradients_or_by_its_mean(mean, falls):
    mesh, tx = mesh_of(3), optax.sgd(0.01)
    with jax.set_mesh(mesh), nn.compute(nn.Compute()):
        model = Weight()
        state = steps.State(jnp.int32(0), model, tx.init(model))
        batch = jax.device_put({"g": np.float32([[0.1, 0.2, 0.3]])}, NamedSharding(mesh, jax.P(None, ("data", "fsdp"))))
        assert [shard.data.shape for shard in batch["g"].addressable_shards] == [(1, 1)] * 3  # one gradient each
        state, metrics = jax.jit(functools.partial(steps.train_step, loss=slope, tx=tx, mean=mean))(state, batch)
    assert float(state.model.w[...]) == pytest.approx(1 - falls, abs=1e-7)
    assert float(metrics["grad_norm"]) == pytest.approx(falls / 0.01, rel=1e-6)


def rows(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 64, (count, 17)).astype(np.int32)
    weights = (random.random((count, 16)) < 0.6).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@functools.cache
def weights(devices: int, layout: str, *configs):
    """The weights of these models as NumPy, from one program on so many devices."""
    layout = layouts.preset(layout)
    with jax.set_mesh(mesh_of(devices, layout)), nn.compute(nn.Compute(layout=layout)):
        models = jax.jit(lambda key: [config.init(key) for config in configs])(jax.random.key(3))
        return [jax.tree.map(np.asarray, model) for model in models]


gradient = jax.jit(functools.partial(steps.gradients, loss=NextToken(z=1e-3)))


def gradients(accumulate: int, devices: int, batch: dict[str, np.ndarray], per_turn: int = 1):
    mesh = mesh_of(devices)
    cut = {name: x.reshape(accumulate, -1, *x.shape[1:]) for name, x in batch.items()}
    with jax.set_mesh(mesh), nn.compute(nn.Compute(microbatches=per_turn)):
        [model] = jax.device_put(weights(1, "dp", TINY), NamedSharding(mesh, jax.P()))
        return gradient(model, jax.device_put(cut, NamedSharding(mesh, jax.P(None, ("data", "fsdp")))))


def test_microbatches_and_devices_with_uneven_masks_give_the_gradient_of_the_whole_batch():
    batch = rows(8)
    loss, sums, grads = gradients(1, 1, batch)
    assert float(sums["weight"]) == batch["weights"].sum()
    for accumulate, devices, per_turn in ((8, 1, 1), (8, 1, 2), (8, 1, 3), (1, 8, 1), (2, 4, 1), (4, 2, 2)):
        other_loss, other_sums, other = gradients(accumulate, devices, batch, per_turn)
        cut = f"{accumulate} microbatches, {per_turn} per turn, on {devices} devices"
        assert float(other_sums["weight"]) == float(sums["weight"]), cut
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6, err_msg=cut)
        other = named(other)
        for name, grad in named(grads).items():
            atol = 2e-6 * float(abs(grad).max())
            np.testing.assert_allclose(other[name], grad, rtol=0, atol=atol, err_msg=f"{name} with {cut}")


def test_a_masked_target_changes_nothing():
    batch = rows(8)
    other = batch | {"targets": np.where(batch["weights"] > 0, batch["targets"], 7).astype(np.int32)}
    assert (other["targets"] != batch["targets"]).any()
    found = named(gradients(1, 1, other))
    for name, value in named(gradients(1, 1, batch)).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_z_loss_adds_the_square_of_log_z_and_stays_out_of_evaluation():
    logits = np.random.default_rng(0).normal(size=(2, 3, 64)).astype(np.float32)
    batch = {"tokens": None, "targets": np.zeros((2, 3), np.int32), "weights": np.ones((2, 3), np.float32)}
    with jax.set_mesh(mesh_of(1)), nn.compute(nn.Compute()):
        kinds, model = (NextToken(), NextToken(z=0.5), NextToken(z=0.5).held_out), lambda *_: jnp.asarray(logits)
        plain, with_z, held_out = jax.jit(lambda batch: [loss(model, batch)[0] for loss in kinds])(batch)
    log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(plain, (log_z - logits[..., 0]).sum(), rtol=1e-6)
    np.testing.assert_allclose(with_z - plain, 0.5 * (log_z**2).sum(), rtol=1e-5)
    assert held_out == plain


def test_the_step_is_compiled_once_and_its_state_is_donated():
    mesh, tx = mesh_of(8), optax.adam(1e-3)
    with jax.set_mesh(mesh), nn.compute(nn.Compute()):
        state = jax.jit(functools.partial(steps.init, TINY.init, tx))(jax.random.key(0))
        step = jax.jit(functools.partial(steps.train_step, loss=NextToken(), tx=tx), donate_argnums=0)
        for i in range(3):
            before = state
            cut = {name: x[None] for name, x in rows(8, i).items()}
            state, _ = step(state, jax.device_put(cut, NamedSharding(mesh, jax.P(None, ("data", "fsdp")))))
            assert not [name for name, x in named(before).items() if not x.is_deleted()]
        assert step._cache_size() == 1, "a step was compiled anew"
        assert int(state.step) == 3


@pytest.mark.parametrize("layout", ("dp", "fsdp", "tp", "fsdp_tp", "fsdp_tp_sp"))
def test_the_same_seed_gives_the_same_weights_on_every_mesh(layout):
    expected, found = weights(1, "dp", TINY, TINY_GPT2), weights(8, layout, TINY, TINY_GPT2)
    for one, eight in zip(map(named, expected), map(named, found), strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(eight[name], value, err_msg=name)


def test_no_device_ever_holds_the_whole_model_when_it_is_born():
    c = Llama(vocab=1024, layers=4, width=256, heads=8, kv_heads=8, head_dim=32, ff=1024, positions=16)
    layout = layouts.fsdp_tp
    with jax.set_mesh(mesh_of(8, layout)), nn.compute(nn.Compute(layout=layout)):
        used = jax.jit(c.init).lower(jax.random.key(0)).compile().memory_analysis()
        whole = 4 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(c.init, jax.random.key(0))))
    assert used.output_size_in_bytes < 1.1 * whole / 8
    assert used.output_size_in_bytes + used.temp_size_in_bytes < whole / 3
