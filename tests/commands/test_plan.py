"""`llmjax plan` as a user calls it: what it prints, what it writes, and how it ends."""

import json
import sys
from pathlib import Path

import pytest

from llmjax import cli, names
from llmjax.commands import plan_meshes
from llmjax.plan import calibrate, search
from llmjax.plan.calibrate import Line, Machine
from llmjax.train.display import Display
from meshes import h100x8, v5p_64

# one second to compile
SHAPE = "--model.vocab 64 --model.layers 2 --model.width 32 --model.heads 2 --model.kv-heads 2 --model.head-dim 16"
TINY = f"{SHAPE} --model.ff 64 --batch 8 --sequence 16 --accumulate 1".split()
LINES = {kind: {"2": Line(1e-4, 1e-9), "8": Line(1e-4, 2e-9)} for kind in calibrate.KINDS}
MACHINE = Machine(8, {"float32": 4e11, "bfloat16": 8e11}, 5e10, 2e10, 4e-4, LINES)


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path):
    """Runs one `llmjax plan` in an empty folder; (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["llmjax", "plan", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        assert shown.err == ""
        return end.value.code, shown.out

    return command


def test_an_analytic_plan_shows_fit_communication_time_and_what_to_do_next(plan):
    code, out = plan("llama3_8b_v5p_64", "--analytic", "--price-per-chip-hour", "2", "--json", "plan.json")
    written = json.loads(Path("plan.json").read_text())
    assert code == 0 and written["fits"] and f"{written['tokens_per_s']:,.0f} tokens/s" in out
    for section in ("Memory of a device", "It fits:", "Communication of a step", "Time of a step", "Trusted:", "Next:"):
        assert section in out
    chip_hours = written["hours"] * 64
    assert f"{chip_hours:,.0f} chip-hours, {2 * chip_hours:,.0f} at 2 per chip-hour" in out
    assert sum(row["bytes"] for row in written["communication"]) > 1e9


def test_a_chip_that_is_two_devices_is_paid_for_once(plan):
    code, out = plan(
        "llama3_8b_v5p_64",
        "--mesh",
        "tpu7x_64",
        "--axes.data",
        "1",
        "--axes.fsdp",
        "128",
        "--accumulate",
        "2",
        "--analytic",
        "--json",
        "7x.json",
    )
    written = json.loads(Path("7x.json").read_text())
    assert code == 0 and written["axes"]["fsdp"] == 128
    assert f"{written['hours'] * 64:,.0f} chip-hours" in out


def test_what_is_waited_for_in_the_table_of_messages_is_what_a_step_waits_for(plan):
    code, _ = plan("llama3_70b_v6e_256", "--analytic", "--json", "plan.json")
    written = json.loads(Path("plan.json").read_text())
    assert code == 0
    for axis in ("fsdp", "tensor"):
        rows = [row for row in written["communication"] if row["axes"] == [axis]]
        assert sum(row["exposed"] for row in rows) == pytest.approx(written["seconds"]["exposed"][axis])
        assert all(0 < row["exposed"] <= row["seconds"] for row in rows)


def test_a_run_that_does_not_fit_is_told_what_would_help(plan):
    code, out = plan("llama3_8b_h100x8", "--analytic", "--remat.policy", "none", "--accumulate", "1")
    assert code == 0 and "It does NOT fit" in out
    assert "What would help" in out and "--remat.policy full" in out


def test_a_search_ends_with_the_command_that_trains_on_the_best_mesh(plan):
    changed = ("--batch", "128", "--optimizer.lr", "0.0001")
    code, out = plan("llama3_8b_h100x8", "--search", "--analytic", "--json", "found.json", *changed)
    best = json.loads(Path("found.json").read_text())["meshes"][0]
    assert code == 0 and best["command"] in out and best["command"].endswith("--optimizer.lr 0.0001 --batch 128")
    words = out.rpartition("llmjax train ")[2].split("\n")[0].split()
    again, out = plan(*words, "--analytic", "--json", "again.json")
    assert again == 0 and json.loads(Path("again.json").read_text())["seconds"] == best["seconds"]


def test_a_search_on_chips_without_a_mesh_file_writes_one(plan, tmp_path):
    code, out = plan(
        "llama3_8b_v5p_64", "--search", "--analytic", "--chips", "16", "--chip", "v6e", "--write", "six.py"
    )
    cluster = names.load_file(tmp_path / "six.py", "cluster")
    assert code == 0 and (cluster.name, cluster.chips, cluster.topology) == ("six", 16, "4x4") and "Wrote six.py" in out


def test_what_is_known_is_shown_when_the_compiling_is_interrupted(capsys):
    found = search.ranked(cli.load("llama3_8b_h100x8"), h100x8.cluster, 3).best
    calls = []

    def measure(estimate):
        calls.append(estimate)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 1.0

    cases = plan_meshes.measured([plan_meshes.Case(each) for each in found], [], measure, Display())
    assert [case.measured for case in cases] == [1.0]


def test_weak_scaling_keeps_the_batch_of_a_device_and_is_relative_to_the_smallest(plan):
    code, out = plan("llama3_8b_v5p_64", "--scale", "64", "128", "--json", "scale.json")
    small, large = json.loads(Path("scale.json").read_text())["scale"]
    assert code == 0 and small["run"]["mesh"]["name"] == v5p_64.cluster.name and "100.0%" in out
    assert large["run"]["batch"] == 2 * small["run"]["batch"]


def test_a_contract_is_kept_by_the_run_it_was_written_for_and_broken_by_another(plan, tmp_path):
    calibrate.store(MACHINE, tmp_path / "runs")
    line = ("stdlib_tiny", *TINY, "--mesh", "cpu8", "--layout", "fsdp")
    assert plan(*line, "--write-contract", "kept.json")[0] == 0
    code, out = plan(*line, "--check", "kept.json")
    assert code == 0 and "stdlib_tiny on cpu8 keeps to kept.json" in out
    code, out = plan(*line[:-1], "fsdp_tp", "--check", "kept.json")
    assert code == 1 and "over tensor for attention" in out and "are new; from jit(train_step)" in out


def test_a_measured_plan_shows_prediction_beside_measurement(plan, tmp_path):
    calibrate.store(MACHINE, tmp_path / "runs")
    code, out = plan("stdlib_tiny", *TINY, "--mesh", "cpu8", "--measure", "--json", "plan.json")
    assert code == 0 and "ms/step here; predicted" in out
    assert json.loads(Path("plan.json").read_text())["measured_step"] > 0
