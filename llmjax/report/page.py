"""The report of one or several runs as one HTML file that asks nothing of a network."""

import html
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from llmjax.report import chart, series
from llmjax.report.chart import Curve, Mark, Scale
from llmjax.report.goodput import WORDS
from llmjax.report.record import AXES, Record
from llmjax.train.display import count, duration, memory

SMOOTH = {"light": 0.01, "strong": 0.05}  # half-lives, as shares of a run's steps
POINTS = 2400  # of a curve's drawing, all runs together
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
        f'<link rel="icon" href="data:,"><title>{_text(title)}: llmjax report</title>'
        f"<style>\n{css}</style></head><body>"
        f"<header><h1>{_text(title)}</h1>{''.join(map(_about, records))}{_notes(records)}{_overview(records)}</header>"
        f"<main>{_curves(records)}{_time(records)}{_memory(records)}{_planned(records)}{_events(records)}"
        f"{_samples(records)}{_config(records)}</main>"
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


def flattened(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a JSON value by dotted name; what a dataclass is, is the value of its own name."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for name, inner in value.items():
            found |= flattened(inner, path if name == "is" else f"{path}.{name}" if path else str(name))
        return found
    return {path: value}


def _text(value: Any) -> str:
    return html.escape(str(value))


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
    return f'<p class="soft">{_text(record.name)}: {_text(" · ".join(filter(None, facts)))}</p>'


def _notes(records: Sequence[Record]) -> str:
    notes = [f"<li>{_text(record.name)}: {_text(note)}</li>" for record in records for note in record.notes]
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
        tiles = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(facts[0][name])}</dd></div>" for name in shown)
        return f'<dl class="tiles">{tiles}</dl>'
    rows = [
        [_key(i) + _text(r.name), *(_text(f[n]) for n in shown)]
        for i, (r, f) in enumerate(zip(records, facts, strict=True))
    ]
    return _table(["run", *shown], rows, numbers=True)


def _key(run: int) -> str:
    return f'<i class="key c{run % chart.COLOURS}"></i>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A table of cells that are HTML; with numbers, all columns but the first are set to the right."""
    side = ' class="n"' if numbers else ""
    head = "".join(f"<th{side if i else ''}>{_text(c)}</th>" for i, c in enumerate(columns))
    body = "".join(
        f"<tr>{''.join(f'<td{side if i else str()}>{cell}</td>' for i, cell in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


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
    parts = [f"<span>{_key(i)}{_text(record.name)}</span>" for i, record in enumerate(records)]
    parts.append("<span>dashed with dots: held out</span>")
    for kind, word in (("restart", "started again"), ("fault", "bad step")):
        if many := sum(mark.kind == kind for mark in events):
            parts.append(f'<span><i class="key {kind}"></i>{word}, {many:,} times</span>')
    return f'<div class="legend">{"".join(parts)}</div>'


def _time(records: Sequence[Record]) -> str:
    """The goodput bar of every run."""
    out = []
    for record in records:
        if not (found := record.goodput):
            continue
        rows = sorted(found.buckets.items(), key=lambda item: (item[0] != "steps", -item[1]))
        rows = [(name, seconds, 100 * seconds / found.wall) for name, seconds in rows if seconds > 0]
        bar = "".join(f'<i class="b-{n}" style="width:{share:.3f}%" title="{WORDS[n]}"></i>' for n, _, share in rows)
        cells = [[f'<i class="dot b-{n}"></i>{WORDS[n]}', f"{s:,.1f}", f"{p:.1f}%"] for n, s, p in rows]
        starts = f"{found.starts} start{'s' * (found.starts > 1)}, {found.redone:,} steps done again"
        starts += f", {found.skipped:,} skipped" * bool(found.skipped)
        out.append(
            f"<div><h3>{_text(record.name)}: {100 * found.share:.1f}% of {duration(found.wall)}</h3>"
            f'<div class="stack">{bar}</div><p class="soft">{starts}</p>'
            f"{_table(['spent on', 'seconds', 'share'], cells, numbers=True)}</div>"
        )
    return f'<h2>Goodput</h2><div class="two">{"".join(out)}</div>' if out else ""


def _memory(records: Sequence[Record]) -> str:
    charts = []
    for name, title in (("device_bytes", "Device memory"), ("host_bytes", "Host memory")):
        curves = [
            Curve(dict.fromkeys(AXES, r.memory["time"]), r.memory[name] / 2**30, i) for i, r in enumerate(records)
        ]
        end = max((float(np.nanmax(c.x["time"])) for c in curves if np.isfinite(c.x["time"]).any()), default=0.0)
        only = Scale({axis: end if axis == "time" else 0.0 for axis in AXES})
        if end > 0:
            drawn = chart.figure(title, "GiB, peak so far of the first process", curves, only, points=300)
            charts.append(drawn.replace(" ax x-time", "").replace(' data-key=""', ""))
    held = [["parameters", "optimizer"], []]
    rows = []
    for record in records:
        sizes = record.env.get("bytes_per_device")
        if isinstance(sizes, Mapping):
            cells = [memory(sizes[n]) if isinstance(sizes.get(n), int) else "–" for n in held[0]]
            rows.append([_text(record.name), *cells])
    table = _table(["at rest on a device", *held[0]], rows, numbers=True) if rows else ""
    return f'<h2>Memory</h2>{table}<div class="two">{"".join(charts)}</div>' if table or charts else ""


def _planned(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        plan = record.env.get("planned")
        if not isinstance(plan, Mapping):
            continue
        step, took = plan.get("step"), record.median("step_ms") / 1e3
        if isinstance(step, (int, float)) and step > 0 and took > 0:
            rows.append(
                [
                    f"{_text(record.name)}: step",
                    f"{1e3 * step:,.1f} ms",
                    f"{1e3 * took:,.1f} ms",
                    f"{100 * (step / took - 1):+.0f}%",
                ]
            )
        parts = plan.get("memory") if isinstance(plan.get("memory"), Mapping) else {}
        sizes = [size for size in parts.values() if isinstance(size, int)]
        if sizes:
            peak = record.memory["device_bytes"]
            peak = float(np.nanmax(peak)) if np.isfinite(peak).any() else math.nan
            known = math.isfinite(peak)
            rows.append([
                f"{_text(record.name)}: memory of a device", memory(sum(sizes)), memory(peak) if known else "not told",
                f"{100 * (sum(sizes) / peak - 1):+.0f}%" if known else "–",
            ])  # fmt: skip
    if not rows:
        return (
            '<h2>Planned and measured</h2><p class="soft">No plan was made of this very run before its last start: '
            "<code>llmjax plan</code> makes one.</p>"
        )
    return (
        f"<h2>Planned and measured</h2>{_table(['run', '', 'planned', 'measured', 'plan off by'], rows, numbers=True)}"
    )


def _events(records: Sequence[Record]) -> str:
    """What happened, but for the bookkeeping of time; long lists keep their ends."""
    out = []
    for record in records:
        told = [event for event in record.events if event["kind"] != "spent"]
        rows = [[_when(event), _text(event["kind"]), _text(_detail(event))] for event in told]
        if len(rows) > 200:
            rows = [*rows[:50], ["…", f"{len(rows) - 150:,} more", ""], *rows[-100:]]
        if rows:
            shown = _table(["when", "what", ""], rows)
            about = f"{_text(record.name)}: {len(told):,} event{'s' * (len(told) > 1)}"
            out.append(f"<details{' open' * (len(rows) < 13)}><summary>{about}</summary>{shown}</details>")
    return f"<h2>Events</h2>{''.join(out)}" if out else ""


def _when(event: Mapping[str, Any]) -> str:
    moment = event.get("time")
    if isinstance(moment, bool) or not isinstance(moment, (int, float)) or not 0 < moment < 1e11:
        return "–"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _detail(event: Mapping[str, Any]) -> str:
    known = ("kind", "time", "elapsed", "process_began")
    found = [(k, f"{v:.6g}" if isinstance(v, float) else v) for k, v in event.items() if k not in known]
    return ", ".join(f"{k} {v}" for k, v in found)[:400]


def _samples(records: Sequence[Record]) -> str:
    out = []
    for record in records:
        for step, texts in record.samples[-20:]:
            shown = "".join(f"<pre><b>{_text(prompt)}</b>{_text(text)}</pre>" for prompt, text in texts[:20])
            out.append(f"<details open><summary>{_text(record.name)}, after step {step:,}</summary>{shown}</details>")
    return f"<h2>Samples</h2>{''.join(out)}" if out else ""


def _config(records: Sequence[Record]) -> str:
    """What differs between several runs, and everything of each."""
    shown = [{k: v for k, v in r.env.items() if k not in ("planned", "bytes_per_device")} for r in records]
    flat = [flattened(r.run) | flattened(dict(env=env)) for r, env in zip(records, shown, strict=True)]
    names = list(dict.fromkeys(name for each in flat for name in each))
    texts = [{n: json.dumps(each[n], ensure_ascii=False)[:300] if n in each else "–" for n in names} for each in flat]
    out = ["<h2>Config</h2>"]
    columns = ["field", *(record.name for record in records)]
    if len(records) > 1:
        rows = [_row(n, texts) for n in names if len({each[n] for each in texts}) > 1 and n not in ("name", "runs")]
        out.append(_table(columns, rows) if rows else '<p class="soft">Nothing differs.</p>')
    if names != [""]:
        every = _table(columns, [_row(name, texts) for name in names if name])
        out.append(f"<details><summary>All {len(names):,} fields of run.json and env.json</summary>{every}</details>")
    return "".join(out)


def _row(name: str, texts: Sequence[Mapping[str, str]]) -> list[str]:
    return [f"<code>{_text(name)}</code>", *(f"<code>{_text(each[name])}</code>" for each in texts)]


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
