"""`llmjax checkpoints`: the checkpoints of a run, and whether they are still what was written."""

import dataclasses
import time
from pathlib import Path

import tyro

from llmjax.checkpoint import manifest
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.checkpoint.folder import ignored
from llmjax.errors import DATA, DONE, Refused
from llmjax.rundir import find
from llmjax.train.display import Display, duration, memory


@dataclasses.dataclass(frozen=True)
class Options:
    """Lists the checkpoints of a run."""

    run: tyro.conf.Positional[str]
    "Name of a run, or the path of its directory."
    runs: str = "runs"
    "Folder that holds run directories."
    verify: bool = False
    "Read all of them back; the exit code is 65 if one is not what was written."
    trust: int = -1
    "Step of a checkpoint without a manifest, as older versions wrote them, to take as it is from now on."


def checkpoints(asked: Options, display: Display | None = None) -> int:
    """Prints the list; returns an exit code.

    Raises:
      Refused: there is no such run or checkpoint.
    """
    folder, display = find(asked.run, asked.runs), display or Display()
    held = Checkpoints(folder / "checkpoints", say=display.say)
    steps = held.steps()
    if asked.trust != -1:
        if asked.trust not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise Refused(f"{folder} has no checkpoint of step {asked.trust} to trust: it has {known}.", DATA)
        with held:
            trust(held, asked.trust)
    for name, kind in ignored(held.folder).items():
        display.say(f"Ignored {held.folder / name}: {kind}.")
    if not steps:
        display.say(f"{folder} has no checkpoint yet.")
        return DONE
    reasons = {}
    for step in steps:
        with display.waiting(f"reading checkpoint {step}"):
            reasons[step] = reason(held, step, asked.verify)
    rows = [row(held.folder / str(step), reasons[step]) for step in steps]
    display.table(["step", "size", "age", "tokens", "read back"], rows)
    if bad := [step for step, why in reasons.items() if why]:
        what_next = (
            "training continues from the newest other" if len(bad) < len(steps) else "training refuses to continue"
        )
        display.say(f"{len(bad)} of {len(steps)} not verified; {what_next}.")
    elif not asked.verify:
        display.say("--verify reads them all back.")
    return DATA if bad else DONE


def trust(held: Checkpoints, step: int) -> None:
    """Gives a checkpoint of an older version its manifest; one that has a whole manifest keeps it."""
    try:
        manifest.read(held.folder / str(step))
    except ValueError:
        held.trust(step)
        return
    raise Refused(f"checkpoint {held.folder / str(step)} has a manifest: --trust is for those that have none.", DATA)


def reason(held: Checkpoints, step: int, verify: bool) -> str | None:
    """Why a checkpoint is not what was written; without `verify`, names and sizes alone are looked at."""
    return held.verify(step) if verify else manifest.damage(held.folder / str(step), content=False)


def row(folder: Path, why: str | None) -> list[str]:
    """A checkpoint's line of the table."""
    try:
        found = manifest.read(folder)
    except ValueError:
        return [folder.name, "", "", "", f"no: {why}"]
    when = manifest.verified(folder)
    back = f"{age(when)} ago" if when else "not yet"
    tokens = found.facts.get("tokens")
    size = [folder.name, memory(found.bytes), age(found.written), f"{tokens:,}" if isinstance(tokens, int) else ""]
    return [*size, f"no: {why}" if why else back]


def age(then: float) -> str:
    """Time since then as d h:mm:ss; never less than none, whatever the clock did."""
    days, seconds = divmod(max(0.0, time.time() - then), 86_400)
    return f"{days:.0f} d {duration(seconds)}" if days else duration(seconds)
