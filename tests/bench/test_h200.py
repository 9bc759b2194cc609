"""The script for one GPU keeps what it has measured, whatever happens to the rest."""

import json

from experiments import bench_h200
from experiments.bench_h200 import Case, Options, measure_all

TINY = "bench_tiny --model.layers 1 --model.width 32 --batch 2 --repeats 2 --warmup 0"


def test_a_case_that_fails_or_takes_too_long_leaves_the_others(tmp_path, capsys):
    written = tmp_path / "out.json"
    cases = Case("no_such_model", 60), Case(TINY, 0.2), Case(TINY, 120)
    good = measure_all(cases, Options(json=str(written)))[-1]
    refused, late, kept = json.loads(written.read_text())["cases"]
    assert "there is no experiment named 'no_such_model'" in refused["failed"]
    assert late["failed"] == "it was ended after 0 s"
    assert kept == good and good["tokens_per_s"] > 0 and good["run"]["batch"] == 2
    assert f"{good['tokens_per_s']:,.0f} tokens/s" in capsys.readouterr().out


def test_nothing_is_begun_when_the_time_is_over(tmp_path):
    found = measure_all([Case(TINY, 60)], Options(seconds=1, json=str(tmp_path / "out.json")))
    assert [case["failed"] for case in found] == ["no time was left"]


def test_all_cases_are_runs_that_exist_and_fit_the_time():
    from llmjax import cli
    from llmjax.checks import check
    from llmjax.mesh import Axes
    from llmjax.run import Run

    for case in bench_h200.H200:
        name, *words = case.words.split()
        run = cli.parse(cli.load(name), words, "bench")
        assert isinstance(run, Run)
        check(run, Axes(1, 1, 1, 1, 1, 1), run.accumulate)
    assert sum(case.seconds for case in bench_h200.H200[:2]) < Options().seconds
