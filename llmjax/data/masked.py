"""A store of token sequences of which some tokens are to be learnt and the others are only read.

    tokens.bin    the sequences one after another, <u4
    learnt.bin    of every token, 1 where it is to be learnt
    starts.bin    the first token of each sequence, and where the last ends, <i8
    heldout.bin   of every record, 1 where it is held out
    dataset.json  what came of it

A record is one sequence or more, such as two answers to a prompt. It is kept in a folder named by a hash of all that
decides its content, which appears when it is whole.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llmjax.data import answers
from llmjax.data.answers import BadLine, Learnt
from llmjax.data.folders import at_once
from llmjax.data.onfile import OnFile, check_file
from llmjax.errors import DATA, USAGE, Refused
from llmjax.errors import IO as DISK

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_VERSION = 1
_TYPES = {name: np.dtype(of) for name, of in dict(tokens="<u4", learnt="u1", starts="<i8", heldout="u1").items()}
_AT_ONCE = 1 << 20  # characters that are encoded together


class Masked(NamedTuple):
    """An open store."""

    tokens: OnFile
    learnt: OnFile
    starts: OnFile
    heldout: OnFile
    record: dict[str, Any]

    def records(self, split: str) -> np.ndarray:
        """The numbers of the records of a split, int64."""
        return np.flatnonzero(np.asarray(self.heldout) == (split == "heldout"))

    def sequence(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, whether each is to be learnt) of a sequence."""
        here = slice(*self.starts[n : n + 2].tolist())
        return self.tokens[here], self.learnt[here]


class Source(NamedTuple):
    """What a store is made of."""

    path: str
    read: Callable[[dict[str, Any]], Sequence[Learnt]]
    "The texts of the object in a line; raises BadLine."
    tokenizer: "Tokenizer"
    "Takes the names of special tokens for these."
    heldout: float
    "Share of the records that is held out, each drawn by its line."
    bad: str
    "fail: the first bad line is refused; skip: it is left out and counted."
    how: str
    "All else that decides the store: what `read` does, and the tokenizer."


def ensure(source: Source, cache: Path, say: Callable[[str], None]) -> Masked:
    """Opens the store of a source below `cache`, making it first if it is not there.

    Raises:
      Refused: an option is wrong (code 2); a file or a line is bad, or there is too little (code 65); `cache` cannot be
        written (code 74).
    """
    if not 0 < source.heldout < 1:
        raise Refused(f"data.heldout is {source.heldout}: give a share of the lines above 0 and below 1.", USAGE)
    if source.bad not in ("fail", "skip"):
        raise Refused(f"data.bad is {source.bad!r}: give fail or skip.", USAGE)
    found = answers.files(source.path)
    folder = cache / f"masked-{_key(source, found)}"
    if not folder.exists():
        try:
            with at_once(folder) as unfinished:
                _build(source, found, unfinished)
        except OSError as error:
            raise Refused(
                f"'{cache}' cannot take the tokens ({error.strerror or error}): free some space there.", DISK
            ) from None
    opened = _open(folder)
    if left := sum(opened.record["bad"].values()):
        listed = "; ".join(opened.record["bad_sample"])
        lines = "bad line" if left == 1 else "bad lines"
        say(f"Left out {left:,} {lines} of '{source.path}': {listed}{' and others' if left > 5 else ''}.")
    return opened


def _key(source: Source, found: list[tuple[str, Path]]) -> str:
    digest = hashlib.sha256(repr((_VERSION, source.how, source.heldout, source.bad)).encode())
    for name, path in found:
        try:
            with path.open("rb") as file:
                digest.update(repr((name, hashlib.file_digest(file, "sha256").hexdigest())).encode())
        except OSError as error:
            raise Refused(f"'{path}' cannot be read ({error.strerror}): give a whole file.", DATA) from None
    return digest.hexdigest()[:24]


def _build(source: Source, found: list[tuple[str, Path]], folder: Path) -> None:
    bad: Counter = Counter()
    sample: list[str] = []
    draws: list[float] = []
    starts, at = [np.zeros(1, np.int64)], 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "learnt.bin").open("wb") as mask:
        for batch in _batches(_records(source, found, bad, sample, draws)):
            lengths = _write(source.tokenizer, batch, tokens, mask)
            starts.append(at + np.cumsum(lengths))
            at += int(lengths.sum())
    if len(draws) < 2:
        besides = f" besides {sum(bad.values()):,} bad ones, such as {sample[0]}" if bad else ""
        raise Refused(f"'{source.path}' holds {len(draws)} records{besides}: give at least 2, one to hold out.", DATA)
    heldout = np.array(draws) < source.heldout
    for side, one in ((True, np.argmin(draws)), (False, np.argmax(draws))):
        if not (heldout == side).any():
            heldout[one] = side
    (folder / "starts.bin").write_bytes(np.concatenate(starts).astype("<i8").tobytes())
    (folder / "heldout.bin").write_bytes(heldout.astype("u1").tobytes())
    record = dict(
        records=len(draws), bad=dict(sorted(bad.items())), bad_sample=sample,
        sha256={name: _hash(folder / f"{name}.bin") for name in _TYPES},
        sizes={name: (folder / f"{name}.bin").stat().st_size for name in _TYPES},
    )  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(record, indent=1) + "\n")


def _records(source, found, bad: Counter, sample: list[str], draws: list[float]) -> Iterator[Sequence[Learnt]]:
    """The texts of every good line, whose draws are added as they come."""
    for name, path in found:
        for number, line in answers.lines(path):
            try:
                texts = source.read(answers.parsed(line))
            except BadLine as why:
                if source.bad == "fail":
                    raise Refused(
                        f"'{path}' has a bad line {number} ({why}): put it right, or leave such lines out with "
                        "--data.bad skip.",
                        DATA,
                    ) from None
                bad[str(why)] += 1
                sample += [f"{name} line {number}: {why}"] if len(sample) < 5 else []
                continue
            draws.append(int.from_bytes(hashlib.sha256(line.strip()).digest()[:8]) / 2**64)
            yield texts


def _batches(records: Iterator[Sequence[Learnt]]) -> Iterator[list[Learnt]]:
    batch, size = [], 0
    for texts in records:
        batch += texts
        size += sum(len(each.text) for each in texts)
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(tokenizer: "Tokenizer", batch: list[Learnt], tokens: IO[bytes], mask: IO[bytes]) -> np.ndarray:
    """Writes the tokens of texts and which are to be learnt; returns how many each has.

    A token is learnt where it begins in a span: one that begins in the prompt is a part of that, whatever its end.
    """
    encoded = tokenizer.encode_batch([each.text for each in batch], add_special_tokens=False)
    for each, encoding in zip(batch, encoded, strict=True):
        begins = np.array([start for start, _ in encoding.offsets], np.int64)
        tokens.write(np.array(encoding.ids, "<u4").tobytes())
        within = [(begins >= start) & (begins < end) for start, end in each.spans]
        mask.write(np.any(within, axis=0).astype("u1").tobytes())
    return np.array([len(encoding.ids) for encoding in encoded], np.int64)


def _open(folder: Path) -> Masked:
    remedy = f"delete the folder '{folder}' and start again."
    try:
        record = json.loads((folder / "dataset.json").read_text())
        sizes, hashes = ({name: record[kind][name] for name in _TYPES} for kind in ("sizes", "sha256"))
    except (OSError, ValueError, KeyError, TypeError):
        raise Refused(f"'{folder / 'dataset.json'}' is damaged: {remedy}", DATA) from None
    for name in _TYPES:
        check_file(folder / f"{name}.bin", sizes[name], remedy)
        if _hash(folder / f"{name}.bin") != hashes[name]:
            raise Refused(f"'{folder / f'{name}.bin'}' holds other bytes than were written: {remedy}", DATA)
    arrays = {
        name: OnFile(folder / f"{name}.bin", kind, sizes[name] // kind.itemsize, remedy=remedy)
        for name, kind in _TYPES.items()
    }
    return Masked(**arrays, record=record)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
