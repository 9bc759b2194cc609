"""The report of one or several runs as one HTML file that asks nothing of a network."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np

from llmjax.report import chart, sections, series
from llmjax.report.chart import Curve, Mark, Scale
from llmjax.report.record import AXES, Record
from llmjax.report.sections import escaped
from llmjax.train.display import count, duration

SMOOTH = {"light": 0.01, "strong": 0.05}  # half-lives, as shares of a run's steps
POINTS = 2400  # of a curve's drawing, all runs together
BELOW = (sections.goodput, sections.held, sections.planned, sections.events, sections.samples, sections.config)
READ = 500  # steps whose numbers can be read out, of each run
STATES = dict(
    finished="finished", running="running", stopped="stopped and saved", gone="ended without a word",
    empty="has not come to train",
)  # fmt: skip


def page(records: Sequence[Record]) -> str:
    """The whole file. Everything that comes from a run is escaped."""
    title = " against ".join(record.name for record in records)
    css, script = (
        resources.files("llmjax.report").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escaped(title)}: llmjax report</title>'
        f"<style>\n{css}</style></head><body>"
        f"<header><h1>{escaped(title)}</h1>{''.join(map(_about, records))}{_notes(records)}{_overview(records)}"
        f"</header><main>{_curves(records)}{''.join(part(records) for part in BELOW)}</main>"
        f"<footer>Made by llmjax report, {time.strftime('%Y-%m-%d %H:%M:%S %Z')}.</footer>"
        f'<script type="application/json" id="data">{_data(records)}</script>'
        f"<script>\n{script}</script></body></html>\n"
    )


def scale(records: Sequence[Record]) -> Scale:
    """The x axes that hold all runs; one that some run with steps does not know is left out."""
    begun = [record.steps for record in records if record.steps["steps"].size]
    ends = {axis: [float(steps[axis][-1]) for steps in begun] for axis in AXES}
    return Scale(
        {axis: max(all_, default=0.0) if all(map(math.isfinite, all_)) else 0.0 for axis, all_ in ends.items()}
    )


def marks(record: Record, beside: bool = False) -> list[Mark]:
    """Restarts and faults, by name of the run where there are several."""
    steps, found, begun = record.steps, [], False
    first = next((e.get("process_began") for e in record.events if e["kind"] == "start"), None)
    for event in record.events:
        kind = {"start": "restart", "fault": "fault", "skip": "fault", "rewind": "fault"}.get(event["kind"])
        at = event.get("step")
        if kind is None or not isinstance(at, int) or (kind == "restart" and not begun):
            begun = begun or kind == "restart"
            continue
        x = {axis: float(np.interp(at, steps["steps"], steps[axis])) for axis in AXES if steps["steps"].size}
        moment = event.get("time")
        if x and isinstance(first, (int, float)) and isinstance(moment, (int, float)):
            x["time"] = moment - first
        why = f" ({event['reason']})" if isinstance(event.get("reason"), str) else ""
        text = f"{record.name + ': ' if beside else ''}{event['kind']} at step {at:,}{why}"
        if x:
            found.append(Mark(x, kind, text))
    return found


def _about(record: Record) -> str:
    env, run = record.env, record.run
    model = run.get("model") if isinstance(run.get("model"), Mapping) else {}
    kind = str(model.get("is", "")).rpartition(":")[2]
    size = env.get("parameters")
    facts = [
        STATES[record.state]
        + (f" at step {record.last:,} of {record.planned_steps:,}" if record.planned_steps else ""),
        " ".join(filter(None, [kind, f"{count(size)} parameters" if isinstance(size, int) else ""])),
        f"{env.get('device_count')} × {env.get('device_kind')}" if env.get("device_kind") else "",
        f"layout {env['layout']}" if env.get("layout") else "",
        f"last written {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.seen))}" if record.seen else "",
    ]
    return f'<p class="soft">{escaped(record.name)}: {escaped(" · ".join(filter(None, facts)))}</p>'


def _notes(records: Sequence[Record]) -> str:
    notes = [f"<li>{escaped(record.name)}: {escaped(note)}</li>" for record in records for note in record.notes]
    return f'<ul class="notes">{"".join(notes)}</ul>' if notes else ""


def _last(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values[-1]) if values.size else math.nan


def _facts(record: Record) -> dict[str, str]:
    """What a run came to, by name."""
    half = max(1.0, SMOOTH["light"] * record.steps["steps"].size)
    loss = _last(series.smooth(record.steps["loss"], half))
    tokens, mfu = _last(record.steps["tokens"]), record.median("mfu")
    found = record.goodput
    return {
        "training loss, smooth": series.words(loss, 4),
        "held-out loss": series.words(_last(record.evals["eval_loss"]), 4),
        "bits per byte": series.words(_last(record.evals["bits_per_byte"]), 4),
        "steps": f"{record.last:,}",
        "tokens": count(tokens) if math.isfinite(tokens) else "–",
        "tokens/s, median": series.words(record.median("tokens_per_s"), 4),
        "MFU, median": f"{100 * mfu:.1f}%" if math.isfinite(mfu) else "–",
        "wall time": duration(found.wall) if found else "–",
        "goodput": f"{100 * found.share:.1f}%" if found else "–",
    }


def _overview(records: Sequence[Record]) -> str:
    facts = [_facts(record) for record in records]
    shown = [name for name in facts[0] if any(each[name] != "–" for each in facts)]
    if len(records) == 1:
        tiles = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(facts[0][name])}</dd></div>" for name in shown)
        return f'<dl class="tiles">{tiles}</dl>'
    rows = [
        [sections.key(i) + escaped(r.name), *(escaped(f[n]) for n in shown)]
        for i, (r, f) in enumerate(zip(records, facts, strict=True))
    ]
    return sections.table(["run", *shown], rows, numbers=True)


def _radios(name: str, legend: str, choices: Mapping[str, str], chosen: str) -> str:
    inputs = "".join(
        f'<label><input type="radio" name="{name}" id="{name}-{value}" value="{value}"{" checked" * (value == chosen)}>'
        f"<span>{label}</span></label>"
        for value, label in choices.items()
    )
    return f'<fieldset><legend>{legend}</legend><div class="seg">{inputs}</div></fieldset>'


def _curves(records: Sequence[Record]) -> str:
    """The switch of the x axis, and a chart for every number that changes."""
    axes = scale(records)
    if not axes.known():
        return '<h2>Curves</h2><p class="soft">No step was recorded.</p>'
    many = len(records) > 1
    events = [mark for record in records for mark in marks(record, many)]
    names = dict(steps="steps", tokens="tokens", time="time", flops="FLOPs")
    controls = _radios("x", "against", {axis: names[axis] for axis in axes.known()}, axes.known()[0])
    controls += _radios("s", "smoothing", dict(none="off", light="light", strong="strong"), "light")
    points = max(150, POINTS // len(records) // 3)

    def draw(title, unit, key, **how):
        curves = [Curve(r.steps, r.steps[key], i) for i, r in enumerate(records)]
        return chart.figure(title, unit, curves, axes, events, key=key, points=points, **how)

    charts = [
        _loss(records, axes, events, 3 * points),
        draw("Learning rate", "", "lr"),
        draw("Gradient norm", "before clipping", "grad_norm", log=True),
        draw("Throughput", "tokens per second", "tokens_per_s"),
        draw("MFU", "share of the chips' bfloat16 peak", "mfu"),
        draw("Step time", "milliseconds", "step_ms", log=True),
        draw("Waiting for data", "milliseconds a step", "data_wait_ms", log=True),
        chart.figure(
            "Held-out text", "bits per byte", _evaluations(records, "bits_per_byte"), axes, events, points=points
        ),
        chart.histogram("Step time", "milliseconds", [_steady(record) for record in records]),
    ]
    return (
        f'<h2>Curves</h2><div class="controls">{controls}</div>{_legend(records, events)}'
        f'<div class="charts">{"".join(charts)}</div>'
    )


def _steady(record: Record) -> np.ndarray:
    return record.steps["step_ms"][record.steps["compiled"] == 0]


def _evaluations(records: Sequence[Record], name: str) -> list[Curve]:
    kinds = ("held", "dots")
    return [Curve(r.evals, r.evals[name], i, kind) for i, r in enumerate(records) for kind in kinds]


def _loss(records: Sequence[Record], axes: Scale, events: Sequence[Mark], points: int) -> str:
    curves = []
    for i, record in enumerate(records):
        steps = record.steps
        curves.append(Curve(steps, steps["loss"], i, "raw"))
        for name, share in SMOOTH.items():
            smooth = series.smooth(steps["loss"], max(1.0, share * steps["steps"].size))
            curves.append(Curve(steps, smooth, i, f"line smooth {name}"))
    curves += _evaluations(records, "eval_loss")
    return chart.figure("Loss", "nats per token", curves, axes, events, key="loss", points=points)


def _legend(records: Sequence[Record], events: Sequence[Mark]) -> str:
    parts = [f"<span>{sections.key(i)}{escaped(record.name)}</span>" for i, record in enumerate(records)]
    parts.append("<span>dashed with dots: held out</span>")
    for kind, word in (("restart", "started again"), ("fault", "bad step")):
        if many := sum(mark.kind == kind for mark in events):
            parts.append(f'<span><i class="key {kind}"></i>{word}, {many:,} times</span>')
    return f'<div class="legend">{"".join(parts)}</div>'


def _data(records: Sequence[Record]) -> str:
    """The numbers to read out, as JSON that no HTML can end."""
    axes, runs = scale(records), []
    for record in records:
        steps = record.steps
        smooth = series.smooth(steps["loss"], max(1.0, SMOOTH["light"] * steps["steps"].size))
        at = np.unique(np.linspace(0, steps["steps"].size - 1, READ).astype(int)) if steps["steps"].size else []
        columns = {name: _short(values[at]) for name, values in (steps | dict(smooth=smooth)).items() if len(at)}
        runs.append({"name": record.name, **{axis: [] for axis in AXES}, **columns})
    ends = {axis: axes.ends[axis] for axis in axes.known()}
    return json.dumps(dict(ends=ends, runs=runs), separators=(",", ":")).replace("<", "\\u003c")


def _short(values: np.ndarray) -> list[float | int | None]:
    """Five digits; whole numbers as such; None for what is not known."""
    found = [float(f"{v:.5g}") if abs(v) < 1e15 else float(v) for v in values.tolist()]
    return [None if v != v else int(v) if v == int(v) and abs(v) < 1e15 else v for v in found]
