"""Several sources in one run, each with its share of every stretch of rows, exactly.

The source of a position is decided by stride scheduling over periods of PERIOD positions: source s has its j-th row of
a period at time (j + 1/2) / quota. So each source is within as many rows of what was asked as there are sources,
after any number of rows. Where a row is in its source follows from how many came before, in closed form: nothing is
kept.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmjax.data.batches import ranked, row_at
from llmjax.data.stored import check_epochs
from llmjax.errors import DATA, USAGE, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PERIOD = 1 << 16


@dataclasses.dataclass(frozen=True)
class Phase:
    """Other weights from a step on."""

    step: int = 0
    "The first step that has them, counted from 0."
    weights: tuple[float, ...] = ()
    "One for each source."


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rows of several sources. Held-out rows are all of theirs, one source after another."""

    sources: tuple[Any, ...] = ()
    "Stores, or other data configs, of one tokenizer."
    weights: tuple[float, ...] = ()
    "How much of all rows each source gives; they need not sum to 1."
    later: tuple[Phase, ...] = ()
    "Other weights later on, by step."
    epochs: float = 0.0
    "A run that would go through a source more often is refused; 0: as often as the weights ask for."

    def open(self, sequence: int, cache: Path, say: Callable[[str], None] = lambda _: None) -> "MixtureDataset":
        """Opens all sources as rows of `sequence` tokens.

        Raises:
          Refused: weights or phases are wrong (code 2); a source is, or their tokenizers differ (code 65).
        """
        if not self.sources:
            raise Refused("data.sources is empty: give at least one data config.", USAGE)
        phases = (Phase(0, self.weights), *self.later)
        for n, phase in enumerate(phases):
            _check_weights(f"data.later[{n - 1}].weights" if n else "data.weights", phase.weights, len(self.sources))
            if n and phase.step <= phases[n - 1].step:
                raise Refused(f"data.later[{n - 1}].step is {phase.step}: give steps that rise, from 1 on.", USAGE)
        if not 0 <= self.epochs < math.inf:
            raise Refused(f"data.epochs is {self.epochs}: give a number of passes, or 0 for any.", USAGE)
        opened = tuple(source.open(sequence, cache, say) for source in self.sources)
        names = tuple(str(getattr(source, "path", None) or type(source).__name__) for source in self.sources)
        _check_alike(names, opened)
        return MixtureDataset(opened, names, phases, self.epochs)


def _check_weights(name: str, weights: tuple[float, ...], count: int) -> None:
    if len(weights) != count:
        raise Refused(f"{name} has {len(weights)} numbers for {count} sources: give one for each.", USAGE)
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights) > 0:
        raise Refused(f"{name} is {weights}: give numbers from 0 on, of which one is above 0.", USAGE)


def _check_alike(names: tuple[str, ...], opened: tuple[Any, ...]) -> None:
    """Refuses sources of which two mean something else by a token, or of which one is empty."""
    for name, dataset in zip(names, opened, strict=True):
        if not dataset.size("train"):
            raise Refused(f"'{name}' gives no training row: give more text, or a shorter sequence.", DATA)
        if dataset.vocab != opened[0].vocab or _written(dataset) != _written(opened[0]):
            raise Refused(f"'{name}' has another tokenizer than '{names[0]}': build both with one.", DATA)


def _written(dataset: Any) -> str | None:
    return dataset.tokenizer.to_str() if dataset.tokenizer else None


@dataclasses.dataclass(frozen=True, eq=False)
class MixtureDataset:
    """The rows of all sources one after another; `order` says which come when."""

    sources: tuple[Any, ...]
    names: tuple[str, ...]
    phases: tuple[Phase, ...]
    epochs: float

    @property
    def fingerprint(self) -> str:
        """Differs where a source, its place, a weight or a phase differs."""
        parts = ([source.fingerprint for source in self.sources], [(p.step, p.weights) for p in self.phases])
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @property
    def tokenizer(self) -> "Tokenizer | None":
        return self.sources[0].tokenizer

    @property
    def vocab(self) -> int | None:
        return self.sources[0].vocab

    @property
    def end(self) -> int:
        """The token that stands between documents."""
        return self.sources[0].end

    @property
    def heldout_bytes(self) -> int | None:
        sizes = [source.heldout_bytes for source in self.sources]
        return sum(sizes) if all(sizes) else None

    @property
    def heldout_tokens(self) -> int:
        return sum(source.heldout_tokens for source in self.sources)

    @property
    def baselines(self) -> dict[str, float]:
        return {}

    def size(self, split: str) -> int:
        """Number of rows."""
        return int(self._first(split)[-1])

    def _first(self, split: str) -> np.ndarray:
        """The first row of each source, and where the last ends."""
        return np.cumsum([0, *(source.size(split) for source in self.sources)])

    def examples(self, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """As the sources give them; what only some give, such as segments, is 0 in the others."""
        rows_N, first = np.asarray(rows, np.int64), self._first(split)
        source_N = np.minimum(np.searchsorted(first, rows_N, "right") - 1, len(self.sources) - 1)  # blank past the end
        batch: dict[str, np.ndarray] = {}
        for n in np.unique(source_N).tolist():
            here = np.flatnonzero(source_N == n)
            for name, values in self.sources[n].examples(split, rows_N[here] - first[n]).items():
                whole = batch.setdefault(name, np.zeros((len(rows_N), *values.shape[1:]), values.dtype))
                whole[here] = values
        return batch


def order(dataset: MixtureDataset, step: int, *, batch: int, seed: int) -> np.ndarray:
    """The rows of the global batch at `step` (from 0), int64 [batch]: a pure function, at the same cost anywhere.

    Each source is walked through shuffles of all its rows, one after another, without replacement, or in its own order.
    """
    number = max(n for n, phase in enumerate(dataset.phases) if phase.step <= step)
    before, begin = _before(dataset, number, batch), dataset.phases[number].step * batch
    first, rows = dataset._first("train"), []
    for position in range(step * batch - begin, (step + 1) * batch - begin):
        source, ordinal = at(dataset.phases[number].weights, position)
        of = dataset.sources[source]
        walked = row_at(before[source] + ordinal, of.size("train"), f"{seed} source {source}", ranked(of))
        rows.append(int(first[source]) + walked)
    return np.array(rows, np.int64)


def seen(dataset: MixtureDataset, steps: int, batch: int) -> list[int]:
    """How many rows of each source the first `steps` batches hold, exactly."""
    number = max(n for n, phase in enumerate(dataset.phases) if phase.step <= steps)
    inside = counts(dataset.phases[number].weights, (steps - dataset.phases[number].step) * batch)
    return [a + b for a, b in zip(_before(dataset, number, batch), inside, strict=True)]


def _before(dataset: MixtureDataset, number: int, batch: int) -> list[int]:
    """Rows of each source before a phase."""
    total = [0] * len(dataset.sources)
    for phase, after in itertools.pairwise(dataset.phases[: number + 1]):
        inside = counts(phase.weights, (after.step - phase.step) * batch)
        total = [a + b for a, b in zip(total, inside, strict=True)]
    return total


def at(weights: tuple[float, ...], position: int) -> tuple[int, int]:
    """(source, how many of its rows came before) of a position under constant weights."""
    period, within = divmod(position, PERIOD)
    begin, end = _through(weights, period), _through(weights, period + 1)
    source_N, ordinal_N = _period(tuple(b - a for a, b in zip(begin, end, strict=True)))
    source = int(source_N[within])
    return source, begin[source] + int(ordinal_N[within])


def counts(weights: tuple[float, ...], positions: int) -> list[int]:
    """How many of the first positions each source has."""
    period, within = divmod(positions, PERIOD)
    begin, end = _through(weights, period), _through(weights, period + 1)
    source_N, _ = _period(tuple(b - a for a, b in zip(begin, end, strict=True)))
    return [a + int(b) for a, b in zip(begin, np.bincount(source_N[:within], minlength=len(weights)), strict=True)]


@functools.lru_cache(64)
def _through(weights: tuple[float, ...], periods: int) -> tuple[int, ...]:
    """Rows of each source in so many whole periods: totals are rounded, so that no error adds up.

    The largest source takes what the others leave; none ever goes down, however small its weight.
    """
    total, largest = sum(map(Fraction, weights)), weights.index(max(weights))
    rows = [math.floor(periods * PERIOD * Fraction(weight) / total + Fraction(1, 2)) for weight in weights]
    rows[largest] = periods * PERIOD - (sum(rows) - rows[largest])
    return tuple(rows)


@functools.lru_cache(8)
def _period(quotas: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(source, its ordinal) of every position of a period."""
    ordinal = np.concatenate([np.arange(quota) for quota in quotas])
    source = np.repeat(np.arange(len(quotas)), quotas)
    chosen = np.lexsort((source, (ordinal + 0.5) / np.array(quotas)[source]))
    return source[chosen], ordinal[chosen]


def check(dataset: MixtureDataset, steps: int, batch: int) -> None:
    """Refuses a run that goes through a source more often than it, or the mixture, may (code 65)."""
    for name, source, rows in zip(dataset.names, dataset.sources, seen(dataset, steps, batch), strict=True):
        passes = rows / source.size("train")
        for most in (dataset.epochs, getattr(source, "epochs", 0.0)):
            check_epochs(name, passes, most, steps, "lower its weight or")


def report(dataset: MixtureDataset, steps: int, batch: int) -> list[list[str]]:
    """Of each source its name, the share that was asked for, the share, rows and epochs that a run will see."""
    asked = [Fraction(0)] * len(dataset.sources)
    ends = [*(phase.step for phase in dataset.phases[1:]), steps]
    for phase, end in zip(dataset.phases, ends, strict=True):
        length, total = max(0, min(end, steps) - phase.step), sum(map(Fraction, phase.weights))
        asked = [share + length * Fraction(w) / total for share, w in zip(asked, phase.weights, strict=True)]
    lines = []
    for n, rows in enumerate(seen(dataset, steps, batch)):
        passes = rows / dataset.sources[n].size("train")
        share, sees = float(asked[n] / steps), rows / (steps * batch)
        lines.append([dataset.names[n], f"{share:.3%}", f"{sees:.3%}", f"{rows:,}", f"{passes:.2f}"])
    return lines
