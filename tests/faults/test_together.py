"""W4, W5, W7: processes that do not come, do not agree, or want the same run directory."""

import contextlib
import socket

import pytest
from matrix import rows, same
from place import FOUR, ended, metrics


def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def by_hand(at, count, index, name, *more):
    return (
        "train", "synthetic.py", "--name", name, "--processes.coordinator", f"127.0.0.1:{at}", "--processes.count",
        str(count), "--processes.index", str(index), "--processes.devices", "2", *more,
    )  # fmt: skip


def both(place, *commands, patches=("", "")):
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(place.started(*c, patch=p)) for c, p in zip(commands, patches, strict=True)]
        return [ended(process) for process in started]


def refused(done, code, *words):
    assert done.code == code and done.err.count("\n") == 1 and "Traceback" not in done.err, done
    assert all(word in done.err for word in words), done.err


def never_comes(place, golden):
    at = port()
    refused(place.run(*by_hand(at, 3, 0, "W4", "--processes.timeout", "3")), 76, "processes 1, 2 of 3 did not come")
    refused(place.run(*by_hand(at, 2, 1, "W4", "--processes.timeout", "1")), 76, "process 0 did not answer")
    assert not (place.runs / "W4").exists()


def wrong_number(place, golden):
    at = port()
    first, second = both(place, by_hand(at, 2, 0, "W4_count"), by_hand(at, 3, 1, "W4_count"))
    for done in (first, second):
        refused(done, 2, "process 1 says that there are 3 processes and process 0 that there are 2")


def port_taken(place, golden):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        at = listener.getsockname()[1]
        refused(place.run(*by_hand(at, 2, 0, "W4_port")), 2, "processes.coordinator", "Address already in use")


def other_config(place, golden):
    at = port()
    found = both(place, by_hand(at, 2, 0, "W5"), by_hand(at, 2, 1, "W5", "--steps", "23"))
    for done in found:
        refused(done, 2, "differs from the others in steps")
    assert not (place.runs / "W5").exists()


def other_code(place, golden):
    at = port()
    patch = "from llmjax.commands import train\ntrain.code = lambda: 'other'\n"
    for done in both(place, by_hand(at, 2, 0, "W5_code"), by_hand(at, 2, 1, "W5_code"), patches=("", patch)):
        refused(done, 2, "differs from the others in code")


def other_data(place, golden):
    at = port()
    patch = "from llmjax.data.dataset import SyntheticDataset\nSyntheticDataset.fingerprint = 'other'\n"
    for done in both(place, by_hand(at, 2, 0, "W5_data"), by_hand(at, 2, 1, "W5_data"), patches=("", patch)):
        refused(done, 65, "differs from the others in data")


def second_start(place, golden):
    slow = """
import time
from llmjax.train import loop
read = loop.Reporter.read
loop.Reporter.read = lambda self, pending: (time.sleep(0.5), read(self, pending))[1]
"""
    words = ("train", "synthetic.py", "--name", "W7", *FOUR)
    with place.started(*words, patch=slow) as process:
        while len(metrics(place.runs / "W7")) < 2 and process.poll() is None:
            pass
        refused(place.run(*words), 2, f"is being trained by process {process.pid} on ")
        assert ended(process).code == 0
    same(place.runs / "W7", golden)
    with place.started("train", "synthetic.py", "--name", "W7_stale", *FOUR, patch=slow) as process:
        while len(metrics(place.runs / "W7_stale")) < 2 and process.poll() is None:
            pass
        process.kill()
        ended(process)
    done = place.run("train", "synthetic.py", "--name", "W7_stale", *FOUR)
    assert (done.code, done.err) == (0, "") and f"over from process {process.pid} on " in done.out
    same(place.runs / "W7_stale", golden)


ROWS = {
    "W4 a process never comes": never_comes,
    "W4 another number of processes": wrong_number,
    "W4 the port is taken": port_taken,
    "W5 another config on one process": other_config,
    "W5 other code on one process": other_code,
    "W5 other data on one process": other_data,
    "W7 two starts on one run directory": second_start,
}


@pytest.mark.parametrize("row", rows(ROWS))
def test_processes_that_do_not_belong_together_are_refused_by_name(row, outcome):
    outcome(row)
