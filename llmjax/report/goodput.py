"""Goodput: the share of a run's wall time that made steps which were kept, and where the rest went.

It is computed from the run's own records. A process counts in its own monotonic clock; only the gaps between two
processes are read off the wall clock, and a gap that the clock makes negative is none.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.errors import DATA, Refused
from llmjax.train.spent import BUCKETS

WORDS = dict(
    steps="steps that were kept", compile="compiling, with the first step", start="starting", restore="restoring",
    save="waiting for checkpoints", data="waiting for data", evaluate="evaluation and samples",
    lost="steps done again", restart="between two starts", other="everything else",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where the time of a run went."""

    wall: float
    "Seconds from the start of the first process to the last sign of life of the last one."
    buckets: Mapping[str, float]
    "Seconds by what they were spent on, as in WORDS; they add up to `wall`."
    starts: int
    "Processes that came as far as training."
    redone: int
    "Steps that were done again."
    skipped: int
    "Steps whose batch was left out."

    @property
    def share(self) -> float:
        """Goodput, 0 to 1."""
        return self.buckets["steps"] / self.wall if self.wall else 0.0


@dataclasses.dataclass(frozen=True)
class _Session:
    """One process: when it began (wall clock), how long it lived, what it says it spent, and steps after it said so."""

    began: float
    lived: float
    spent: Mapping[str, float]
    stepped: float


def of(events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> Goodput:
    """From the lines of events.jsonl and metrics.jsonl.

    Raises:
      Refused: an older version wrote them.
    """
    if not all("process_began" in event for event in events if event["kind"] == "start"):
        raise Refused("events.jsonl was begun by an older version, which kept no time: goodput is not known.", DATA)
    sessions = _sessions(events, metrics)
    buckets = dict.fromkeys(WORDS, 0.0)
    for session in sessions:
        for bucket, seconds in session.spent.items():
            buckets[bucket] += seconds
        after = session.lived - sum(session.spent.values())
        stepped = min(after, session.stepped)
        buckets["steps"] += stepped
        buckets["other"] += after - stepped
    for before, after in itertools.pairwise(sessions):
        buckets["restart"] += max(0.0, after.began - (before.began + before.lived))
    lost = min(sum(event["seconds"] for event in events if event["kind"] == "redo"), buckets["steps"])
    buckets["steps"] -= lost
    buckets["lost"] += lost
    return Goodput(
        wall=sum(buckets.values()),
        buckets=buckets,
        starts=len(sessions),
        redone=sum(event["steps"] for event in events if event["kind"] == "redo"),
        skipped=len({line["step"] for line in metrics if line.get("skipped")}),
    )


def _sessions(events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> list[_Session]:
    """The processes in turn. One that was killed lived at least until the last step that was later taken back."""
    starts = [i for i, event in enumerate(events) if event["kind"] == "start"]
    sessions = []
    for number, first in enumerate(starts):
        start, last = events[first], number == len(starts) - 1
        mine = events[first : None if last else starts[number + 1]]
        # What the next process takes back, and what a supervisor adds, is written before the next start.
        # What this process takes back itself it writes right after it says that it goes back.
        taken_back = [
            event
            for before, event in itertools.pairwise(mine)
            if event["kind"] == "redo" and (before["kind"] != "rewind" or event["elapsed"] < event["until"])
        ]
        own = [e for e in mine if e["kind"] in ("start", "save", "spent", "finish", "stop", "fault", "skip", "rewind")]
        spent = next((_seconds(event) for event in reversed(own) if event["kind"] == "spent"), {})
        told = sum(spent.values())
        lines = [line for line in metrics if last and line["step"] > start["step"] and line.get("elapsed", 0) > told]
        lived = max(event["elapsed"] for event in own)
        lived = max([lived, told, *(e["until"] for e in taken_back), *(line["elapsed"] for line in lines)])
        stepped = sum(e["seconds"] for e in taken_back) + sum(line.get("step_ms", 0) / 1e3 for line in lines)
        sessions.append(_Session(start["process_began"], lived, spent, stepped))
    return sessions


def _seconds(event: Mapping[str, Any]) -> dict[str, float]:
    return {bucket: max(0.0, float(event.get(bucket, 0.0))) for bucket in BUCKETS}


def line(found: Goodput) -> str:
    """One line for a person: "Goodput 93.1 %: 6.2 % compiling, ..."."""
    rest = sorted(((s, name) for name, s in found.buckets.items() if name != "steps"), reverse=True)
    told = ", ".join(f"{100 * s / found.wall:.1f}% {WORDS[name]}" for s, name in rest[:3] if s > 0.0005 * found.wall)
    return f"Goodput {100 * found.share:.1f}%{f'; {told}' if told else ''}."
