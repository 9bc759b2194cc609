"""What frees memory, and by how much."""

import dataclasses
import shlex

import pytest

from experiments import llama3_8b_v5p_64, llama3_70b_v6e_256, stdlib_tiny
from llmjax.cli import parse
from llmjax.layout import preset
from llmjax.mesh import AXES, Axes, Cluster
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.plan import knobs, memory
from llmjax.run import Remat, Run
from llmjax.train.loss import NextToken
from meshes import chips, cpu8

MODEL = Llama(vocab=32_768, layers=16, width=2048, heads=16, kv_heads=8, head_dim=128, ff=8192)
SLICE = Cluster("v5e_16", chips.TPU_V5E, chips=16, topology="4x4")
RUN = Run(
    MODEL, stdlib_tiny.run.data, AdamW(), NextToken(), SLICE,
    layout=preset("fsdp_tp"), batch=64, sequence=4096, accumulate=1, name="asked",
)  # fmt: skip
SIZES = Axes(data=2, stage=1, fsdp=4, expert=1, context=1, tensor=2)
LIMIT = chips.TPU_V5E.memory


def found(run: Run = RUN, sizes: Axes = SIZES, limit: float = LIMIT) -> dict[str, knobs.Knob]:
    return {knob.name: knob for knob in knobs.ranked(run, sizes, run.accumulate, limit)}


def test_what_frees_most_comes_first_and_nothing_that_frees_nothing():
    freed = [knob.frees for knob in knobs.ranked(RUN, SIZES, 1, LIMIT)]
    assert freed == sorted(freed, reverse=True)
    assert min(freed) > 0


def test_every_kind_of_knob_is_there_where_it_applies():
    expected = {
        "remat dots", "remat attention", "remat full", "remat full, offloaded", "optimizer offloaded",
        "accumulate x2", "accumulate x4", "batch halved", "fsdp x2 from data", "tensor x2 from data",
        "context x2 from data, cp", "context x2 from data, ring", "sequence parallel", "Lion", "Adafactor", "SGD",
    }  # fmt: skip
    assert expected <= set(found())


def test_a_knob_fits_if_the_changed_run_is_within_the_limit():
    now = memory.predict(RUN, SIZES, 1).total
    for limit in (now // 2, now // 4):
        assert all(knob.fits == (now - knob.frees <= limit) for knob in found(limit=limit).values())
    assert {knob.fits for knob in found(limit=now // 2).values()} == {True, False}


@pytest.mark.parametrize("name", ["remat full", "accumulate x2", "tensor x2 from data", "context x2 from data, ring"])
def test_the_flags_make_the_run_that_was_predicted(name):
    knob = found(dataclasses.replace(RUN, mesh=cpu8.cluster))[name]
    changed = parse(dataclasses.replace(RUN, mesh=cpu8.cluster, axes=SIZES), shlex.split(knob.change), "plan")
    sizes = Axes(*(size or 1 for size in changed.axes.sizes()))
    before = memory.predict(dataclasses.replace(RUN, mesh=cpu8.cluster), SIZES, 1).total
    assert before - memory.predict(changed, sizes, changed.accumulate).total == knob.frees


def test_what_the_checks_refuse_is_left_out():
    one_row = dataclasses.replace(RUN, batch=8)  # on each of eight devices
    assert not {"accumulate x2", "batch halved"} & set(found(one_row))
    assert "tensor x16" not in " ".join(found())
    assert not any("sequence" in name for name in found(dataclasses.replace(RUN, layout=preset("fsdp_tp_sp"))))


def test_a_run_that_computes_everything_again_can_only_offload_what_is_left():
    again = found(dataclasses.replace(RUN, remat=Remat("full")))
    assert [name for name in again if name.startswith("remat")] == ["remat full, offloaded"]
    on_host = found(dataclasses.replace(RUN, remat=Remat("full", offload=True)))
    assert not any(name.startswith("remat") for name in on_host)


def test_a_loss_in_pieces_frees_the_logits_of_the_others():
    model = dataclasses.replace(MODEL, vocab=262_144, layers=2)
    run = dataclasses.replace(RUN, model=model, mesh=cpu8.cluster, sequence=512, remat=Remat("full"), dtype="float32")
    knob = found(run)["loss in 8 pieces"]
    changed = parse(dataclasses.replace(run, axes=SIZES), shlex.split(knob.change), "plan")
    assert changed.loss_chunk == 64
    logits = 64 // 8 * 512 * 262_144 // 2 * 4  # bytes of a device's
    assert 7 / 8 * logits < knob.frees < 7 / 8 * 4 * logits
    assert "loss in 2 pieces" in found(run)


def test_nothing_is_offloaded_from_a_cpu():
    assert not any("offloaded" in name for name in found(dataclasses.replace(RUN, mesh=cpu8.cluster)))


def test_the_devices_stay_the_same():
    for change in knobs._changes(RUN, SIZES, 1):
        product = 1
        for axis in AXES:
            product *= getattr(change.sizes, axis)
        assert product == 16, change.name


def test_an_optimizer_frees_the_state_that_it_does_not_have():
    state = memory.predict(RUN, SIZES, 1).optimizer
    lion, sgd = found()["Lion"], found()["SGD"]
    assert abs(lion.frees - state / 2) < 100
    assert abs(sgd.frees - state) < 100
    assert lion.change == "optimizer=Lion()"


@pytest.mark.parametrize("run", [llama3_8b_v5p_64.run, llama3_70b_v6e_256.run], ids=["8b", "70b"])
def test_the_experiments_have_knobs(run):
    sizes = Axes(*(size or 1 for size in run.axes.sizes()))
    assert knobs.ranked(run, sizes, run.accumulate, run.mesh.chip.memory)
