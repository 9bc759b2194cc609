"""Tracing steps leaves every number, and the run's own records, as they are without it."""

import dataclasses
import json

import pytest

from llmjax.commands.train import train
from llmjax.errors import Refused
from llmjax.models.llama import Llama
from llmjax.optim.schedules import Constant
from llmjax.report.profile import newest, read
from llmjax.run import Profile, fingerprint, from_json, load, to_json
from llmjax.train.display import Display
from llmjax.train.profile import window
from llmjax.train.records import read as lines_of

TINY = Llama(vocab=64, layers=1, width=32, heads=2, kv_heads=2, head_dim=16, ff=64, positions=16)


def tiny(folder, name, **fields):
    from llmjax.data.dataset import Synthetic

    run = load("stdlib_tiny")
    optimizer = dataclasses.replace(run.optimizer, schedule=Constant())
    fields = dict(model=TINY, data=Synthetic(vocab=64, rows=64), optimizer=optimizer, prompts=(), eval_every=0,
                  save_every=0, steps=8, batch=8, sequence=16) | fields  # fmt: skip
    return dataclasses.replace(run, runs=str(folder), name=name, **fields)


def losses(folder):
    return [(line["step"], repr(line["loss"])) for line in lines_of(folder / "metrics.jsonl") if "loss" in line]


def test_a_traced_run_has_the_same_numbers_and_a_trace_of_just_these_steps(tmp_path, capsys):
    traced = tiny(tmp_path, "traced", profile=Profile(start=4, steps=3))
    assert train(traced) == train(tiny(tmp_path, "plain")) == 0
    assert losses(tmp_path / "traced") == losses(tmp_path / "plain")
    found = read(newest(tmp_path / "traced"))
    assert found.steps == (4, 5, 6) and found.shares["compute"] > 0
    assert not (tmp_path / "plain" / "profile").exists()
    said = f"Traced steps 4 to 6: `llmjax profile {tmp_path / 'traced'}` shows what they were spent on."
    assert said in capsys.readouterr().out.replace("\n", " ")
    (event,) = [event for event in lines_of(tmp_path / "traced" / "events.jsonl") if event["kind"] == "profile"]
    assert (event["first"], event["last"]) == (4, 6)


def test_a_trace_that_cannot_be_written_does_not_stop_training(tmp_path, capsys):
    run = tiny(tmp_path, "full", profile=Profile(start=3, steps=2))
    run.folder().mkdir(parents=True)
    (run.folder() / "profile").write_text("in the way")
    assert train(run) == 0
    assert [step for step, _ in losses(run.folder())] == list(range(1, 9))
    assert "Training goes on without a trace: " in capsys.readouterr().out
    assert "profile_failed" in {event["kind"] for event in lines_of(run.folder() / "events.jsonl")}


def test_which_steps_are_traced_is_no_part_of_what_a_run_is(tmp_path):
    run = tiny(tmp_path, "x")
    other = dataclasses.replace(run, profile=Profile(start=4, steps=3))
    assert fingerprint(run) == fingerprint(other)
    older = json.loads(json.dumps(to_json(run)))
    del older["profile"]
    assert from_json(older).profile == Profile() == Profile(0, 0)


def test_a_trace_begins_where_it_was_asked_or_when_the_process_is_warm():
    assert window(Profile(start=20, steps=5), 0) == (20, 25)
    assert window(Profile(steps=2), 0) == (3, 5) and window(Profile(steps=2), 100) == (103, 105)


@pytest.mark.parametrize(
    ("profile", "sentence"),
    [
        (Profile(start=3), "profile.start is 3, but profile.steps is 0: say how many"),
        (Profile(start=9, steps=1), "profile.start is 9, but the run has 8 steps: give a step that it takes"),
        (Profile(start=-1, steps=1), "profile.start is -1: give at least 0"),
    ],
)
def test_steps_that_cannot_be_traced_are_refused(tmp_path, profile, sentence):
    with pytest.raises(Refused, match=sentence):
        train(tiny(tmp_path, "x", profile=profile), display=Display(quiet=True))
    assert not list(tmp_path.iterdir())
