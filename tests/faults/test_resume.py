"""B5, B6, C1, C2, X3: other meshes, the border of an epoch, clocks that leap, and caches change nothing."""

import json
import signal
import time

import numpy as np
import pytest
from matrix import address, one_of, rows, same, slowly, train
from place import STEPS, arrays, curve, ended, kinds, losses, metrics

from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.report.goodput import of
from llmjax.train.records import read

# Writes down which rows every step reads, of whichever process.
RECORD = """
import json, os
from llmjax.train import loop
order = loop.order
def recorded(step, **how):
    rows = order(step, **how)
    with open(f"{NAME}.rows", "a") as file:
        file.write(json.dumps([step, rows.tolist()]) + "\\n")
    return rows
loop.order = recorded
"""


def batches(place, name):
    found: dict[int, list[int]] = {}
    for line in (place.folder / f"{name}.rows").read_text().splitlines():
        step, of_step = json.loads(line)
        assert found.setdefault(step, of_step) == of_step, f"step {step} read other rows the second time"
    return found


def stopped_at(place, name, steps, devices, *more):
    """Trains on with so many devices, to be killed right after the save of a step."""
    die = f"""
import os, signal
from llmjax.checkpoint import folder
prune = folder.prune
folder.prune = lambda *a: (prune(*a), a[1] == {steps} and os.kill(os.getpid(), signal.SIGKILL))
"""
    done = place.run(*train(name, *more, devices=devices), patch=RECORD.replace("{NAME}", name) + die)
    assert done.code == -signal.SIGKILL, done


def from_mesh_to_mesh(place, golden):
    """1x4 -> 2x2 processes -> 1x8 -> 1x1."""
    stopped_at(place, "B5", 4, 4)
    folder = place.runs / "B5"
    kept = arrays(folder, 4)
    assert kept["step"] == 4
    at = address()
    pair = [one_of(at, 2, index, "B5") for index in (0, 1)]
    slow = RECORD.replace("{NAME}", "B5") + slowly(0.7)  # the processes take a second or two to agree
    with place.started(*pair[0], patch=slow) as first, place.started(*pair[1], patch=slow) as second:
        # What was killed may have written as many lines: those of the second start alone count.
        while (kinds(folder).count("start") < 2 or len(metrics(folder)) < 9) and first.poll() is None:
            time.sleep(0.01)
        second.send_signal(signal.SIGTERM)
        assert [ended(first).code, ended(second).code] == [75, 75]
    assert 8 <= Checkpoints(folder / "checkpoints").latest() < 16
    stopped_at(place, "B5", 16, 8)
    done = place.run(*train("B5", devices=1), patch=RECORD.replace("{NAME}", "B5"))
    assert done.code == 0 and "Continuing runs/B5 from step 16." in done.out
    np.testing.assert_allclose(losses(folder)[:, 0], losses(golden)[:, 0], rtol=1e-6)
    place.run(*train("B5_rows"), patch=RECORD.replace("{NAME}", "B5_rows"))
    mine, theirs = batches(place, "B5"), batches(place, "B5_rows")
    assert mine == theirs and len(theirs) == STEPS


def border_of_an_epoch(place, golden):
    """256 rows are 16 steps of 16: killed at 12, resumed over the border."""
    stopped_at(place, "B6", 12, 4)
    done = place.run(*train("B6"), patch=RECORD.replace("{NAME}", "B6"))
    assert (done.code, done.err) == (0, "")
    same(place.runs / "B6", golden)
    read_rows = batches(place, "B6")
    epoch = [row for step in range(16) for row in read_rows[step]]
    assert sorted(epoch) == list(range(256)) and len({r for s in range(16, 24) for r in read_rows[s]}) == 128


def clock_moved_between(seconds):
    def row(place, golden):
        name = f"C1_{'back' if seconds < 0 else 'forward'}"
        stopped_at(place, name, 8, 4)
        moved = f"import time\nnow = time.time\ntime.time = lambda: now() + {seconds}\n"
        done = place.run(*train(name), patch=moved)
        assert (done.code, done.err) == (0, "") and f"Continuing runs/{name} from step 8." in done.out
        folder = place.runs / name
        same(folder, golden)
        found = of(read(folder / "events.jsonl"), metrics(folder))
        assert 0 < found.share < 1 and min(found.buckets.values()) >= 0

    return row


def clock_leaps(place, golden):
    leaping = """
now, ahead = time.time, {8: 0, 11: -86_400, 19: 2.6e6}  # a day back before step 11, a month forward before step 19
since = [0]
time.time = lambda: now() + since[0]
slowly = loop.Reporter.read
def leap(self, pending):
    since[0] = ahead.get(pending.step, since[0])
    return slowly(self, pending)
loop.Reporter.read = leap
"""
    done = place.run(*train("C2"), patch=slowly(0.1) + leaping)
    assert (done.code, done.err) == (0, "")
    folder = place.runs / "C2"
    same(folder, golden)
    lines = [line for line in metrics(folder) if "loss" in line]
    assert all(100 < line["step_ms"] < 60_000 and 0 < line["tokens_per_s"] < 2560 for line in lines)


def caches(place, golden):
    cold = "import os, tempfile\nos.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp()\n"
    for name, patch in (("X3_cold", cold), ("X3_warm", "")):
        done = place.run(*train(name), patch=patch)
        assert (done.code, done.err) == (0, "")
        same(place.runs / name, golden)
    assert curve(place.runs / "X3_cold") == curve(place.runs / "X3_warm")


ROWS = {
    "B5 from 1x4 devices to 2x2 processes to 1x8 to 1x1": from_mesh_to_mesh,
    "B6 resumed over the border of an epoch": border_of_an_epoch,
    "C1 the clock a day back between two runs": clock_moved_between(-86_400),
    "C1 the clock ten years forward between two runs": clock_moved_between(3.2e8),
    "C2 the clock leaps during the run": clock_leaps,
    "X3 with a cold and a warm cache of programs": caches,
}


@pytest.mark.parametrize("row", rows(ROWS, fast=("B5",)))
def test_what_does_not_matter_changes_nothing(row, outcome):
    outcome(row)
