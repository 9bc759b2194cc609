"""What a model thinks of given texts, and what it writes after them: the three questions that tasks of lm-eval ask.

Rows go over the batch axes of any mesh. They are sorted by length, and padded to one of a few widths, so that little
is computed for nothing and few programs are compiled.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from llmjax.data.tokenizer import end_of_text
from llmjax.errors import DATA, Refused
from llmjax.evaluate.generate import Sampling, complete, ready
from llmjax.layout import axes_of
from llmjax.models import nn
from llmjax.train import rows
from llmjax.train.program import Program

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NARROWEST = 32  # positions of the narrowest rows
LONG = 1024  # positions from which attention goes in blocks
Pair = tuple[list[int], list[int]]  # tokens that are given, and those that are asked about


class Stopped(Exception):
    """It was asked to stop."""


def _never() -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model with its tokenizer, on a mesh. Ask it in the context of its program."""

    program: Program
    model: nnx.Module
    tokenizer: "Tokenizer"
    stop: Callable[[], bool] = _never
    "Whether to stop, asked before every batch; every question then raises Stopped."

    @property
    def positions(self) -> int:
        """Most tokens that the model is given at once."""
        return min(self.program.run.sequence, self.program.run.model.positions)

    def prefix(self) -> int:
        """What stands before a text that follows nothing: the tokenizer's own beginning, or the end of a text."""
        return [*self.tokenizer.encode("").ids, end_of_text(self.tokenizer)][0]

    def pair(self, context: str, continuation: str) -> Pair:
        """Both as tokens, cut where their sum is: blanks at the end of the context belong to what follows."""
        kept = context.rstrip()
        if not kept:
            return [self.prefix()], self.tokens(context + continuation)
        continuation = context[len(kept) :] + continuation
        given = self.tokenizer.encode(kept).ids
        asked = self.tokenizer.encode(kept + continuation).ids[len(given) :]
        return given, asked or self.tokens(continuation)

    def go_on(self) -> None:
        """Raises Stopped where it was asked to stop."""
        if self.stop():
            raise Stopped

    def tokens(self, text: str) -> list[int]:
        """A text that stands inside another."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def log_likelihoods(self, texts: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """ln P(continuation | context), and whether each of its tokens is the likeliest one, for every pair.

        Of a context that is too long for the model, the end is taken.

        Raises:
          Refused: a continuation alone is too long.
        """
        pairs = [self.pair(*text) for text in texts]
        for _, asked in pairs:
            if len(asked) > self.positions:
                raise Refused(
                    f"an answer of a task has {len(asked)} tokens, more than the {self.positions} positions of the "
                    "model: leave that task out.",
                    DATA,
                )
        nats_N, missed_N = scored(self, pairs)
        return [(-float(nats), not missed) for nats, missed in zip(nats_N, missed_N, strict=True)]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """ln P of whole texts, of any length; every token counts once, as `windows` says."""
        parts = [windows([self.prefix(), *self.tokens(text)], self.positions) for text in texts]
        nats_N, _ = scored(self, [pair for part in parts for pair in part])
        ends = np.cumsum([0, *map(len, parts)])
        return [-float(nats_N[start:stop].sum()) for start, stop in itertools.pairwise(ends)]

    def continuations(self, texts: Sequence[str], how: Sampling, stop: Sequence[str]) -> list[str]:
        """What the model writes after every text, cut before the first of the words `stop`.

        It writes at most half of the model's positions; of a text that leaves no room for that, the end is taken.
        """
        how = dataclasses.replace(how, tokens=max(1, min(how.tokens, self.positions // 2)))
        room = self.positions - how.tokens
        prompts = [(self.tokenizer.encode(text).ids or [self.prefix()])[-room:] for text in texts]
        end, written = end_of_text(self.tokenizer), [""] * len(texts)
        model, words = ready(self.model), [word for word in stop if word]
        size = self.program.run.batch // self.program.accumulate
        for chosen in batches([len(prompt) for prompt in prompts], size):
            self.go_on()
            some = [prompts[n] for n in chosen]
            some += some[:1] * (size - len(some))  # as many rows each time: one program
            new = complete(
                model, some, how, positions=self.positions, end=end, stop=words, decode=self.tokenizer.decode
            )
            for n, tokens in zip(chosen, new[: len(chosen)], strict=True):
                written[n] = cut(self.tokenizer.decode(tokens), words)
        return written


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these words."""
    return text[: min((at for word in stop if word and (at := text.find(word)) >= 0), default=len(text))]


def windows(tokens: Sequence[int], positions: int) -> list[Pair]:
    """Pairs in which every token but the first is asked about once, at most `positions` tokens looked at in each.

    The last one is full as well: it looks back at tokens that were asked about before.
    """
    found, done = [], 1
    while done < len(tokens):
        until = min(len(tokens), done + positions)
        found.append((list(tokens[max(0, until - positions - 1) : done]), list(tokens[done:until])))
        done = until
    return found


def scored(judge: Judge, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """(nats, tokens that are not the likeliest) of what each pair asks about, float64 [N] each."""
    program, most = judge.program, judge.positions
    nats_N, missed_N = np.zeros(len(pairs)), np.zeros(len(pairs))
    lengths = [min(most, len(given) + len(asked) - 1) for given, asked in pairs]
    sizes = widths(most)
    for chosen in batches(lengths, program.run.batch):
        judge.go_on()
        width = next(size for size in sizes if size >= max(lengths[n] for n in chosen))
        batch = filled([pairs[n] for n in chosen], program.run.batch, width)
        with nn.compute(dataclasses.replace(nn.how(), attention=attention(width, program.run.sequence))):
            sums = jax.device_get(rows.sums(judge.model, placed(program, batch)))
        nats_N[chosen] = sums["nats"].ravel()[: len(chosen)]
        missed_N[chosen] = sums["missed"].ravel()[: len(chosen)]
    return nats_N, missed_N


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Which go together, at most `size` at a time: the longest first, so what does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    for at in range(0, len(order), size):
        yield order[at : at + size]


def widths(most: int) -> list[int]:
    """Widths that rows are padded to, ascending: `most`, and its halves as long as devices can share them evenly."""
    shape = jax.sharding.get_abstract_mesh().shape
    parts = 2 * math.prod(shape[axis] for axis in axes_of(nn.how().layout.stream.get("T")))  # a ring has two each
    found = [most]
    while found[0] >= 2 * NARROWEST and found[0] % (2 * parts) == 0:
        found.insert(0, found[0] // 2)
    return found


def attention(width: int, sequence: int) -> str:
    """How attention is computed in rows of this width: as in training, or what takes any width."""
    return nn.how().attention if width == sequence else "blocked" if width >= LONG else "reference"


def filled(pairs: Sequence[Pair], size: int, width: int) -> dict[str, np.ndarray]:
    """`size` rows of `width`: of each pair the tokens, and weight 1 where the target is one that is asked about."""
    batch = {name: np.zeros((size, width), np.int32) for name in ("tokens", "targets")}
    batch["weights"] = np.zeros((size, width), np.float32)
    for n, (given, asked) in enumerate(pairs):
        window = [*given, *asked][-(width + 1) :]
        count = len(window) - 1
        batch["tokens"][n, :count], batch["targets"][n, :count] = window[:-1], window[1:]
        batch["weights"][n, count - len(asked) : count] = 1
    return batch


def placed(program: Program, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """The batch, which every process has all of, on its devices: [A, B/A, T]."""
    sharding = program.batch_sharding()

    def on_devices(x_BT):
        x_ABT = x_BT.reshape(program.accumulate, -1, x_BT.shape[1])
        return jax.make_array_from_callback(x_ABT.shape, sharding, x_ABT.__getitem__)

    return {name: on_devices(x_BT) for name, x_BT in batch.items()}
