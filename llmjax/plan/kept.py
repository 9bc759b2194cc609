"""The newest plan of a run, kept so that training can show it beside what it measures."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmjax.mesh import Axes
from llmjax.run import Run, to_json

# What decides the time of a step: a plan that differs in any of these is of another run.
DECIDES = ("model", "optimizer", "axes", "layout", "pipeline", "batch", "sequence", "accumulate", "dtype",
           "parameters", "attention", "remat", "offload_optimizer", "unroll", "loss_chunk", "local")  # fmt: skip


def file(run: Run) -> Path:
    """Where the plan is kept, below the folder of runs."""
    return Path(run.runs) / ".cache" / "plans" / f"{run.name}.json"


def keep(run: Run, sizes: Axes, accumulate: int, step: float, memory: Mapping[str, int] = {}) -> None:
    """Keeps the seconds planned for a step, and a device's bytes by what they hold.

    A folder that cannot be written keeps nothing.
    """
    with contextlib.suppress(OSError):
        file(run).parent.mkdir(parents=True, exist_ok=True)
        facts = _facts(run, sizes, accumulate) | {"step": step, "memory": dict(memory)}
        file(run).write_text(json.dumps(facts, indent=1) + "\n")


def planned(run: Run, sizes: Axes, accumulate: int) -> float | None:
    """Seconds that were planned for a step of this very run on this very mesh; None where there is no such plan."""
    found = plan(run, sizes, accumulate)
    return found["step"] if found else None


def plan(run: Run, sizes: Axes, accumulate: int) -> dict[str, Any] | None:
    """(step: seconds, memory: bytes of a device by what they hold) of this very run on this very mesh, if planned."""
    try:
        found = json.loads(file(run).read_text(encoding="utf-8"))
        known = dict(step=float(found.pop("step")), memory=dict(found.pop("memory", {})))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return known if found == _facts(run, sizes, accumulate) else None


def _facts(run: Run, sizes: Axes, accumulate: int) -> dict:
    run = dataclasses.replace(run, axes=sizes, accumulate=accumulate)
    return {"mesh": run.mesh.name} | {field: to_json(getattr(run, field)) for field in DECIDES}
