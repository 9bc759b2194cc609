"""Folders that are there with all that belongs in them, or not at all."""

import contextlib
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_BUILDING = ".building-"
_STALE = 24 * 3600  # seconds after which a folder that is being built is one that was left


@contextlib.contextmanager
def at_once(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside this one, which takes its name at the end; if another was faster, that one stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    unfinished = folder.parent / f"{_BUILDING}{folder.name}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        yield unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # it failed for another reason than a faster one
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sweep(cache: Path) -> None:
    for left in cache.glob(f"{_BUILDING}*"):
        try:
            stale = time.time() - left.stat().st_mtime > _STALE
        except FileNotFoundError:  # its build has just finished
            continue
        if stale:
            shutil.rmtree(left, ignore_errors=True)
