"""Images, text classes and the tutorial's points train on the loop of language models, alike on any devices."""

import dataclasses
import importlib
import io
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.digits import Digits
from experiments.prose_or_code import labelled
from llmjax.commands.train import train
from llmjax.errors import Refused
from llmjax.mesh import Cluster
from llmjax.train.display import Display
from llmjax.train.records import read
from meshes import cpu8
from meshes.chips import CPU

ONE = Cluster("one", CPU, chips=1)


@pytest.fixture(autouse=True)
def as_for_users():
    """Convolutions that are compiled as the tests' programs are take minutes; and no program comes from a cache."""
    changed = {"jax_disable_most_optimizations": False, "jax_compilation_cache_dir": ""}
    before = {name: jax.config.values[name] for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def trained(name: str, mesh: Cluster, runs: Path, **fields) -> tuple[list[dict], list[dict], str]:
    """(steps, evaluations, what was shown) of a run of an experiment."""
    run = importlib.import_module(f"experiments.{name}").run
    run, shown = dataclasses.replace(run, mesh=mesh, name=mesh.name, runs=str(runs), **fields), io.StringIO()
    assert train(run, display=Display(console=Console(file=shown, width=200))) == 0
    lines = read(run.folder() / "metrics.jsonl")
    return [x for x in lines if "loss" in x], [x for x in lines if "eval_loss" in x], shown.getvalue()


@pytest.mark.parametrize(
    ("name", "fields", "before", "bar", "targets"),
    [
        ("digits", dict(steps=60, eval_every=5, eval_rows=60), 0.6, 0.9, 360),
        ("prose_or_code", dict(steps=60, eval_every=2, eval_rows=160), 0.75, 0.85, 1000),
        ("tutorial_mlp", dict(eval_every=10), 0.7, 0.75, 256),
    ],
)
def test_accuracy_on_held_out_examples_is_shown_recorded_and_the_same_on_eight_devices(
    name, fields, before, bar, targets, tmp_path
):
    if name == "digits":
        pytest.importorskip("sklearn", reason="the extra `images` is not installed")
    one, eight = (trained(name, mesh, tmp_path, **fields) for mesh in (ONE, cpu8.cluster))
    steps, evaluations, shown = one
    assert evaluations[0]["eval_accuracy"] < before and evaluations[-1]["eval_accuracy"] >= bar
    last = evaluations[-1]
    assert last["eval_targets"] == targets and (last["eval_accuracy"] * targets) % 1 in (
        0,
        pytest.approx(0),
        pytest.approx(1),
    )
    sentence = f"held-out loss {last['eval_loss']:.4f}  accuracy {last['eval_accuracy']:.4g}  ({targets:,} targets)"
    assert f"step {last['step']}: {sentence}\n" in shown
    np.testing.assert_allclose([x["loss"] for x in eight[0]][:20], [x["loss"] for x in steps][:20], rtol=1e-4)
    assert eight[1][-1]["eval_loss"] == pytest.approx(last["eval_loss"], rel=0.02)
    assert eight[1][-1]["eval_accuracy"] == pytest.approx(last["eval_accuracy"], abs=2 / targets)


def test_digits_say_what_to_install_where_scikit_learn_is_not(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(Refused, match=r"pip install 'llmjax\[images\]'"):
        Digits().open(1, tmp_path, print)


def test_lines_of_python_are_told_apart_by_where_they_stand():
    lines = (
        '"""What this module is for."""',
        "value = compute(3)  # as before",
        "# A comment on its own",
        "def call(x):",
        '    """Say it',
        '    in two lines."""',
        "    return x + value",
    )
    assert list(labelled("\n".join(lines))) == [
        ("prose", "What this module is for."),
        ("prose", "A comment on its own"),
        ("code", "def call(x):"),
        ("prose", "in two lines."),
        ("code", "return x + value"),
    ]
