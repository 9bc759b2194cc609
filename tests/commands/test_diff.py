"""`llmjax diff`: what differs between two runs, what it changes, and where their curves part."""

import dataclasses
import json

import pytest

from llmjax import layout as layouts
from llmjax.commands.diff import Options, diff
from llmjax.errors import Refused
from llmjax.run import load, to_json

RUN = load("stdlib_tiny")
LOSSES = [3.0, 2.5, 2.0, 1.5]


@pytest.fixture
def runs(tmp_path):
    """Makes run directories below `tmp_path`."""

    def make(name, run=RUN, losses=LOSSES, env=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(to_json(run)))
        if env is not None:
            (folder / "env.json").write_text(env if isinstance(env, str) else json.dumps(env))
        lines = [json.dumps(dict(step=step, loss=loss)) for step, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        return folder

    return make


def found(tmp_path, a, b):
    file = tmp_path / "diff.json"
    assert diff(Options(str(a), str(b), runs=str(tmp_path), json=str(file))) == 0
    return json.loads(file.read_text())


def test_fields_are_grouped_by_what_they_change(runs, tmp_path, capsys):
    other = dataclasses.replace(RUN, seed=1, layout=layouts.fsdp, save_every=5, name="other", runs="elsewhere")
    runs("a"), runs("b", other)
    facts = found(tmp_path, "a", "b")
    kinds = {change["field"]: change["kind"] for change in facts["changes"]}
    assert kinds == dict(seed="numbers", layout="speed", save_every="records", name="records", runs="records")
    out = capsys.readouterr().out
    order = [out.index(x) for x in ("Changes the numbers", "\n  seed", "Changes the speed only", "\n  layout  dp")]
    assert order == sorted(order) and "elsewhere" not in out
    assert "These are different runs: seed decides what is computed." in out


def test_curves_that_are_equal_part_by_rounding_or_leave_each_other(runs, tmp_path, capsys):
    runs("a"), runs("same"), runs("near", losses=[3.0, 2.5, 2.0001, 1.5]), runs("far", losses=[3.0, 2.6, 2.3])
    assert found(tmp_path, "a", "same")["curves"] == dict(steps=4, parts=None, leaves=None, largest=0, last=[1.5, 1.5])
    assert "all 4 common steps are equal in every bit" in capsys.readouterr().out
    near = found(tmp_path, "a", "near")["curves"]
    assert (near["parts"], near["leaves"]) == (3, None) and near["largest"] == pytest.approx(5e-5)
    far = found(tmp_path, "a", "far")["curves"]
    assert (far["steps"], far["parts"], far["leaves"], far["last"]) == (3, 2, 2, [2.0, 2.3])


def test_versions_and_data_are_compared_where_both_say_them(runs, tmp_path, capsys):
    runs("a", env=dict(versions=dict(jax="0.10.2", numpy="2"), data="aaaa", device_count=1, mesh=dict(fsdp=1)))
    runs("b", env=dict(versions=dict(jax="0.12.0", numpy="2"), data="bbbb", device_count=8, mesh=dict(fsdp=8)))
    runs("torn", env='{"versions": {"jax"')
    facts = found(tmp_path, "a", "b")
    told = {change["field"]: (change["before"], change["after"]) for change in facts["environment"]}
    assert told == {
        "device_count": (1, 8),
        "data": ("aaaa", "bbbb"),
        "jax": ("0.10.2", "0.12.0"),
        "axes as they were": ("one device", "fsdp 8"),
    }
    assert facts["meaning"] == "These are different runs: data decides what is computed."
    assert found(tmp_path, "a", "torn")["meaning"] == "They compute the same numbers."


def test_a_run_is_compared_with_an_experiment_and_a_run_json_of_an_older_version(runs, tmp_path):
    folder = runs("a", dataclasses.replace(RUN, steps=7))
    old = {name: value for name, value in to_json(RUN).items() if name not in ("loss_chunk", "guard", "keep_best")}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert [change["field"] for change in found(tmp_path, folder, "stdlib_tiny")["changes"]] == ["steps"]
    assert [change["field"] for change in found(tmp_path, tmp_path / "old.json", folder / "run.json")["changes"]] == [
        "steps"
    ]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("aa", "aa is neither a run in .* nor an experiment: did you mean a"),
        ("mine.py", "mine.py does not exist"),
        ("x/run.json", "x/run.json cannot be read"),
    ],
)
def test_what_is_neither_run_nor_experiment_is_one_sentence(runs, tmp_path, word, sentence):
    runs("ab")
    with pytest.raises(Refused, match=sentence):
        diff(Options("ab", word, runs=str(tmp_path)))
