"""The report's curves as PNG files, with matplotlib (extra `plots`)."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmjax.report import series
from llmjax.report.goodput import WORDS
from llmjax.report.page import SMOOTH, marks
from llmjax.report.record import Record

COLOURS = ("#0072b2", "#d55e00", "#00805c", "#b0508c", "#8a6d00", "#3a86c0")


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes loss.png, steps.png and goodput.png, those of which there is something to show."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#eceef0",
             "font.size": 10, "legend.frameon": False, "figure.constrained_layout.use": True}  # fmt: skip
    with plt.rc_context(style):
        drawn = {"loss": _loss(plt, records), "steps": _steps(plt, records), "goodput": _goodput(plt, records)}
        written = []
        for name, figure in drawn.items():
            if figure is not None:
                written.append(folder / f"{name}.png")
                figure.savefig(written[-1], dpi=150)
                plt.close(figure)
    return written


def _line(axes, x: np.ndarray, y: np.ndarray, **how) -> None:
    kept = series.thin(y, 2000)
    axes.plot(x[kept], y[kept], **how)


def _loss(plt, records: Sequence[Record]):
    if not any(record.steps["steps"].size for record in records):
        return None
    figure, (by_tokens, by_time) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axes, axis, name in ((by_tokens, "tokens", "tokens"), (by_time, "time", "seconds since the first start")):
        every = np.concatenate([record.steps["loss"] for record in records])
        axes.set(xlabel=name, ylim=_room(every))
        for i, record in enumerate(records):
            steps, colour = record.steps, COLOURS[i % len(COLOURS)]
            _line(axes, steps[axis], steps["loss"], color=colour, alpha=0.3, linewidth=0.8)
            smooth = series.smooth(steps["loss"], max(1.0, SMOOTH["light"] * steps["steps"].size))
            _line(axes, steps[axis], smooth, color=colour, linewidth=1.6, label=_plain(record.name))
            axes.plot(record.evals[axis], record.evals["eval_loss"], "o--", color=colour, markersize=4, linewidth=1)
            for mark in marks(record):
                fault = mark.kind == "fault"
                axes.axvline(mark.x[axis], color="#c43e00" if fault else "#7a7f86", linestyle="-" if fault else ":")
    by_tokens.set_ylabel("loss, nats per token (dots: held out)")
    by_time.legend()
    return figure


def _steps(plt, records: Sequence[Record]):
    shown = [("tokens_per_s", "tokens per second"), ("step_ms", "milliseconds a step"), ("grad_norm", "gradient norm"),
             ("lr", "learning rate"), ("mfu", "MFU")]  # fmt: skip
    shown = [(key, name) for key, name in shown if any(np.isfinite(r.steps[key]).any() for r in records)]
    if not shown:
        return None
    figure, every = plt.subplots(
        math.ceil(len(shown) / 2), 2, figsize=(11, 2.8 * math.ceil(len(shown) / 2)), squeeze=False
    )
    for axes in every.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (key, name) in zip(every.flat, shown, strict=False):
        axes.set(xlabel="steps", ylabel=name, ylim=_room(np.concatenate([record.steps[key] for record in records])))
        for i, record in enumerate(records):
            _line(
                axes,
                record.steps["steps"],
                record.steps[key],
                color=COLOURS[i % len(COLOURS)],
                linewidth=1.2,
                label=_plain(record.name),
            )
    every.flat[0].legend()
    return figure


def _goodput(plt, records: Sequence[Record]):
    known = [record for record in records if record.goodput]
    if not known:
        return None
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.6 * len(known)))
    left = np.zeros(len(known))
    colours = (
        "#0072b2",
        "#8a6d00",
        "#8d949d",
        "#b3b8bf",
        "#00805c",
        "#3a86c0",
        "#b0508c",
        "#c43e00",
        "#5c636b",
        "#dddddd",
    )
    for (bucket, words), colour in zip(WORDS.items(), colours, strict=True):
        shares = np.array([100 * r.goodput.buckets[bucket] / r.goodput.wall for r in known])
        if shares.any():
            axes.barh([_plain(record.name) for record in known], shares, left=left, color=colour, label=words)
            left += shares
    axes.set(xlabel="share of the wall time, %", xlim=(0, 100))
    axes.grid(visible=False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _room(values: np.ndarray) -> tuple[float, float]:
    low, high = series.domain(values)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _plain(name: str) -> str:
    """A name of which matplotlib makes no formula."""
    return name.replace("$", r"\$").lstrip("_") or "run"
