"""What a run writes down as it goes, and whose its directory is."""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmjax import redact
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.errors import IO, Refused
from llmjax.train.display import Display
from llmjax.train.records import LOSS, Records, holds, read
from llmjax.train.spent import Spent
from llmjax.train.vitals import memory

BETWEEN = 10.0  # seconds, at most, between two lines that say what the time was spent on


class Heartbeat:
    """Says in a file how far the run is, for a supervisor; without a path, nowhere."""

    def __init__(self, path: str, folder: Path, *, fallback: bool = False):
        self.path = Path(path) if path else None
        self.facts = dict(folder=str(folder.absolute()), pid=os.getpid(), fallback=fallback)
        self.said, self.phase = 0.0, ""

    def __call__(self, step: int, phase: str) -> None:
        """At once where the phase is new, else once a second."""
        if self.path is None or (phase == self.phase and time.monotonic() - self.said < 1):
            return
        self.said, self.phase = time.monotonic(), phase
        scratch = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(dict(step=step, phase=phase, **self.facts)))
        scratch.replace(self.path)


@dataclasses.dataclass
class Ledger:
    """What the loop writes to; the records are None on every process but the first."""

    display: Display
    checkpoints: Checkpoints
    records: Records | None
    spent: Spent = dataclasses.field(default_factory=Spent)
    heartbeat: Callable[[int, str], None] = lambda step, phase: None
    accounted: float = 0.0  # of the spent seconds, how many are in the records

    def metrics(self, **facts) -> None:
        if self.records:
            self.records.metrics(facts | dict(elapsed=self.spent.elapsed()))

    def event(self, kind: str, **facts) -> None:
        if self.records:
            self.records.event(kind, elapsed=self.spent.elapsed(), **facts)

    def fault(self, facts: dict[str, Any]) -> None:
        """A bad step: a line of the events, and what is kept of it in faults/."""
        self.event("fault", step=facts["step"], reason=facts["reason"])
        if self.records:
            path = self.records.folder / "faults" / f"{facts['step']}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(redact.tree(facts), indent=1) + "\n", encoding="utf-8")

    def evaluated(self, step: int, kind: str = LOSS) -> bool:
        """Whether the records, where there are any, have an evaluation of a kind after so many steps."""
        return self.records is not None and any(
            line["step"] == step and holds(line, kind) for line in read(self.records.folder / "metrics.jsonl")
        )

    def sampled(self, step: int) -> bool:
        """Whether the run's prompts, where this process keeps records, were completed after so many steps."""
        return self.records is not None and (self.records.folder / "samples" / f"{step}.json").is_file()

    def account(self, *, now: bool = False) -> None:
        """Records what the time was spent on so far, if asked or some time after the last such line."""
        if now or self.spent.elapsed() - self.accounted > BETWEEN:
            self.accounted = self.spent.elapsed()
            self.event("spent", **self.spent.totals(), **memory())


@contextlib.contextmanager
def owned(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Makes a run directory, and keeps other runs out of it until the end, or the death, of this process.

    The lock is the kernel's, so that a process that was killed leaves none; the file says whose it is.

    Raises:
      Refused: another process has it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise Refused(f"{folder} cannot be written ({error.strerror}): choose another folder, --runs.", IO) from error
    with open(descriptor, "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                f"{folder} is being trained by {_owner(file.read()) or 'another process'}: wait for it or stop it, or "
                "give this run another --name."
            ) from error
        except OSError as error:
            say(f"{folder} cannot be locked ({error.strerror}): see to it that no other process trains it.")
        if before := _owner(file.read()):
            say(f"Took {folder} over from {before}, which is gone.")
        file.seek(0)
        file.truncate()
        file.write(json.dumps(dict(pid=os.getpid(), host=platform.node(), since=time.time())))
        file.flush()
        yield
        file.seek(0)
        file.truncate()


def _owner(text: str) -> str:
    """Who a lock's text says it is; nothing where it says nothing of that kind."""
    try:
        said = json.loads(text)
        return f"process {int(said['pid'])} on {str(said['host'])[:99]}"
    except (ValueError, TypeError, KeyError):
        return ""
