"""Which tokens make a row: the stream cut every T tokens, or whole documents put together so that few are cut.

`split` concatenates and cuts: no padding, but most rows begin inside a document. `best_fit` cuts only documents longer
than a row, and puts the rests into the fullest row that has room (arXiv:2404.10830). It is decided once for a store
and a T, in groups of documents that bound memory, and kept as

    pieces.bin   (start, length) of every piece, row by row
    rows.bin     the first piece of every row
    packing.json what came of it
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmjax.data import shards
from llmjax.data.folders import at_once
from llmjax.data.onfile import OnFile, check_file
from llmjax.data.shards import Shards
from llmjax.errors import DATA, IO, Refused

PIECE = np.dtype([("start", "<i8"), ("length", "<i4")])
_VERSION = 1
_GROUP = 1 << 17  # documents that are packed together


class Packing(NamedTuple):
    """The rows of a split."""

    folder: Path
    pieces: OnFile
    "PIECE [pieces]."
    first: OnFile
    "The first piece of each row, and where the last ends: int64 [rows + 1]."
    facts: dict
    "As `report` gives."


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece: best fit decreasing, into rows of `capacity`; int64 [pieces].

    The longest piece comes first; each goes into the row with the least room that is enough, or opens one.
    """
    room_of: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by what is left in them
    rooms, rows = 0, 0  # bit r of `rooms`: a row with room r is there
    row_of = np.empty(len(lengths), np.int64)
    sizes = lengths.tolist()
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[piece]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = room_of[room].pop()
            if not room_of[room]:
                rooms ^= 1 << room
        else:
            row, room, rows = rows, capacity, rows + 1
        row_of[piece] = row
        if left := room - size:
            rooms |= 1 << left
            room_of[left].append(row)
    return row_of


def documents(store: Shards, split: str) -> Iterator[np.ndarray]:
    """(start, length) of the split's documents, in groups that may span shards: PIECE [n]."""
    held: list[np.ndarray] = []
    for n, base in enumerate(store.first[split][:-1].tolist()):
        shard = store.shard(split, n)
        bounds = np.append(shard.starts, np.uint64(len(shard.tokens))).astype(np.int64)
        for at in range(0, len(shard.starts), _GROUP):
            cut = bounds[at : at + _GROUP + 1]
            held.append(pieces(cut[:-1] + base, np.diff(cut)))
            if sum(map(len, held)) >= _GROUP:
                yield np.concatenate(held)
                held = []
    if held:
        yield np.concatenate(held)


def pieces(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """PIECE [n]."""
    made = np.empty(len(start), PIECE)
    made["start"], made["length"] = start, length
    return made


def rows_of(group: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of a group of documents in the order of their rows, PIECE [n], and how many each row has, int64."""
    full_N, rest_N = group["length"] // length, group["length"] % length
    many = np.repeat(group["start"], full_N)
    within = np.arange(len(many)) - np.repeat(np.cumsum(full_N) - full_N, full_N)
    whole = pieces(many + within * length, np.full(len(many), length))
    rest = pieces(group["start"] + full_N * length, rest_N)[rest_N > 0]
    row_of = best_fit(rest["length"], length)
    order = np.argsort(row_of, kind="stable")
    counts = np.concatenate([np.ones(len(whole), np.int64), np.bincount(row_of)]) if len(rest) else np.ones(len(whole))
    return np.concatenate([whole, rest[order]]), counts.astype(np.int64)


def report(store: Shards, split: str, length: int, kind: str, rows: int) -> dict[str, float]:
    """Rows, share of padding, and of the documents those cut, and those cut that a row could have held.

    Reads the starts of all documents.
    """
    total = cut = needless = 0
    for group in documents(store, split):
        start, size = group["start"], group["length"]
        fits = size <= length
        parted = start // length != (start + size - 1) // length if kind == "split" else ~fits
        total, cut, needless = total + len(group), cut + int(parted.sum()), needless + int((parted & fits).sum())
    tokens = int(store.first[split][-1])
    padding = max(0.0, 1 - tokens / (rows * length)) if rows else 0.0
    return dict(rows=rows, padding=padding, documents=total, cut=cut / max(total, 1), needless=needless / max(total, 1))


def ensure(store: Shards, split: str, length: int, cache: Path) -> Packing:
    """Opens the best-fit packing of a split in rows of `length` below `cache`, deciding it first if it is not there.

    Raises:
      Refused: the store is damaged (code 65), or `cache` cannot be written (code 74).
    """
    folder = cache / f"packing-{_VERSION}-{store.record['fingerprint'][:24]}-{split}-{length}"
    if not folder.exists():
        try:
            _build(store, split, length, folder)
        except OSError as error:
            raise Refused(f"'{cache}' cannot take the packing ({error.strerror or error}): free some space there.",
                          IO) from None  # fmt: skip
    return _open(folder)


def _build(store: Shards, split: str, length: int, folder: Path) -> None:
    with at_once(folder) as unfinished:
        held = rows = 0
        with (unfinished / "pieces.bin").open("wb") as file, (unfinished / "rows.bin").open("wb") as firsts:
            for group in documents(store, split):
                found, counts = rows_of(group, length)
                file.write(found.tobytes())
                firsts.write((held + np.cumsum(counts) - counts).astype("<i8").tobytes())
                held, rows = held + len(found), rows + len(counts)
            firsts.write(np.array([held], "<i8").tobytes())
        facts = report(store, split, length, "best_fit", rows) | dict(pieces=held)
        shards.write(unfinished / "packing.json", json.dumps(facts).encode())


def _open(folder: Path) -> Packing:
    remedy = f"delete the folder '{folder}' and start again."
    try:
        facts = json.loads((folder / "packing.json").read_text())
        kept = Packing(
            folder,
            OnFile(folder / "pieces.bin", PIECE, int(facts["pieces"]), remedy=remedy),
            OnFile(folder / "rows.bin", np.dtype("<i8"), int(facts["rows"]) + 1, remedy=remedy),
            facts,
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise Refused(f"'{folder / 'packing.json'}' is damaged: {remedy}", DATA) from None
    for array in (kept.pieces, kept.first):
        check_file(array.path, array.size, remedy)
    return kept
