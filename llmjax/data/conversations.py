"""Finetuning on conversations: `data=Chat("talk.jsonl")` in an experiment, a conversation per line.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

They are written down by the chat template, what the assistant says is the target, and they are put together into rows
(best fit), in which attention keeps to one conversation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmjax.data import answers, masked, packing
from llmjax.data.answers import Learnt
from llmjax.data.masked import Masked
from llmjax.data.tokenizer import Bytes, TokenizerFile
from llmjax.data.written import Batch, WrittenDataset, blank, check, written
from llmjax.errors import DATA, USAGE, Refused


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

    def open(self, sequence: int, cache: Path, say: Callable[[str], None] = lambda _: None) -> WrittenDataset:
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
        return WrittenDataset(store, found, sequence, rows, conversations, f"conversations, {self.long}")


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


def conversations(store: Masked, length: int, rows: Sequence[np.ndarray | None]) -> Batch:
    """`tokens`, `targets` and `segments`, int32 [n, T], and `weights`, float32 [n, T], of the sequences in each row.

    A weight is 1 where the target is what the assistant says, else 0; tokens of one segment are of one conversation,
    padding is of none.
    """
    batch = blank((len(rows), length), "tokens", "targets", "segments")
    for n, held in enumerate(rows):
        held, at = () if held is None else held, 0
        for number, one in enumerate(held):
            window, learnt = (x[: length + 1] for x in store.sequence(one))
            here = slice(at, at + len(window) - 1)
            batch["tokens"][n, here], batch["targets"][n, here] = window[:-1], window[1:]
            batch["weights"][n, here], batch["segments"][n, here] = learnt[1:], number
            at += len(window) - 1
        batch["segments"][n, at:] = len(held)
    return batch
