"""W4, W5, W7: processes that do not come, do not agree, or want the same run directory."""

import contextlib
import socket

import pytest
from matrix import address, one_of, rows, same, slowly, train, until
from place import ended, metrics


def both(place, *commands, patches=("", "")):
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(place.started(*c, patch=p)) for c, p in zip(commands, patches, strict=True)]
        return [ended(process) for process in started]


def refused(done, code, *words):
    assert done.code == code and done.err.count("\n") == 1 and "Traceback" not in done.err, done
    assert all(word in done.err for word in words), done.err


def never_comes(place, golden):
    at = address()
    refused(place.run(*one_of(at, 3, 0, "W4", "--processes.timeout", "3")), 76, "processes 1, 2 of 3 did not come")
    refused(place.run(*one_of(at, 2, 1, "W4", "--processes.timeout", "1")), 76, "process 0 did not answer")
    assert not (place.runs / "W4").exists()


def wrong_number(place, golden):
    at = address()
    first, second = both(place, one_of(at, 2, 0, "W4_count"), one_of(at, 3, 1, "W4_count"))
    for done in (first, second):
        refused(done, 2, "process 1 says that there are 3 processes and process 0 that there are 2")


def port_taken(place, golden):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        at = f"127.0.0.1:{listener.getsockname()[1]}"
        refused(place.run(*one_of(at, 2, 0, "W4_port")), 2, "processes.coordinator", "Address already in use")


def other_config(place, golden):
    at = address()
    found = both(place, one_of(at, 2, 0, "W5"), one_of(at, 2, 1, "W5", "--steps", "23"))
    for done in found:
        refused(done, 2, "differs from the others in steps")
    assert not (place.runs / "W5").exists()


def other_code(place, golden):
    at = address()
    patch = "from llmjax.commands import train\ntrain.code = lambda: 'other'\n"
    for done in both(place, one_of(at, 2, 0, "W5_code"), one_of(at, 2, 1, "W5_code"), patches=("", patch)):
        refused(done, 2, "differs from the others in code")


def other_data(place, golden):
    at = address()
    patch = "from llmjax.data.dataset import SyntheticDataset\nSyntheticDataset.fingerprint = 'other'\n"
    for done in both(place, one_of(at, 2, 0, "W5_data"), one_of(at, 2, 1, "W5_data"), patches=("", patch)):
        refused(done, 65, "differs from the others in data")


def second_start(place, golden):
    slow, words = slowly(0.5), train("W7")
    with place.started(*words, patch=slow) as process:
        until(process, lambda: len(metrics(place.runs / "W7")) >= 2)
        refused(place.run(*words), 2, f"is being trained by process {process.pid} on ")
        assert ended(process).code == 0
    same(place.runs / "W7", golden)
    with place.started(*train("W7_stale"), patch=slow) as process:
        until(process, lambda: len(metrics(place.runs / "W7_stale")) >= 2)
        process.kill()
        ended(process)
    done = place.run(*train("W7_stale"))
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
