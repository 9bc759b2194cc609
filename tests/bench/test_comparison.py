"""Two results beside each other: a ratio where it means something, a refusal where it does not."""

import copy
import json

import pytest

from llmjax import cli
from llmjax.bench import comparison
from llmjax.errors import Refused
from llmjax.run import to_json


def result(step_ms: float = 100.0, **fields) -> dict:
    run = to_json(cli.load("bench_small"))
    quartiles = [0.99 * step_ms, 1.01 * step_ms]
    return dict(run=run, step_ms=step_ms, tokens_per_s=4096e3 / step_ms, quartiles_ms=quartiles, compile_s=5.0) | fields


def changed(found: dict, path: str, value) -> dict:
    other = copy.deepcopy(found)
    *words, last = path.split(".")
    inner = other["run"]
    for word in words:
        inner = inner[word]
    inner[last] = value
    return other


def test_a_slower_result_is_seen_and_noise_is_not():
    slower = comparison.compare(result(100), result(125))
    assert slower.faster == pytest.approx(0.8) and slower.clear
    assert ["tokens/s", "40,960", "32,768", "0.800"] in slower.rows
    assert not comparison.compare(result(100), result(101)).clear


def test_layouts_precision_and_machines_may_differ_and_are_named():
    second = changed(result(jax="0.12.0"), "dtype", "bfloat16")
    assert comparison.compare(result(jax="0.10.2"), changed(second, "layout.name", "fsdp")).differs == [
        "layout", "dtype", "jax",
    ]  # fmt: skip


@pytest.mark.parametrize("path, value", [("batch", 8), ("model.width", 64), ("sequence", 128)])
def test_other_models_and_batches_are_not_compared(path, value):
    with pytest.raises(Refused, match=f"results whose {path} differs: measure the same model and batch in both"):
        comparison.compare(result(), changed(result(), path, value))


@pytest.mark.parametrize("written", ["{", "[]", "{}", json.dumps({"run": {}, "step_ms": 1.0})])
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, written):
    (tmp_path / "a.json").write_text(written)
    with pytest.raises(Refused, match=r"compare names .*a\.json, which .*: (give|measure)"):
        comparison.read(str(tmp_path / "a.json"))
