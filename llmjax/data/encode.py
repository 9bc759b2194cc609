"""Turns one unit of a build into its shards, in a process of its own: tokens, document starts, counts."""

import functools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llmjax.data import quality, records, shards, sources, tokenfiles, words
from llmjax.data.sources import Unit
from llmjax.data.tokenizer import TokenizerFile
from llmjax.errors import DATA, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_AT_ONCE = 1 << 18  # characters that are encoded at once: a hundred bytes of memory each
SAMPLE = 5  # bad records of a unit that are named


class How(NamedTuple):
    """What every unit of a build has in common."""

    tokenizer: str
    "Path of a tokenizer.json."
    vocab: int
    end: int
    heldout: float
    "Share of the documents that is held out, each drawn by its name."
    bad: str
    "fail or skip."
    judged: bool
    "Whether `verdicts` says of every document if it is left out."


def unit(number: int, of: Unit, how: How, folder: Path) -> dict[str, Any]:
    """Writes the shards of a unit below `folder`; returns what dataset.json will say of them.

    Raises:
      Refused: a record is bad and none may be (code 65).
      OSError: the folder cannot be written.
    """
    if of.tokens:
        base = shards.stem(folder, number, of.side)
        facts = tokenfiles.index(of.tokens, base, how.vocab, how.end)
        return dict(source=of.source, shards={of.side: facts}, documents=facts["documents"], bad={}, sample=[], empty=0,
                    left_out={}, left_out_sample=[])  # fmt: skip
    bad, sample, left, left_sample = Counter(), [], Counter(), []
    dtype = np.dtype("<u2" if how.vocab <= 1 << 16 else "<u4")
    writers = {split: shards.Writer(shards.stem(folder, number, split), dtype) for split in shards.SPLITS}
    read = 0
    empty = [0]
    pieces = good(of, how.bad, bad, sample, empty)
    if how.judged:
        pieces = quality.kept(pieces, np.fromfile(verdicts(folder, number), np.uint8), left, left_sample, SAMPLE)
    for batch in _batches(pieces):
        read += sum(piece.first for piece in batch)
        for split in shards.SPLITS:
            here = [piece for piece in batch if sources.split(piece.name, of.side, how.heldout) == split]
            _add(writers[split], here, how)
    written = {split: facts for split, writer in writers.items() if (facts := writer.close())}
    facts = dict(source=of.source, shards=written, documents=read, bad=dict(bad), sample=sample, empty=empty[0])
    return facts | dict(left_out=dict(left), left_out_sample=left_sample)


def verdicts(folder: Path, number: int) -> Path:
    """The file of the verdicts on a unit's documents, of a build in `folder`."""
    return folder / "parts" / f"{number:06}.verdicts"


def good(of: Unit, policy: str, bad: Counter, sample: list, empty: list) -> Iterator[records.Piece]:
    """The pieces of a unit's documents; what is bad is refused, or counted, and so is what is empty."""
    for read in of.read:
        for found in read():
            if isinstance(found, records.Bad):
                if policy == "fail":
                    raise Refused(
                        f"'{read.args[1]}' has a bad record, {found.name} ({found.reason}): put it right, or leave "
                        "such records out with --bad skip.",
                        DATA,
                    )
                bad[found.reason] += 1
                if len(sample) < SAMPLE:
                    sample.append(f"{found.name}: {found.reason}")
            elif found.text:
                yield found
            else:
                empty[0] += 1


def _batches(pieces: Iterable[records.Piece]) -> Iterator[list[records.Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _add(writer: shards.Writer, pieces: list[records.Piece], how: How) -> None:
    if not pieces:
        return
    texts = [piece.text for piece in pieces]
    encoded = _encode(how.tokenizer, texts)
    arrays, starts, at = [], [], 0
    for piece, ids in zip(pieces, encoded, strict=True):
        if piece.first:
            starts.append(at)
            arrays.append(np.array([how.end], writer.dtype))
        arrays.append(np.asarray(ids).astype(writer.dtype))
        at += piece.first + len(ids)
    writer.add(np.concatenate(arrays), starts, sum(len(text.encode()) for text in texts))


def _encode(tokenizer: str, texts: list[str]) -> list[list[int]] | list[np.ndarray]:
    loaded, known = _load(tokenizer, os.stat(tokenizer).st_mtime_ns)
    if known:
        return words.encode(loaded, texts, known)
    return [encoding.ids for encoding in loaded.encode_batch_fast(texts, add_special_tokens=False)]


@functools.lru_cache(1)
def _load(path: str, _written: int) -> tuple["Tokenizer", words.Known | None]:
    """The tokenizer of a build, loaded once in a process, and what it knows of words if they can be encoded apart."""
    loaded = TokenizerFile(path).build()
    return loaded, words.known(loaded) if words.apart(loaded) else None
