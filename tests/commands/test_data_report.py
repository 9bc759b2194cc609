"""`llmjax train --data.report` shows what a run will see, refuses what a run would, and trains nothing."""

import dataclasses
import json
import re

import pytest

from experiments.stdlib_tiny import run as tiny
from llmjax import cli
from llmjax.data.build import Build, build
from llmjax.data.mixture import Mixture, Phase
from llmjax.data.stored import Store
from llmjax.errors import Refused
from llmjax.notice import Notice


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    for name, count in (("a", 400), ("b", 200)):
        lines = "".join(json.dumps(dict(text=f"{name} {n} " + "x" * (n % 70))) + "\n" for n in range(count))
        (root / f"{name}.jsonl").write_text(lines)
        build(Build((str(root / f"{name}.jsonl"),), heldout=0.1), root / name, 1, lambda _: None)
    a, b = Store(str(root / "a"), "best_fit", order="short_first"), Store(str(root / "b"))
    data = Mixture((a, b), (0.75, 0.25), (Phase(8, (0.5, 0.5)),))
    return dataclasses.replace(tiny, data=data, sequence=64, steps=16, batch=8, runs=str(root / "runs"), name="m")


def told(run, capsys, *words):
    with Notice() as notice:
        code = cli._train(run, ["--data.report", *words], notice)
    return code, capsys.readouterr().out


def test_of_each_source_tokens_padding_cuts_shares_and_epochs_are_shown_and_nothing_is_trained(mixed, capsys):
    code, out = told(mixed, capsys)
    root = mixed.runs.removesuffix("/runs")
    assert code == 0 and not (mixed.folder()).exists()
    lines = {tuple(line.split()[:1]): line.split() for line in out.splitlines()}
    asked = [line.split() for line in out.splitlines() if line.startswith(root)]
    dataset = mixed.data.open(64, mixed.folder() / "cache")
    for source, name, held, seen in zip(dataset.sources, "ab", asked[:2], asked[2:], strict=True):
        facts = source.store.record["train"]
        assert held[0] == f"{root}/{name}" and held[1] == f"{source.size('train'):,}"
        assert f"{facts['documents']:,}" in held and held[-1] == source.order
        rows = 80 if name == "a" else 48  # 6 and 4 of 8 in each of 8 steps
        assert seen[1] == seen[2] == f"{rows / 128:.3%}" and seen[3] == str(rows)
        assert seen[-1] == f"{rows / source.size('train'):.2f}"
    assert lines[("0",)][1:] == ["75.000%", "25.000%"] and lines[("8",)][1:] == ["50.000%", "50.000%"]
    assert "Nothing was run." in out and re.search(r"best_fit: \d+ rows", out)


def test_one_store_or_any_other_data_is_reported_as_well(mixed, capsys):
    code, out = told(dataclasses.replace(mixed, data=mixed.data.sources[1]), capsys, "--steps", "3")
    assert code == 0 and "100.000%" in out and "3 steps x 8 rows of 64" in out


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda data: dataclasses.replace(data, epochs=0.2), "gone through"),
        (lambda data: dataclasses.replace(data.sources[1], epochs=0.5), "gone through"),
        (lambda data: dataclasses.replace(data.sources[1], epochs=0.25), "lower --steps"),
    ],
)
def test_what_a_run_would_refuse_is_refused(mixed, capsys, data, said):
    with pytest.raises(Refused, match=said) as refused:
        told(dataclasses.replace(mixed, data=data(mixed.data)), capsys)
    assert refused.value.code == 65
