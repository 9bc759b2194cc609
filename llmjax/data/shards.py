"""The store that `llmjax data build` writes: shards of tokens that stay on file, each block checked as it is read.

    dataset.json              provenance, counts, versions, one fingerprint
    tokenizer.json            the tokenizer that wrote the tokens
    index.bin                 one ENTRY per shard
    tokens/000000-train.bin   the documents' tokens, each document preceded by the end of text
    tokens/000000-train.idx   where each document starts (uint64), then the SHA-256 of every BLOCK bytes of tokens

Opening reads dataset.json and the index, 109 bytes per shard, and no token. A shard's file sizes and .idx are compared
with the index when it is first used, and a block's hash when it is first read: nothing wrong is ever trained on, and
a store of terabytes opens at once.
"""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmjax import reading
from llmjax.data.onfile import OnFile, check_file
from llmjax.errors import DATA, Refused

FORMAT = "llmjax shards 1"
SPLITS = ("train", "heldout")
BLOCK = 1 << 16  # bytes of tokens under one hash
ENTRY = np.dtype(
    [("unit", "<u8"), ("split", "u1"), ("width", "<u4"), ("offset", "<u8"), ("tokens", "<u8"), ("documents", "<u8"),
     ("bytes", "<u8"), ("sha256", "u1", 32), ("idx", "u1", 32)]
)  # fmt: skip
_OPEN = 2048  # shards of which the starts and hashes are kept


class Shard(NamedTuple):
    """What is known of one shard."""

    tokens: OnFile
    "Token ids as they lie in the file."
    starts: np.ndarray
    "Where each document starts, uint64, ascending."
    digests: np.ndarray
    "SHA-256 of every block: uint8 [blocks, 32]."
    sound: np.ndarray
    "Blocks that were read and compared: bool [blocks]."


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
    """An open store."""

    folder: Path
    record: dict
    "What dataset.json says."
    entries: dict[str, np.ndarray]
    "Of each split, its shards in order: ENTRY [n]."
    first: dict[str, np.ndarray]
    "Where each shard's tokens begin in the split, and where the last ends: int64 [n + 1]."

    @functools.cached_property
    def shard(self):
        """(split, number) -> Shard, the latest ones kept."""
        return functools.lru_cache(_OPEN)(functools.partial(_shard, self))


def open_shards(folder: Path) -> Shards:
    """Opens a store in time that does not depend on its tokens.

    Raises:
      Refused: there is none, or dataset.json or index.bin is not what was written (code 65).
    """
    try:
        text = reading.content(folder / "dataset.json", reading.RECORD)
        index = reading.content(folder / "index.bin", reading.RECORD)
        record = reading.parsed(text)
        whole = record["format"] == FORMAT and record_text(record) == text
        whole = whole and hashlib.sha256(index).hexdigest() == record["index"]
        entries_N = np.frombuffer(index, ENTRY) if whole else np.zeros(0, ENTRY)
    except OSError as error:
        raise Refused(
            f"'{error.filename or folder}' cannot be read ({error.strerror}): give a folder that `llmjax data build` "
            "wrote.",
            DATA,
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise Refused(f"'{folder}' is damaged (dataset.json, index.bin), or of another version: build it again.", DATA)
    entries = {split: entries_N[entries_N["split"] == n] for n, split in enumerate(SPLITS)}
    first = {split: np.concatenate([[0], np.cumsum(of["tokens"], dtype=np.int64)]) for split, of in entries.items()}
    return Shards(folder, record, entries, first)


def take(store: Shards, split: str, start: int, stop: int) -> np.ndarray:
    """Tokens `start` to `stop - 1` of a split, int32; they may lie in several shards.

    Raises:
      Refused: a shard is gone, of another size, or holds other bytes than were written (code 65).
    """
    parts = [_checked(store.shard(split, n), low, high) for n, low, high in _spans(store, split, start, stop)]
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)


def starts(store: Shards, split: str, start: int, stop: int) -> np.ndarray:
    """Where documents start among the tokens `start` to `stop - 1` of a split, int64, from 0 at `start`."""
    found = []
    for n, low, high in _spans(store, split, start, stop):
        within = store.shard(split, n).starts
        here = within[slice(*np.searchsorted(within, np.array([low, high], np.uint64)))].astype(np.int64)
        found.append(here + int(store.first[split][n]) - start)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _spans(store: Shards, split: str, start: int, stop: int):
    """(shard, from, to) of the shards that hold these tokens."""
    first, stop = store.first[split], min(stop, int(store.first[split][-1]))
    n = int(np.searchsorted(first, start, "right")) - 1
    while start < stop:
        base, end = int(first[n]), min(stop, int(first[n + 1]))
        if start < end:
            yield n, start - base, end - base
        start, n = max(start, end), n + 1


def _checked(shard: Shard, start: int, stop: int) -> np.ndarray:
    """Tokens of a shard whose blocks are what was written."""
    each = BLOCK // shard.tokens.dtype.itemsize
    first, last = start // each, -(-stop // each)
    if shard.sound[first:last].all():
        return shard.tokens[start:stop]
    read = shard.tokens[first * each : last * each]
    for block in np.flatnonzero(~shard.sound[first:last]).tolist():
        digest = hashlib.sha256(read[block * each : (block + 1) * each]).digest()
        if digest != shard.digests[first + block].tobytes():
            raise Refused(
                f"'{shard.tokens.path}' holds other bytes than were written (in the {BLOCK} after "
                f"{shard.tokens.offset + (first + block) * BLOCK}): {REMEDY}",
                DATA,
            )
        shard.sound[first + block] = True
    return read[start - first * each : stop - first * each]


REMEDY = "bring the file back, or build the store again."


def stem(folder: Path, unit: int, split: str) -> Path:
    """Path of a shard's files, without what they end with."""
    return folder / "tokens" / f"{unit:06}-{split}"


def _shard(store: Shards, split: str, number: int) -> Shard:
    entry = store.entries[split][number]
    base = stem(store.folder, int(entry["unit"]), split)
    path = Path(store.record["in_place"].get(base.name, base.with_suffix(".bin")))
    tokens, offset = int(entry["tokens"]), int(entry["offset"])
    dtype = np.dtype(f"<u{entry['width']}")
    blocks = -(-tokens * dtype.itemsize // BLOCK)
    idx = base.with_suffix(".idx")
    array = OnFile(path, dtype, tokens, offset, REMEDY)
    check_file(path, array.size, REMEDY)
    check_file(idx, 8 * int(entry["documents"]) + 32 * blocks, REMEDY)
    content = np.fromfile(idx, np.uint8)
    if hashlib.sha256(content).digest() != entry["idx"].tobytes():
        raise Refused(f"'{idx}' holds other bytes than were written: {REMEDY}", DATA)
    cut = 8 * int(entry["documents"])
    return Shard(array, content[:cut].view("<u8"), content[cut:].reshape(blocks, 32), np.zeros(blocks, bool))


class Writer:
    """Writes one shard, block by block; a resource. The files have their names once `close` has given the entry."""

    def __init__(self, base: Path, dtype: np.dtype):
        self.base, self.dtype = base, np.dtype(dtype)
        self.tokens = self.bytes = 0
        self._starts: list[int] = []
        self._digests = bytearray()
        self._open, self._whole = b"", hashlib.sha256()
        self._file = open(_scratch(base, ".bin"), "wb")  # noqa: SIM115, closed by close

    def add(self, ids: np.ndarray, starts: list[int], size: int) -> None:
        """Appends tokens, `starts` of which begin documents, that stand for `size` bytes of text."""
        self._starts += [self.tokens + start for start in starts]
        self.tokens, self.bytes = self.tokens + len(ids), self.bytes + size
        content = self._open + np.ascontiguousarray(ids, self.dtype).tobytes()
        whole = len(content) // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            self._digests += hashlib.sha256(memoryview(content)[at : at + BLOCK]).digest()
        self._whole.update(memoryview(content)[:whole])
        self._file.write(memoryview(content)[:whole])
        self._open = content[whole:]

    def close(self) -> dict[str, Any] | None:
        """The shard's facts, for `entry`; None, and no file, where it holds no token."""
        if self._open:
            self._digests += hashlib.sha256(self._open).digest()
        self._whole.update(self._open)
        self._file.write(self._open)
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if not self.tokens:
            os.unlink(self._file.name)
            return None
        os.replace(self._file.name, self.base.with_suffix(".bin"))
        facts = dict(width=self.dtype.itemsize, offset=0, tokens=self.tokens, bytes=self.bytes)
        return facts | write_idx(self.base, self._starts, bytes(self._digests)) | dict(sha256=self._whole.hexdigest())


def write_idx(base: Path, starts: Any, digests: bytes) -> dict[str, Any]:
    """Writes a shard's .idx; returns what its entry says of it."""
    content = np.asarray(starts, "<u8").tobytes() + digests
    write(base.with_suffix(".idx"), content)
    return dict(documents=len(starts), idx=hashlib.sha256(content).hexdigest())


def entry(unit: int, split: str, facts: dict[str, Any]) -> np.ndarray:
    """A shard's line of the index: ENTRY [1]."""
    line = np.zeros(1, ENTRY)
    line["unit"], line["split"] = unit, SPLITS.index(split)
    for name in ("width", "offset", "tokens", "documents", "bytes"):
        line[name] = facts[name]
    for name in ("sha256", "idx"):
        line[name] = np.frombuffer(bytes.fromhex(facts[name]), np.uint8)
    return line


def write(path: Path, content: bytes) -> None:
    """Writes a file all at once: under its name there is nothing, the old file, or the new one, on the disk."""
    scratch = _scratch(path, path.suffix)
    with open(scratch, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _scratch(path: Path, suffix: str) -> Path:
    return path.with_suffix(f"{suffix}.{os.getpid()}")


def record_text(record: dict[str, Any]) -> bytes:
    """The one form of dataset.json, with its own sha256."""
    facts = {name: value for name, value in record.items() if name != "record"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return (json.dumps(facts | {"record": digest}, indent=1) + "\n").encode()
