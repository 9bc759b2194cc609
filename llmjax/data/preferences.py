"""Preferences: `data=Preferences("pairs.jsonl")` in an experiment, a prompt with a better and a worse answer per line.

    {"prompt": [{"role": "user", "content": "..."}], "chosen": "...", "rejected": "..."}

Answers are texts or lists of messages. A prompt that is a text itself is taken as it is, without a template, and
answers to it end by the end of text.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmjax.data import answers, masked
from llmjax.data.answers import BadLine, Learnt
from llmjax.data.chat import Template
from llmjax.data.masked import Masked
from llmjax.data.tokenizer import Bytes, TokenizerFile
from llmjax.data.written import Batch, WrittenDataset, blank, check, written
from llmjax.errors import DATA, Refused

ANSWERS = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Prompts with a better and a worse answer, for the loss `DPO`."""

    path: str = ""
    "A .jsonl file, maybe with .gz, or a folder of them: a line has `prompt`, `chosen` and `rejected`."
    tokenizer: Bytes | TokenizerFile = Bytes()
    "How text becomes tokens; `--from` takes that of the run."
    template: str = ""
    "Folder with the chat template; empty: that of the tokenizer's file, and a plain template where it has none."
    heldout: float = 0.05
    "Share of the pairs kept for evaluation, each drawn by its line."
    bad: Literal["fail", "skip"] = "fail"
    "What a bad line does: end the start, or be left out, counted and named."

    def open(self, sequence: int, cache: Path, say: Callable[[str], None] = lambda _: None) -> WrittenDataset:
        """Opens the pairs, each answer with its prompt in a row of `sequence` tokens; longer ones are left out.

        Raises:
          Refused: a field is out of range (code 2); files, lines, tokenizer or template are not what they should be,
            or no pair fits (code 65); `cache` cannot be written (code 74).
        """
        check(sequence)
        found = written(self.tokenizer, self.template)
        names = answers.specials(found.tokenizer)
        end = found.tokenizer.id_to_token(found.end)

        def read(line: dict[str, Any]) -> tuple[Learnt, ...]:
            sides = tuple(_answered(line, side, found.template, names, end) for side in ANSWERS)
            if sides[0].text == sides[1].text:
                raise BadLine("chosen and rejected are the same")
            return sides

        source = masked.Source(
            self.path, read, found.tokenizer, self.heldout, self.bad, repr(("preferences", found.identity))
        )
        store = masked.ensure(source, Path(cache), say)
        pairs = {split: _fitting(store, split, sequence, say) for split in ("train", "heldout")}
        return WrittenDataset(store, found, sequence, pairs, both, "preferences")


def _answered(line: dict[str, Any], side: str, template: Template, names: Any, end: str) -> Learnt:
    """The prompt with one of the answers, which is to be learnt."""
    prompt, answer = line.get("prompt"), line.get(side)
    if isinstance(prompt, str):
        prompt, answer = answers.text(prompt, "prompt"), answers.text(answer, side)
        answers.check_plain([prompt, answer], names)
        return Learnt(prompt + answer + end, ((len(prompt), len(prompt + answer + end)),))
    before = answers.messages(prompt, "prompt")
    if isinstance(answer, str):
        answer = [dict(role="assistant", content=answers.text(answer, side))]
    after = answers.messages(answer, side)
    answers.check_plain([message["content"] for message in (*before, *after)], names)
    return answers.learnt(template, [*before, *after], first=len(before))


def _fitting(store: Masked, split: str, length: int, say: Callable[[str], None]) -> np.ndarray:
    """The records of a split whose answers both fit a row, and a line about them."""
    sizes = np.diff(store.starts).reshape(-1, len(ANSWERS)).max(1) - 1  # the last token has no target
    chosen = store.records(split)
    kept = chosen[sizes[chosen] <= length]
    if not len(kept):
        raise Refused(f"sequence is {length}, and no {split} pair is as short: raise --sequence.", DATA)
    left = len(chosen) - len(kept)
    said = f", {left:,} left out, as they are longer than {length} tokens" if left else ""
    say(f"Preferences, {split}: {len(kept):,} pairs{said}.")
    return kept


def both(store: Masked, length: int, pairs: Sequence[int | None]) -> Batch:
    """`tokens` and `targets`, int32 [n, 2, T], and `weights`, float32 [n, 2, T]: 1 where the target is an answer's.

    The chosen answer comes first.
    """
    batch = blank((len(pairs), len(ANSWERS), length), "tokens", "targets")
    for n, pair in enumerate(pairs):
        for side in () if pair is None else range(len(ANSWERS)):
            tokens, learnt = store.sequence(len(ANSWERS) * int(pair) + side)
            here = (n, side, slice(0, len(tokens) - 1))
            batch["tokens"][here], batch["targets"][here] = tokens[:-1], tokens[1:]
            batch["weights"][here] = learnt[1:]
    return batch
