"""Every value of a Run, and where it came from."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from llmjax import redact
from llmjax.changes import shown
from llmjax.layout import Layout, ways
from llmjax.mesh import AXES, Axes, Cluster
from llmjax.run import Run, differences, to_json
from llmjax.train.program import Program

DEFAULT, COMMAND = "default", "command line"
NAMED = (Layout, Cluster)  # values with a name, which are not taken apart


@dataclasses.dataclass(frozen=True)
class Value:
    """A field of a run as it is used."""

    field: str
    "Dotted name, as on the command line."
    value: Any
    "JSON value; a class stands for what is chosen, its fields follow."
    source: str
    "default, experiment, run.json, mesh NAME, command line, or derived with what from."


def values(before: Run, asked: Run, arguments: Iterable[str], program: Program, word: str) -> list[Value]:
    """Every field of a run, in order, with its source.

    `before` is what the experiment `word` holds, `asked` that with the command line, `arguments`, and `program` what
    became of it on its mesh. A value that an experiment sets to what is the default anyway counts as the default.
    """
    home = "run.json" if word.endswith(".json") else "experiment"
    given = {_field(argument) for argument in arguments if argument.startswith("--")}
    changed, run = set(differences(to_json(before), to_json(asked))), program.run
    found, told = derived(run, program), []
    for field, value, default in _leaves(run, None, ""):
        top = field.split(".")[0]
        if top == "mesh" and field != "mesh":
            open_here = getattr(asked.mesh, field.partition(".")[2], None) is None
            source = "found here" if open_here and field in ("mesh.chip", "mesh.chips") else f"mesh {run.mesh.name}"
        elif (
            field in given
            or field in changed
            or (isinstance(value, NAMED) and _below(changed, field))
            or f"{field}.is" in changed
        ):
            source = COMMAND
        else:
            source = DEFAULT if default is not dataclasses.MISSING and value == default else home
        if field in found:
            value, why = found[field]
            source = f"derived from {why}"
        told.append(Value(field, _plain(value), source))
    return told


def derived(run: Run, program: Program) -> dict[str, tuple[Any, str]]:
    """What a run leaves open, and what became of it: (value, what from) by dotted field."""
    mesh, compute = dict(program.mesh.shape), program.compute
    devices = f"{program.mesh.size} devices" if program.mesh.size > 1 else "one device"
    cut = f"layout {run.layout.name} on {devices}"
    found = {f"axes.{axis}": (mesh[axis], cut) for axis in AXES if not getattr(run.axes, axis)}
    chip = run.mesh.chip.name if run.mesh.chip else "this machine's chip"
    if not run.accumulate:
        found["accumulate"] = program.accumulate, f"rows and positions of a device, {chip}"
    if run.dtype == "auto":
        found["dtype"] = compute.operands, chip
    if run.attention == "auto":
        found["attention"] = compute.attention, program.lacking or f"what {chip} can run, and sequence"
    if not run.unroll:
        found["unroll"] = compute.unroll, chip
    if not run.loss_chunk and compute.chunk:
        found["loss_chunk"] = compute.chunk, "size of the logits"
    if run.remat.budget:
        found["remat.policy"] = compute.remat, f"remat.budget {run.remat.budget:g}"
    stages = ways(run.layout.params.get("L"), Axes(**mesh))
    if stages > 1 and not run.pipeline.microbatches:
        rows = run.batch // ways(run.layout.inner.get("B"), Axes(**mesh)) // program.accumulate
        found["pipeline.microbatches"] = run.pipeline.parts(rows, stages), f"{rows} rows on {stages} stages"
    return found


def facts(program: Program) -> dict[str, Any]:
    """Counts of the model and of the whole run; what a model does not tell is left out."""

    run, state = program.run, program.abstract_state()
    parameters = program.size(state)
    found: dict[str, Any] = dict(parameters=parameters, steps=run.steps)
    if not hasattr(run.model, "flops_per_token"):
        return found
    causal, full = run.model.flops_per_token(run.sequence)
    tokens = run.steps * run.tokens
    return found | dict(
        active=active(run), tokens=tokens, tokens_per_parameter=tokens / parameters,
        flops_per_token=causal, flops_per_token_full=full, flops=tokens * causal,
    )  # fmt: skip


def active(run: Run) -> int:
    """Weights that one token is multiplied by: without the table it is looked up in, and experts it does not go to."""
    sizes, layer = run.model.sizes(), ("attention", "mlp")
    met = {module: sum(m.share * m.size(sizes) for m in matrices) for module, matrices in run.model.matrices().items()}
    return round(sum(number * (run.model.layers if module in layer else 1) for module, number in met.items()))


def _leaves(value: Any, default: Any, path: str):
    """(dotted field, value, default) of all that a dataclass holds; a default that is missing is MISSING."""
    if path in ("mesh", "fallback_mesh") or not dataclasses.is_dataclass(value) or isinstance(value, NAMED):
        yield path, value, default
        if path == "mesh":
            yield from ((f"mesh.{name}", _plain(held), None) for name, held in _cluster(value).items())
        return
    if path and default != value and type(default) is not type(value):
        yield path, type(value), default
    for field in dataclasses.fields(value):
        if not field.init:
            continue
        usual = getattr(default, field.name) if type(default) is type(value) else field.default
        held = getattr(value, field.name)
        held = redact.HIDDEN if redact.is_secret(field) and held else held
        yield from _leaves(held, usual, f"{path}.{field.name}" if path else field.name)


def _cluster(cluster: Cluster) -> Mapping[str, Any]:
    """What of a mesh a person wants to see."""
    chip = cluster.chip
    told = dict(chip=chip and chip.name, chips=cluster.chips, slices=cluster.slices, topology=cluster.topology)
    return told | (dict(flops=chip.flops, memory=chip.memory) if chip else {})


def _plain(value: Any) -> Any:
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, NAMED):
        return value.name
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    return redact.tree(list(value) if isinstance(value, tuple) else value)


def _field(argument: str) -> str:
    """The dotted field that an option names."""
    group, dot, leaf = argument[2:].partition("=")[0].replace("-", "_").rpartition(".")
    return f"{group}{dot}{leaf.removeprefix('no_')}"


def _below(changed: Iterable[str], field: str) -> bool:
    return any(path == field or path.startswith(f"{field}.") for path in changed)


def text(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float) and (abs(value) >= 1e6 or 0 < abs(value) < 1e-3):
        return f"{value:.6g}"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else shown(value) if value != "" else '""'
