"""A run as a terminal shows it: its curve in dots of braille, its speed, its processes and what happened last."""

import math
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llmjax.report import series
from llmjax.report.record import Record, number
from llmjax.train.display import count, duration, memory

SHOWN = 8  # processes, at most; those that are silent longest come first
SILENT = 30.0  # seconds without a sign of life that are worth a colour
COLOURS = dict(finished="green", running="green", stopped="yellow", gone="red", empty="yellow")
WORDS = dict(
    finished="finished", running="running", stopped="stopped, saved", gone="ended without a word", empty="not begun"
)


def view(record: Record, width: int, height: int = 8, events: int = 5) -> Panel:
    """One run, so many columns wide, with a curve so many rows high."""
    title = Text.assemble((plain(record.name), "bold"), "  ", (WORDS[record.state], COLOURS[record.state]))
    parts: list[RenderableType] = [Text(plain(note), "red") for note in record.notes]
    parts += [_numbers(record), *curve(record.steps["loss"], width - 4, height), _processes(record)]
    return Panel(
        Group(*parts, _events(record, events)), title=title, title_align="left", width=width, border_style="dim"
    )


def curve(y: np.ndarray, width: int, height: int) -> list[Text]:
    """Lines of text that draw a smoothed series over all of its steps, lowest and highest value beside it."""
    y = series.smooth(y, max(1.0, 0.01 * y.size))
    y = y[np.isfinite(y)]
    if y.size < 2:
        return []
    low, high = series.domain(y)
    names = [series.words(value, 4) for value in (high, low)]
    margin = max(map(len, names)) + 1
    columns, rows = max(2, 2 * (width - margin)), 4 * height
    at = np.interp(np.linspace(0, y.size - 1, columns), np.arange(y.size), y)
    level = np.clip(np.rint((high - at) / (high - low) * (rows - 1)), 0, rows - 1).astype(int)
    dots = np.zeros((rows, columns), bool)
    for x, (a, b) in enumerate(zip(np.r_[level[0], level[:-1]], level, strict=True)):
        dots[min(a, b) : max(a, b) + 1, x] = True
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # Unicode's order of a cell's dots
    cells = (dots.reshape(height, 4, -1, 2) * bits[None, :, None, :]).sum((1, 3))
    sides = [names[0], *[""] * (height - 2), names[1]] if height > 1 else [names[0]]
    lines = zip(sides, cells, strict=True)
    return [
        Text.assemble((f"{side:>{margin - 1}} ", "dim"), ("".join(chr(0x2800 + c) for c in row), "cyan"))
        for side, row in lines
    ]


def left(record: Record) -> float:
    """Seconds until the last step, at the pace of the last fifty; NaN where it is not known."""
    recent = record.steps["step_ms"][record.steps["compiled"] == 0][-50:]
    recent = recent[np.isfinite(recent)]
    if not recent.size or not record.planned_steps:
        return math.nan
    return float(recent.mean()) / 1e3 * max(0, record.planned_steps - record.last)


def plain(text: object) -> str:
    """A text without what would steer a terminal."""
    return "".join(c if c.isprintable() else "·" for c in str(text))


def _numbers(record: Record) -> Text:
    steps, evals, wait = record.steps, record.evals, left(record)
    if not steps["steps"].size:
        return Text("no step yet", "dim")
    recent = steps["tokens_per_s"][-50:]
    recent = recent[np.isfinite(recent)]
    mfu = steps["mfu"][-50:]
    mfu = mfu[np.isfinite(mfu)]
    total = f"/{record.planned_steps:,}" if record.planned_steps else ""
    facts = [
        ("step ", f"{record.last:,}{total}"),
        ("loss ", series.words(float(series.smooth(steps["loss"], max(1.0, 0.01 * steps["loss"].size))[-1]), 4)),
        ("held out ", series.words(float(evals["eval_loss"][-1]), 4) if evals["eval_loss"].size else ""),
        ("", f"{np.median(recent):,.0f} tokens/s" if recent.size else ""),
        ("MFU ", f"{100 * np.median(mfu):.1f}%" if mfu.size else ""),
        ("", f"{count(float(steps['tokens'][-1]))} tokens" if math.isfinite(steps["tokens"][-1]) else ""),
        ("goodput ", f"{100 * record.goodput.share:.0f}%" if record.goodput else ""),
        ("eta ", duration(wait) if record.state == "running" and math.isfinite(wait) else ""),
    ]
    shown = [Text.assemble((name, "dim"), value) for name, value in facts if value]
    return Text("  ").join(shown)


def _processes(record: Record) -> RenderableType:
    """The processes of a run that is under way, those that have been silent longest first."""
    if record.state in ("finished", "stopped", "empty") or not record.processes:
        return Text("")
    now = time.time()
    ages = [(now - number(each.get("time")), each) for each in record.processes]
    ages = sorted(ages, key=lambda pair: (-pair[0] // SILENT if pair[0] > SILENT else 0, pair[1]["process"]))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("process", "host", "pid", "phase", "step", "heard of", "host memory", "device memory"):
        table.add_column(name, justify="left" if name in ("host", "phase") else "right")
    for age, each in ages[:SHOWN]:
        sizes = [memory(size) if (size := number(each.get(n))) >= 0 else "–" for n in ("host_bytes", "device_bytes")]
        heard = f"{duration(max(0.0, age))} ago" if math.isfinite(age) else "–"
        cells = [each["process"], each.get("host"), each.get("pid"), each.get("phase"), f"{each['step']:,}"]
        silent = "red" if not age < SILENT else ""
        table.add_row(*(Text(plain(cell)[:24]) for cell in cells), Text(heard, silent), *sizes)
    if len(ages) > SHOWN:
        table.add_row(Text(f"and {len(ages) - SHOWN:,} more", "dim"))
    return table


def _events(record: Record, most: int) -> Text:
    told = [event for event in record.events if event["kind"] != "spent"][-most:] if most else []
    lines = []
    for event in told:
        moment = number(event.get("time"))
        when = time.strftime("%H:%M:%S", time.localtime(moment)) if 0 < moment < 1e11 else "--:--:--"
        step = f" at step {event['step']}" if "step" in event else ""
        why = f": {event['reason']}" if "reason" in event else ""
        bad = event["kind"] in ("fault", "skip", "rewind", "restart", "redo", "save_failed", "tracker_failed")
        text = plain(f"{event['kind']}{step}{why}")[:200]
        lines.append(Text.assemble((when, "dim"), " ", (text, "yellow" if bad else "")))
    return Text("\n").join(lines)


def together(records: Sequence[Record], width: int, height: int) -> Group:
    """Several runs below each other, in so many rows as there are."""
    room = max(1, min(12, height // max(1, len(records)) - 13))
    return Group(*(view(record, min(width, 120), room, 5 if len(records) < 3 else 2) for record in records))
