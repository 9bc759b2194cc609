"""P1-P5: asked to stop at any time, a run saves and says so by its exit code, and ends as an unbroken one."""

import os
import signal
import time
from pathlib import Path

import pytest
from matrix import PAIR, counted, rows, same, slowly, train, until
from place import Place, ended, kinds, metrics

from llmjax.checkpoint.checkpoints import Checkpoints

SLOW_SAVES = """
import time
from llmjax.checkpoint import manifest
write = manifest.write
manifest.write = lambda *a: (time.sleep({seconds}), write(*a))[1]
"""


def listens(pid: int) -> bool:
    """Whether the interpreter has come as far as llmjax, which then handles the signals."""
    caught = int(Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)  # the last of the two; SIGINT is Python's from the beginning


def to_its_end(place: Place, name: str, golden: Path) -> None:
    done = place.run(*train(name))
    assert (done.code, done.err) == (0, "")
    same(place.runs / name, golden)


def stopped(place: Place, name: str) -> int:
    """Of a run that was asked to stop: the step that it says, and has, is saved."""
    folder = place.runs / name
    step = Checkpoints(folder / "checkpoints").latest()
    assert kinds(folder)[-1] == "stop" and [line for line in metrics(folder) if "loss" in line][-1]["step"] == step
    assert all(path.name.isdecimal() for path in (folder / "checkpoints").iterdir())
    return step


def during_a_save(place, golden):
    folder = place.runs / "P2"
    with place.started(*train("P2"), patch=SLOW_SAVES.format(seconds=1)) as process:
        until(process, lambda: list((folder / "checkpoints").glob("8.unsealed")))
        process.send_signal(signal.SIGTERM)
        assert ended(process).code == 75
    assert stopped(place, "P2") >= 8
    to_its_end(place, "P2", golden)


@counted("kills survived", 1)
def killed_within_its_grace(place, golden):
    folder = place.runs / "P3"
    with place.started(*train("P3"), patch=SLOW_SAVES.format(seconds=3)) as process:
        until(process, lambda: list((folder / "checkpoints").glob("8.unsealed")))
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.poll() is None
        process.kill()
        ended(process)
    to_its_end(place, "P3", golden)


def ctrl_c_twice(place, golden):
    folder = place.runs / "P4"
    with place.started(*train("P4"), patch=slowly(0.05)) as process:
        until(process, lambda: len(metrics(folder)) > 6)
        process.send_signal(signal.SIGINT)
        assert ended(process).code == 75
    assert 6 <= stopped(place, "P4") < 12
    with place.started(*train("P4"), patch=slowly(1)) as process:
        lines = len(metrics(folder))
        until(process, lambda: len(metrics(folder)) > lines)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert ended(process).code == 130 and time.monotonic() - began < 10
    to_its_end(place, "P4", golden)


def while_it_starts(signals):
    def row(place, golden):
        for number, after in enumerate((0.0, 0.7, 1.4, 2.1, 2.8)):
            name = f"P5_{signals.name}_{number}"
            with place.started(*train(name)) as process:
                until(process, lambda: listens(process.pid))
                time.sleep(after)
                process.send_signal(signals)
                done = ended(process)
            assert done.code == 75, (after, done)
            assert "Traceback" not in done.err, done.err
        to_its_end(place, name, golden)

    return row


def while_it_compiles(place, golden):
    folder = place.runs / "P5_compile"
    with place.started(*train("P5_compile")) as process:
        until(process, lambda: (folder / "events.jsonl").is_file() and "start" in kinds(folder))
        process.send_signal(signal.SIGTERM)
        assert ended(process).code == 75
    assert stopped(place, "P5_compile") <= 4
    to_its_end(place, "P5_compile", golden)


def while_it_evaluates(place, golden):
    slow = """
import time
from llmjax.train import between
place = between.place
def slowly(dataset, split, *a, **k):
    time.sleep(0.5 * (split == "heldout"))
    return place(dataset, split, *a, **k)
between.place = slowly
"""
    folder = place.runs / "P5_evaluates"
    with place.started(*train("P5_evaluates"), patch=slow) as process:
        until(process, lambda: len(metrics(folder)) == 8)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert ended(process).code == 75
    assert stopped(place, "P5_evaluates") == 8 and not [m for m in metrics(folder) if "eval_loss" in m]
    to_its_end(place, "P5_evaluates", golden)  # with the evaluation that was due and missed


ROWS = {
    "P2 SIGTERM during a save": during_a_save,
    "P3 SIGTERM and SIGKILL a second later": killed_within_its_grace,
    "P4 Ctrl-C once and twice": ctrl_c_twice,
    "P5 SIGTERM while it starts": while_it_starts(signal.SIGTERM),
    "P5 Ctrl-C while it starts": while_it_starts(signal.SIGINT),
    "P5 SIGTERM while it compiles": while_it_compiles,
    "P5 SIGTERM while it evaluates": while_it_evaluates,
}


@pytest.mark.parametrize("row", rows(ROWS))
def test_a_run_that_is_asked_to_stop_saves_and_ends_as_an_unbroken_one(row, outcome):
    outcome(row)


@pytest.mark.fast
def test_p1_sigterm_to_one_of_two_processes_stops_both_at_one_step(place, golden_pair):
    folder, words = place.runs / "P1", (*PAIR[:-1], "logs_P1", "train", "synthetic.py", "--name", "P1")
    with place.started(*words) as process:
        until(process, lambda: len(metrics(folder)) > 3)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        began = time.monotonic()
        os.kill(int(children[1]), signal.SIGTERM)
        done = ended(process)
    assert done.code == 75 and time.monotonic() - began < 10, done
    assert stopped(place, "P1") < 24
    done = place.run(*words)
    assert done.code == 0, done
    same(folder, golden_pair)
