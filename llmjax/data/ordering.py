"""Rows in an order of their own instead of a shuffle: as they are stored, or those of the shortest documents first.

A curriculum by length is decided once for a store, a packing and a T, and kept as order.bin, the rows in their order
(int64). Deciding it takes 24 bytes of memory per row.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmjax.data import packing, shards
from llmjax.data.dataset import mix
from llmjax.data.folders import at_once
from llmjax.data.onfile import OnFile, check_file
from llmjax.errors import DATA, IO, Refused

_VERSION = 1


def documents_of_rows(store: shards.Shards, length: int, rows: int, packed: packing.Packing | None) -> np.ndarray:
    """How many documents each training row has a part of, int64 [rows]."""
    if packed:
        return np.diff(packed.first)
    count = np.ones(rows + 1, np.int64)  # the document that the row begins in
    for group in packing.documents(store, "train"):
        begins = group["start"][group["start"] % length > 0] // length
        count += np.bincount(np.minimum(begins, rows), minlength=rows + 1)
    return count[:rows]


def short_first(documents_N: np.ndarray) -> np.ndarray:
    """Rows by falling number of documents, thus by rising mean length; equal ones mixed, alike anywhere. int64 [N]."""
    return np.lexsort((mix(np.arange(len(documents_N), dtype=np.uint64)), -documents_N))


def ensure(store: shards.Shards, length: int, rows: int, packed: packing.Packing | None, cache: Path) -> Sequence[int]:
    """Opens the order of the shortest documents first below `cache`, deciding it first if it is not there.

    Raises:
      Refused: the store or the order is damaged (code 65), or `cache` cannot be written (code 74).
    """
    kind = "best_fit" if packed else "split"
    folder = cache / f"order-{_VERSION}-{store.record['fingerprint'][:24]}-{kind}-{length}"
    if not folder.exists():
        try:
            with at_once(folder) as unfinished:
                content = short_first(documents_of_rows(store, length, rows, packed)).astype("<i8").tobytes()
                shards.write(unfinished / "order.bin", content)
                facts = dict(sha256=hashlib.sha256(content).hexdigest())
                shards.write(unfinished / "order.json", json.dumps(facts).encode())
        except OSError as error:
            raise Refused(f"'{cache}' cannot take the order ({error.strerror or error}): free some space there.",
                          IO) from None  # fmt: skip
    return _open(folder, rows)


def _open(folder: Path, rows: int) -> OnFile:
    remedy = f"delete the folder '{folder}' and start again."
    try:
        check_file(folder / "order.bin", 8 * rows, remedy)
        digest = json.loads((folder / "order.json").read_text())["sha256"]
        with (folder / "order.bin").open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise Refused(f"'{folder / 'order.bin'}' is damaged: {remedy}", DATA) from None
    return OnFile(folder / "order.bin", np.dtype("<i8"), rows, remedy=remedy)
