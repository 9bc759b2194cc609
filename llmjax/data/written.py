"""Sequences that a chat template wrote, as a dataset: how they become tokens, and which targets are learnt."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmjax.data import chat
from llmjax.data.chat import Template
from llmjax.data.masked import Masked
from llmjax.data.tokenizer import END_OF_TEXT, Bytes, TokenizerFile, end_of_text, plain, vocabulary
from llmjax.errors import DATA, USAGE, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Written:
    """How conversations become tokens."""

    tokenizer: "Tokenizer"
    "Takes the names of special tokens for these."
    template: Template
    identity: str
    "Differs where either does."

    @functools.cached_property
    def vocab(self) -> int:
        return vocabulary(self.tokenizer)

    @functools.cached_property
    def end(self) -> int:
        """The token that ends a text."""
        return end_of_text(self.tokenizer)

    def plain(self) -> "Tokenizer":
        """The tokenizer as texts from outside want it, in which a special token's name is text."""
        from tokenizers import Tokenizer

        return plain(Tokenizer.from_str(self.tokenizer.to_str()))

    def asked(self, text: str) -> list[int]:
        """The tokens of a user's message, up to where the assistant's answer begins."""
        said = chat.render(self.template, [dict(role="user", content=text)], prompt=True)
        return chat.encode(self.tokenizer, said)


def written(tokenizer: Bytes | TokenizerFile, template: str) -> Written:
    """What a tokenizer and the folder of a template say; without one, the folder of the tokenizer's file.

    Raises:
      Refused: either cannot be read (code 65).
    """
    built = tokenizer.build()
    built.encode_special_tokens = False
    folder = template or (str(Path(tokenizer.path).parent) if isinstance(tokenizer, TokenizerFile) else "")
    if template and not Path(template).expanduser().is_dir():
        raise Refused(f"data.template '{template}' is no folder: give one with chat_template.jinja.", DATA)
    found = chat.load(Path(folder).expanduser()) if folder else Template(special={"eos_token": END_OF_TEXT})
    return Written(built, found, repr((tokenizer.identity(), found.text, sorted(found.special.items()))))


def check(sequence: int) -> None:
    """Refuses rows of no token (code 2)."""
    if sequence < 1:
        raise Refused(f"sequence is {sequence}: give at least 1 token.", USAGE)


@dataclasses.dataclass(frozen=True, eq=False)
class WrittenDataset:
    """Rows that `fill` makes of sequences in a store; a pure function of the row."""

    store: Masked
    written: Written
    sequence: int
    rows: dict[str, Sequence[Any]]
    "Of each split, what `fill` makes each row of."
    fill: Callable[[Masked, int, Sequence[Any]], Batch]
    "(store, T, what of each row; None of a blank one) -> the arrays of these rows, weights of 0 in blank ones."
    kind: str
    "Which kind of rows these are, with what makes them others of the same store."
    heldout_bytes: None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs where tokens, targets, sides, the sequence length, or the kind of rows differ."""
        parts = self.kind, sorted(self.store.record["sha256"].items()), self.written.vocab, self.sequence
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        return self.written.plain()

    @property
    def template(self) -> Template:
        return self.written.template

    @property
    def vocab(self) -> int:
        return self.written.vocab

    @property
    def end(self) -> int:
        return self.written.end

    @property
    def baselines(self) -> dict[str, float]:
        return {}

    def asked(self, text: str) -> list[int]:
        """The tokens of a user's message, up to where the assistant's answer begins."""
        return self.written.asked(text)

    def size(self, split: str) -> int:
        """Number of rows."""
        return len(self.rows[split])

    def examples(self, split: str, rows: np.ndarray) -> Batch:
        """The arrays that `fill` makes; rows from `size(split)` on are blank."""
        rows_N = np.asarray(rows, np.int64)
        if rows_N.size and rows_N.min() < 0:
            raise IndexError(f"row {rows_N.min()} of a dataset")
        held, size = self.rows[split], self.size(split)
        return self.fill(self.store, self.sequence, [held[row] if row < size else None for row in rows_N.tolist()])


def blank(shape: tuple[int, ...], *names: str) -> Batch:
    """Arrays of int32 with these names, and `weights`, all 0."""
    return {name: np.zeros(shape, np.int32) for name in names} | dict(weights=np.zeros(shape, np.float32))
