"""Token files of other trainers, read where they lie: nanoGPT's and llm.c's `.bin`, Megatron's `.bin` with `.idx`.

nanoGPT    uint16, without a header
llm.c      a header of 256 int32 (20240520 or 20240801, version, tokens, ...), then uint16, or uint32 in version 7
Megatron   .idx: `MMIDIDX`, version, type, counts, then lengths, pointers and the first sequence of each document
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmjax.data import shards
from llmjax.data.onfile import OnFile
from llmjax.errors import DATA, Refused

_LLM_C = {(20240520, 1): 2, (20240801, 7): 4}  # llm.c's data_common.py: bytes per token by magic number and version
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {4: 4, 8: 2}  # int32 and uint16, of its eight
_AT_ONCE = 64 * shards.BLOCK


class TokenFile(NamedTuple):
    """Where the tokens of a file lie."""

    path: str
    width: int
    "Bytes per token."
    offset: int
    tokens: int
    idx: str = ""
    "Megatron's index, if it has one."


def recognise(path: Path) -> TokenFile | None:
    """The token file at `path`, or None: one without a header or an index looks like any other file.

    Raises:
      Refused: its header or index does not fit the file (code 65).
    """
    idx = path.with_suffix(".idx")
    if (head := _head(idx, 18)).startswith(_MEGATRON):
        width = _MEGATRON_TYPES.get(head[17])
        if not width:
            raise Refused(f"'{idx}' has tokens of a type other than uint16 and int32: write the file anew.", DATA)
        return _sized(path, width, 0, path.stat().st_size // width, str(idx))
    header = np.frombuffer(_head(path, 12), "<i4")
    if len(header) == 3 and (width := _LLM_C.get((int(header[0]), int(header[1])))):
        return _sized(path, width, 1024, int(header[2]))
    return None


def _head(path: Path, size: int) -> bytes:
    """The first bytes of a file; none where it is none, or shorter."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        found = file.read(size)
    return found if len(found) == size else b""


def plain(path: Path, vocab: int) -> TokenFile:
    """A file of nothing but tokens, as nanoGPT writes: uint16, or uint32 where the vocabulary needs it."""
    width = 2 if vocab <= 1 << 16 else 4
    return _sized(path, width, 0, path.stat().st_size // width)


def _sized(path: Path, width: int, offset: int, tokens: int, idx: str = "") -> TokenFile:
    size = path.stat().st_size
    if size != offset + tokens * width or not tokens:
        raise Refused(f"'{path}' has {size} bytes where {tokens} tokens take {offset + tokens * width}: copy it anew.",
                      DATA)  # fmt: skip
    return TokenFile(os.path.abspath(path), width, offset, tokens, idx)


def index(of: TokenFile, base: Path, vocab: int, end: int) -> dict:
    """Reads a token file once and writes the .idx of a shard that leaves it where it is; returns the shard's facts.

    A document starts at the file's start and at every end of text, or where Megatron's index says.

    Raises:
      Refused: a token is not in the vocabulary, or the index does not fit (code 65).
    """
    tokens = OnFile(Path(of.path), np.dtype(f"<u{of.width}"), of.tokens, of.offset, "copy it anew.")
    whole, digests, found = hashlib.sha256(), bytearray(), [np.zeros(1, np.int64)]
    step = _AT_ONCE // of.width
    for at in range(0, of.tokens, step):
        part = tokens[at : at + step]
        if (high := int(part.max())) >= vocab:
            where = at + int(part.argmax())
            raise Refused(
                f"'{of.path}' has token {high} at {where}, above the tokenizer's {vocab}: give the tokenizer that "
                "wrote it.",
                DATA,
            )
        content = memoryview(part.tobytes())
        whole.update(content)
        for block in range(0, len(content), shards.BLOCK):
            digests += hashlib.sha256(content[block : block + shards.BLOCK]).digest()
        found.append(np.flatnonzero(part == end) + at)
    starts = _megatron_starts(of) if of.idx else np.unique(np.concatenate(found))
    facts = dict(width=of.width, offset=of.offset, tokens=of.tokens, bytes=0, sha256=whole.hexdigest(), path=of.path)
    return facts | shards.write_idx(base, starts, bytes(digests))


def _megatron_starts(of: TokenFile) -> np.ndarray:
    content = Path(of.idx).read_bytes()
    try:
        sequences, documents = (int(n) for n in np.frombuffer(content, "<u8", 2, 18))
        lengths = np.frombuffer(content, "<i4", sequences, 34)
        pointers = np.frombuffer(content, "<i8", sequences, 34 + 4 * sequences)
        first = np.frombuffer(content, "<i8", documents, 34 + 12 * sequences)
        begin = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        fits = begin[-1] == of.tokens and (pointers == begin[:-1] * of.width).all()
        starts = np.unique(begin[first])
    except (ValueError, IndexError):
        fits = False
    if not fits:
        raise Refused(f"'{of.idx}' does not fit '{of.path}': copy both anew.", DATA)
    return starts[starts < of.tokens]
