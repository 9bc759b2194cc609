"""A plan is remembered for the run that it is of, and for no other."""

import dataclasses
import importlib

import pytest

from llmjax import layout as layouts
from llmjax.mesh import Axes
from llmjax.plan import kept
from llmjax.run import Remat

SIZES = Axes(1, 1, 4, 1, 1, 2)


@pytest.fixture
def run(tmp_path):
    run = importlib.import_module("experiments.stdlib_tiny").run
    return dataclasses.replace(run, name="tiny", runs=str(tmp_path), layout=layouts.fsdp_tp)


def test_a_plan_is_found_again_by_the_run_that_was_planned(run):
    kept.keep(run, SIZES, 2, 0.25)
    assert kept.planned(run, SIZES, 2) == 0.25
    assert kept.planned(dataclasses.replace(run, steps=7, prompts=("x",), axes=SIZES), SIZES, 2) == 0.25


def test_a_plan_of_another_mesh_batch_or_method_is_not_taken_for_this_one(run):
    kept.keep(run, SIZES, 2, 0.25)
    assert kept.planned(run, Axes(2, 1, 2, 1, 1, 2), 2) is None
    assert kept.planned(run, SIZES, 1) is None
    for change in (dict(batch=16), dict(remat=Remat("full")), dict(layout=layouts.fsdp), dict(name="other")):
        assert kept.planned(dataclasses.replace(run, **change), SIZES, 2) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": "soon"}', "\x00"])
def test_a_damaged_plan_is_none(run, text):
    kept.keep(run, SIZES, 2, 0.25)
    kept.file(run).write_text(text)
    assert kept.planned(run, SIZES, 2) is None


def test_a_folder_that_cannot_be_written_keeps_nothing_and_stops_nothing(run, tmp_path):
    (tmp_path / "file").write_text("")
    kept.keep(dataclasses.replace(run, runs=str(tmp_path / "file")), SIZES, 2, 0.25)
