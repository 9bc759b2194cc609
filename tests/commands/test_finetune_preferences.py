"""A small real run on preferences: the better answers become likelier than the worse, and the reference stays."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
from place import arrays, curve, metrics
from tuned import MODEL, StopAfter

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import Checkpoints, named
from llmjax.commands.train import train
from llmjax.data.dataset import Synthetic
from llmjax.data.preferences import Preferences
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Constant
from llmjax.run import LoRA, Run
from llmjax.train.display import Display
from llmjax.train.loss import NextToken
from llmjax.train.preference import DPO
from llmjax.train.program import make, resolve
from llmjax.train.resume import read_state
from meshes import chips, cpu8

QUIET = Display(quiet=True)


def pair(n: int) -> dict:
    """The better answer repeats the question's letter, the worse another one."""
    draw = random.Random(n)
    letter, other = draw.sample("abcdef", 2)
    prompt = [dict(role="user", content=f"{draw.randrange(1000):03} {letter}")]
    return dict(prompt=prompt, chosen=letter * 3, rejected=other * 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("preferences")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair(n)) + "\n" for n in range(400)))
    run = Run(
        model=MODEL, data=Synthetic(vocab=256, rows=512), optimizer=AdamW(lr=3e-3, schedule=Constant()),
        loss=NextToken(), mesh=cpu8.cluster, layout=layouts.fsdp, steps=2, batch=16, sequence=64, accumulate=1,
        dtype="float32", name="base", runs=str(folder / "runs"),
    )  # fmt: skip
    assert train(run, display=QUIET) == 0
    return run


@pytest.fixture(scope="module", params=["all weights", "adapters"])
def tuned(base, request) -> Run:
    adapters = request.param == "adapters"
    run = dataclasses.replace(
        base, name=request.param.split()[0], data=Preferences(str(base.folder().parents[1] / "pairs.jsonl")),
        loss=DPO(), weights=str(base.folder()), lora=LoRA(rank=8 if adapters else 0), steps=40, save_every=20,
        eval_every=20, optimizer=AdamW(lr=1e-2 if adapters else 4e-3, schedule=Constant()),
    )  # fmt: skip
    assert train(run, display=QUIET) == 0
    return run


def test_the_chosen_answers_win_and_the_margin_grows(tuned):
    lines = [line for line in metrics(tuned.folder()) if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and abs(lines[0]["reward_margin"]) < 1e-5
    first, last = ([line["reward_margin"] for line in part] for part in (lines[1:6], lines[-5:]))
    assert np.mean(last) > np.mean(first) + 0.5
    assert np.mean([line["reward_accuracy"] for line in lines[-5:]]) > 0.9
    assert lines[0]["tokens"] == 2 * 16 * 64
    heldout = metrics(tuned.folder())[-1]
    assert heldout["eval_reward_accuracy"] > 0.8 and heldout["eval_reward_margin"] > 0.5
    assert heldout["eval_loss"] < 0.6


def test_the_reference_is_what_training_began_with_and_is_not_saved(tuned, base):
    devices, before = jax.devices(), arrays(base.folder())
    program = make(tuned, meshes.device_mesh(resolve(tuned, len(devices)), devices), chips.CPU)
    with program.context(), Checkpoints(tuned.folder() / "checkpoints") as checkpoints:
        state = read_state(program, checkpoints, 40)
    frozen = {f"model.{name}": np.asarray(x) for name, x in named(state.frozen).items()}
    assert all(x.tobytes() == before[name].tobytes() for name, x in frozen.items())
    saved = arrays(tuned.folder())
    assert not any(name.startswith("frozen") for name in saved)
    if not tuned.lora.rank:
        assert not np.array_equal(saved["model.head_DV"], before["model.head_DV"])


def test_a_run_that_was_stopped_has_the_curve_of_one_that_was_not(tuned):
    if not tuned.lora.rank:  # the other way is what adapters are tested in
        stopped = dataclasses.replace(tuned, name="stopped")
        assert train(stopped, notice=StopAfter(9), display=QUIET) == 75
        assert train(stopped, display=QUIET) == 0
        assert curve(stopped.folder()) == curve(tuned.folder())
