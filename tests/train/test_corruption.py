"""X1, X2: devices that compute wrongly without a word are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import mesh as meshes
from llmjax.errors import Refused
from llmjax.mesh import Axes
from llmjax.train import digest
from llmjax.train.corruption import repeat, replicas

CUTS = {
    "dp": (Axes(8, 1, 1, 1, 1, 1), jax.P(None, None)),
    "fsdp": (Axes(2, 1, 4, 1, 1, 1), jax.P("fsdp", None)),
    "fsdp_tp": (Axes(2, 1, 2, 1, 1, 2), jax.P("fsdp", "tensor")),
}


def state(mesh, spec):
    values = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    leaves = dict(weight=(values, spec), scale=(values[0], jax.P()), count=(np.int32(3), jax.P()))
    return {name: jax.device_put(x, jax.NamedSharding(mesh, spec)) for name, (x, spec) in leaves.items()}


def with_a_flipped_bit(x, device, bit=1):
    """The array, one bit of which is another on one device."""
    pieces = []
    for shard in x.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1).view(np.uint8)[2] ^= bit
        pieces.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, pieces)


@pytest.mark.parametrize("cut", CUTS)
def test_x1_one_flipped_bit_on_one_replica_names_leaf_and_device(cut):
    axes, spec = CUTS[cut]
    mesh = meshes.device_mesh(axes, jax.devices())
    with jax.set_mesh(mesh):
        good = state(mesh, spec)
        replicas(good, mesh)
        for name in ("weight", "scale"):
            bad = good | {name: with_a_flipped_bit(good[name], jax.devices()[5])}
            with pytest.raises(Refused, match=rf"device .*\b5\b.* {name} ") as refusal:
                replicas(bad, mesh)
            copies = 8 if name == "scale" else 8 // (axes.fsdp * axes.tensor)
            assert refusal.value.code == 70 and str(refusal.value).count("device ") == (
                1 if copies > 2 else 2
            )  # those that are named


def test_x1_what_is_held_once_has_no_copy_to_differ_from():
    mesh = meshes.device_mesh(Axes(1, 1, 8, 1, 1, 1), jax.devices())
    with jax.set_mesh(mesh):
        good = state(mesh, jax.P("fsdp", None))
        replicas(good | dict(weight=with_a_flipped_bit(good["weight"], jax.devices()[5])), mesh)


class Failing:
    """A step that adds the batch, and goes wrong in some of its calls."""

    def __init__(self, mesh, bad):
        self.calls, self.bad = 0, bad
        self.step = jax.jit(
            lambda state, batch: (dict(w=state["w"] + batch), dict(loss=jnp.sum(batch))), donate_argnums=0
        )

    def __call__(self, state, batch):
        self.calls += 1
        new, metrics = self.step(state, batch)
        return (dict(w=new["w"] * (1 + 1e-6 * self.calls)) if self.calls in self.bad else new), metrics


@pytest.mark.parametrize(("bad", "kind"), [({2}, "transient"), ({1}, "transient"), ({1, 2, 3}, "persistent")])
def test_x2_a_step_that_gives_two_results_is_called_transient_or_persistent(bad, kind):
    mesh = meshes.device_mesh(Axes(8, 1, 1, 1, 1, 1), jax.devices())
    with (
        jax.set_mesh(mesh),
        pytest.raises(Refused, match=rf"gave different results in state\.w on all devices \({kind}"),
    ):
        repeat(Failing(mesh, bad), dict(w=jnp.ones(4)), jnp.ones(4), number=7)


def test_x2_a_step_taken_twice_gives_what_it_gives_once():
    mesh = meshes.device_mesh(Axes(8, 1, 1, 1, 1, 1), jax.devices())
    with jax.set_mesh(mesh):
        new, metrics = repeat(Failing(mesh, ()), dict(w=jnp.ones(4)), jnp.ones(4), number=7)
        assert new["w"].tolist() == [2.0] * 4 and float(metrics["loss"]) == 4


def test_x2_the_result_that_is_kept_is_one_of_those_that_were_compared():
    mesh = meshes.device_mesh(Axes(8, 1, 1, 1, 1, 1), jax.devices())
    with jax.set_mesh(mesh):
        step = Failing(mesh, {3})  # well in both calls that are compared
        new, _ = repeat(step, dict(w=jnp.ones(4)), jnp.ones(4), number=7)
        assert new["w"].tolist() == [2.0] * 4 and step.calls == 2


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("device", [0, 5])
def test_x2_a_step_that_went_wrong_on_one_device_alone_names_leaf_and_device(cut, device):
    axes, spec = CUTS[cut]
    mesh = meshes.device_mesh(axes, jax.devices())
    calls = iter(range(3))

    def step(state, batch):
        new = state | dict(scale=with_a_flipped_bit(state["scale"], jax.devices()[device]))
        return (new if next(calls) == 1 else state), dict(loss=batch)

    with jax.set_mesh(mesh), pytest.raises(Refused, match=rf"in state\.scale on device {device} of .* \(transient"):
        repeat(step, state(mesh, spec), jnp.ones(()), number=7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_digest_is_the_same_on_every_mesh_and_moves_with_every_bit_and_place(dtype):
    values = np.random.default_rng(0).integers(0, 2, (8, 16)).astype(jnp.dtype(dtype))
    found = set()
    for axes, spec in CUTS.values():
        mesh = meshes.device_mesh(axes, jax.devices())
        with jax.set_mesh(mesh):
            x = jax.device_put(values, jax.NamedSharding(mesh, spec))
            found.add(digest.text(jax.jit(digest.digest)(dict(x=x)))["x"])
    assert len(found) == 1
    seen = list(found)
    for at in range(0, values.nbytes, 7):
        changed = values.copy()
        changed.reshape(-1).view(np.uint8)[at] ^= 1
        seen.append(digest.text(jax.jit(digest.digest)(dict(x=jnp.asarray(changed))))["x"])
    row = next(i for i in range(7) if (values[i] != values[i + 1]).any())
    swapped = values.copy()
    swapped[[row, row + 1]] = swapped[[row + 1, row]]
    seen.append(digest.text(jax.jit(digest.digest)(dict(x=jnp.asarray(swapped))))["x"])
    assert len(seen) == len(set(seen))
