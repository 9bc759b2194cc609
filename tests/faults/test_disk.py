"""D1-D5: a disk that is full, read-only or slow, and a record that was cut short."""

import contextlib
import shutil
import subprocess
import time

import pytest
from matrix import copied, rows, same, slowly, train
from place import Place, content, ended, kinds, metrics

from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.train.records import read


@contextlib.contextmanager
def small_disk(place: Place, name: str, options: str = "size=4m"):
    """A run's folder on a disk of its own."""
    folder = place.runs / name
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("a small disk can be mounted by root alone")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, free):
    """Leaves so many bytes free."""
    with open(folder / "filler", "wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(folder).free - free)))


def full_for_a_while(place, golden):
    with small_disk(place, "D1") as folder:
        with place.started(*train("D1"), patch=slowly(0.2)) as process:
            while len(metrics(folder)) < 5:
                time.sleep(0.01)
            before = content(folder / "checkpoints" / "4")
            fill(folder, 150_000)
            while process.poll() is None and "save_failed" not in kinds(folder):
                time.sleep(0.01)
            assert content(folder / "checkpoints" / "4") == before
            assert Checkpoints(folder / "checkpoints").newest_verified() == 4
            (folder / "filler").unlink()
            done = ended(process)
        assert (done.code, done.err) == (0, "") and "Training goes on without it: checkpoint 8 could not" in done.out
        assert "No space left" in done.out and "bytes, and" in done.out
        same(folder, golden)
        assert kinds(folder).count("save_failed") >= 1 and kinds(folder)[-1] == "finish"


def full_at_the_end(place, golden):
    with small_disk(place, "D2") as folder:
        with place.started(*train("D2"), patch=slowly(0.2)) as process:
            while len(metrics(folder)) < 23:
                time.sleep(0.01)
            fill(folder, 150_000)
            done = ended(process)
        assert done.code == 74 and done.err.count("\n") == 1, done
        assert "No space left" in done.err and "; it takes " in done.err and " are free)" in done.err
        assert Checkpoints(folder / "checkpoints").newest_verified() == 20
        (folder / "filler").unlink()
        done = place.run(*train("D2"))
        assert (done.code, done.err) == (0, "")
        same(folder, golden)


def read_only(place, golden):
    with small_disk(place, "D3", "size=4m,ro"):
        began = time.monotonic()
        refused = place.run(*train("D3"))
        assert refused.code == 2 and refused.err.count("\n") == 1 and "runs/D3" in refused.err
        assert "step 1" not in refused.out and time.monotonic() - began < 10  # an import takes two seconds


def slow(place, golden):
    patch = """
import time
from llmjax.checkpoint import manifest
write = manifest.write
manifest.write = lambda *a: (time.sleep(5), write(*a))[1]
"""
    done = place.run(*train("D4", "--save-every", "12", "--eval-every", "0"), patch=patch)
    assert (done.code, done.err) == (0, "")
    lines = [line for line in metrics(place.runs / "D4") if "loss" in line]
    began = next(e["elapsed"] for e in read(place.runs / "D4" / "events.jsonl") if e["kind"] == "save")
    assert lines[23]["elapsed"] - began < 3  # twelve steps while the disk takes its five seconds
    spent = [e for e in read(place.runs / "D4" / "events.jsonl") if e["kind"] == "spent"][-1]
    assert spent["save"] > 8  # the last save waits for the one before it, and for itself


def torn(place, golden):
    folder = copied(golden, "D5")
    shutil.rmtree(folder / "checkpoints" / "24")
    for name in ("metrics.jsonl", "events.jsonl"):
        text = (folder / name).read_text()
        kept = [line for line in text.splitlines(keepends=True) if '"finish"' not in line]
        (folder / name).write_text("".join(kept)[:-7])
    done = place.run(*train("D5"))
    assert (done.code, done.err) == (0, "")
    same(folder, golden)
    assert "finish" in kinds(folder)
    told = place.run("goodput", "D5")
    assert told.code == 0 and "2 starts" in told.out and "4 steps done again" in told.out


ROWS = {
    "D1 the disk is full for a while": full_for_a_while,
    "D2 the disk is full at the end": full_at_the_end,
    "D3 the run directory is read-only": read_only,
    "D4 the disk is slow": slow,
    "D5 the last line of the records is torn": torn,
}


@pytest.mark.parametrize("row", rows(ROWS))
def test_a_disk_that_fails_costs_no_step(row, outcome):
    outcome(row)
