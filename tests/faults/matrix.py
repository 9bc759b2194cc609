"""What the rows of the fault matrix share: the verdict, a count of what was survived, and how a row is marked."""

import collections
import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from place import STEPS, arrays, curve, equal, metrics

COUNTS: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])


@contextlib.contextmanager
def counted(what: str, tried: int) -> Iterator[None]:
    """Adds to the summary at the end: so many tried, and as many survived if no assertion in the context fails."""
    COUNTS[what][1] += tried
    yield
    COUNTS[what][0] += tried


PAIR = ("launch", "--processes", "2", "--devices", "2", "--logs", "logs")


def train(name: str, *more: str, devices: int = 4) -> tuple[str, ...]:
    """The command that trains, or continues, the run of this name, on so many devices."""
    return ("train", "synthetic.py", "--name", name, "--processes.devices", str(devices), *more)


def one_of(address: str, count: int, index: int, name: str, *more: str) -> tuple[str, ...]:
    """The same as one of several processes of two devices, started by hand."""
    place = ("--processes.coordinator", address, "--processes.count", str(count), "--processes.index", str(index))
    return train(name, *place, *more, devices=2)


def address() -> str:
    """A port of this machine that is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def slowly(seconds: float) -> str:
    """Lines that come before a command: every step then takes so much longer."""
    return f"""
import time
from llmjax.train import loop
read = loop.Reporter.read
loop.Reporter.read = lambda self, pending: (time.sleep({seconds}), read(self, pending))[1]
"""


def until(process: subprocess.Popen, seen: Callable[[], object], seconds: float = 120.0) -> None:
    """Waits for something to be seen while a process runs."""
    end = time.monotonic() + seconds
    while process.poll() is None and not seen():
        assert time.monotonic() < end
        time.sleep(0.002)


def same(folder, golden) -> None:
    """Verdict A: every step once, each with the loss, gradient norm and evaluation of the unbroken run, bit for bit,
    and the same weights and optimizer at the end."""
    steps = [line["step"] for line in metrics(folder) if "loss" in line]
    assert steps == list(range(1, STEPS + 1)), steps
    assert curve(folder) == curve(golden)
    assert equal(arrays(folder), arrays(golden))
    assert all(path.name.isdecimal() for path in (folder / "checkpoints").iterdir())


def copied(folder, name: str):
    """A copy of a run directory, under another name."""
    shutil.copytree(folder, folder.parent / name)
    return folder.parent / name


def rows(functions: dict, fast: tuple[str, ...] = ()) -> list:
    """The rows of the matrix as parameters: those that begin with one of `fast` run always, the others in full."""
    return [
        pytest.param(row, marks=pytest.mark.fast if row.split()[0] in fast else pytest.mark.faults) for row in functions
    ]
