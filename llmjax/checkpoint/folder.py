"""What lies in the folder of a run's checkpoints, and what may be deleted from it.

A step is a folder with a plain number for its name and something in it. A step that is being written or deleted has a
longer name, so that a kill leaves nothing that looks whole. Anything else is another's: named, never followed, never
deleted.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Set
from pathlib import Path

from llmjax.checkpoint import manifest
from llmjax.checkpoint.retention import Retention

UNSEALED, DROPPED = ".unsealed", ".dropped"  # a step that has no manifest yet, and one that is being deleted
UNFINISHED = re.compile(rf"\d+({UNSEALED}|{DROPPED}|({UNSEALED})?\.orbax-checkpoint-tmp.*)")


def steps(folder: Path) -> list[int]:
    """The steps that have a folder with something in it, oldest first, verified or not."""
    return sorted(int(name) for name, kind in _entries(folder).items() if kind is None)


def ignored(folder: Path) -> dict[str, str]:
    """What else lies there, and what it is in words; without what is being written or deleted."""
    return {name: kind for name, kind in _entries(folder).items() if kind and not UNFINISHED.fullmatch(name)}


def drop(folder: Path, step: int) -> None:
    """Deletes a step; half deleted, it no longer has the name of one."""
    dropped = folder / f"{step}{DROPPED}"
    with contextlib.suppress(OSError):
        shutil.rmtree(dropped, ignore_errors=True)
        (folder / str(step)).rename(dropped)
        shutil.rmtree(dropped, ignore_errors=True)


def prune(folder: Path, newest: int, retention: Retention, damaged: Set[int]) -> None:
    """Deletes the steps before `newest` that the retention lets go of; a damaged one counts for nothing.

    Without a manifest a step is not ours to delete.
    """
    losses, verified = {}, set()
    ours = [step for step in steps(folder) if (folder / str(step) / manifest.NAME).is_file()]
    for step in set(ours) - damaged:
        with contextlib.suppress(ValueError):
            losses[step] = manifest.read(folder / str(step)).facts.get("eval_loss")
        if manifest.verified(folder / str(step)):
            verified.add(step)
    stay = retention.kept(losses, verified)
    for step in ours:
        if step < newest and step not in stay:
            drop(folder, step)


def tidy(folder: Path) -> None:
    """Deletes what killed processes left half written or half deleted; none may be at work."""
    _delete(folder, UNFINISHED)


def abandon(folder: Path, step: int) -> None:
    """Deletes what a failed save of this step left."""
    _delete(folder, re.compile(rf"{step}({UNSEALED}|({UNSEALED})?\.orbax-checkpoint-tmp.*)"))


def _delete(folder: Path, names: re.Pattern[str]) -> None:
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if names.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _entries(folder: Path) -> dict[str, str | None]:
    """Every name in the folder: what it is, or None for a step."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: _kind(entry) for entry in sorted(entries, key=lambda entry: entry.name)}


def _kind(entry: os.DirEntry) -> str | None:
    if entry.is_symlink():
        return "a symbolic link, which is not followed"
    if not entry.is_dir():
        return "a file"
    if not (entry.name.isdecimal() and entry.name.isascii() and str(int(entry.name)) == entry.name):
        return "a folder whose name is no step"
    try:
        return None if any(os.scandir(entry.path)) else "an empty folder"
    except FileNotFoundError:  # deleted meanwhile
        return "an empty folder"
    except OSError:
        return None  # a step that cannot be read does not verify, and says why
