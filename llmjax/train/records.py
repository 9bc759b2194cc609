"""Records of a run: metrics.jsonl, events.jsonl and what trackers are told, by the first process as it goes."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax import reading, redact
from llmjax.errors import DATA, Refused
from llmjax.tracking import About, Followed, Tracker

LOSS, TASK = "eval_loss", "task/"  # what names begin with in a line of an evaluation, by its kind


class Records:
    """Appends to the records in a run directory; a resource, to be used in a `with`."""

    def __init__(
        self,
        folder: Path,
        trackers: Sequence[Tracker] = (),
        config: Mapping[str, Any] = {},
        say: Callable[[str], None] = print,
    ):
        self.folder, self.trackers, self.config, self.say = Path(folder), trackers, config, say

    def __enter__(self) -> "Records":
        for name in ("metrics.jsonl", "events.jsonl"):
            write(self.folder / name, read(self.folder / name))  # a killed process may have left half a line
        self._metrics, self._events = (
            (self.folder / name).open("a", encoding="utf-8", buffering=1) for name in ("metrics.jsonl", "events.jsonl")
        )
        self._followed: list[Followed] | None = None  # until there is something to tell them
        self._start = 0
        return self

    def __exit__(self, *_) -> None:
        for each in self._followed or ():
            each.close()
        for file in (self._metrics, self._events):
            file.close()

    def rewind(self, step: int, end: int | None = None) -> list[dict[str, Any]]:
        """Drops, and returns, the metrics of what will be done again: steps after `step`, and evaluations of `end`.

        A run killed between its last evaluation and the end of its records evaluates once more.
        """
        self._metrics.close()
        path = self.folder / "metrics.jsonl"
        again = [
            line
            for line in read(path)
            if line["step"] > step or (line["step"] == end and (holds(line, LOSS) or holds(line, TASK)))
        ]
        write(path, [line for line in read(path) if line not in again])
        self._metrics = path.open("a", encoding="utf-8", buffering=1)
        self._start = step
        return again

    def metrics(self, facts: dict[str, Any]) -> None:
        """One line of metrics.jsonl, with at least `step`; finite numbers also go to the trackers."""
        self._metrics.write(json.dumps(facts) + "\n")
        shown = {name: x for name, x in facts.items() if type(x) in (int, float) and math.isfinite(x)}
        step = shown.pop("step")
        for each in self._follow():
            each.metrics(step, shown)

    def text(self, step: int, name: str, text: str) -> None:
        """A text of a step, for the trackers."""
        for each in self._follow():
            each.text(step, name, text)

    def _follow(self) -> list[Followed]:
        """The trackers at work; they begin where the run first tells them something."""
        if self._followed is None:
            about = About(self.folder, self.folder.name, redact.tree(dict(self.config)), self._start)
            self._followed = [Followed(tracker, about, self._left_out) for tracker in self.trackers]
        return self._followed

    def _left_out(self, name: str, reason: str) -> None:
        self.say(f"Training goes on without the tracker {name}: {reason}")
        self.event("tracker_failed", tracker=name, reason=reason)

    def event(self, kind: str, **facts: Any) -> None:
        """One line of events.jsonl: what happened, and when (seconds since 1970)."""
        self._events.write(json.dumps(redact.tree(dict(kind=kind, time=time.time(), **facts))) + "\n")
        os.fsync(self._events.fileno())


def holds(line: dict[str, Any], kind: str) -> bool:
    """Whether a line of metrics.jsonl is of an evaluation of this kind."""
    return any(name.startswith(kind) for name in line)


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file; none if there is no file, and a last line cut short is left out.

    Raises:
      Refused: a line before the last is not what a run writes.
    """
    if not path.is_file():
        return []
    found = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if text:
            try:
                found.append(_line(text, *(("kind", str) if path.name == "events.jsonl" else ("step", int))))
            except ValueError as error:
                raise Refused(f"{path}, line {number}, is damaged ({error}): take that line out.", DATA) from error
    return found


def _line(text: bytes, name: str, kind: type) -> dict[str, Any]:
    line = reading.parsed(text)
    if not isinstance(line, dict) or not isinstance(line.get(name), kind):
        raise ValueError(f"it has no {name}")
    return line


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replaces a .jsonl file at once."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    scratch.replace(path)
