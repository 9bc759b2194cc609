"""Finetuning on conversations: `data=Chat("talk.jsonl")` in an experiment, a conversation per line.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

They are written down by the chat template, what the assistant says is the target, and they are put together into rows
(best fit), in which attention keeps to one conversation.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmjax.data import answers, chat, masked, packing
from llmjax.data.answers import Learnt
from llmjax.data.chat import Template
from llmjax.data.masked import Masked
from llmjax.data.tokenizer import END_OF_TEXT, Bytes, TokenizerFile, end_of_text, plain, vocabulary
from llmjax.errors import DATA, USAGE, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
class ChatDataset:
    """Rows of T tokens in which whole conversations stand; a pure function of the row."""

    store: Masked
    written: Written
    sequence: int
    rows: dict[str, list[np.ndarray]]
    "Of each split, the sequences of every row."
    long: str
    heldout_bytes: None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Differs where tokens, targets, sides, the sequence length, or what is done with longer ones differ."""
        parts = sorted(self.store.record["sha256"].items()), self.written.vocab, self.sequence, self.long
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

    def examples(self, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`tokens`, `targets` and `segments`, int32 [n, T], and `weights`, float32 [n, T].

        A weight is 1 where the target is what the assistant says, else 0; tokens of one segment are of one
        conversation, padding is of none. Rows from `size(split)` on are blank.
        """
        rows_N = np.asarray(rows, np.int64)
        if rows_N.size and rows_N.min() < 0:
            raise IndexError(f"row {rows_N.min()} of a dataset")
        shape = (len(rows_N), self.sequence)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments")}
        batch["weights"] = np.zeros(shape, np.float32)
        for n, row in enumerate(rows_N.tolist()):
            held, at = self.rows[split][row] if row < self.size(split) else (), 0
            for number, one in enumerate(held):
                window, learnt = (x[: self.sequence + 1] for x in self.store.sequence(one))
                here = slice(at, at + len(window) - 1)
                batch["tokens"][n, here], batch["targets"][n, here] = window[:-1], window[1:]
                batch["weights"][n, here], batch["segments"][n, here] = learnt[1:], number
                at += len(window) - 1
            batch["segments"][n, at:] = len(held)
        return batch


@dataclasses.dataclass(frozen=True)
class Chat:
    """Conversations, of which the model learns what the assistant says."""

    path: str = ""
    "A .jsonl file, maybe with .gz, or a folder of them: a line has `messages`, each with `role` and `content`."
    tokenizer: Bytes | TokenizerFile = Bytes()
    "How text becomes tokens; `--from` takes that of the run."
    template: str = ""
    "Folder with the chat template; empty: that of the tokenizer's file, and a plain template where it has none."
    heldout: float = 0.05
    "Share of the conversations kept for evaluation, each drawn by its line."
    bad: Literal["fail", "skip"] = "fail"
    "What a bad line does: end the start, or be left out, counted and named."
    long: Literal["cut", "skip"] = "cut"
    "What is done with a conversation longer than a row: its end is cut off, or it is left out; counted either way."

    def open(self, sequence: int, cache: Path, say: Callable[[str], None] = lambda _: None) -> ChatDataset:
        """Opens the conversations as rows of `sequence` tokens, encoding them below `cache` the first time.

        Raises:
          Refused: a field is out of range (code 2); files, lines, tokenizer or template are not what they should be,
            or nothing is left to learn (code 65); `cache` cannot be written (code 74).
        """
        check(sequence)
        if self.long not in ("cut", "skip"):
            raise Refused(f"data.long is {self.long!r}: give cut or skip.", USAGE)
        found = written(self.tokenizer, self.template)
        names = answers.specials(found.tokenizer)

        def read(line: dict[str, Any]) -> tuple[Learnt]:
            said = answers.messages(line.get("messages"), "messages")
            answers.check_plain([message["content"] for message in said], names)
            return (answers.learnt(found.template, said),)

        source = masked.Source(self.path, read, found.tokenizer, self.heldout, self.bad, repr(("chat", found.identity)))
        store = masked.ensure(source, Path(cache), say)
        rows = {split: _packed(store, split, sequence, self.long, say) for split in ("train", "heldout")}
        return ChatDataset(store, found, sequence, rows, self.long)


def _packed(store: Masked, split: str, length: int, long: str, say: Callable[[str], None]) -> list[np.ndarray]:
    """The sequences of every row of `length` tokens, and a line about them."""
    sizes = np.diff(store.starts) - 1  # the last token has no target
    chosen = store.records(split)
    whole = sizes[chosen] <= length
    if long == "skip":
        kept = chosen[whole]
    else:
        kept = np.array([n for n in chosen.tolist() if store.sequence(n)[1][1 : length + 1].any()], np.int64)
    if not len(kept):
        raise Refused(
            f"sequence is {length}, and no {split} conversation has an answer within so many tokens: raise --sequence.",
            DATA,
        )
    row_of = packing.best_fit(np.minimum(sizes[kept], length), length)
    order = np.argsort(row_of, kind="stable")
    rows = np.split(kept[order], np.flatnonzero(np.diff(row_of[order])) + 1)
    padding = 1 - np.minimum(sizes[kept], length).sum() / (len(rows) * length)
    longer, left = int((~whole).sum()), len(chosen) - len(kept)
    cut = f", {longer - left:,} cut to a row" if longer > left else ""
    out = f", {left:,} left out, as no answer of theirs fits" if left and long == "cut" else ""
    out = f", {left:,} left out, as they are longer" if left and long == "skip" else out
    say(f"Conversations, {split}: {len(kept):,} in {len(rows):,} rows of {length}, {padding:.1%} padding{cut}{out}.")
    return rows
