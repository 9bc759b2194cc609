"""Training from a store that `llmjax data build` wrote: `data=Store("path")` in an experiment."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmjax.data import ordering, packing, places, shards
from llmjax.data.tokenizer import load
from llmjax.errors import DATA, USAGE, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class StoreDataset:
    """Rows of T tokens out of a store; a pure function of the row.

    Held-out rows are cut every T tokens under either packing: every token but the first is a target exactly once.
    """

    store: shards.Shards
    sequence: int
    segments: bool
    packed: packing.Packing | None
    "The training rows, or None: cut every T tokens."
    order: str = "shuffle"
    "As in `Store`."
    ranked: Sequence[int] | None = None
    "The training rows in the order that a run takes them; None: shuffled anew in every epoch."
    epochs: float = 0.0
    "As in `Store`."

    @property
    def fingerprint(self) -> str:
        """Differs where the tokens, the tokenizer, the sequence length, the packing, the segments or the order do."""
        parts = (self.store.record["fingerprint"], self.sequence, self.packed is not None, self.segments)
        parts += () if self.order == "shuffle" else (self.order,)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @functools.cached_property
    def tokenizer(self) -> "Tokenizer":
        return load(self.store.folder / "tokenizer.json")

    @property
    def vocab(self) -> int:
        return self.store.record["vocab"]

    @property
    def end(self) -> int:
        """The token that stands between documents."""
        return self.store.record["end_of_text"]

    @property
    def heldout_bytes(self) -> int | None:
        """Bytes of the held-out text; None where tokens of others are among it, which do not tell."""
        sizes = self.store.entries["heldout"]["bytes"]
        return int(sizes.sum()) if sizes.all() else None

    @property
    def heldout_tokens(self) -> int:
        """Targets in the held-out rows."""
        return int(self.store.first["heldout"][-1]) - 1

    @property
    def baselines(self) -> dict[str, float]:
        return {}

    def size(self, split: str) -> int:
        """Number of rows."""
        if self.packed and split == "train":
            return len(self.packed.first) - 1
        targets = int(self.store.first[split][-1]) - 1
        return targets // self.sequence if split == "train" else -(-targets // self.sequence)

    def examples(self, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`tokens` and `targets`, int32 [n, T], and `weights`, float32 [n, T]: 0 where there is no target.

        With segments also `segments`, int32 [n, T]: tokens of one number are of one document, padding is of none.
        Rows from `size(split)` on are blank: all weights 0.

        Raises:
          Refused: a shard is gone, of another size, or holds other bytes than were written (code 65).
        """
        rows_N = np.asarray(rows, np.int64)
        if rows_N.size and rows_N.min() < 0:
            raise IndexError(f"row {rows_N.min()} of a dataset")
        shape, size = (len(rows_N), self.sequence), self.size(split)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments")}
        batch["weights"] = np.zeros(shape, np.float32)
        fill = self._fill_packed if self.packed and split == "train" else functools.partial(self._fill_cut, split)
        for n, row in enumerate(rows_N.tolist()):
            if row < size:
                fill(row, {name: array[n] for name, array in batch.items()})
        if not self.segments:
            del batch["segments"]
        return batch

    def _fill_cut(self, split: str, row: int, one: dict[str, np.ndarray]) -> None:
        start = row * self.sequence
        window = shards.take(self.store, split, start, start + self.sequence + 1)
        count = len(window) - 1
        one["tokens"][:count], one["targets"][:count], one["weights"][:count] = window[:-1], window[1:], 1
        if self.segments:
            one["segments"][shards.starts(self.store, split, start, start + count)] = 1
            one["segments"][count : count + 1] = 1
            np.cumsum(one["segments"], out=one["segments"])

    def _fill_packed(self, row: int, one: dict[str, np.ndarray]) -> None:
        first, last = self.packed.first[row : row + 2].tolist()
        at, tokens, total = 0, one["tokens"], int(self.store.first["train"][-1])
        for number, (start, length) in enumerate(self.packed.pieces[first:last].tolist()):
            window = shards.take(self.store, "train", start, min(start + length + 1, total))
            here = slice(at, at + length)
            tokens[here], one["segments"][here], one["weights"][here] = window[:length], number, 1
            one["targets"][at : at + len(window) - 1] = window[1:]
            self._close(one, at + length - 1, start + length, total)
            at += length
        one["segments"][at:] = last - first

    def _close(self, one: dict[str, np.ndarray], last: int, after: int, total: int) -> None:
        """The target of a piece's last token: what follows in its document, or the end of text, but that once."""
        if after == total or len(shards.starts(self.store, "train", after, after + 1)):
            one["targets"][last] = self.end
            one["weights"][last] = one["tokens"][last] != self.end


@dataclasses.dataclass(frozen=True)
class Store:
    """A token store that `llmjax data build` wrote."""

    path: str = ""
    "Its folder."
    packing: Literal["split", "best_fit"] = "split"
    "The stream cut every T tokens; or documents put together into rows, of which only longer ones are cut."
    segments: bool = False
    "Attention stays within a document."
    tokenizer: str = ""
    "A tokenizer.json that the store must have been made with; empty: whichever it was."
    order: Literal["shuffle", "stored", "short_first"] = "shuffle"
    "Of rows: shuffled, anew in every epoch; as they are stored; or those of the shortest documents first."
    epochs: float = 0.0
    "A run that would go through the store more often is refused; 0: as often as its steps ask for."

    def open(self, sequence: int, cache: Path, say: Callable[[str], None] = lambda _: None) -> StoreDataset:
        """Opens the store as rows of `sequence` tokens; a best-fit packing is decided the first time, below `cache`.

        Raises:
          Refused: it is no store, is damaged, has another tokenizer, or nothing held out (code 65); a field is out of
            range (code 2); `cache` cannot be written (code 74).
        """
        if sequence < 1:
            raise Refused(f"sequence is {sequence}: give at least 1 token.", USAGE)
        if not self.path:
            raise Refused("data.path is empty: give the folder of a store, as `llmjax data build` writes it.", USAGE)
        if self.packing not in ("split", "best_fit"):
            raise Refused(f"data.packing is {self.packing!r}: give split or best_fit.", USAGE)
        if self.order not in ("shuffle", "stored", "short_first"):
            raise Refused(f"data.order is {self.order!r}: give shuffle, stored or short_first.", USAGE)
        if not 0 <= self.epochs < math.inf:
            raise Refused(f"data.epochs is {self.epochs}: give a number of passes, or 0 for any.", USAGE)
        store = shards.open_shards(places.local(self.path, "data.path"))
        check_tokenizer(store, self.tokenizer)
        if not len(store.entries["heldout"]):
            raise Refused(
                f"data.path '{self.path}' holds nothing out to evaluate on: build it with --heldout or "
                "--heldout-source.",
                DATA,
            )
        packed = packing.ensure(store, "train", sequence, Path(cache)) if self.packing == "best_fit" else None
        if packed:
            facts = packed.facts
            say(
                f"Packing best_fit: {facts['rows']:,} rows of {sequence}, {facts['padding']:.2%} padding, "
                f"{facts['cut']:.2%} of {facts['documents']:,} documents cut, as they are longer than a row."
            )
        dataset = StoreDataset(store, sequence, self.segments, packed, self.order, None, self.epochs)
        rows = dataset.size("train")
        match self.order:
            case "stored":
                return dataclasses.replace(dataset, ranked=range(rows))
            case "short_first":
                return dataclasses.replace(dataset, ranked=ordering.ensure(store, sequence, rows, packed, Path(cache)))
        return dataset


def check_epochs(name: str, passes: float, most: float, steps: int, remedy: str) -> None:
    """Refuses a run that goes through a source more often than it may (code 65)."""
    if most and passes > most:
        raise Refused(
            f"'{name}' would be gone through {passes:.2f} times in {steps} steps, but data.epochs is {most:g}: {remedy}"
            " --steps, or raise --data.epochs.",
            DATA,
        )


def check_tokenizer(store: shards.Shards, path: str) -> None:
    """Refuses a store that another tokenizer wrote (code 65), or whose own was changed."""
    own = store.folder / "tokenizer.json"
    try:
        found = hashlib.sha256(own.read_bytes()).hexdigest()
    except OSError as error:
        raise Refused(f"'{own}' cannot be read ({error.strerror}): {shards.REMEDY}", DATA) from None
    if found != store.record["tokenizer"]:
        raise Refused(f"'{own}' holds other bytes than were written: {shards.REMEDY}", DATA)
    if path and load(path).to_str() != load(own).to_str():
        raise Refused(
            f"data.tokenizer '{path}' is not the tokenizer of '{store.folder}': build the store with it, or name "
            f"'{own}'.",
            DATA,
        )
