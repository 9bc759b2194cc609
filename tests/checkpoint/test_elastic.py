"""A checkpoint of any parallelism continues under any other: stages, experts' shards and all."""

import functools

import jax
import numpy as np
import optax
import pytest

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import Checkpoints, like, named
from llmjax.checkpoint.retention import Retention
from llmjax.models import nn
from llmjax.models.mixtral import Mixtral
from llmjax.optim.muon import Muon
from llmjax.train import step as steps

MODEL = Mixtral(
    vocab=64, layers=4, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=16, experts=4, router="sigmoid"
)
PLACES = [
    ("dp", {}),
    ("fsdp_tp", dict(fsdp=4, tensor=2)),
    ("fsdp_pp", dict(fsdp=2, stage=4)),
    ("ep", dict(data=2, expert=4)),
    ("tp_ep_pp_vp", dict(stage=2, expert=2, tensor=2)),
    ("fsdp_ring", dict(fsdp=2, context=4)),
    ("fsdp_ep_cp", dict(fsdp=2, expert=2, context=2)),
    ("pp", dict(stage=2)),
    ("fsdp_tp_sp", dict(data=2, fsdp=2, tensor=2)),
    ("dp", {}),
]


def abstract(tx: optax.GradientTransformation, layout: str, sizes: dict[str, int]):
    """The state's arrays as types, where this layout wants them on a mesh of these sizes."""
    axes = meshes.Axes(**dict.fromkeys(meshes.AXES, 1) | sizes)
    mesh = meshes.device_mesh(axes, jax.devices()[: int(np.prod(axes.sizes()))])
    with jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layouts.preset(layout))):
        build = functools.partial(steps.init, MODEL.init, tx)
        return like(jax.eval_shape(build, jax.random.key(0)), mesh)


@pytest.mark.parametrize("tx", (optax.adamw(1e-3), Muon(b2_neurons=0.95).build(1)), ids=("adamw", "muon of neurons"))
def test_a_state_handed_on_from_mesh_to_mesh_stays_the_same_bit_for_bit(tmp_path, tx):
    random = np.random.default_rng(0)
    first = abstract(tx, *PLACES[0])
    written = jax.tree.map(lambda x: random.integers(0, 2**20, x.shape).astype(x.dtype), first)
    state = jax.device_put(written, jax.tree.map(lambda x: x.sharding, first))
    with Checkpoints(tmp_path, Retention(last=len(PLACES))) as checkpoints:
        checkpoints.save(0, state, {})
        checkpoints.wait()
        for step, place in enumerate(PLACES[1:], 1):
            wanted = abstract(tx, *place)
            state = checkpoints.restore(step - 1, wanted)
            for name, x in named(state).items():
                np.testing.assert_array_equal(np.asarray(x), named(written)[name], err_msg=f"{name} on {place}")
                assert x.sharding == named(wanted)[name].sharding, (name, place)
            checkpoints.save(step, state, {})
            checkpoints.wait()
