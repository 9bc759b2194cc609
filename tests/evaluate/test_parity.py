"""Parity finds equal numbers equal, and says where unequal ones begin."""

import dataclasses
import functools
import importlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from llmjax import cli
from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.errors import Refused
from llmjax.evaluate import parity
from llmjax.evaluate.parity import Trace, compare
from llmjax.models import nn
from llmjax.train.program import resolve
from meshes import cpu8


@functools.cache
def traced(layout: layouts.Layout, devices: int) -> Trace:
    run = parity.small(importlib.import_module("experiments.llama3_8b_v5p_64").run)
    run = dataclasses.replace(
        run, layout=layout, mesh=cpu8.cluster, axes=meshes.Axes(), model=dataclasses.replace(run.model, layers=2)
    )
    mesh = meshes.device_mesh(resolve(run, devices), jax.devices()[:devices])
    return parity.trace(run, mesh, cpu8.cluster.chip, 3)


def test_equal_numbers_pass():
    verdict = compare(traced(layouts.dp, 1), traced(layouts.fsdp_tp, 8))
    assert verdict.passed and verdict.first == ""
    assert 0 < verdict.loss < 1e-6 and 0 < verdict.gradient < 1e-5


def test_a_broken_layout_is_caught_and_its_parameter_named(monkeypatch):
    """Tensor parallelism that forgets to add up one product's gradient over the devices that share it."""
    whole = nn._slopes

    def forgetful(subscripts, x, weights, cotangents):
        into_x, into_weights = whole(subscripts, x, weights, cotangents)
        if nn.how().layout.name == "broken" and subscripts == ("BTF,FD->BTD",):

            def own(x, cotangent):  # no psum, though every device says that it holds the sum
                return jax.numpy.einsum("BTF,BTD->FD", x, cotangent)

            into_weights = jax.shard_map(
                own, in_specs=jax.P(("data", "fsdp")), out_specs=jax.P(), axis_names={"data", "fsdp"}, check_vma=False
            )(x, *cotangents)
            into_weights = (into_weights,)
        return into_x, into_weights

    monkeypatch.setattr(nn, "_slopes", forgetful)
    verdict = compare(traced(layouts.dp, 1), traced(dataclasses.replace(layouts.dp, name="broken"), 8))
    assert not verdict.passed and verdict.first == "blocks.down_FD"
    assert verdict.gradient > 0.1


def test_what_is_not_finite_never_passes():
    good = traced(layouts.dp, 1)
    bad = dataclasses.replace(good, losses=np.full_like(good.losses, np.nan))
    assert not compare(good, bad).passed


def test_a_run_made_small_keeps_its_heads_ratio_and_everything_that_is_no_width():
    big = importlib.import_module("experiments.llama31_405b_v5p_512").run
    run = parity.small(big)
    assert run.model.heads // run.model.kv_heads == big.model.heads // big.model.kv_heads
    assert (run.model.scaling, run.model.tied, run.model.theta) == (
        big.model.scaling,
        big.model.tied,
        big.model.theta,
    )
    assert (run.layout, run.remat, run.loss, type(run.optimizer)) == (
        big.layout,
        big.remat,
        big.loss,
        type(big.optimizer),
    )


@pytest.fixture
def shell(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def command(line: str):
        monkeypatch.setattr(sys, "argv", ["llmjax", *line.split()])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        return end.value.code, shown.out, shown.err

    return command


def test_the_command_prints_the_losses_and_how_far_apart_they_are(shell, tmp_path):
    code, out, _ = shell("parity gpt2_124m_h200 --steps 2 --model.layers 1 --layouts fsdp_tp --json found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == 0 and [result["layout"] for result in found["results"]] == ["fsdp_tp"]
    assert f"{found['one_device']['losses'][1]:.6f}" in out
    assert "fsdp_tp on cpu8 (fsdp 4 x tensor 2)" in out and "1 of 1 give the numbers of one device" in out


def test_a_tolerance_that_rounding_exceeds_fails_with_code_1(shell):
    code, out, _ = shell("parity gpt2_124m_h200 --steps 2 --model.layers 1 --layouts fsdp_tp --tolerance.loss 0")
    assert code == 1 and "0 of 1" in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("parity tutorial_mlp", "tutorial_mlp is no language model: give one of the others"),
        ("parity --meshes v5p_64", "mesh v5p_64 is 64 chips that this machine does not have: compare on emulated"),
        ("parity --layouts fsdp_pt", "there is no layout named 'fsdp_pt': did you mean"),
        ("parity --layouts ring --full --sequence 18", "sequence is 18, which 2 x context 2 pieces of a ring do not"),
        ("parity --json nowhere/x.json", "is no folder: make it, or choose another file"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(shell, line, words):
    code, out, err = shell(line)
    assert code in (2, 74) and out == "" and words in err and err.startswith("llmjax: ")


def test_an_axis_named_for_two_dims_of_an_array_is_refused():
    twice = dataclasses.replace(layouts.dp, name="twice", inner=layouts.dp.inner | {"T": "data"})
    with pytest.raises(Refused, match="layout twice cuts two dims of an array BT over 'data': name an axis for one"):
        twice.gathered("BT")


def test_experts_that_rounding_chose_otherwise_end_the_comparison_and_many_others_fail_it():
    good = traced(layouts.dp, 1)
    chosen = [np.full((2, 4), 256.0)] * 3
    moved = chosen[0] + [[1, -1, 0, 0], [0, 0, 0, 0]]
    one = dataclasses.replace(good, loads=chosen)
    late = dataclasses.replace(one, losses=good.losses * [1, 1, 1.1], loads=[*chosen[:2], moved])
    assert compare(one, late).passed and compare(one, late).rounded == 2
    assert not compare(one, dataclasses.replace(late, losses=good.losses * [1, 1.1, 1])).passed
    assert not compare(one, dataclasses.replace(late, loads=[moved] * 3)).passed  # the weights were still the same
    many = chosen[0] + [[50, -50, 0, 0], [0, 0, 0, 0]]
    assert not compare(one, dataclasses.replace(late, loads=[*chosen[:2], many])).passed


@pytest.mark.slow
def test_five_axes_at_once_give_the_numbers_of_one_device(tmp_path):
    line = """parity stdlib_moe --meshes cpu32 --layouts fsdp_tp_ep_ring_pp --model.layers 2 --json found.json"""
    done = subprocess.run(
        [sys.executable, "-m", "llmjax.cli", *line.split()], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (result,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert sorted(result["axes"].values()) == [1, 2, 2, 2, 2, 2] and result["passed"]
