"""The parts of a report below its curves, as HTML: goodput, memory, plan, events, samples, config."""

import html
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llmjax.report import chart
from llmjax.report.chart import Curve, Scale
from llmjax.report.goodput import WORDS
from llmjax.report.record import AXES, Record
from llmjax.train.display import duration, memory


def escaped(value: Any) -> str:
    """Anything as text of HTML."""
    return html.escape(str(value))


def key(run: int) -> str:
    """The colour of a run."""
    return f'<i class="key c{run % chart.COLOURS}"></i>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A table of cells that are HTML; with numbers, all columns but the first are set to the right."""
    side = ' class="n"' if numbers else ""
    head = "".join(f"<th{side if i else ''}>{escaped(c)}</th>" for i, c in enumerate(columns))
    body = "".join(
        f"<tr>{''.join(f'<td{side if i else str()}>{cell}</td>' for i, cell in enumerate(row))}</tr>" for row in rows
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def flattened(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a JSON value by dotted name; what a dataclass is, is the value of its own name."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for name, inner in value.items():
            found |= flattened(inner, path if name == "is" else f"{path}.{name}" if path else str(name))
        return found
    return {path: value}


def goodput(records: Sequence[Record]) -> str:
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
            f"<div><h3>{escaped(record.name)}: {100 * found.share:.1f}% of {duration(found.wall)}</h3>"
            f'<div class="stack">{bar}</div><p class="soft">{starts}</p>'
            f"{table(['spent on', 'seconds', 'share'], cells, numbers=True)}</div>"
        )
    return f'<h2>Goodput</h2><div class="two">{"".join(out)}</div>' if out else ""


def held(records: Sequence[Record]) -> str:
    """What devices hold at rest, and the peaks of memory over time."""
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
    kinds = ("parameters", "optimizer")
    rows = []
    for record in records:
        sizes = record.env.get("bytes_per_device")
        if isinstance(sizes, Mapping):
            cells = [memory(sizes[n]) if isinstance(sizes.get(n), int) else "–" for n in kinds]
            rows.append([escaped(record.name), *cells])
    found = table(["at rest on a device", *kinds], rows, numbers=True) if rows else ""
    return f'<h2>Memory</h2>{found}<div class="two">{"".join(charts)}</div>' if found or charts else ""


def planned(records: Sequence[Record]) -> str:
    """The step and the memory that `llmjax plan` foresaw, beside what came of it."""
    rows = []
    for record in records:
        plan = record.env.get("planned")
        if not isinstance(plan, Mapping):
            continue
        step, took = plan.get("step"), record.median("step_ms") / 1e3
        if isinstance(step, (int, float)) and step > 0 and took > 0:
            rows.append(
                [
                    f"{escaped(record.name)}: step",
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
                f"{escaped(record.name)}: memory of a device", memory(sum(sizes)),
                memory(peak) if known else "not told",
                f"{100 * (sum(sizes) / peak - 1):+.0f}%" if known else "–",
            ])  # fmt: skip
    if not rows:
        return (
            '<h2>Planned and measured</h2><p class="soft">No plan was made of this very run before its last start: '
            "<code>llmjax plan</code> makes one.</p>"
        )
    return (
        f"<h2>Planned and measured</h2>{table(['run', '', 'planned', 'measured', 'plan off by'], rows, numbers=True)}"
    )


def events(records: Sequence[Record]) -> str:
    """What happened, but for the bookkeeping of time; long lists keep their ends."""
    out = []
    for record in records:
        told = [event for event in record.events if event["kind"] != "spent"]
        rows = [[_when(event), escaped(event["kind"]), escaped(_detail(event))] for event in told]
        if len(rows) > 200:
            rows = [*rows[:50], ["…", f"{len(rows) - 150:,} more", ""], *rows[-100:]]
        if rows:
            shown = table(["when", "what", ""], rows)
            about = f"{escaped(record.name)}: {len(told):,} event{'s' * (len(told) > 1)}"
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


def samples(records: Sequence[Record]) -> str:
    """What became of the prompts, by step."""
    out = []
    for record in records:
        for step, texts in record.samples[-20:]:
            shown = "".join(f"<pre><b>{escaped(prompt)}</b>{escaped(text)}</pre>" for prompt, text in texts[:20])
            out.append(f"<details open><summary>{escaped(record.name)}, after step {step:,}</summary>{shown}</details>")
    return f"<h2>Samples</h2>{''.join(out)}" if out else ""


def config(records: Sequence[Record]) -> str:
    """What differs between several runs, and everything of each."""
    shown = [{k: v for k, v in r.env.items() if k not in ("planned", "bytes_per_device")} for r in records]
    flat = [flattened(r.run) | flattened(dict(env=env)) for r, env in zip(records, shown, strict=True)]
    names = list(dict.fromkeys(name for each in flat for name in each))
    texts = [{n: json.dumps(each[n], ensure_ascii=False)[:300] if n in each else "–" for n in names} for each in flat]
    out = ["<h2>Config</h2>"]
    columns = ["field", *(record.name for record in records)]
    if len(records) > 1:
        rows = [_row(n, texts) for n in names if len({each[n] for each in texts}) > 1 and n not in ("name", "runs")]
        out.append(table(columns, rows) if rows else '<p class="soft">Nothing differs.</p>')
    if names != [""]:
        every = table(columns, [_row(name, texts) for name in names if name])
        out.append(f"<details><summary>All {len(names):,} fields of run.json and env.json</summary>{every}</details>")
    return "".join(out)


def _row(name: str, texts: Sequence[Mapping[str, str]]) -> list[str]:
    return [f"<code>{escaped(name)}</code>", *(f"<code>{escaped(each[name])}</code>" for each in texts)]
