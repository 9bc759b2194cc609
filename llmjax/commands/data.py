"""`llmjax data`: builds token stores, and shows what is in them."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.text import Text

from llmjax.data import packing, places, shards
from llmjax.data.build import Build, build, summary
from llmjax.data.stored import StoreDataset
from llmjax.errors import DONE, USAGE, Refused
from llmjax.train.display import Display, memory

_COLOURS = ("default", "cyan", "yellow", "green", "magenta")


@dataclasses.dataclass(frozen=True)
class Options:
    """Builds a token store from files, or goes on where a build was stopped."""

    out: tyro.conf.Positional[str]
    "Folder of the store; OUT.unfinished holds it until it is whole."
    build: Annotated[Build, tyro.conf.arg(name="")] = Build()
    workers: int = 0
    "Processes; 0: one for each core. The store has the same bytes with any number."


def data(asked: Options, display: Display | None = None) -> int:
    """Builds the store, says what came of it; returns an exit code.

    Raises:
      Refused: as `llmjax.data.build.build`.
    """
    display = display or Display()
    out = places.local(asked.out, "OUT")
    record = build(asked.build, out, asked.workers or os.cpu_count() or 1, display.say).record
    display.say(f"{out}: {summary(record)}.")
    for reason, count in record["bad"].items():
        display.say(f"  left out {count:,}: {reason}")
    for reason, count in record.get("left_out", {}).items():
        display.say(f"  left out {count:,} documents: {reason}")
    if record["empty"]:
        display.say(f"  left out {record['empty']:,} documents without text")
    return DONE


@dataclasses.dataclass(frozen=True)
class Stats:
    """Says what a token store holds, and what either packing would pad and cut."""

    out: tyro.conf.Positional[str]
    "Folder of the store."
    sequence: tuple[int, ...] = (1024, 4096)
    "Lengths of rows to pack."


def stats(asked: Stats, display: Display | None = None) -> int:
    """Prints the tables; returns an exit code.

    Raises:
      Refused: it is no store or is damaged (code 65), or a length is below 1 (code 2).
    """
    display, store = display or Display(), shards.open_shards(places.local(asked.out, "OUT"))
    if bad := [length for length in asked.sequence if length < 1]:
        raise Refused(f"--sequence is {bad[0]}: give at least 1 token.", USAGE)
    display.say(f"{asked.out}: {summary(store.record)}.")
    display.table(
        ["split", "documents", "tokens", "text", "bytes per token", "median", "90 %", "longest"],
        [_held(store, split) for split in shards.SPLITS if len(store.entries[split])],
    )
    lines = [_packed(store, length, kind) for length in asked.sequence for kind in ("split", "best_fit")]
    display.table(["row", "packing", "rows", "padding", "documents cut", "of those that fit a row"], lines)
    return DONE


def _held(store: shards.Shards, split: str) -> list[str]:
    lengths = np.concatenate([group["length"] for group in packing.documents(store, split)])
    facts = store.record[split]
    text = [memory(facts["bytes"]), f"{facts['bytes'] / facts['tokens']:.2f}"] if facts["bytes"] else ["?", "?"]
    quantiles = [f"{q:,.0f}" for q in np.quantile(lengths, (0.5, 0.9, 1))]
    return [split, f"{facts['documents']:,}", f"{facts['tokens']:,}", *text, *quantiles]


def _packed(store: shards.Shards, length: int, kind: str) -> list[str]:
    if kind == "split":
        rows = (int(store.first["train"][-1]) - 1) // length
    else:
        rows = sum(len(packing.rows_of(group, length)[1]) for group in packing.documents(store, "train"))
    facts = packing.report(store, "train", length, kind, rows)
    return [f"{length:,}", kind, f"{rows:,}", *(f"{facts[name]:.2%}" for name in ("padding", "cut", "needless"))]


@dataclasses.dataclass(frozen=True)
class Show:
    """Shows a row of a token store as a run would train on it: its text, each document in another colour."""

    out: tyro.conf.Positional[str]
    "Folder of the store."
    index: int = 0
    "Number of the row."
    sequence: int = 1024
    "Tokens of a row."
    packing: Literal["split", "best_fit"] = "split"
    "As in a run."
    split: Literal["train", "heldout"] = "train"
    "Side of the store."


def show(asked: Show, console: Console | None = None) -> int:
    """Prints the row; returns an exit code.

    Raises:
      Refused: it is no store or is damaged (code 65), or there is no such row (code 2).
    """
    console, store = console or Console(highlight=False), shards.open_shards(places.local(asked.out, "OUT"))
    if asked.sequence < 1:
        raise Refused(f"--sequence is {asked.sequence}: give at least 1 token.", USAGE)
    with tempfile.TemporaryDirectory() as cache:
        packed = packing.ensure(store, "train", asked.sequence, Path(cache)) if asked.packing == "best_fit" else None
        dataset = StoreDataset(store, asked.sequence, True, packed)
        size = dataset.size(asked.split)
        if not 0 <= asked.index < size:
            raise Refused(f"--index is {asked.index}: the {asked.split} rows are numbered 0 to {size - 1}.", USAGE)
        row = {name: array[0] for name, array in dataset.examples(asked.split, np.array([asked.index])).items()}
    shown, used = Text(), row["weights"] > 0
    for n, number in enumerate(np.unique(row["segments"][used])):
        tokens = row["tokens"][used & (row["segments"] == number)]
        text = dataset.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        shown.append(text, _COLOURS[n % len(_COLOURS)])
    console.print(shown, soft_wrap=True)
    console.print(
        f"row {asked.index:,} of {size:,}: {n + 1} documents, {used.sum()} of {used.size} tokens", style="dim"
    )
    return DONE
