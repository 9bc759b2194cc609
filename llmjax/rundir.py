"""Run directories: which one a name means, and whether it may be looked into. It imports nothing slow."""

import contextlib
from pathlib import Path

from llmjax import reading
from llmjax.errors import DATA, Refused, did_you_mean


def find(name: str, runs: str) -> Path:
    """The directory of a run given by name or path."""
    for folder in (Path(runs) / name, Path(name)):
        with contextlib.suppress(OSError, ValueError):  # a name too long for a folder, or of characters that none has
            if (folder / "run.json").is_file():
                own(folder)
                return folder
    near = did_you_mean(name, sorted(p.parent.name for p in Path(runs).glob("*/run.json")))
    raise Refused(f"there is no run {name!r} in {runs}: {near}train one with llmjax train, or name its folder.")


def own(folder: Path) -> None:
    """Refuses a run directory with a symbolic link in it, which could have files elsewhere read or overwritten.

    `checkpoints` may itself be one, and says on its own which entries it leaves alone.
    """
    if found := reading.links(folder, beside={"checkpoints"}):
        raise Refused(
            f"{folder / found} is a symbolic link, which no run writes: put what it means in its place.", DATA
        )
