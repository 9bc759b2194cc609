"""`llmjax diff`: how two runs differ, what that means, and where their loss curves part."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from llmjax import changes, names, reading
from llmjax.changes import Change, Kind
from llmjax.commands.show import check_file
from llmjax.errors import DONE, Refused, did_you_mean
from llmjax.run import Run, load, read, to_json
from llmjax.rundir import find
from llmjax.train import records
from llmjax.train.display import Display

HEADINGS: Mapping[Kind, str] = {
    "numbers": "Changes the numbers",
    "steps": "Changes what becomes of bad steps",
    "speed": "Changes the speed only (same numbers up to rounding)",
    "records": "Changes what is recorded (same numbers)",
}
ENVIRONMENT = ("commit", "python", "device_kind", "device_count", "processes", "data")
ROUNDING = 1e-3  # relative difference of two losses beyond which it is no rounding


@dataclasses.dataclass(frozen=True)
class Options:
    """How two runs differ. A run is a name, the path of its directory, its run.json, or an experiment."""

    a: tyro.conf.Positional[str]
    "The first run."
    b: tyro.conf.Positional[str]
    "The second run."
    runs: str = "runs"
    "Folder that holds run directories."
    json: str = ""
    "File to write the same to."


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two."""

    name: str
    run: Run
    folder: Path | None
    "Its directory; None for an experiment."


@dataclasses.dataclass(frozen=True)
class Curves:
    """Where the losses of two runs part, over the steps that both have."""

    steps: int
    "That both have."
    parts: int | None
    "First step whose losses are not equal in every bit; None: there is none."
    leaves: int | None
    "First step whose losses differ by more than rounding, a thousandth of themselves; None: there is none."
    largest: float
    "Largest difference, relative to the first run's loss."
    last: tuple[float, float]
    "Losses at the last step that both have."


def diff(asked: Options, display: Display | None = None) -> int:
    """Prints the differences by what they change; returns an exit code.

    Raises:
      Refused: one of the two is neither a run nor an experiment, or its files are damaged.
    """
    check_file(asked.json)
    display, (a, b) = display or Display(), (side(word, asked.runs) for word in (asked.a, asked.b))
    found = changes.between(to_json(a.run), to_json(b.run))
    around, curves = beside(a, b), part(a, b)
    display.say(f"a  {a.name}\nb  {b.name}")
    for kind, heading in HEADINGS.items():
        rows = [change for change in found if change.kind == kind and change.field not in ("name", "runs")]
        show(display, heading, rows)
    show(display, "Versions, machine and data", around)
    display.say(f"\n{meaning(found, around)}")
    if curves:
        display.say(told(curves))
    if asked.json:
        facts = dict(
            a=a.name, b=b.name, changes=[dataclasses.asdict(change) for change in found],
            environment=[dataclasses.asdict(change) for change in around],
            curves=curves and dataclasses.asdict(curves), meaning=meaning(found, around),
        )  # fmt: skip
        Path(asked.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return DONE


def side(word: str, runs: str) -> Side:
    """What a word on the command line means: a run, or else an experiment."""
    if word.endswith(".json"):
        folder = Path(word).parent
        return Side(word, read(Path(word)), folder if Path(word).name == "run.json" else None)
    if word.endswith(".py"):
        return Side(f"experiment {word}", load(word), None)
    with contextlib.suppress(Refused):
        folder = find(word, runs)
        return Side(str(folder), read(folder / "run.json"), folder)
    if word in (known := names.names("experiments")):
        return Side(f"experiment {word}", load(word), None)
    near = did_you_mean(word, [*known, *sorted(p.parent.name for p in Path(runs).glob("*/run.json"))])
    raise Refused(f"{word} is neither a run in {runs} nor an experiment: {near}give the name or folder of one.")


def beside(a: Side, b: Side) -> list[Change]:
    """What differs around the two runs: versions, machine and the data's fingerprint, where both say."""
    x, y = environment(a.folder), environment(b.folder)
    pairs = [(name, x.get(name), y.get(name)) for name in ENVIRONMENT]
    versions = [side.get("versions") if isinstance(side.get("versions"), dict) else {} for side in (x, y)]
    pairs += [(name, versions[0].get(name), versions[1].get(name)) for name in sorted(versions[0])]
    axes = [side.get("mesh") for side in (x, y)]
    if all(isinstance(one, dict) for one in axes):
        pairs.append(("axes as they were", *map(changes.cut, axes)))
    return [
        Change(name, short(p), short(q), "numbers" if name == "data" else "speed")
        for name, p, q in pairs
        if p is not None and q is not None and p != q
    ]


def environment(folder: Path | None) -> dict[str, Any]:
    """The env.json of a run's newest start; nothing where there is none, or it is torn."""
    if folder is None:
        return {}
    try:
        found = reading.parsed(reading.content(folder / "env.json", reading.RUN))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def part(a: Side, b: Side) -> Curves | None:
    """Where the loss curves part; None where the two have no steps in common."""
    x, y = losses(a.folder), losses(b.folder)
    both = sorted(x.keys() & y.keys())
    if not both:
        return None
    apart = {step: abs(x[step] - y[step]) / max(abs(x[step]), 1e-9) for step in both if x[step] != y[step]}
    leaves = next((step for step in both if apart.get(step, 0) > ROUNDING), None)
    return Curves(
        len(both), min(apart, default=None), leaves, max(apart.values(), default=0.0), (x[both[-1]], y[both[-1]])
    )


def losses(folder: Path | None) -> dict[int, float]:
    """The training loss of every step that is in the records."""
    lines = records.read(folder / "metrics.jsonl") if folder else ()
    return {line["step"]: line["loss"] for line in lines if isinstance(line.get("loss"), (int, float))}


def show(display: Display, heading: str, rows: list[Change]) -> None:
    """One group of differences."""
    if not rows:
        return
    cells = [(row.field, changes.shown(row.before), changes.shown(row.after)) for row in rows]
    first, second = max(len(cell[0]) for cell in cells), max(1, *(min(len(cell[1]), 40) for cell in cells))
    display.say()
    display.console.print(heading, style="bold", markup=False)
    display.say(f"  {'':<{first}}  {'a':<{second}}  b")
    for field, before, after in cells:
        display.say(f"  {field:<{first}}  {short(before):<{second}}  {short(after)}")


def meaning(found: list[Change], around: list[Change]) -> str:
    """Whether the two compute the same numbers, in a sentence."""
    everything = [*found, *around]
    if any(change.kind == "numbers" for change in everything):
        fields = [change.field for change in everything if change.kind == "numbers"]
        which = ", ".join(fields[:4]) + (f" and {len(fields) - 4} more" if len(fields) > 4 else "")
        return f"These are different runs: {which} decide{'s' * (len(fields) == 1)} what is computed."
    if any(change.kind == "steps" for change in everything):
        return "They compute the same numbers, up to rounding, unless a step is bad."
    if any(change.kind == "speed" for change in everything):
        return "They compute the same numbers, up to rounding."
    return "They compute the same numbers."


def told(curves: Curves) -> str:
    """Where the curves part, in a sentence."""
    last = f"at the last of {curves.steps:,} common steps {curves.last[0]:.4f} and {curves.last[1]:.4f}"
    if curves.parts is None:
        return f"The losses of all {curves.steps:,} common steps are equal in every bit."
    most = f"they differ by up to {100 * curves.largest:.2g}% and are {last}"
    if curves.leaves is None:
        return f"The losses part at step {curves.parts:,}, by no more than rounding does: {most}."
    return f"The losses part at step {curves.parts:,}, and by more than a thousandth at {curves.leaves:,}: {most}."


def short(value: Any) -> Any:
    """A text as one line of at most 40 characters; anything else as it is."""
    if not isinstance(value, str):
        return value
    line = " ".join(value.split())
    return f"{line[:37]}..." if len(line) > 40 else line
