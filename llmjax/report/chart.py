"""Charts as HTML with inline SVG: they stretch to any width while lines and letters keep their size.

The plot is an SVG without an aspect ratio of its own; what is text is HTML around it. A curve has one path for every x
axis, of which the page's style shows one, so that a chart needs no script.
"""

import dataclasses
import html
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llmjax.report import series
from llmjax.report.record import AXES

WIDE, HIGH = 2000, 1000  # of the drawing's own units


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line, or dots, of one run."""

    x: Mapping[str, np.ndarray]
    "By axis of AXES; every one as long as y."
    y: np.ndarray
    run: int
    "Which of the runs, from 0: its colour."
    kind: str = "line"
    "line, dots, or line with further classes of the page's style."
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something that happened, at an x of every axis."""

    x: Mapping[str, float]
    kind: str
    "fault or restart."
    text: str


@dataclasses.dataclass(frozen=True)
class Scale:
    """The x axes of a page, which all charts share: where each ends, and how its numbers read."""

    ends: Mapping[str, float]
    "By axis; 0 where the axis is not known."

    def known(self) -> list[str]:
        """The axes that can be shown."""
        return [axis for axis in AXES if self.ends[axis] > 0]

    def at(self, axis: str, x: np.ndarray) -> np.ndarray:
        """Units of the drawing."""
        return x / self.ends[axis] * WIDE


def figure(
    title: str,
    unit: str,
    curves: Sequence[Curve],
    scale: Scale,
    marks: Sequence[Mark] = (),
    *,
    log: bool = False,
    key: str = "",
    points: int = 900,
) -> str:
    """A chart; nothing where no curve has a finite point. `key` names the numbers of the page's data to read out."""
    curves = [curve for curve in curves if np.isfinite(curve.y).any()]
    if not curves:
        return ""
    every = np.concatenate([curve.y for curve in curves if "smooth" not in curve.kind])
    positive = every[np.isfinite(every) & (every > 0)]
    log = bool(log and positive.size and positive.max() > 20 * positive.min())
    forward: Callable = (lambda y: np.log10(np.maximum(y, 1e-300))) if log else (lambda y: y)
    low, high = series.domain(forward(positive if log else every))
    pad = 0.04 * (high - low)
    drawn_low = low - pad if log or low < 0 or low > pad else min(low, 0.0)
    height = (drawn_low, high + pad)
    outside = int(np.sum(forward(every[np.isfinite(every)]) > height[1]))
    body = "".join(_curve(curve, scale, forward, height, points) for curve in curves)
    values = series.log_ticks(10 ** height[0], 10 ** height[1]) if log else series.ticks(*height)
    rows = [(1 - (float(forward(v)) - height[0]) / (height[1] - height[0]), _tick(v)) for v in values]
    grid = "".join(f'<path class="grid" d="M0,{HIGH * y:.0f}h{WIDE}"/>' for y, _ in rows)
    labels = "".join(f'<span style="top:{100 * y:.2f}%">{text}</span>' for y, text in rows)
    note = f" · {outside:,} above" if outside else ""
    about = f"{title}, {unit}: from {series.words(float(np.nanmin(every)))} to {series.words(float(np.nanmax(every)))}"
    return (
        f'<figure class="chart" tabindex="0" data-key="{key}"><figcaption><h3>{html.escape(title)}</h3>'
        f'<span class="unit">{html.escape(unit)}{", logarithmic" if log else ""}{note}</span></figcaption>'
        f'<div class="readout" aria-live="off"></div><div class="plot"><div class="ys">{labels}</div>'
        f'<div class="area"><svg viewBox="0 0 {WIDE} {HIGH}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(about)}">{grid}{_marks(marks, scale)}{body}</svg><i class="cursor"></i></div>'
        f"{''.join(_x_labels(scale, axis) for axis in scale.known())}</div></figure>"
    )


def histogram(title: str, unit: str, values: Sequence[np.ndarray], bins: int = 40) -> str:
    """Shares of each run's values, one row of bars a run, with the median and the 99th percentile said."""
    known = [v[np.isfinite(v)] for v in values]
    filled = [v for v in known if v.size]
    if not filled:
        return ""
    every = np.concatenate(filled)
    low, high = float(every.min()), float(np.quantile(every, 0.995)) if every.size > 50 else float(every.max())
    if high <= low:
        low, high = low - (0.1 * abs(low) or 1.0), low + (0.1 * abs(low) or 1.0)
    rows, said = [], []
    for run, each in enumerate(known):
        if not each.size:
            continue
        counts, _ = np.histogram(np.clip(each, low, high), bins, (low, high))
        wide = WIDE / bins
        bars = "".join(
            f"M{i * wide + 3:.0f},{HIGH}v-{960 * n / counts.max():.0f}h{wide - 6:.0f}V{HIGH}z"
            for i, n in enumerate(counts)
            if n
        )
        rows.append(
            f'<div class="area bars"><svg viewBox="0 0 {WIDE} {HIGH}" preserveAspectRatio="none" role="img" '
            f'aria-label="{html.escape(title)}"><path class="bar c{run % COLOURS}" d="{bars}"/></svg></div>'
        )
        middle, slow = (series.words(float(np.quantile(each, q))) for q in (0.5, 0.99))
        said.append(f'<span><i class="key c{run % COLOURS}"></i>median {middle}, 99% below {slow}</span>')
    labels = "".join(
        f'<span style="left:{100 * (v - low) / (high - low):.2f}%">{_tick(v)}</span>'
        for v in series.ticks(low, high, 6)
    )
    return (
        f'<figure class="chart"><figcaption><h3>{html.escape(title)}</h3><span class="unit">{html.escape(unit)}, share '
        f'of steps</span></figcaption><div class="readout">{"".join(said)}</div><div class="plot">{"".join(rows)}'
        f'<div class="xs">{labels}</div></div></figure>'
    )


COLOURS = 6


def _curve(curve: Curve, scale: Scale, forward: Callable, height: tuple[float, float], points: int) -> str:
    """The paths of a curve, each for the axes on which it is the same."""
    kept = series.thin(curve.y, points)
    y = (height[1] - forward(curve.y[kept])) / (height[1] - height[0]) * HIGH
    y = np.clip(np.nan_to_num(y), 0, HIGH)
    paths: dict[str, list[str]] = {}
    for axis in scale.known():
        x = scale.at(axis, np.asarray(curve.x[axis], float)[kept])
        known = np.isfinite(x)
        if known.any():
            paths.setdefault(_path(x[known], y[known], curve.kind), []).append(f"x-{axis}")
    return "".join(
        f'<path class="{curve.kind} c{curve.run % COLOURS} ax {" ".join(axes)}" d="{d}"/>' for d, axes in paths.items()
    )


def _path(x: np.ndarray, y: np.ndarray, kind: str) -> str:
    """Absolute first, then relative whole numbers, which are short; a lone point is a dot."""
    points = np.rint(np.clip(np.stack([x, y], 1), -WIDE, 2 * WIDE)).astype(int)
    if "dots" in kind or len(points) == 1:
        return "".join(f"M{a},{b}h0" for a, b in points)
    changes = np.diff(points, axis=0)
    return f"M{points[0][0]},{points[0][1]}l" + " ".join(f"{a},{b}" for a, b in changes)


def _marks(marks: Sequence[Mark], scale: Scale) -> str:
    out = []
    for mark in marks:
        for axis in scale.known():
            if math.isfinite(x := mark.x[axis]) and 0 <= x <= scale.ends[axis]:
                at = f"{x / scale.ends[axis] * WIDE:.0f}"
                title = f"<title>{html.escape(mark.text)}</title>"
                out.append(f'<path class="mark {mark.kind} ax x-{axis}" d="M{at},0V{HIGH}">{title}</path>')
    return "".join(out)


def _x_labels(scale: Scale, axis: str) -> str:
    end, size, name = scale.ends[axis], 1.0, axis
    if axis == "time":
        size, name = series.span(end)
    if axis == "flops":
        name = "FLOPs"
    values = series.ticks(0, end / size, 8)
    at = [(100 * v * size / end, _tick(v)) for v in values]
    labels = "".join(f'<span style="left:{x:.2f}%">{text}</span>' for x, text in at if x < 92)
    return f'<div class="xs ax x-{axis}">{labels}<b>{name}</b></div>'


def _tick(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e4:
        return series.words(value)
    return f"{value:,g}" if abs(value) >= 1000 else f"{value:g}"
