"""What a run directory says, as far as it can be read: of a running, crashed, torn or foreign run as well.

Nothing here raises for what is in the files: what cannot be used is left out and named in `notes`.
"""

import contextlib
import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmjax import reading
from llmjax.errors import DATA, Refused
from llmjax.report import goodput
from llmjax.rundir import find, own

MEASURED = ("loss", "grad_norm", "lr", "tokens_per_s", "step_ms", "mfu", "data_wait_ms")
EVALUATED = ("eval_loss", "bits_per_byte")
AXES = ("steps", "tokens", "time", "flops")
SILENT = 120.0  # seconds without a sign of life after which a run elsewhere counts as gone
MOST = 2**31  # bytes of a .jsonl file that are read

Table = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Record:
    """A run as its directory tells it. Numbers that it does not tell are NaN."""

    folder: Path
    name: str
    run: Mapping[str, Any]
    "run.json; empty where there is none."
    env: Mapping[str, Any]
    "env.json of the last start."
    steps: Table
    "By step: AXES and MEASURED; time is seconds since the first start, flops those of the model."
    evals: Table
    "By evaluation: AXES and EVALUATED."
    events: Sequence[Mapping[str, Any]]
    memory: Table
    "time, host_bytes and device_bytes: the peaks so far of the first process."
    samples: Sequence[tuple[int, Sequence[tuple[str, str]]]]
    "(step, its prompts and what became of them)."
    processes: Sequence[Mapping[str, Any]]
    "The last sign of life of each process."
    goodput: goodput.Goodput | None
    state: str
    "finished, running, stopped, gone or empty."
    seen: float
    "When something was last written, in seconds since 1970; 0: never."
    notes: Sequence[str]
    "What could not be read, in sentences."

    @property
    def last(self) -> int:
        """The last step that was done."""
        return int(self.steps["steps"][-1]) if self.steps["steps"].size else 0

    @property
    def planned_steps(self) -> int:
        """How many the run is to have; 0 where it is not known."""
        found = self.run.get("steps")
        return found if isinstance(found, int) and found > 0 else 0

    def median(self, name: str) -> float:
        """Of a measured number over all steps but those that compiled; NaN where there are none."""
        values = self.steps[name][~self.steps["compiled"].astype(bool)]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if values.size else math.nan


def where(name: str, runs: str) -> Path:
    """The directory of a run, or any other that a path names.

    Raises:
      Refused: there is none, or it holds symbolic links.
    """
    folder = Path(name)
    with contextlib.suppress(OSError, ValueError):
        for each in (Path(runs) / name, folder):
            if (each / "run.json").is_file():
                break
        else:
            if folder.is_dir():
                own(folder)
                return folder
    return find(name, runs)


def read(folder: Path) -> Record:
    """Everything that the directory says.

    Raises:
      Refused: it holds nothing that a run writes.
    """
    notes: list[str] = []
    run, env = (_object(folder / name, notes.append) for name in ("run.json", "env.json"))
    metrics, events = (_lines(folder / name, notes.append) for name in ("metrics.jsonl", "events.jsonl"))
    events = [event for event in events if isinstance(event.get("kind"), str)]
    metrics = [line for line in metrics if _is_step(line.get("step"))]
    if not (run or env or metrics or events or (folder / "run.json").exists()):
        raise Refused(f"{folder} holds nothing that a run writes: name the directory of a run.", DATA)
    timeline = Timeline(events)
    per_token = _flops_per_token(run, env, notes.append)
    steps, evals = steps_of(metrics, timeline, per_token), evals_of(metrics, timeline)
    for axis in ("tokens", "flops"):
        evals[axis] = _at(evals["steps"], steps["steps"], steps[axis])
    processes = _processes(folder)
    written = max([0.0, *map(_changed, (folder / "metrics.jsonl", folder / "events.jsonl", folder / "processes"))])
    lock = _object(folder / "lock", lambda said: None)
    return Record(
        folder=folder, name=folder.absolute().name, run=run, env=env, steps=steps, evals=evals, events=events,
        memory=_memory(events, timeline), samples=_samples(folder / "samples", notes.append), processes=processes,
        goodput=_goodput(events, metrics, notes.append), state=state(events, lock, written), seen=written,
        notes=notes,
    )  # fmt: skip


class Timeline:
    """Wall time since a run's first start, of any line, by the start that wrote it."""

    def __init__(self, events: Sequence[Mapping[str, Any]]):
        starts = [e for e in events if e["kind"] == "start" and _is_step(e.get("step"))]
        found = [(e["step"], number(e.get("process_began"))) for e in starts]
        self.starts = [(step, began) for step, began in found if math.isfinite(began)]

    def of_step(self, step: int, elapsed: float) -> float:
        """A line of metrics of step `step`, written `elapsed` seconds after its process began."""
        began = next((began for start, began in reversed(self.starts) if start < step), None)
        return math.nan if began is None else began + elapsed - self.starts[0][1]

    def of_event(self, event: Mapping[str, Any]) -> float:
        """An event, by the clock on the wall."""
        return number(event.get("time")) - self.starts[0][1] if self.starts else math.nan


def steps_of(metrics: Sequence[Mapping[str, Any]], timeline: Timeline, per_token: float) -> Table:
    """The table of the lines of steps that were taken, in order, the last line of each."""
    lines = {line["step"]: line for line in metrics if "eval_loss" not in line and "loss" in line}
    lines = [lines[step] for step in sorted(lines)]
    table = {name: _column(lines, name) for name in (*MEASURED, "tokens")}
    table["steps"] = np.array([line["step"] for line in lines], float)
    table["compiled"] = np.array([line.get("compiled") is True for line in lines], float)
    passed = np.array([timeline.of_step(line["step"], number(line.get("elapsed"))) for line in lines], float)
    if not np.isfinite(passed).all():  # begun by a version that kept no time
        passed = np.cumsum(np.nan_to_num(table["step_ms"])) / 1e3
    table["time"] = np.maximum.accumulate(passed) if lines else passed
    table["flops"] = table["tokens"] * per_token
    return table


def evals_of(metrics: Sequence[Mapping[str, Any]], timeline: Timeline) -> Table:
    """The table of the evaluations, without tokens and flops."""
    lines = {line["step"]: line for line in metrics if "eval_loss" in line}
    lines = [lines[step] for step in sorted(lines)]
    table = {name: _column(lines, name) for name in EVALUATED}
    table["steps"] = np.array([line["step"] for line in lines], float)
    table["time"] = np.array([timeline.of_step(line["step"], number(line.get("elapsed"))) for line in lines], float)
    return table


def state(events: Sequence[Mapping[str, Any]], lock: Mapping[str, Any], seen: float) -> str:
    """finished, running, stopped, gone (it ended without a word) or empty (it never came to train)."""
    if lock and _alive(lock, seen):
        return "running"
    told = [event["kind"] for event in events if event["kind"] in ("start", "finish", "stop")]
    return {"finish": "finished", "stop": "stopped", "start": "gone"}[told[-1]] if told else "empty"


def number(value: Any) -> float:
    """A finite number as a float; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value) if abs(value) < 1e300 else math.nan


def _alive(lock: Mapping[str, Any], seen: float) -> bool:
    """Whether the process that a lock names lives; one on another machine does while it writes."""
    pid = lock.get("pid")
    if lock.get("host") != platform.node() or not isinstance(pid, int) or not 0 < pid < 2**31:
        return time.time() - seen < SILENT
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([number(line.get(name)) for line in lines], float)


def _at(steps: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values at other steps, in between those that are known."""
    return np.interp(steps, known, values) if known.size else np.full(steps.shape, math.nan)


def _object(path: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """The JSON object of a small file; an empty one where it has none."""
    try:
        found = reading.parsed(reading.content(path, reading.RUN))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        note(f"{path.name} cannot be read ({_why(error)}).")
        return {}
    if isinstance(found, dict):
        return found
    note(f"{path.name} holds no object.")
    return {}


def _lines(path: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, one a line; other lines are counted and left out."""
    try:
        content = reading.content(path, MOST)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        note(f"{path.name} cannot be read ({_why(error)}).")
        return []
    *whole, rest = content.split(b"\n")
    found, bad = [], 0
    for line in filter(None, whole):
        try:
            value = reading.parsed(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            bad += 1
    if bad:
        note(f"{bad:,} damaged line{'s' * (bad > 1)} of {path.name} left out.")
    if rest.strip():
        note(f"The last line of {path.name} is cut short and left out.")
    return found


def _why(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _memory(events: Sequence[Mapping[str, Any]], timeline: Timeline) -> Table:
    lines = [e for e in events if e["kind"] == "spent" and not math.isnan(number(e.get("host_bytes")))]
    table = {name: _column(lines, name) for name in ("host_bytes", "device_bytes")}
    return table | {"time": np.array([timeline.of_event(line) for line in lines], float)}


def _samples(folder: Path, note: Callable[[str], None]) -> list[tuple[int, list[tuple[str, str]]]]:
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            texts = reading.parsed(reading.content(path, reading.RUN))
            pairs = [(str(each["prompt"]), str(each["text"])) for each in texts]
            found.append((int(path.stem), pairs))
        except (OSError, ValueError, TypeError, LookupError) as error:
            note(f"samples/{path.name} cannot be read ({_why(error)}).")
    return sorted(found)


def _processes(folder: Path) -> list[dict[str, Any]]:
    found = [_object(path, lambda said: None) for path in sorted((folder / "processes").glob("*.json"))]
    whole = [each for each in found if _is_step(each.get("process")) and _is_step(each.get("step"))]
    return sorted(whole, key=lambda each: each["process"])


def _goodput(events, metrics, note: Callable[[str], None]) -> goodput.Goodput | None:
    try:
        found = goodput.of(events, metrics)
    except Refused as refusal:
        note(str(refusal))
        return None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        note("events.jsonl is not whole: goodput is not known.")
        return None
    return found if found.starts and found.wall > 0 and math.isfinite(found.wall) else None


def _flops_per_token(run: Mapping[str, Any], env: Mapping[str, Any], note: Callable[[str], None]) -> float:
    """FLOPs of the model per token, from env.json, or from the model itself where an older version wrote that."""
    told = number(env.get("flops_per_token"))
    if "flops_per_token" in env or not run:
        return told
    from llmjax.run import from_json

    try:
        model, sequence = from_json(run.get("model")), run["sequence"]
        return number(model.flops_per_token(sequence)[0])
    except Exception as error:  # the model's class is anybody's
        note(f"FLOPs per token are not known ({type(error).__name__}).")
        return math.nan


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
