"""Pictures of a step in time: what is computed and what travels, and what each stage of a pipeline does when."""

from collections.abc import Sequence

from llmjax.models.pipeline import backward_at, forward_at, ticks
from llmjax.plan.timeline import COMPUTE, Span, Timeline
from llmjax.report.elements import Markup, tag

KINDS = {"matmul": "products", "attention": "attention", "memory": "memory", "wait": "waiting", "idle": "idle"}
MOST = 24  # microbatches that a grid shows
Cell = tuple[str, int, int]  # F or B, microbatch, lap


def timeline(found: Timeline) -> list[Markup]:
    """Lanes over the length of a step: phases, compute, and one for all collectives over the same axes."""
    heads = [segment(phase.begin, phase.end, found.total, phase.name, "phase", "var(--card)") for phase in found.phases]
    lanes = [lane("", heads)]
    for name in found.lanes():
        spans = [span for span in found.spans if span.lane == name]
        lanes.append(lane(name, [drawn(span, found.total) for span in spans]))
    key = [tag("span", label, class_="badge", style=f"--c: var(--{kind})") for kind, label in KINDS.items()]
    ends = tag("div", tag("span", "0"), tag("span", milliseconds(found.total)), class_="ends")
    note = tag("p", f"{found.source} Hatched: what nothing hides, and devices wait for.", class_="soft")
    return [tag("div", lanes, ends, class_="time"), tag("div", key, class_="badges"), note, largest(found)]


def lane(name: str, segments: Sequence[Markup]) -> Markup:
    """One line of the timeline."""
    return tag("div", tag("div", name, class_="lane-name"), tag("div", segments, class_="lane"), class_="lane-row")


def drawn(span: Span, total: float) -> Markup:
    """A span as a segment; hatched where devices wait for it."""
    colour = f"var(--{span.kind})" if span.lane == COMPUTE else f"var(--{span.lane.split(' x ')[0]})"
    kind = f"{span.kind} exposed" if span.waited else span.kind
    return segment(span.begin, span.end, total, span.what, kind, colour)


def segment(begin: float, end: float, total: float, what: str, kind: str, colour: str) -> Markup:
    """A box from one time to another."""
    left, width = 100 * begin / total, 100 * (end - begin) / total
    style = f"left:{left:.3f}%;width:{width:.3f}%" + (f";background:{colour}" if colour else "")
    shown = tag("span", what) if width > 6 else None
    kind = f"seg {kind}{' thin' * (width < 0.4)}"
    return tag("div", shown, class_=kind, style=style, title=f"{what}, {milliseconds(end - begin)}")


def largest(found: Timeline) -> Markup:
    """The longest of all as a list, for those who cannot point at them."""
    rows = sorted(found.spans, key=lambda span: span.begin - span.end)[:12]
    items = [
        tag(
            "tr",
            tag("td", span.what),
            tag("td", "" if span.lane == COMPUTE else f"over {span.lane}"),
            tag("td", milliseconds(span.end - span.begin), class_="number"),
            tag("td", f"{100 * (span.end - span.begin) / found.total:.1f}%", class_="number"),
        )
        for span in rows
    ]
    return tag("details", tag("summary", "In numbers"), tag("div", tag("table", tag("tbody", items)), class_="wide"))


def milliseconds(seconds: float) -> str:
    """Seconds as a person reads a step's."""
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:,.3g} ms"


def cells(schedule: str, stages: int, microbatches: int, laps: int) -> list[list[list[Cell]]]:
    """For every stage and tick what is run there: forwards and backwards of which microbatch in which lap."""
    before, both, after = ticks(schedule, stages, microbatches, laps)
    if schedule == "1f1b":
        total = before + both + after
        grid = [[[] for _ in range(total)] for _ in range(stages)]
        for stage in range(stages):
            for tick in range(total):
                n, _, real = forward_at(tick, stage, microbatches)
                if real and tick < before + both:
                    grid[stage][tick].append(("F", n, 0))
                n, real = backward_at(tick, stage, stages, microbatches)
                if real and tick >= before:
                    grid[stage][tick].append(("B", n, 0))
        return grid
    grid = []
    for stage in range(stages):
        there = []
        for tick in range(before):
            n, lap, real = forward_at(tick, stage, microbatches, laps)
            there.append([("F", n, lap)] if real else [])
        grid.append(there + [[("B", n, lap) for _, n, lap in cell] for cell in reversed(there)])
    return grid


def idle(grid: Sequence[Sequence[Sequence[Cell]]], schedule: str) -> float:
    """The part of the time that a stage has nothing to do, counting a backward as long as two forwards."""
    long = {"F": 1, "B": 2}
    ticks_long = [max((sum(long[what] for what, *_ in row[t]) for row in grid), default=0) for t in range(len(grid[0]))]
    busy = sum(long[what] for row in grid for cell in row for what, *_ in cell)
    return 1 - busy / (len(grid) * sum(ticks_long))


def pipeline(schedule: str, stages: int, microbatches: int, laps: int, chosen: bool) -> Markup:
    """The grid of a schedule: stages down, ticks across."""
    shown = min(microbatches, MOST)
    grid = cells(schedule, stages, shown, laps if schedule == "circular" else 1)
    size = 22
    longest = [max(len(row[tick]) for row in grid) for tick in range(len(grid[0]))]  # one of each takes longer
    starts = [52 + size * sum(longest[:tick]) for tick in range(len(longest))]
    drawn = []
    for stage, row in enumerate(grid):
        y = stage * size
        drawn.append(tag("text", f"stage {stage}", x=0, y=y + 15, class_="soft"))
        for tick, cell in enumerate(row):
            for i, (what, n, lap) in enumerate(cell):
                x = starts[tick] + size * (i if len(cell) > 1 else (what == "B") * (longest[tick] - 1))
                kind = f"cell {what}{' later' * (lap % 2)}"
                drawn.append(tag("rect", x=x + 0.5, y=y + 0.5, width=size - 1, height=size - 1, rx=2, class_=kind))
                drawn.append(tag("text", str(n), x=x + size / 2, y=y + 15, text_anchor="middle", class_="cell"))
    width, height = 54 + size * sum(longest), stages * size + 2
    said = f"{schedule}: {stages} stages, {shown} microbatches" + (f", {laps} laps" * (schedule == "circular"))
    art = tag(
        "svg",
        drawn,
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=said,
        style=f"max-width:none;min-width:{width}px",
    )
    more = f" The run has {microbatches}." if shown < microbatches else ""
    rest = 100 * idle(cells(schedule, stages, microbatches, laps if schedule == "circular" else 1), schedule)
    text = f"{said}. {rest:.0f}% of the time a stage waits.{more}"
    title = f"{schedule}{', as this run does' * chosen}"
    return tag("div", tag("h3", title), tag("p", text), tag("div", art, class_="wide"), class_="card")
