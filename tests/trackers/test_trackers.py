"""Each tracker keeps what a run tells it where its own tools find it, over several starts, and nothing secret."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest

from llmjax.trackers.mlflow import MLflow
from llmjax.trackers.tensorboard import TensorBoard
from llmjax.trackers.trackio import Trackio
from llmjax.trackers.wandb import WandB
from llmjax.tracking import identity
from llmjax.train.records import Records

SECRET = "hunter2-hunter2"
CONFIG = dict(steps=4, model=dict(width=64), data=dict(note=SECRET))


def needs(module: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A run directory that was begun, killed after step 3 and continued from step 2; nothing was said of a failure."""
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setattr(sys, "argv", ["llmjax", "train", f"--data.note={SECRET}"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    return tmp_path / "runs" / "mine"


STARTS = ((0, (1, 2, 3)), (2, (3, 4)))


def train(folder: Path, tracker, starts=STARTS) -> None:
    said: list[str] = []
    for start, steps in starts:
        with Records(folder, [tracker], CONFIG, said.append) as records:
            records.rewind(start)
            for step in steps:
                records.metrics(dict(step=step, loss=1 / step, lr=0.5))
            records.text(steps[-1], "samples", f"def <b> & {SECRET}")
    assert said == []


def expect(losses: list[tuple[int, float]]) -> None:
    assert [step for step, _ in sorted(losses)] == [1, 2, 3, 3, 4]
    assert [loss for _, loss in sorted(losses)] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 3, 1 / 4])


def holding(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_tensorboard_has_a_file_for_each_start_with_the_losses_and_the_texts(folder):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    train(folder, TensorBoard())
    files = sorted((folder / "tb").iterdir())
    events = []
    for file in files:
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            content = data[at + 12 : at + 12 + size]
            assert masked_crc32c(content).to_bytes(4, "little") == data[at + 12 + size : at + 16 + size]
            events.append(Event.FromString(content))
            at += 16 + size
    losses = [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == "loss"]
    expect(losses)
    assert [e.step for e in events if e.session_log.status] == [3]  # TensorBoard hides what came before from there on
    texts = [v.tensor.string_val[0] for e in events for v in e.summary.value if "samples" in v.tag]
    assert texts == [b"def <b> & ***"] * 2 and not holding(folder, SECRET)


def wandb_history(file: Path, rows: int) -> tuple[list[dict[str, str]], set[str]]:
    """(rows, names of projects) of an offline file, once it has so many rows.

    A process of wandb's own writes it, and goes on after its `finish` has returned.
    """
    from wandb.proto import wandb_internal_pb2

    until = time.monotonic() + 30
    while True:
        found, projects, data, at = [], set(), file.read_bytes(), 7
        while at + 7 < len(data):  # a record has a header of 7 bytes: checksum, size, kind
            size = int.from_bytes(data[at + 4 : at + 6], "little")
            record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + size])
            at += 7 + size
            if record.history.item:
                found.append({i.key or i.nested_key[0]: i.value_json for i in record.history.item})
            projects.add(record.run.project)
        if len(found) >= rows or time.monotonic() > until:
            return found, projects
        time.sleep(0.2)


@needs("wandb")
def test_wandb_writes_every_start_offline_in_its_own_format_under_the_id_of_the_run(folder):
    seen = set()
    for start in STARTS:
        train(folder, WandB(project="demo"), [start])
        (file,) = set((folder.parent / "wandb").glob("offline-run-*/*.wandb")) - seen
        seen.add(file)
        assert file.name == f"run-{identity(folder / 'wandb')[0]}.wandb"
        rows, projects = wandb_history(file, len(start[1]) + 1)  # and a text
        losses = [(int(row["step"]), float(row["loss"])) for row in rows if "loss" in row]
        assert losses == [(step, pytest.approx(1 / step)) for step in start[1]] and "demo" in projects
        time.sleep(1)  # the folder of a start is named by the second
    assert holding(folder.parent, "width") and not holding(folder.parent, SECRET)
    assert not [path for path in folder.rglob("*") if path.is_symlink()]  # a run directory has none


@needs("mlflow")
@needs("sqlalchemy")
def test_mlflow_has_one_run_for_all_starts_with_parameters_metrics_and_texts(folder):
    from mlflow.tracking import MlflowClient

    train(folder, MLflow(experiment="demo"))
    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "mine"
    assert run.data.params == {"steps": "4", "model.width": "64", "data.note": "***"}
    losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    expect(losses)
    texts = list((folder.parent / "mlflow").rglob("samples/*.txt"))
    assert {path.read_text() for path in texts} == {"def <b> & ***"} and not holding(folder.parent, SECRET)


@needs("trackio")
def test_trackio_has_one_run_for_all_starts_with_the_losses(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    train(folder, Trackio(project="demo"))
    (run,) = trackio.Api().runs("demo")
    assert run.name.startswith("mine_") and run.config["model"] == dict(width=64)
    rows = SQLiteStorage.get_logs("demo", run.name)
    expect([(row["step"], row["loss"]) for row in rows if "loss" in row])
    assert not holding(tmp_path, SECRET)
