"""Child processes that end with their parent, however that ends, and with all that they have started.

`python -m llmjax.leash PID MODULE ARGUMENTS` is `python -m MODULE ARGUMENTS` for as long as process PID, its parent,
lives. On Linux the kernel sees to it; elsewhere a parent that is killed leaves its children behind.
"""

import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

WHEN_THE_PARENT_DIES = 1  # PR_SET_PDEATHSIG of prctl(2)


def command(module: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs a module as a child of this thread, which must live as long as the child is wanted."""
    return [sys.executable, "-m", "llmjax.leash", str(os.getpid()), module, *arguments]


def main() -> None:
    parent, module, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(WHEN_THE_PARENT_DIES, signal.SIGKILL)
        if os.getppid() != int(parent):  # it was quicker
            sys.exit(1)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def tree(process: int) -> list[int]:
    """The ids of all living descendants of a process, as far as the system tells; parents before their children."""
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # gone meanwhile
            for child in map(int, children.read_text().split()):
                found += [child, *tree(child)]
    return found


def end(child: subprocess.Popen, patience: float = 10.0) -> None:
    """Kills a child that leads a process group, the group and all descendants, and waits until they are gone."""
    below = tree(child.pid)
    if child.poll() is None:
        child.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):  # what it left behind, if anything
        os.killpg(child.pid, signal.SIGKILL)
    for pid in below:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    child.wait()
    until = time.monotonic() + patience
    while any(map(_alive, below)) and time.monotonic() < until:
        time.sleep(0.02)


class Charge:
    """The child that is looked after, and what the supervisor was asked to do; a resource, from the main thread.

    The first SIGINT or SIGTERM is passed on to the child, once; SIGINT after it raises KeyboardInterrupt. SIGUSR1 is
    passed on. At the end nothing that the child started is left.
    """

    def __init__(self) -> None:
        self.child: subprocess.Popen | None = None
        self.asked = self._passed_on = 0

    def __enter__(self) -> "Charge":
        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        self.end()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self, command: Sequence[str]) -> subprocess.Popen:
        """Starts a child in a process group of its own: the terminal's Ctrl-C reaches it once, from here."""
        self.child = subprocess.Popen(command, process_group=0, stdin=subprocess.DEVNULL)
        self._pass_on()
        return self.child

    def end(self) -> None:
        """Kills the child, if it lives, and what it left behind."""
        child, self.child = self.child, None
        if child is not None:
            end(child)

    def show_stacks(self) -> None:
        """Has every process of the run print where it is; one that was stopped does so as well."""
        if self.child is not None:
            self.child.send_signal(signal.SIGUSR1)
            for pid in (self.child.pid, *tree(self.child.pid)):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGCONT)

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGUSR1:
            if self.child is not None:
                self.child.send_signal(number)
        elif self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.asked = self.asked or number
            self._pass_on()

    def _pass_on(self) -> None:
        if self.asked and not self._passed_on and self.child is not None:
            self._passed_on = self.asked
            self.child.send_signal(self.asked)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


if __name__ == "__main__":
    main()
