"""`llmjax train EXPERIMENT --data.report`: what a run will see of its data, before it runs."""

import itertools
from pathlib import Path
from typing import Any

from llmjax.commands.train import check_data
from llmjax.data import mixture, packing
from llmjax.data.stored import StoreDataset
from llmjax.errors import DONE
from llmjax.run import Run
from llmjax.train.display import Display, count


def report(run: Run, display: Display | None = None) -> int:
    """Prints of each source its tokens, padding, cut documents, share and epochs over the run; returns an exit code.

    Raises:
      Refused: the data cannot be used, as when training begins (code 65, or 2).
    """
    display = display or Display()
    dataset = run.data.open(run.sequence, Path(run.runs) / ".cache" / "data", display.say)
    check_data(run, dataset)
    mixed = isinstance(dataset, mixture.MixtureDataset)
    sources = dataset.sources if mixed else (dataset,)
    lines = mixture.report(dataset, run.steps, run.batch) if mixed else [_only(run, dataset)]
    facts = [_packed(source, run.sequence) for source in sources]
    display.table(
        ["source", "rows", "tokens", "padding", "documents", "cut", "order"],
        [
            [line[0], *_held(source, run.sequence, fact)]
            for line, source, fact in zip(lines, sources, facts, strict=True)
        ],
    )
    display.table(
        ["source", "asked", "sees", "rows", "tokens", "epochs"],
        [
            [*line[:4], count(rows * run.sequence * (1 - fact.get("padding", 0.0))), line[4]]
            for line, fact, rows in zip(lines, facts, _seen(run, dataset, mixed), strict=True)
        ],
    )
    if mixed and len(dataset.phases) > 1:
        display.table(["from step", *dataset.names], _phases(run, dataset))
    total = run.steps * run.batch * run.sequence
    display.say(f"{run.steps:,} steps x {run.batch} rows of {run.sequence}: {count(total)} positions. Nothing was run.")
    return DONE


def _only(run: Run, dataset: Any) -> list[str]:
    rows = run.steps * run.batch
    name = getattr(run.data, "path", None) or type(run.data).__name__
    return [str(name), "100.000%", "100.000%", f"{rows:,}", f"{rows / dataset.size('train'):.2f}"]


def _seen(run: Run, dataset: Any, mixed: bool) -> list[int]:
    return mixture.seen(dataset, run.steps, run.batch) if mixed else [run.steps * run.batch]


def _packed(source: Any, length: int) -> dict[str, float]:
    """What the packing of a store pads and cuts; nothing of a source that is no store."""
    if not isinstance(source, StoreDataset):
        return {}
    rows = source.size("train")
    return source.packed.facts if source.packed else packing.report(source.store, "train", length, "split", rows)


def _held(source: Any, length: int, facts: dict[str, float]) -> list[str]:
    rows = source.size("train")
    if not facts:
        return [f"{rows:,}", count(rows * length), "", "", "", "shuffle"]
    tokens = source.store.record["train"]["tokens"]
    documents = f"{facts['documents']:,}"
    return [f"{rows:,}", count(tokens), f"{facts['padding']:.2%}", documents, f"{facts['cut']:.2%}", source.order]


def _phases(run: Run, dataset: mixture.MixtureDataset) -> list[list[str]]:
    """The shares of the sources in each phase that the run comes to."""
    edges = [*(phase.step for phase in dataset.phases if phase.step < run.steps), run.steps]
    seen = [mixture.seen(dataset, edge, run.batch) for edge in edges]
    return [
        [f"{edge:,}", *(f"{(b - a) / ((end - edge) * run.batch):.3%}" for a, b in zip(before, after, strict=True))]
        for (edge, before), (end, after) in itertools.pairwise(zip(edges, seen, strict=True))
    ]
