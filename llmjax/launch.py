"""A cluster of processes on this machine, and the exit code that they come to together."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from llmjax import leash
from llmjax.errors import DATA, DONE, IO, NON_FINITE, PEER_LOST, PREEMPTED, USAGE, Refused

GRACE = 5.0  # seconds that the others get to end by themselves once one process has failed, and again once told to


def launch(processes: int, devices: int, arguments: Sequence[str], folder: Path, module: str = "llmjax.cli") -> int:
    """Runs `python -m module arguments` as a cluster of processes on this machine and returns its exit code.

    Process 0 has this terminal; process i > 0 writes to `folder/process_<i>.log`. When one fails, the others get a
    moment and are then ended. SIGINT, SIGTERM and SIGUSR1 are passed on and the processes waited for. Call it from the
    main thread.

    Raises:
      Refused: fewer than one process or device, or a log cannot be written.
    """
    if processes < 1 or devices < 1:
        raise Refused(f"launch got {processes} processes of {devices} devices: give at least one of each.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(
            f"{folder} cannot take the logs ({error.strerror}): choose another folder, --logs.", IO
        ) from error
    address = f"127.0.0.1:{_free_port()}"
    children: list[subprocess.Popen] = []

    def pass_on(number: int, _frame: object) -> None:
        for child in children:
            child.send_signal(number)  # does nothing to one that has ended

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    again = "--supervised.heartbeat" in arguments  # what a start before this one said last may tell why it ended
    try:
        for index in range(processes):
            own = {"coordinator": address, "count": processes, "index": index, "devices": devices}
            flags = [word for key, value in own.items() for word in (f"--processes.{key}", str(value))]
            log = folder / f"process_{index}.log" if index else None
            children.append(_spawn(leash.command(module, [*arguments, *flags]), log, append=again))
        return exit_code(_wait(children))
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _spawn(command: list[str], log: Path | None, append: bool) -> subprocess.Popen:
    # A process group of its own: the terminal's Ctrl-C then reaches a child once, through the launcher. gRPC would
    # ask an http_proxy even for this machine.
    # C++ parts would warn of the SIGTERM by which the processes agree to stop.
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2"} | os.environ | {"no_grpc_proxy": "127.0.0.1"}
    options = {"process_group": 0, "env": environment, "stdin": subprocess.DEVNULL}
    if log is None:
        return subprocess.Popen(command, **options)
    with log.open("ab" if append else "wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)


def _wait(children: list[subprocess.Popen]) -> list[int]:
    """Waits for all; returns the codes of those that ended by themselves, the first to end first."""
    codes: dict[int, int] = {}
    failed_at = told_at = None
    while len(codes) < len(children):
        for child in children:
            if child.pid not in codes and child.poll() is not None:
                codes[child.pid] = child.returncode
                if child.returncode not in (DONE, PREEMPTED):
                    failed_at = failed_at or time.monotonic()
        if failed_at and time.monotonic() - failed_at > GRACE:
            break
        time.sleep(0.05)
    own = list(codes.values())
    for child in children:
        if child.poll() is None:
            child.terminate()
            told_at = time.monotonic()
    for child in children:
        try:
            child.wait(max(0.0, GRACE - (time.monotonic() - told_at)) if told_at else None)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    return own


def exit_code(codes: Sequence[int]) -> int:
    """What a group of processes ended with: the cause, not its consequences.

    A code of ours that names a cause wins; else the first that failed counts, where death by a signal is a lost peer,
    as is the SIGABRT by which JAX ends the survivors of one.
    """
    failures = [code for code in codes if code != DONE]
    for code in failures:
        if code in (USAGE, DATA, NON_FINITE, IO):
            return code
    for code in failures:
        if code != PREEMPTED:
            return PEER_LOST if code < 0 else code
    return failures[0] if failures else DONE


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
