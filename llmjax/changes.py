"""What it means that two runs, or two starts of one, differ: in what they compute, in how, or in what is kept.

The command line shows it (`llmjax diff`, and the line with which a run goes on), and whether it is safe.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from llmjax.run import FREE, differences

Kind = Literal["numbers", "steps", "speed", "records"]
MEANING: Mapping[Kind, str] = {  # the gravest first
    "numbers": "another run from here on",
    "steps": "same numbers unless a step is bad",
    "speed": "same numbers up to rounding",
    "records": "same numbers",
}
# Of what may change between two starts, what touches no number at all.
RECORDS = frozenset({"eval_every", "eval_rows", "eval", "trackers", "save_every", "save_minutes", "keep", "keep_every",
                     "keep_best", "prompts", "sample_every", "accept_data", "runs", "name", "fallback_mesh",
                     "guard.replicas", "guard.repeat", "profile"})  # fmt: skip
NAMED = ("layout", "mesh", "fallback_mesh")  # values that have a name, by which they are shown


@dataclasses.dataclass(frozen=True)
class Change:
    """A field in which two runs differ."""

    field: str
    "Dotted name."
    before: Any
    "JSON value; None also where one run has no such field."
    after: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.field} {shown(self.before)} -> {shown(self.after)}"


def kind(field: str, *, local: bool = False) -> Kind:
    """What a change of this field, by its dotted name, changes.

    `local` says that the run is one of local SGD, whose workers are the devices along axis data.
    """
    top = field.split(".")[0]
    if field in RECORDS or top in RECORDS:
        return "records"
    if top not in FREE or field == "guard.skip" or (local and field == "axes.data"):
        return "numbers"
    return "steps" if top == "guard" else "speed"


def between(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The fields in which two runs differ, as JSON of `run.to_json`, in the order of the fields."""
    local = any(((run.get("local") or {}).get("every") or 0) > 0 for run in (before, after))
    found: dict[str, Change] = {}
    for path in differences(before, after):
        field, a, b = _told(path, before, after)
        found.setdefault(field, Change(field, a, b, kind(field, local=local)))
    return list(found.values())


def since(facts: Mapping[str, Any], now: Mapping[str, Any], axes: Mapping[str, int], versions: Mapping[str, str],
          data: str) -> list[Change]:  # fmt: skip
    """What changed since a checkpoint with these facts: the run's fields, the mesh that came of them, versions, data.

    What an older version did not write into a checkpoint counts as unchanged.
    """
    local = bool((now.get("local") or {}).get("every"))
    free = {name: value for name, value in now.items() if name in FREE}
    found = between(facts["how"], free) if isinstance(facts.get("how"), dict) else []
    found = [change for change in found if change.field.split(".")[0] not in ("axes", "runs", "accept_data")]
    before = facts.get("mesh")
    if isinstance(before, dict) and before != dict(axes):
        moved = local and before.get("data") != axes.get("data")
        found.append(Change("axes", cut(before), cut(axes), "numbers" if moved else "speed"))
    old = facts.get("versions") if isinstance(facts.get("versions"), dict) else {}
    found += [Change(name, old[name], now, "speed") for name, now in versions.items() if old.get(name, now) != now]
    if facts.get("data") not in (None, data):
        found.append(Change("data", facts["data"][:12], data[:12], "numbers"))
    return found


def sentences(changes: Iterable[Change]) -> list[str]:
    """A line for each kind of change: what changed, and what that means."""
    lines = []
    for kind, meaning in MEANING.items():
        if told := ", ".join(str(change) for change in changes if change.kind == kind):
            lines.append(f"Changed since that checkpoint: {told} ({meaning}).")
    return lines


def cut(axes: Mapping[str, int]) -> str:
    """The mesh axes that cut something."""
    return " x ".join(f"{axis} {size}" for axis, size in axes.items() if size != 1) or "one device"


def shown(value: Any) -> str:
    """A JSON value as a person reads it."""
    if isinstance(value, dict):
        return str(value.get("name") or str(value.get("is", "")).rpartition(":")[2] or value)
    if isinstance(value, list):
        return "(" + ", ".join(map(shown, value)) + ")"
    if value is None or value == "":
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _told(path: str, before: Any, after: Any) -> tuple[str, Any, Any]:
    """(field, value before, value after) for a person: by name where both have one, a class by its own."""
    top = path.split(".")[0]
    if top in NAMED:
        a, b = (_at(run, top) for run in (before, after))
        if shown(a) != shown(b):
            return top, a, b
    a, b = (_at(run, path) for run in (before, after))
    if path.endswith(".is"):
        return path.removesuffix(".is"), *(str(x or "none").rpartition(":")[2] for x in (a, b))
    return path, a, b


def _at(run: Any, path: str) -> Any:
    return functools.reduce(lambda tree, key: tree.get(key) if isinstance(tree, dict) else None, path.split("."), run)
