"""The least recomputation within a share of memory, and where arrays may wait."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from experiments import stdlib_tiny
from llmjax import mesh as meshes
from llmjax.errors import Refused
from llmjax.layout import preset
from llmjax.mesh import AXES, Axes, Cluster
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.plan import memory
from llmjax.plan.budget import within
from llmjax.plan.work import REMAT
from llmjax.run import Remat, Run
from llmjax.train import program
from llmjax.train.loss import NextToken
from meshes import chips

SIZES = Axes(**dict.fromkeys(AXES, 1) | dict(fsdp=16))
RUN = Run(
    Llama(vocab=32_768, layers=16, width=2048, heads=16, kv_heads=8, head_dim=128, ff=8192), stdlib_tiny.run.data,
    AdamW(), NextToken(), Cluster("v5e_16", chips.TPU_V5E, chips=16, topology="4x4"), layout=preset("fsdp"), batch=32,
    sequence=1024, accumulate=1,
)  # fmt: skip


def share(run: Run) -> float:
    return memory.predict(run, SIZES, 1).total / chips.TPU_V5E.memory


@pytest.mark.parametrize("policy", REMAT)
def test_a_budget_is_kept_by_the_first_policy_that_can(policy):
    budget = share(dataclasses.replace(RUN, remat=Remat(policy))) + 1e-3
    found = within(dataclasses.replace(RUN, remat=Remat(budget=budget)), SIZES, chips.TPU_V5E)
    assert found.remat == Remat(policy, budget)
    assert share(found) <= budget


def test_each_policy_keeps_less_than_the_one_before():
    kept = [memory.predict(dataclasses.replace(RUN, remat=Remat(policy)), SIZES, 1).activations for policy in REMAT]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(REMAT)


@pytest.mark.parametrize(
    ("chip", "budget", "words"),
    [
        (chips.CPU, 0.5, "remat.budget is 0.5, but the memory of .* is not known: set it to 0 and give --remat.policy"),
        (chips.TPU_V5E, 0.01, "remat.budget is 0.01, but a step takes at least 0.* of a .*: raise it, or see what"),
    ],
)
def test_a_budget_that_nothing_keeps_to_is_refused(chip, budget, words):
    with pytest.raises(Refused, match=words):
        within(dataclasses.replace(RUN, remat=Remat(budget=budget)), SIZES, chip)


@pytest.mark.parametrize(
    ("fields", "chip", "words"),
    [
        (dict(remat=Remat("full", offload=True)), chips.CPU, "remat.offload is True, but a CPU's memory is the host's"),
        (dict(offload_optimizer=True), chips.CPU, "offload_optimizer is True, but a CPU's memory is the host's"),
        (
            dict(remat=Remat(offload=True)),
            chips.TPU_V5E,
            "remat.offload is True, but remat.policy none keeps everythin",
        ),
        (dict(remat=Remat(budget=1.5)), chips.TPU_V5E, "remat.budget is 1.5: give a share"),
        (dict(loss_chunk=-1), chips.TPU_V5E, "loss_chunk is -1: give at least 0"),
        (dict(unroll=-1), chips.TPU_V5E, "unroll is -1: give at least 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(fields, chip, words):
    with pytest.raises(Refused, match=words):
        program.make(dataclasses.replace(RUN, **fields), meshes.abstract_mesh(SIZES), chip)


def test_an_optimizer_on_the_host_gives_the_same_updates_and_its_arrays_stay_there():
    tx, weights = optax.adamw(1e-2), {"w": np.linspace(-1, 1, 8, dtype=np.float32)}
    results = {}
    for name, kind in dict(device=tx, host=program.on_host(tx)).items():
        state = jax.jit(kind.init)(weights)
        for _ in range(2):
            updates, state = jax.jit(kind.update)(weights, state, weights)
        results[name] = np.asarray(updates["w"])
        assert str(jax.typeof(state[0].mu["w"])).startswith("float32<host>") == (name == "host")
    np.testing.assert_array_equal(results["host"], results["device"])
