"""`llmjax profile`: what the traced steps of a run were spent on."""

import dataclasses
import json
from pathlib import Path

import tyro

from llmjax.commands.show import check_file
from llmjax.errors import DONE, Refused
from llmjax.report.profile import newest, read
from llmjax.rundir import find
from llmjax.train.display import Display

SHOWN = 44  # characters of a name


@dataclasses.dataclass(frozen=True)
class Options:
    """What the traced steps of a run were spent on: the longest operations, and the shares of compute and waiting."""

    run: tyro.conf.Positional[str]
    "Name of a run, or the path of its directory."
    runs: str = "runs"
    "Folder that holds run directories."
    top: int = 15
    "Operations that are shown, the longest first."
    json: str = ""
    "File to write the same to."


def profile(asked: Options, display: Display | None = None) -> int:
    """Prints the tables; returns an exit code.

    Raises:
      Refused: there is no such run, it has no trace, or the trace is torn.
    """
    if asked.top < 1:
        raise Refused(f"top is {asked.top}: give at least 1.")
    check_file(asked.json)
    folder, display = find(asked.run, asked.runs), display or Display()
    files = newest(folder)
    found = read(files, asked.top)
    many = f"steps {found.steps[0]} to {found.steps[-1]}" if found.steps else "a trace"
    each = f", {1e3 * found.seconds / len(found.steps):,.1f} ms each" if found.steps else ""
    devices = f"{found.devices} device{'s' * (found.devices > 1)}"
    display.say(f"{folder}: {many} on {devices}, {1e3 * found.seconds:,.1f} ms{each}")
    words = {"collectives": "collectives that no compute hides", "memory": "memory: copies and moves"}
    rows = [[words.get(kind, kind), f"{100 * share:.1f}%"] for kind, share in found.shares.items()]
    display.table(["time of a device", "share"], rows)
    if found.hidden is not None:
        display.say(f"Compute hides {100 * found.hidden:.0f}% of the time of collectives.")
    display.say()
    per = found.devices * max(1, len(found.steps))
    cells = [
        [_short(one.name, one.source), one.kind, f"{one.runs / per:,.4g}", f"{1e3 * one.seconds / per:,.3f}",
         f"{100 * one.share:.1f}%"]
        for one in found.top
    ]  # fmt: skip
    display.table(["operation", "kind", "runs a step", "ms a step", "share"], cells)
    display.say(f"\nNext:\n  xprof {folder / 'profile'} shows it on a timeline (pip install xprof)")
    if asked.json:
        facts = dataclasses.asdict(found) | dict(files=[str(path) for path in files])
        Path(asked.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return DONE


def _short(name: str, source: str) -> str:
    """A name, with the end of the traced operation that it comes from."""
    told = f"{name} ({'/'.join(source.rstrip(':').split('/')[-3:])})" if source else name
    return told if len(told) <= SHOWN else f"{told[: SHOWN - 3]}..."
