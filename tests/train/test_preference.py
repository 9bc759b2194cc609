"""The loss of preferences is the paper's, the same on any mesh, and 0.69 where nothing has been learnt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.evaluate import parity
from llmjax.layout import Pipeline
from llmjax.mesh import Axes
from llmjax.models import nn
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.run import DiLoCo, LoRA, Run
from llmjax.train.preference import DPO
from llmjax.train.program import make
from meshes import chips, cpu8

MODEL = Llama(vocab=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=16)


def run_of(layout="dp", **fields) -> Run:
    return Run(
        model=MODEL, data=Synthetic(vocab=64), optimizer=AdamW(lr=1e-2), loss=DPO(beta=0.5), mesh=cpu8.cluster,
        layout=layouts.preset(layout), steps=3, batch=8, sequence=16, dtype="float32", **(dict(accumulate=1) | fields),
    )  # fmt: skip


def mesh_of(**axes: int):
    sizes = Axes(**dict.fromkeys(meshes.AXES, 1) | axes)
    return meshes.device_mesh(sizes, jax.devices()[: int(np.prod(list(axes.values())))])


def test_loss_and_rewards_are_those_of_the_formula():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 64, (3, 2, 17), np.int32)
    weights = (random.random((3, 2, 16)) < 0.5).astype(np.float32)
    weights[2] = 0  # a blank pair
    batch = dict(tokens=tokens[..., :-1], targets=tokens[..., 1:], weights=weights)
    with jax.set_mesh(mesh_of()), nn.compute(nn.Compute()):
        models = [MODEL.init(jax.random.key(n)) for n in range(2)]
        loss, sums = jax.jit(DPO(beta=0.5))(models[0], jax.tree.map(jnp.asarray, batch), models[1])
        logits = [np.asarray(model(jnp.asarray(batch["tokens"].reshape(6, 16))), np.float64) for model in models]

    def chances(logits):
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        of_targets = np.take_along_axis(logs, batch["targets"].reshape(6, 16, 1), -1)[..., 0]
        return (of_targets.reshape(3, 2, 16) * weights).sum(-1)

    reward = 0.5 * (chances(logits[0]) - chances(logits[1]))[:2]
    margin = reward[:, 0] - reward[:, 1]
    np.testing.assert_allclose(float(loss), np.log1p(np.exp(-margin)).sum(), rtol=1e-5)
    expected = dict(weight=2, reward_margin=margin.sum(), reward_accuracy=(margin > 0).sum(),
                    reward_chosen=reward[:, 0].sum(), reward_rejected=reward[:, 1].sum())  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(float(sums[name]), value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("layout", "axes", "fields"),
    [
        ("fsdp_tp", dict(fsdp=4, tensor=2), dict(accumulate=2)),
        ("fsdp_ring", dict(fsdp=4, context=2), dict(lora=LoRA(rank=4))),
    ],
    ids=["all weights", "adapters"],
)
def test_preferences_are_learnt_the_same_on_any_mesh(layout, axes, fields):
    one = parity.trace(run_of(**fields), mesh_of(), chips.CPU, 3)
    assert one.losses[0] == pytest.approx(np.log(2), abs=1e-6) and one.losses[-1] != one.losses[0]
    verdict = parity.compare(one, parity.trace(run_of(layout, **fields), mesh_of(**axes), chips.CPU, 3))
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(local=DiLoCo(every=2)), "local.every is 2, but DPO compares with frozen weights"),
        (dict(loss_chunk=4), "loss_chunk is 4, but DPO takes all positions"),
        (
            dict(layout="pp", pipeline=Pipeline("1f1b")),
            "pipeline.schedule is 1f1b, which DPO has no loss of logits for",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(fields, words):
    axes = dict(stage=2) if "layout" in fields else {}
    with pytest.raises(Refused, match=words):
        make(run_of(**fields), mesh_of(**axes), chips.CPU)
    with pytest.raises(Refused, match=r"loss\.beta is 0"):
        dataclasses.replace(DPO(), beta=0.0)
