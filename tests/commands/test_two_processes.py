"""Two processes, whose only link is each axis in turn, give the numbers of one device."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_every_kind_of_parallelism_over_two_processes_gives_the_numbers_of_one_device(tmp_path):
    line = """launch --processes 2 --devices 1 parity stdlib_moe --meshes local --axes.data 1 --steps 2
        --model.layers 2 --layouts fsdp tp cp ring ep pp --json found.json"""
    done = subprocess.run(
        [sys.executable, "-m", "llmjax.cli", *line.split()], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    cut = [[axis for axis, size in result["axes"].items() if size == 2] for result in results]
    assert cut == [["fsdp"], ["tensor"], ["context"], ["context"], ["expert"], ["stage"]]  # two devices, one axis each
    assert all(result["passed"] for result in results)
