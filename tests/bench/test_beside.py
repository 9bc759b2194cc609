"""PyTorch and ours by turns: what cannot be compared is refused, and one that fails does not take the other along."""

import dataclasses
import importlib.util
import sys

import pytest

from llmjax import cli
from llmjax.bench import beside
from llmjax.errors import Refused
from llmjax.models.llama import Llama
from llmjax.optim.sgd import SGD
from llmjax.run import DiLoCo

TINY = Llama(vocab=64, layers=1, width=32, heads=2, kv_heads=2, head_dim=16, ff=64)
RUN = dataclasses.replace(cli.load("bench_small"), model=TINY, batch=4, sequence=16)


def test_without_torch_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"not installed: pip install 'llmjax\[torch\]', or leave out --torch"):
        beside.check(RUN)


@pytest.mark.parametrize(
    "run, words",
    [
        (dataclasses.replace(cli.load("stdlib_moe")), "model is Mixtral, which .*: bench with Llama or GPT2"),
        (dataclasses.replace(RUN, optimizer=SGD()), "optimizer is SGD, which .*: bench with AdamW"),
        (dataclasses.replace(RUN, local=DiLoCo(every=5)), "local.every is not 0"),
    ],
)
def test_what_the_reference_lacks_is_refused(monkeypatch, run, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(Refused, match=words):
        beside.check(run)


def test_the_contenders_take_turns_and_ratios_are_turn_by_turn():
    pytest.importorskip("torch", reason="the extra `torch` is not installed")
    found = beside.compare(RUN, warmup=1, repeats=7)
    for kind in ("ours", "eager", "compiled"):
        assert [len(turn) for turn in found[kind]["turns"]] == [2] * beside.ROUNDS
        assert "failed" not in found[kind] and found[kind]["process_bytes"] > 0
    assert len(beside.ratios(found["ours"]["turns"], found["eager"]["turns"])) == beside.ROUNDS
    assert beside.ratios([[1.0, 2.0, 9.0]], [[4.0]]) == [2.0]


def test_a_contender_that_fails_says_so_and_ours_is_measured_all_the_same(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('no kernel for this card')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = beside.compare(RUN, warmup=0, repeats=1)
    assert found["eager"]["failed"] == found["compiled"]["failed"] == "RuntimeError: no kernel for this card"
    assert len(found["ours"]["turns"]) == beside.ROUNDS and found["ours"]["matmul_flops_per_s"] > 0


def test_a_layout_that_the_machine_has_no_devices_for_is_refused_as_without_torch():
    with pytest.raises(Refused, match="the layout cuts nothing over 'tensor'"):
        beside.compare(dataclasses.replace(RUN, axes=dataclasses.replace(RUN.axes, tensor=2)), warmup=0, repeats=1)
