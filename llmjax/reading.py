"""Reads small files that somebody else may have written: so many bytes at most, and never through a symbolic link."""

import json
import os
import stat
from collections.abc import Set
from pathlib import Path
from typing import Any

RUN = 2**24  # bytes of a run.json: far more than any
TOKENIZER = 2**28
RECORD = 2**28  # of a token store: a million files


def content(path: Path, most: int, *, follow: bool = False) -> bytes:
    """All of a file.

    Raises:
      OSError: it cannot be read, or is a symbolic link.
      ValueError: it is no file, or larger than `most` bytes.
    """
    link = 0 if follow else getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | link), "rb") as file:  # a pipe would wait for a writer
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        found = file.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return found


def parsed(text: bytes) -> Any:
    """The JSON value of a text in UTF-8.

    Raises:
      ValueError: it is none, or nested deeper than any.
    """
    try:
        return json.loads(text.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def links(folder: Path, beside: Set[str] = frozenset()) -> str | None:
    """The first symbolic link in a folder or below it, as a path inside it; not at and in the names `beside`."""
    for where, folders, files in os.walk(folder):
        top = Path(where) == folder
        folders[:] = [name for name in folders if not (top and name in beside)]
        for name in sorted((*folders, *files)):
            if os.path.islink(path := os.path.join(where, name)):
                return os.path.relpath(path, folder)
    return None
