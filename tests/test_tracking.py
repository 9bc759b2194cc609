"""A tracker gets what it should and nothing secret, and whatever it does, training goes on without it."""

import dataclasses
import threading

import pytest

from llmjax import cli, tracking
from llmjax.errors import Refused
from llmjax.run import Run, differences, from_json, to_json
from llmjax.trackers.mlflow import MLflow
from llmjax.trackers.tensorboard import TensorBoard
from llmjax.trackers.trackio import Trackio
from llmjax.trackers.wandb import WandB
from llmjax.tracking import named, told
from llmjax.train.records import Records, read


@dataclasses.dataclass(frozen=True)
class Broken:
    """A tracker that is told everything and fails where it is asked to."""

    at: str = ""
    heard: list = dataclasses.field(default_factory=list)
    free: threading.Event = dataclasses.field(default_factory=threading.Event)

    def ready(self):
        pass

    def open(self, about):
        self.heard.append(about)
        self.fail("open")
        return self

    def metrics(self, step, numbers):
        self.heard.append((step, dict(numbers)))
        self.fail("metrics")

    def text(self, step, name, text):
        self.heard.append((step, name, text))

    def close(self):
        self.fail("close")
        self.heard.append("closed")

    def fail(self, where):
        if self.at == f"hang at {where}":
            self.free.wait()
        if self.at == f"exit at {where}":
            raise SystemExit(3)
        if self.at == where:
            raise ValueError(f"no {where}\nhere")


def followed(tmp_path, *trackers, steps=5, config=()):
    """What is said while trackers follow a few steps, and the run's events."""
    said = []
    with Records(tmp_path, trackers, dict(config), said.append) as records:
        for step in range(1, steps + 1):
            records.metrics(dict(step=step, loss=1 / step, mfu=None, grad_norm=float("inf"), skipped=True))
        records.text(steps, "samples", "a text")
    return said, read(tmp_path / "events.jsonl")


def test_a_tracker_is_told_the_finite_numbers_of_every_step_in_order_the_texts_and_the_end(tmp_path):
    tracker = Broken()
    assert followed(tmp_path, tracker, config=dict(steps=5)) == ([], [])
    about, *heard = tracker.heard
    assert (about.folder, about.name, about.config, about.start) == (tmp_path, tmp_path.name, dict(steps=5), 0)
    assert heard == [*((step, dict(loss=1 / step)) for step in range(1, 6)), (5, "samples", "a text"), "closed"]


@pytest.mark.parametrize("at", ["open", "metrics", "close", "exit at open", "exit at metrics", "exit at close"])
def test_a_tracker_that_fails_is_named_once_and_left_out_while_the_others_and_the_records_go_on(tmp_path, at):
    good = Broken()
    said, events = followed(tmp_path, Broken(at), good)
    assert len(said) == 1 and said[0].startswith("Training goes on without the tracker Broken: ")
    assert ("SystemExit" if at.startswith("exit") else f"ValueError: no {at} here") in said[0]
    assert [(event["kind"], event["tracker"]) for event in events] == [("tracker_failed", "Broken")]
    assert good.heard[-1] == "closed" and len(read(tmp_path / "metrics.jsonl")) == 5


@pytest.mark.parametrize("at", ["hang at open", "hang at metrics", "hang at close"])
def test_a_tracker_that_hangs_is_left_and_seen_to_hang(tmp_path, at, monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE", 0.2)
    tracker = Broken(at)
    said, _ = followed(tmp_path, tracker)
    assert said == ["Training goes on without the tracker Broken: it did not end within 0.2 s"]
    assert tracking.hanging() and len(read(tmp_path / "metrics.jsonl")) == 5
    tracker.free.set()
    for thread in [t for t in threading.enumerate() if t.name.startswith(tracking.THREAD)]:
        thread.join(60)
    assert not tracking.hanging()


def test_a_tracker_that_cannot_keep_up_is_left_instead_of_filling_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "WAITING", 3)
    tracker = Broken("hang at open")
    said, _ = followed(tmp_path, tracker, steps=9)
    assert said == ["Training goes on without the tracker Broken: it is 3 lines behind"]
    tracker.free.set()


def test_no_tracker_is_told_a_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "hunter2-hunter2")
    tracker = Broken()
    with Records(tmp_path, [tracker], dict(data=dict(url="s3://me:pw123@host/x", note="hunter2-hunter2"))) as records:
        records.metrics(dict(step=1, loss=1.0))
        records.text(1, "samples", "see hunter2-hunter2")
    assert "hunter2" not in str(tracker.heard) and "pw123" not in str(tracker.heard)
    assert (1, "samples", "see ***") in tracker.heard


def test_what_a_failing_tracker_says_holds_no_secret_either(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "no metrics")
    said, events = followed(tmp_path, Broken("metrics"))
    assert "no metrics" not in said[0] and "no metrics" not in str(events)


@pytest.mark.parametrize(
    "text, tracker",
    [
        ("tensorboard", TensorBoard()),
        ("wandb", WandB()),
        ("wandb:project=mine,mode=online", WandB("mine", "online")),
        ("mlflow:store=http://host:5000", MLflow("http://host:5000")),
        ("trackio:project=mine", Trackio("mine")),
    ],
)
def test_a_tracker_is_named_on_the_command_line_and_told_again_in_the_same_words(text, tracker):
    assert named(text) == tracker and told(tracker) == text


@pytest.mark.parametrize(
    "text, said",
    [
        ("wandbb", "did you mean wandb"),
        ("", "there is no tracker named ''"),
        ("wandb:projekt=x", "did you mean project"),
        ("wandb:mode=none", "choose from offline, online"),
        ("tensorboard:x=1", "give nothing after the colon"),
        ("../evil", "there is no tracker"),
    ],
)
def test_what_names_no_tracker_is_refused_in_one_sentence(text, said):
    with pytest.raises(Refused, match=said):
        named(text)


def test_trackers_are_part_of_a_run_and_a_run_from_before_there_were_any_has_tensorboard():
    run = cli.load("stdlib_tiny")
    asked = cli.parse(run, ["--trackers", "tensorboard", "wandb:project=mine"], "train")
    assert asked.trackers == (TensorBoard(), WandB("mine"))
    assert cli.parse(run, ["--trackers"], "train").trackers == ()
    assert from_json(to_json(asked)) == asked
    old = {name: value for name, value in to_json(run).items() if name != "trackers"}
    assert from_json(old).trackers == run.trackers == (TensorBoard(),) and not differences(old, to_json(run))
    assert isinstance(from_json(old), Run)
