"""Datasets: numbered rows of arrays, the same on every machine.

Every dataset has `fingerprint`, `tokenizer`, `vocab`, `heldout_bytes`, `baselines`, `size(split)` and
`examples(split, rows)`; the split is "train" or "heldout". Every config has `open(sequence, cache, say)`.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmjax.data import corpus, store
from llmjax.data.onfile import OnFile
from llmjax.data.tokenizer import BPE, Bytes, TokenizerFile, end_of_text, load
from llmjax.errors import DATA, USAGE, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def _silent(_: str) -> None:
    pass


@dataclasses.dataclass(frozen=True, eq=False)
class TextDataset:
    """Rows of T tokens out of a token store; row i is `stream[i*T : i*T+T+1]`.

    Training drops the incomplete last row. The held-out rows make every token but the first (an end of text, of no
    bytes) a target exactly once: the sum of their weighted losses in nats / ln 2 / `heldout_bytes` is bits per byte.
    """

    store: store.Store
    sequence: int

    @property
    def fingerprint(self) -> str:
        """Differs where the tokens, the tokenizer or the sequence length differ."""
        return _fingerprint(self.store.record["fingerprint"], self.sequence)

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        return load(self.store.folder / "tokenizer.json")

    @property
    def vocab(self) -> int:
        return self.store.record["vocab"]

    @property
    def heldout_bytes(self) -> int:
        return self.store.record["heldout"]["bytes"]

    @property
    def heldout_tokens(self) -> int:
        """Targets in the held-out rows."""
        return len(self.store.heldout) - 1

    @functools.cached_property
    def end(self) -> int:
        """The token that stands between documents."""
        return end_of_text(self.tokenizer)

    @property
    def baselines(self) -> dict[str, float]:
        """Bits per byte of `gzip -9` and `xz -9`, each held-out file compressed by itself."""
        return dict(self.store.record["baselines"])

    def size(self, split: str) -> int:
        """Number of rows."""
        targets = len(self._stream(split)) - 1
        return targets // self.sequence if split == "train" else -(-targets // self.sequence)

    def examples(self, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`tokens` and `targets`, int32 [n, T], and `weights`, float32 [n, T]: 0 where there is no target.

        Rows from `size(split)` on are blank: all weights 0. So an evaluation may count past the end to fill a batch.

        Raises:
          Refused: the tokens' file is gone or of another size (code 65).
        """
        stream, size, length = self._stream(split), self.size(split), self.sequence
        window_NU = np.zeros((len(rows), length + 1), np.int32)
        weights_NT = np.zeros((len(rows), length), np.float32)
        for n, row in enumerate(_checked(rows).tolist()):
            piece = stream[row * length : row * length + length + 1] if row < size else ()
            window_NU[n, : len(piece)] = piece
            weights_NT[n, : max(0, len(piece) - 1)] = 1
        return {"tokens": window_NU[:, :-1].copy(), "targets": window_NU[:, 1:].copy(), "weights": weights_NT}

    def _stream(self, split: str) -> OnFile:
        return {"train": self.store.train, "heldout": self.store.heldout}[split]


@dataclasses.dataclass(frozen=True)
class SyntheticDataset:
    """A noisy affine recurrence: token -> (a * token + 3) mod vocab, but one token in 16 is drawn anew.

    A row is a pure function of its number and T. The next token is known but for the draw, so a model that has
    learned the rule reaches `floor` nats per token and no model does better.
    """

    vocab: int
    rows: int
    sequence: int
    tokenizer: None = None
    heldout_bytes: None = None

    @property
    def baselines(self) -> dict[str, float]:
        return {}

    @property
    def fingerprint(self) -> str:
        """Differs where the vocabulary, the rows or the sequence length differ."""
        return _fingerprint("synthetic 1", self.vocab, self.rows, self.sequence)

    @property
    def floor(self) -> float:
        """The entropy of the next token in nats: the least mean loss."""
        other = 1 / 16 / self.vocab
        rule = 15 / 16 + other
        return -rule * math.log(rule) - (self.vocab - 1) * other * math.log(other)

    def size(self, split: str) -> int:
        """Number of rows; there is a held-out row for every eight training rows."""
        return {"train": self.rows, "heldout": max(1, self.rows // 8)}[split]

    def examples(self, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`tokens` and `targets`, int32 [n, T], and `weights`, float32 [n, T]: 0 in rows from `size(split)` on."""
        rows_N = _checked(rows)
        first = {"train": 0, "heldout": self.rows}[split]
        window_NU = _affine(rows_N + first, self.sequence + 1, self.vocab)
        weights_NT = np.broadcast_to((rows_N < self.size(split))[:, None], window_NU[:, 1:].shape).astype(np.float32)
        return {"tokens": window_NU[:, :-1].copy(), "targets": window_NU[:, 1:].copy(), "weights": weights_NT}


def _affine(rows_N: np.ndarray, length: int, vocab: int) -> np.ndarray:
    """int32 [n, length]. The recurrence is written out in powers of `a`, so no loop runs over a row."""
    a = next(prime for prime in (5, 7, 11, 13, 17, 19, 23, 29, 31, 37) if math.gcd(prime, vocab) == 1)
    factor, offset = [1], [0]
    for _ in range(length - 1):
        factor.append(factor[-1] * a % vocab)
        offset.append((offset[-1] * a + 3) % vocab)
    position_U = np.arange(length, dtype=np.int64)[None]
    bits_NU = mix(rows_N.astype(np.uint64)[:, None] << np.uint64(32) | position_U.astype(np.uint64))
    fresh_NU = (bits_NU >> np.uint64(60) == 0) | (position_U == 0)
    start_NU = np.maximum.accumulate(np.where(fresh_NU, position_U, 0), axis=1)
    draw_NU = ((bits_NU & np.uint64(0xFFFFFFFF)) % np.uint64(vocab)).astype(np.int64)
    since_NU = position_U - start_NU
    drawn_NU = np.take_along_axis(draw_NU, start_NU, axis=1)
    return ((np.array(factor)[since_NU] * drawn_NU + np.array(offset)[since_NU]) % vocab).astype(np.int32)


def mix(bits: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: NumPy's own generators may change their streams between versions."""
    bits = (bits + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayDataset:
    """Arrays of any meaning; a row is an index into their first dim.

    Rows also have `weights`, float32 [n]: 1, or 0 from `size(split)` on.

    Raises:
      Refused: the arrays of a split differ in length (code 65).
    """

    train: dict[str, np.ndarray]
    heldout: dict[str, np.ndarray]
    tokenizer: None = None
    vocab: None = None
    heldout_bytes: None = None

    def __post_init__(self):
        for split in ("train", "heldout"):
            lengths = {name: len(array) for name, array in getattr(self, split).items()}
            if len(set(lengths.values())) > 1:
                raise Refused(f"the {split} arrays differ in length ({lengths}): give one entry per row to each.", DATA)

    @property
    def baselines(self) -> dict[str, float]:
        return {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs where any array's name, type, shape or content differs."""
        arrays = [
            (split, name, a) for split in ("train", "heldout") for name, a in sorted(getattr(self, split).items())
        ]
        return _fingerprint(
            *(
                (*where, a.dtype.str, a.shape, hashlib.sha256(np.ascontiguousarray(a)).hexdigest())
                for *where, a in arrays
            )
        )

    def size(self, split: str) -> int:
        """Number of rows."""
        return min((len(array) for array in self._arrays(split).values()), default=0)

    def examples(self, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays' entries at `rows`: [n, ...]."""
        rows_N, size = _checked(rows), self.size(split)
        real_N = rows_N < size
        picked = {name: array[np.where(real_N, rows_N, 0)] for name, array in self._arrays(split).items()}
        return picked | {"weights": real_N.astype(np.float32)}

    def _arrays(self, split: str) -> dict[str, np.ndarray]:
        return {"train": self.train, "heldout": self.heldout}[split]


Dataset = TextDataset | SyntheticDataset | ArrayDataset


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus of text files, or Python's own standard library."""

    path: str | None = None
    "A text file, or a folder of them (UTF-8). None: the source of this Python's standard library."
    tokenizer: BPE | Bytes | TokenizerFile = dataclasses.field(default_factory=BPE)
    "How text becomes tokens."
    heldout: float = 0.1
    "Fraction of the files (of the text, if there is one file) kept for evaluation."
    size: int = 0
    "Bytes of the corpus that are used, about: whole files, drawn by their names; 0: all."

    def open(self, sequence: int, cache: Path, say: Callable[[str], None] = _silent) -> TextDataset:
        """Opens the corpus as rows of `sequence` tokens, building its token store below `cache` the first time.

        Raises:
          Refused: the corpus is missing, empty or not UTF-8 (code 65); a field is out of range (code 2); the cache
            cannot be written (code 74).
        """
        if sequence < 1:
            raise Refused(f"sequence is {sequence}: give at least 1 token.", USAGE)
        if self.size < 0:
            raise Refused(f"data.size is {self.size}: give a number of bytes, or 0 for the whole corpus.", USAGE)
        corpus.split((), self.heldout)  # refuse a bad fraction or tokenizer before anything is read
        self.tokenizer.identity()
        found = corpus.standard_library() if self.path is None else corpus.files(self.path)
        found = corpus.some(found, self.size) if self.size else found
        documents, skipped = corpus.read(found, skip_other_codings=self.path is None)
        if skipped:
            say(f"Skipped {skipped} of {len(found)} files: they declare another coding than UTF-8.")
        source = "the Python standard library" if self.path is None else self.path
        opened = store.ensure(documents, self.tokenizer, self.heldout, source=source, cache=Path(cache), say=say)
        return TextDataset(opened, sequence)


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Made-up tokens with a rule to learn: no corpus, no tokenizer."""

    vocab: int = 256
    "Number of tokens."
    rows: int = 4096
    "Number of training rows."

    def open(self, sequence: int, cache: Path, say: Callable[[str], None] = _silent) -> SyntheticDataset:
        """Opens it as rows of `sequence` tokens; `cache` stays untouched.

        Raises:
          Refused: a field is out of range (code 2).
        """
        least = {"data.vocab": (self.vocab, 2), "data.rows": (self.rows, 1), "sequence": (sequence, 1)}
        for field, (value, minimum) in least.items():
            if value < minimum:
                raise Refused(f"{field} is {value}: give at least {minimum}.", USAGE)
        return SyntheticDataset(self.vocab, self.rows, sequence)


def check_rows(dataset: Dataset, batch: int) -> None:
    """Refuses a corpus whose training rows cannot fill one batch (code 65)."""
    rows = dataset.size("train")
    if rows < batch:
        raise Refused(
            f"the corpus gives {rows} training rows, fewer than one batch of {batch}: give more text, a smaller batch "
            "or a shorter sequence.",
            DATA,
        )


def _checked(rows: np.ndarray) -> np.ndarray:
    """NumPy would take a negative row from the end; a row that does not exist is a bug of the caller."""
    rows_N = np.asarray(rows, np.int64)
    if rows_N.size and rows_N.min() < 0:
        raise IndexError(f"row {rows_N.min()} of a dataset")
    return rows_N


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
