"""Trackers: where else a run's numbers go. One may fail, hang or be missing; training goes on without it.

A tracker is a frozen dataclass of one file in `llmjax.trackers`, or of any other module, with two methods. What it
opens works in a thread of its own, so that no call of the loop waits for a disk, a server or a lock.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import queue
import secrets
import threading
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llmjax import names, redact
from llmjax.errors import Refused, did_you_mean

PACKAGE = "llmjax.trackers"
THREAD = "llmjax tracker "  # how the names of their threads begin
PATIENCE = 30.0  # seconds for a tracker to end in
WAITING = 10_000  # lines that may wait for a slow tracker


@dataclasses.dataclass(frozen=True)
class About:
    """What a tracker is told of a run."""

    folder: Path
    "The run directory."
    name: str
    config: Mapping[str, Any]
    "The Run as JSON, without secrets."
    start: int
    "Steps that were done before."


class Sink(Protocol):
    """An open tracker. All calls come from one thread; whatever they raise ends the tracker and nothing else."""

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """Finite numbers of a step, by name."""

    def text(self, step: int, name: str, text: str) -> None:
        """A text that belongs to a step, without secrets."""

    def close(self) -> None:
        """Everything is to be where it belongs when this returns."""


@runtime_checkable
class Tracker(Protocol):
    """A frozen dataclass that says where the numbers go."""

    def ready(self) -> None:
        """Returns if it can be opened here.

        Raises:
          Refused: a package is missing, or a field has no meaning.
        """

    def open(self, about: About) -> Sink:
        """Begins to follow a run, or goes on."""


class Followed:
    """A tracker at work. No call waits for it or raises what it raises; `left_out` is told why it ended, once."""

    def __init__(self, tracker: Tracker, about: About, left_out: Callable[[str, str], None]):
        self.name = type(tracker).__name__
        self._left_out = left_out
        self._lines: queue.Queue = queue.Queue(WAITING)
        self._failed: BaseException | None = None
        self._gone = False
        self._thread = threading.Thread(target=self._work, args=(tracker, about), name=THREAD + self.name, daemon=True)
        self._thread.start()

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """As Sink's, but at once."""
        self._put(lambda sink: sink.metrics(step, numbers))

    def text(self, step: int, name: str, text: str) -> None:
        """As Sink's, but at once, and with what is secret taken out."""
        self._put(lambda sink: sink.text(step, name, redact.text(text)))

    def close(self) -> None:
        """Waits for it to write what it has been given, PATIENCE seconds at most, and then leaves it."""
        self._put(None)
        if not self._gone:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._end(f"it did not end within {PATIENCE:g} s")
            elif self._failed:
                self._end(_sentence(self._failed))

    def _put(self, call: Callable[[Sink], None] | None) -> None:
        if self._gone:
            return
        if self._failed:
            return self._end(_sentence(self._failed))
        try:
            self._lines.put_nowait(call)
        except queue.Full:
            self._end(f"it is {WAITING:,} lines behind")

    def _end(self, reason: str) -> None:
        self._gone = True
        self._left_out(self.name, redact.text(reason))

    def _work(self, tracker: Tracker, about: About) -> None:
        try:
            sink = tracker.open(about)
            while call := self._lines.get():
                call(sink)
            sink.close()
        except BaseException as error:  # SystemExit of a library as well
            self._failed = error


def hanging() -> bool:
    """Whether a tracker that was left is still at it, so that Python's own end might wait for it."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())


def installed(module: str, extra: str) -> None:
    """Refuses a tracker whose package is missing."""
    if importlib.util.find_spec(module) is None:
        raise Refused(f"trackers names {extra}, and {module} is not installed: pip install 'llmjax[{extra}]'.")


def identity(folder: Path) -> tuple[str, bool]:
    """(the id of a run in a store that others use too, whether it is new); kept in a folder, which is made."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (known := (folder / "id").read_text(encoding="ascii").strip()).isalnum():
            return known, False
    folder.mkdir(parents=True, exist_ok=True)
    new = secrets.token_hex(8)
    (folder / "id").write_text(new + "\n", encoding="ascii")
    return new, True


def named(text: str) -> Tracker:
    """The tracker of a command line: a module of llmjax.trackers, and what its fields are, as in wandb:project=mine.

    Raises:
      Refused: there is no such tracker or field, or a field cannot have that value.
    """
    name, _, rest = text.partition(":")
    known = names.names(PACKAGE)
    if name not in known:
        near = did_you_mean(name, known)
        raise Refused(f"there is no tracker named {name!r}: {near}choose from {', '.join(known)}.")
    default = importlib.import_module(f"{PACKAGE}.{name}").tracker
    hints = typing.get_type_hints(type(default))
    given = {}
    for part in filter(None, rest.split(",")):
        field, equals, value = part.partition("=")
        if field not in hints or not equals:
            raise Refused(
                f"trackers has {part!r} for {name}: {did_you_mean(field, hints)}give "
                f"{' or '.join(f'{f}=...' for f in hints) or 'nothing'} after the colon, with commas between."
            )
        allowed = typing.get_args(hints[field])
        if allowed and value not in allowed:
            raise Refused(f"trackers has {field}={value} for {name}: choose from {', '.join(allowed)}.")
        given[field] = value
    return dataclasses.replace(default, **given)


def told(tracker: Any) -> str:
    """The text from which `named` makes an equal tracker."""
    fields = dataclasses.fields(tracker) if dataclasses.is_dataclass(tracker) else ()
    changed = [f"{f.name}={getattr(tracker, f.name)}" for f in fields if getattr(tracker, f.name) != f.default]
    return ":".join([type(tracker).__module__.rpartition(".")[2], *([",".join(changed)] if changed else [])])


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
