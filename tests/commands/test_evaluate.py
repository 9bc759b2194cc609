"""`llmjax evaluate`, and tasks asked while a run trains, stopped and started again."""

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from place import Place, prepared

from llmjax import cli
from llmjax.commands import evaluate as command
from llmjax.commands import train as training
from llmjax.data.dataset import Synthetic, Text
from llmjax.data.tokenizer import Bytes
from llmjax.errors import DATA, DONE, PREEMPTED, Refused
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.run import Evaluation, Run, from_json, to_json
from llmjax.train.loss import NextToken
from llmjax.train.records import read
from meshes import local

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra evaluate)"
)
TASK = """task: local
dataset_path: json
dataset_kwargs: {{data_files: {folder}/questions.jsonl, cache_dir: {folder}/cache}}
test_split: train
output_type: multiple_choice
doc_to_text: "a quick brown"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module", autouse=True)
def no_cache_of_programs() -> Iterator[None]:
    """Runs that train in this process would leave theirs to all tests that come after."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, a task file, and a trained run of each kind of data."""
    folder = tmp_path_factory.mktemp("evaluate")
    prepared(folder)
    line = json.dumps(dict(choices=["fox", "cow"])) + "\n"
    (folder / "questions.jsonl").write_text(line * 24)
    (folder / "task.yaml").write_text(TASK.format(folder=folder))
    for run in (of(folder, "text"), dataclasses.replace(of(folder, "made_up"), data=Synthetic(vocab=64, rows=64))):
        assert training.train(run) == DONE
    return folder


def of(folder: Path, name: str, **changes) -> Run:
    run = Run(
        model=Llama(vocab=260, layers=1, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=32),
        data=Text(path=str(folder / "corpus"), tokenizer=Bytes(), heldout=0.5),
        optimizer=AdamW(lr=3e-3),
        loss=NextToken(),
        mesh=local.cluster,
        steps=8,
        batch=8,
        sequence=32,
        dtype="float32",
        eval_every=4,
        eval_rows=8,
        name=name,
        runs=str(folder / "runs"),
    )
    return dataclasses.replace(run, **changes)


def asked(folder: Path, name: str = "text", **more) -> command.Options:
    return command.Options(name, runs=str(folder / "runs"), json=folder / "found.json", **more)


def evaluated(folder: Path, name: str = "text", **more) -> dict:
    assert command.evaluate(asked(folder, name, **more)) == DONE
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", ["text", "made_up"])
def test_the_loss_is_the_one_that_training_ended_with(folder, name, capsys):
    found = evaluated(folder, name)
    last = [line for line in read(folder / "runs" / name / "metrics.jsonl") if "eval_loss" in line][-1]
    loss = found["heldout"]["loss"]
    assert loss["value"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert found["heldout"].get("bits_per_byte", {}).get("value") == pytest.approx(last.get("bits_per_byte"))
    assert found["heldout"]["targets"] == last["eval_targets"]
    assert (found["step"], found["devices"]) == (8, len(jax.devices()))
    shown = capsys.readouterr().out
    assert f"{loss['value']:.4f}" in shown and "step 8 of" in shown
    if loss["low"] is not None:
        assert f"{loss['low']:.4f} to {loss['high']:.4f}" in shown


def test_any_text_is_evaluated_whole(folder):
    text = "a quick brown fox\n" * 30
    (folder / "more").mkdir()
    for n in range(6):
        (folder / "more" / f"{n}.txt").write_text(text + str(n))
    found = evaluated(folder, data=str(folder / "more"))["heldout"]
    assert found["targets"] == 6 * (len(text) + 2) - 1
    assert found["bits_per_byte"]["low"] < found["bits_per_byte"]["value"] < found["bits_per_byte"]["high"]
    alone = evaluated(folder, data=str(folder / "more" / "0.txt"))["heldout"]
    assert alone["loss"]["value"] == pytest.approx(found["loss"]["value"], rel=0.05) and alone["loss"]["low"] is None


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("txet", {}, "no run 'txet' in .*: did you mean text"),
        ("text", dict(step=3), "no checkpoint of step 3: choose one of 8"),
        ("text", dict(mesh="locl"), "no mesh named 'locl': did you mean local"),
        ("text", dict(data="nowhere.txt"), "data is 'nowhere.txt', which does not exist"),
        ("text", dict(limit=-1), "limit is -1"),
        ("made_up", dict(tasks=("task.yaml",)), "tasks needs a tokenizer, and .*made_up has no tokenizer.json"),
        ("made_up", dict(data="corpus"), "data is 'corpus' needs a tokenizer"),
        ("moved", {}, "the run's own data is not to be had here: .*gone.* does not exist.*--data"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_a_sentence(folder, name, more, message):
    moved = folder / "runs" / "moved"
    if name == "moved" and not moved.exists():
        moved.mkdir()
        text = (folder / "runs" / "text" / "run.json").read_text()
        (moved / "run.json").write_text(text.replace(str(folder / "corpus"), str(folder / "gone")))
    with pytest.raises(Refused, match=message):
        command.evaluate(asked(folder, name, **more))


def test_a_store_of_another_tokenizer_is_refused(folder):
    from llmjax.data.tokenizer import BPE

    out, other = folder / "store", folder / "bpe.json"
    other.write_text(BPE(vocab=300).build(["a quick brown fox"]).to_str())
    words = ["build", str(out), "--source", str(folder / "corpus"), "--tokenizer", str(other), "--heldout", "0.3"]
    assert cli._data(words) == DONE
    with pytest.raises(Refused, match="is not the tokenizer of") as refused:
        command.evaluate(asked(folder, data=str(out)))
    assert refused.value.code == DATA


@needs_lm_eval
def test_tasks_are_asked_in_place_of_text(folder, capsys):
    found = evaluated(folder, tasks=(str(folder / "task.yaml"),), limit=5)
    assert "heldout" not in found and found["tasks"]["local"]["acc"]["value"] in (0, 1)
    assert "local" in capsys.readouterr().out


class Asked:
    """Asked to stop as soon as the records have the evaluation of step 4, so that its tasks are being asked."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def asked(self) -> bool:
        return any(line["step"] == 4 and "eval_loss" in line for line in read(self.folder / "metrics.jsonl"))

    def save_first(self) -> None:
        pass


@needs_lm_eval
def test_a_run_that_was_stopped_asks_what_it_missed_and_asks_nothing_twice(folder):
    run = of(folder, "stopped", eval=Evaluation((str(folder / "task.yaml"),), tasks_every=4))
    metrics = run.folder() / "metrics.jsonl"

    def scored() -> list[int]:
        return [line["step"] for line in read(metrics) if "task/local/acc" in line]

    assert training.train(run, notice=Asked(run.folder())) == PREEMPTED
    assert [line["step"] for line in read(metrics) if "step_ms" in line] == [1, 2, 3, 4] and scored() == []
    assert training.train(run) == DONE
    assert scored() == [4, 8]
    order = [("task" if "task/local/acc" in line else line["step"]) for line in read(metrics)]
    assert order.index("task") < order.index(5)
    board = next((run.folder() / "tb").iterdir()).parent
    assert any(b"task/local/acc" in path.read_bytes() for path in board.iterdir())


@needs_lm_eval
def test_what_cannot_be_asked_is_refused_before_anything_is_written(folder):
    run = of(folder, "refused", eval=Evaluation((str(folder / "gone.yaml"),)))
    with pytest.raises(Refused, match=r"gone\.yaml, which is no file"):
        training.train(run)
    made_up = dataclasses.replace(run, data=Synthetic(vocab=64, rows=64))
    with pytest.raises(Refused, match="the run's data is no text"):
        training.train(made_up)
    assert not run.folder().exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(tasks_every=5), "eval.tasks_every is 5, but there are no tasks: name some with --eval.tasks"),
        (dict(tasks=("x",), tasks_every=-1), "eval.tasks_every is -1"),
        (dict(tasks=("x",), tasks_limit=-1), "eval.tasks_limit is -1"),
    ],
)
def test_fields_of_tasks_that_cannot_be_are_refused(folder, fields, message):
    with pytest.raises(Refused, match=message):
        training.train(of(folder, "refused", eval=Evaluation(**fields)))


def test_a_run_json_from_before_there_were_tasks_is_read():
    run = of(Path("x"), "older")
    text = to_json(run)
    del text["eval"]
    assert from_json(text) == run


def test_a_run_json_cannot_have_task_files_run_but_names_of_tasks_it_can(folder, capsys):
    path = folder / "other.json"
    run = of(folder, "other", eval=Evaluation(("hellaswag", "beside.yaml"), tasks_every=4))
    path.write_text(json.dumps(to_json(run)))
    assert cli._experiment([str(path)], "")[0].eval == Evaluation()
    assert "task files, which may run code: add --eval.tasks hellaswag beside.yaml" in capsys.readouterr().err
    named = dataclasses.replace(run, eval=Evaluation(("hellaswag",), tasks_every=4))
    path.write_text(json.dumps(to_json(named)))
    assert cli._experiment([str(path)], "")[0].eval == named.eval


@needs_lm_eval
@pytest.mark.slow
def test_two_processes_score_as_one_does(folder):
    place, name = Place(folder), "task/local/bits_per_byte"
    task = (
        TASK.format(folder=folder).replace("multiple_choice", "loglikelihood_rolling").replace("acc", "bits_per_byte")
    )
    (folder / "rolling.yaml").write_text(
        task.replace("doc_to_target: 0", 'doc_to_target: "{{choices[0]}} {{choices}}"')
    )
    words = ("train", "text.py", "--steps", "8", "--save-every", "0", "--eval.tasks", "rolling.yaml")
    together = place.run("launch", "--processes", "2", "--devices", "2", *words, "--layout", "fsdp", "--name", "two")
    alone = place.run(*words, "--name", "one")
    assert (together.code, alone.code) == (DONE, DONE), together.err + alone.err
    two, one = (
        next(line[name] for line in read(place.runs / run / "metrics.jsonl") if name in line) for run in ("two", "one")
    )
    assert two == pytest.approx(one, rel=1e-4)
