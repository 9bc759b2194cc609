"""Run: one frozen value that says everything a run is, and its form as JSON."""

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from llmjax import layout as layouts
from llmjax.errors import DATA, Refused
from llmjax.layout import Layout, Pipeline
from llmjax.mesh import Axes, Cluster


@dataclasses.dataclass(frozen=True)
class DiLoCo:
    """Local SGD over the mesh axis `data`: each of its coordinates trains a model of its own (arXiv:2311.08105).

    Every so many steps the workers average what they changed, and an outer step of SGD with that average moves all of
    them. In between nothing crosses the axis. The number of workers decides the numbers, as `every` does.
    """

    every: int = 30
    "Steps between two exchanges, H; 0: synchronous training. The last step of a run ends with one as well."
    lr: float = 0.7
    "Learning rate of the outer step; 1 without momentum takes the average of the workers."
    momentum: float = 0.9
    "How much of the outer step before is kept."
    nesterov: bool = True
    "Look one outer step of momentum ahead."
    fragments: int = 1
    "Parts of the model that are exchanged in turn, each once in `every` steps (arXiv:2501.18512)."
    delta: Literal["float32", "bfloat16", "int8"] = "float32"
    "What a change crosses the axis as; int8 has one scale per tensor."


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run. The same value gives the same numbers on every mesh.

    `model`, `data`, `optimizer` and `loss` are values of any class with the methods that `llmjax.models`,
    `llmjax.data`, `llmjax.optim` and `llmjax.train.loss` show.
    """

    model: Any
    "Family and shape of the model."
    data: Any
    "Corpus and tokenizer."
    optimizer: Any
    "Optimizer and its learning-rate schedule."
    loss: Any
    "What is minimised."
    mesh: Cluster
    "Where it runs: a name that `llmjax meshes` lists."
    axes: Axes = Axes()
    layout: Layout = layouts.dp
    "What is cut over which mesh axis: a kind of parallelism, or several joined by _, such as fsdp_tp."
    pipeline: Pipeline = Pipeline()
    "How microbatches pass through the stages, where the layout cuts layers (pp)."
    steps: int = 1000
    "Optimizer steps."
    batch: int = 16
    "Sequences per step, over all devices."
    sequence: int = 256
    "Positions per sequence, T."
    accumulate: int = 0
    "Microbatches per step; 0: one on an accelerator, as many as keep a CPU's caches warm on a CPU."
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    "Precision of the products; parameters and losses stay float32. auto: bfloat16 on accelerators, float32 on CPUs."
    remat: Literal["none", "full", "dots"] = "none"
    "What the backward pass computes again: nothing, everything, or all but the products with weights."
    clip: float = 1.0
    "Largest global norm of the gradient; 0 switches clipping off."
    local: DiLoCo = DiLoCo(every=0)
    "Local SGD over axis data; off by default."
    seed: int = 0
    "Seeds the weights and the order of the data."
    eval_every: int = 0
    "Steps between evaluations on held-out data; 0: only at the end."
    eval_rows: int = 64
    "Held-out sequences of an evaluation on the way; the last one uses all."
    save_every: int = 0
    "Steps between checkpoints; 0: only at the end or when interrupted."
    keep: int = 2
    "Checkpoints kept."
    prompts: tuple[str, ...] = ()
    "Texts to complete when training ends."
    name: str = ""
    "Name of the run directory; the experiment's own name if empty."
    runs: str = "runs"
    "Folder that holds run directories."

    def folder(self) -> Path:
        """The run directory."""
        return Path(self.runs) / self.name


# What may change between two starts of one run: where and how it is computed and recorded, never what is computed.
FREE = frozenset({"mesh", "axes", "layout", "pipeline", "accumulate", "remat", "eval_every", "eval_rows", "save_every",
                  "keep", "prompts", "runs"})  # fmt: skip


def to_json(value: Any) -> Any:
    """A JSON value from which `from_json` makes an equal one. Dataclasses keep their class under "is"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"is": _name_of(type(value))} | fields
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if callable(value):
        return {"is": "function", "name": _name_of(value)}
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    raise Refused(f"a run holds {value!r}, which cannot be written to run.json: use dataclasses, numbers and strings.")


def from_json(value: Any) -> Any:
    """The inverse of `to_json`; imports the modules it names and makes only dataclasses."""
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "is" not in value:
        return {k: from_json(v) for k, v in value.items()}
    if value["is"] == "function":
        return _named(value["name"])
    cls = _named(value["is"])
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise Refused(f"run.json names {value['is']}, which is not a dataclass: the file was changed by hand.", DATA)
    fields = {k: from_json(v) for k, v in value.items() if k != "is"}
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise Refused(
            f"run.json has fields that {cls.__name__} lacks ({', '.join(unknown)}): it was written by another version.",
            DATA,
        )
    try:
        return cls(**fields)
    except TypeError as error:  # a field without a default is missing
        raise Refused(f"run.json holds no whole {cls.__name__} ({error}): restore the file.", DATA) from error


def read(path: Path) -> Run:
    """The Run that a run.json holds.

    Raises:
      Refused: there is no such file, or it does not hold a Run.
    """
    try:
        run = from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): give the run.json of a run directory.") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise Refused(f"{path} is not JSON ({error}): restore the file.", DATA) from error
    if not isinstance(run, Run):
        raise Refused(f"{path} does not hold a run: give the run.json of a run directory.", DATA)
    return run


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted names of the fields in which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [path]


def _name_of(thing: Any) -> str:
    module = sys.modules[thing.__module__]
    spec = getattr(module, "__spec__", None)
    home = spec.name if spec else module.__name__  # an experiment run with -m is __main__, but importable by its name
    return f"{home}:{thing.__qualname__}"


def _named(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        thing: Any = importlib.import_module(module)
        for part in path.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError) as error:
        raise Refused(
            f"run.json names {name}, which cannot be imported here ({error}): install what defines it.", DATA
        ) from error
    return thing


def check(run: Run, axes: Axes, accumulate: int) -> None:
    """Refuses a run whose numbers make no sense or whose shapes cannot be cut over these axes.

    It costs nothing, so it comes before anything is read, built or compiled.

    Raises:
      Refused: naming the field, its value and what would do.
    """
    for field, least in _LEAST.items():
        if not getattr(run, field) >= least:
            raise Refused(f"{field} is {getattr(run, field)}: give at least {least}.")
    if "" in run.prompts:
        raise Refused("prompts holds an empty text: give each prompt some text, or none with --prompts alone.")
    _check_batch(run, axes, accumulate)
    if not run.local.every >= 0:
        raise Refused(f"local.every is {run.local.every}: give the steps between two exchanges, or 0 for none.")
    if run.local.every:
        _check_local(run, axes)
    if hasattr(run.loss, "of_layers") and not hasattr(run.model, "experts"):
        raise Refused(
            f"loss is {type(run.loss).__name__}, but {type(run.model).__name__} has no experts to keep even: "
            f"use NextToken, or a model with experts such as Mixtral."
        )
    if hasattr(run.model, "sizes"):
        _check_model(run, axes)
    _check_pipeline(run, axes, accumulate)


_LEAST = dict(
    steps=1, batch=1, sequence=1, accumulate=0, clip=0, seed=0, eval_every=0, eval_rows=1, save_every=0, keep=1
)
_WORDS = dict(
    D="model.width", E="model.experts", H="model.heads", G="model.kv_heads", K="model.head_dim", F="model.ff",
    V="model.vocab", P="model.positions", T="sequence",
)  # fmt: skip

_TYPICAL, _TYPICAL_WEIGHTS = ("BTD", "BTHK", "BTGK", "BTF", "BTV"), ("VD", "LDHK", "LDGK", "LEDF")


def _check_batch(run: Run, axes: Axes, accumulate: int) -> None:
    factors = {axis: getattr(axes, axis) for axis in layouts.axes_of(run.layout.inner.get("B"))}
    factors = {name: size for name, size in (factors | {"accumulate": accumulate}).items() if size > 1}
    ways = math.prod(factors.values())
    if run.batch % ways:
        shown = " x ".join(f"{name} {size}" for name, size in factors.items())
        raise Refused(
            f"batch is {run.batch}, which {shown}{f' = {ways}' if len(factors) > 1 else ''} does not divide: "
            f"use batch {max(1, round(run.batch / ways)) * ways}, or other axes or accumulation."
        )


def _check_local(run: Run, axes: Axes) -> None:
    local, layers = run.local, getattr(run.model, "layers", 1)
    if hasattr(run.loss, "of_layers"):
        raise Refused(
            f"local.every is {local.every}, but {type(run.loss).__name__} counts loads over all workers: "
            f"use NextToken, or 0 for synchronous training."
        )
    most = min(local.every, layers)
    if not 0 < local.lr < math.inf:
        raise Refused(f"local.lr is {local.lr}: give a positive number.")
    if not 0 <= local.momentum < 1:
        raise Refused(f"local.momentum is {local.momentum}: give at least 0 and less than 1.")
    if local.delta not in (deltas := get_args(get_type_hints(DiLoCo)["delta"])):
        raise Refused(f"local.delta is {local.delta!r}: give one of {', '.join(deltas)}.")
    if not 1 <= local.fragments <= most:
        raise Refused(
            f"local.fragments is {local.fragments}: give 1 to {most}, as there are {layers} layers to part and "
            f"{local.every} steps to take turns in."
        )
    over = [axis for axis in layouts.axes_of(run.layout.params.get("L")) if getattr(axes, axis) > 1]
    if local.fragments > 1 and over:
        raise Refused(
            f"local.fragments is {local.fragments}, but the layers are cut over '{over[0]}': set --local.fragments 1, "
            f"or --axes.{over[0]} 1."
        )


def _check_model(run: Run, axes: Axes) -> None:
    for dims in _TYPICAL:
        run.layout.activation(dims)  # refuses an axis named for two of them
    for dims in _TYPICAL_WEIGHTS:
        run.layout.at_rest(dims)
    model, letters = run.model, dict(run.model.sizes())
    sizes = {_WORDS.get(letter, letter): size for letter, size in letters.items()}
    for field, size in (sizes | {"model.layers": getattr(model, "layers", 1)}).items():
        if size < 1:
            raise Refused(f"{field} is {size}: give at least 1.")
    letters["T"] = run.sequence
    for placement in (run.layout.params, run.layout.inner, run.layout.stream):
        for letter, value in placement.items():
            over, size = layouts.axes_of(value), letters.get(letter)
            ways = math.prod(getattr(axes, axis) for axis in over)
            if size is not None and size % ways:
                shown = " x ".join(f"{axis} {getattr(axes, axis)}" for axis in over)
                raise Refused(
                    f"{_WORDS.get(letter, letter)} is {size}, which axis {shown} does not divide: "
                    f"choose a multiple of {ways}, or a smaller {over[0]} axis (--axes.{over[0]})."
                )
    for axis in layouts.axes_of(run.layout.inner.get("S")):
        pieces = 2 * getattr(axes, axis)
        if pieces > 2 and run.sequence % pieces:
            raise Refused(
                f"sequence is {run.sequence}, which 2 x {axis} {pieces // 2} pieces of a ring do not divide: "
                f"choose a multiple of {pieces}, a smaller {axis} axis (--axes.{axis}), or cp in place of ring."
            )
    if run.sequence > getattr(model, "positions", run.sequence):
        raise Refused(
            f"sequence is {run.sequence}, longer than the model's {model.positions} positions: "
            f"lower --sequence or raise --model.positions."
        )
    if letters.get("H", 0) % letters.get("G", 1):
        raise Refused(
            f"model.heads is {letters['H']}, which model.kv_heads {letters['G']} does not divide: "
            f"choose a multiple of {letters['G']}, or other kv_heads."
        )


def _check_pipeline(run: Run, axes: Axes, accumulate: int) -> None:
    how, stages = run.pipeline, _ways(axes, run.layout.params.get("L"))
    for field, least in dict(microbatches=0, repeats=1).items():
        if getattr(how, field) < least:
            raise Refused(f"pipeline.{field} is {getattr(how, field)}: give at least {least}.")
    if stages == 1:
        return
    model, layers = type(run.model).__name__, getattr(run.model, "layers", None)
    if layers is None:
        raise Refused(
            f"axes.stage is {stages}, but {model} has no layers to cut into stages: "
            f"set it to 1, or choose a model with a field layers."
        )
    if how.schedule == "1f1b" and not hasattr(run.loss, "of"):
        raise Refused(
            f"pipeline.schedule is 1f1b, which {type(run.loss).__name__} has no loss of logits for: "
            f"choose gpipe or circular, or give it a method of(logits, batch)."
        )
    if layers % (stages * how.laps):
        ways = f"stage {stages}" + f" x pipeline.repeats {how.laps} = {stages * how.laps}" * (how.laps > 1)
        raise Refused(
            f"model.layers is {layers}, which {ways} does not divide: every stage holds as many layers; "
            f"choose a multiple of {stages * how.laps}, or a smaller stage axis (--axes.stage)."
        )
    devices = _ways(axes, run.layout.inner.get("B")) * accumulate
    rows = run.batch // devices
    more = -(-rows // max(how.microbatches, stages)) * max(how.microbatches, stages) * devices
    if 0 < how.microbatches < stages:
        raise Refused(
            f"pipeline.microbatches is {how.microbatches}, fewer than the {stages} stages to keep busy: "
            f"give at least {stages}, or 0 to have it derived."
        )
    if how.microbatches and rows % how.microbatches:
        raise Refused(
            f"pipeline.microbatches is {how.microbatches}, which does not divide the {rows} rows of a device: "
            f"use batch {more}, or 0 to have it derived."
        )
    if how.parts(rows, stages) < stages:
        raise Refused(
            f"batch is {run.batch}, {rows} rows on a device, which cannot be cut into a microbatch for each of "
            f"{stages} stages: use batch {more}, or a smaller stage axis (--axes.stage)."
        )


def _ways(axes: Axes, value: str | tuple[str, ...] | None) -> int:
    return math.prod(getattr(axes, axis) for axis in layouts.axes_of(value))
