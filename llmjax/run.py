"""Run: one frozen value that says everything a run is, and its form as JSON."""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from llmjax import layout as layouts
from llmjax import names, reading, redact
from llmjax.errors import DATA, Refused
from llmjax.layout import Layout, Pipeline
from llmjax.mesh import Axes, Cluster
from llmjax.trackers.tensorboard import TensorBoard
from llmjax.tracking import Tracker


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
class Guard:
    """What is done about a step whose numbers cannot be right, and how far to look for such.

    A step is bad where its loss or gradient norm is not finite, or, if asked, a spike. The state never takes it over,
    under any policy.
    """

    policy: Literal["abort", "skip", "rewind"] = "abort"
    "abort: stop with exit code 70. skip: go on without it. rewind: go back to a checkpoint and leave its batch out."
    sigmas: float = 0.0
    "Loss or gradient norm this many deviations above their mean over the last 128 steps is a spike; 0: nothing is."
    limit: int = 3
    "Bad steps, or rewinds to one checkpoint, in a row that are borne; one more stops the run with exit code 70."
    window: int = 1
    "Batches that a rewind leaves out, from the bad step's on."
    skip: tuple[int, ...] = ()
    "Steps, counted from 1, whose batches are left out from the start."
    replicas: int = 0
    "Steps between two comparisons of the copies of every parameter on all devices; 0: never."
    repeat: int = 0
    "Steps between two steps that are computed twice and compared; 0: never."


@dataclasses.dataclass(frozen=True)
class Profile:
    """Which steps are traced for XProf; `llmjax profile` reads the trace."""

    start: int = 0
    "First step that is traced, counted from 1; 0: the third that a process takes, when it is warm."
    steps: int = 0
    "How many are traced; 0: none."


@dataclasses.dataclass(frozen=True)
class Remat:
    """What the backward pass computes again instead of having it kept (arXiv:1604.06174)."""

    policy: Literal["none", "dots", "attention", "full"] = "none"
    "Nothing; all but attention and the products with weights; all but attention and its own; all but a layer's input."
    budget: float = 0.0
    "Share of a device's memory that a step may take: the planner chooses the first policy that keeps to it; 0: none."
    offload: bool = False
    "Keep what the policy keeps in the host's memory (TPU and GPU)."

    def __str__(self) -> str:
        """As headers and tables say it."""
        within = f", the first within {self.budget:.0%} of memory" if self.budget else ""
        return f"{self.policy}{' on the host' if self.offload else ''}{within}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Tasks of lm-eval that a run is asked on its way and at its end; they need the extra `evaluate`."""

    tasks: tuple[str, ...] = ()
    "Names of lm-eval's tasks, or task files (.yaml)."
    tasks_every: int = 0
    "Steps between two times that they are asked; 0: only at the end."
    tasks_limit: int = 0
    "Questions of each task that are asked; 0: all."


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Adapters beside the weights of layers, which alone are trained and saved (arXiv:2106.09685).

    A weight W becomes W + alpha / rank · A B, with `rank` columns of A, drawn at random, and rows of B, at first 0.
    """

    rank: int = 0
    "Width of an adapter, R; 0: none, all weights are trained."
    alpha: float = 16.0
    "What their product is multiplied by, times rank."
    on: tuple[str, ...] = ()
    "Weights that get one, as query_DHK or query; none: every matrix of the layers but routers."

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank


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
    fallback_mesh: Cluster | None = None
    "Where it goes on when devices of `mesh` are lost for good, with the same global batch; see `llmjax supervise`."
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
    dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = "auto"
    "Of products. auto: bfloat16 on accelerators, float32 on CPUs. int8, fp8: of layers' dense weights, else bfloat16."
    parameters: Literal["float32", "bfloat16"] = "float32"
    "What matrices are stored in between steps; in bfloat16 they are rounded at random, see optim.parameters."
    attention: Literal["auto", "reference", "blocked", "splash", "cudnn"] = "auto"
    "All scores at once, in blocks, in a TPU's or a GPU's kernel (auto: where it can run); a ring has its own way."
    remat: Remat = Remat()
    "What the backward pass computes again."
    offload_optimizer: bool = False
    "Keep the optimizer's state in the host's memory between updates (TPU and GPU)."
    unroll: int = 0
    "Layers per turn of the loop over them; 0: one on an accelerator, up to 12 on a CPU, where a turn copies."
    loss_chunk: int = 0
    "Positions of a sequence that the loss takes at once; 0: all, but on an accelerator pieces of a large loss."
    clip: float = 1.0
    "Largest global norm of the gradient; 0 switches clipping off."
    local: DiLoCo = DiLoCo(every=0)
    "Local SGD over axis data; off by default."
    guard: Guard = Guard()
    profile: Profile = Profile()
    lora: LoRA = LoRA()
    seed: int = 0
    "Seeds the weights and the order of the data."
    weights: str = ""
    "Directory of a run, or folder of a Hugging Face checkpoint, whose weights come before step 1; `--from` sets it."
    eval_every: int = 0
    "Steps between evaluations on held-out data; 0: only at the end."
    eval_rows: int = 64
    "Held-out sequences of an evaluation on the way; the last one uses all."
    eval: Evaluation = Evaluation()
    save_every: int = 0
    "Steps between checkpoints; 0: only at the end or when interrupted."
    save_minutes: float = 0.0
    "Save as well when so many minutes have passed since the last checkpoint; 0: never for that reason."
    keep: int = 2
    "Newest checkpoints kept."
    keep_every: int = 0
    "Checkpoints of a step that is a multiple of this are kept as well; 0: none for that reason."
    keep_best: int = 0
    "So many with the lowest held-out loss are kept as well, of those saved at a step with an evaluation."
    accept_data: bool = False
    "Go on although the data is another than the checkpoint was trained on; the events say so."
    prompts: tuple[str, ...] = ()
    "Texts to complete when training ends."
    sample_every: int = 0
    "Steps from one time that they are completed on the way to the next; 0: only at the end."
    trackers: tuple[Tracker, ...] = (TensorBoard(),)
    "Where numbers go besides metrics.jsonl: tensorboard, wandb, mlflow, trackio, with fields as in wandb:project=mine."
    name: str = ""
    "Name of the run directory; the experiment's own name if empty."
    runs: str = "runs"
    "Folder that holds run directories."

    def in_bfloat16(self, platform: str) -> bool:
        """Whether products take bfloat16 operands there, or less."""
        return self.dtype != "float32" and (self.dtype != "auto" or platform != "cpu")

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.sequence * getattr(self.loss, "sequences", 1)

    def folder(self) -> Path:
        """The run directory."""
        return Path(self.runs) / self.name


# What may change between two starts of one run: where and how it is computed and recorded, never what is computed.
FREE = frozenset({"mesh", "fallback_mesh", "axes", "layout", "pipeline", "accumulate", "attention", "remat",
                  "offload_optimizer", "unroll", "loss_chunk", "guard", "eval_every", "eval_rows", "eval", "save_every",
                  "save_minutes", "keep", "keep_every", "keep_best", "prompts", "sample_every", "trackers",
                  "accept_data", "runs", "profile"})  # fmt: skip


def fingerprint(run: Run, unless: Mapping[str, Any] = types.MappingProxyType({})) -> str:
    """sha256 of all that decides what the run computes, as hex: two starts of one run have the same.

    Secrets take no part, the environment neither, nor fields of whatever value that have what `unless` says.
    """

    def counted(value):
        if not isinstance(value, dict):
            return value
        return {k: counted(v) for k, v in value.items() if k not in unless or v != unless[k]}

    fields = {name: value for name, value in _written(run, redact.urls).items() if name not in FREE | {"is", "name"}}
    fields = counted(fields)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def to_json(value: Any) -> Any:
    """A JSON value from which `from_json` makes an equal one, but for secrets (see llmjax.redact), which are ***.

    Dataclasses keep their class under "is".
    """
    return _written(value, redact.text)


def from_json(value: Any) -> Any:
    """The inverse of `to_json`. It makes nothing but dataclasses, and imports only what was made for llmjax.

    A class is taken from llmjax, experiments, meshes, an installed package that requires llmjax, or a module that is
    imported already; a function only from the first four and from the experiment's own file. So a file from elsewhere
    cannot run what happens to lie on the path.
    """
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "is" not in value:
        return {k: from_json(v) for k, v in value.items()}
    if value["is"] == "function":
        found = _named(value.get("name"), imported=False)
        if not isinstance(found, types.FunctionType):
            raise Refused(f"run.json names {value['name']}, which is not a function: restore the file.", DATA)
        return found
    cls = _named(value["is"], imported=True)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise Refused(f"run.json names {value['is']}, which is not a dataclass: the file was changed by hand.", DATA)
    fields = {k: from_json(v) for k, v in value.items() if k != "is"}
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise Refused(
            f"run.json has fields that {cls.__name__} lacks ({', '.join(unknown)}): it was written by another version.",
            DATA,
        )
    if cls is Run and isinstance(fields.get("remat"), str):  # as versions with the policy alone wrote it
        fields["remat"] = Remat(fields["remat"])
    for name, hint in _hints(cls).items():
        if name in fields and not _is_a(hint, fields[name]):
            raise Refused(
                f"run.json has {fields[name]!r:.60} for {cls.__name__}.{name}, which is none: restore the file.", DATA
            )
    try:
        return cls(**fields)
    except TypeError as error:  # a field without a default is missing
        raise Refused(f"run.json holds no whole {cls.__name__} ({error}): restore the file.", DATA) from error


def read(path: Path) -> Run:
    """The Run that a run.json holds. What was secret in it is ***, as it was not written.

    Raises:
      Refused: there is no such file, or it does not hold a Run.
    """
    try:
        run = from_json(reading.parsed(reading.content(path, reading.RUN)))
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): give the run.json of a run directory.") from error
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise Refused(f"{path} is not JSON ({error}): restore the file.", DATA) from error
    if not isinstance(run, Run):
        raise Refused(f"{path} does not hold a run: give the run.json of a run directory.", DATA)
    for name in ("model", "data", "optimizer", "loss"):
        if not (dataclasses.is_dataclass(getattr(run, name)) or callable(getattr(run, name))):
            raise Refused(f"{path} has {getattr(run, name)!r:.60} for {name}: restore the file.", DATA)
    return run


def load(name: str) -> Run:
    """The Run of an experiment: a name in `experiments`, a path to a .py file, or a run.json.

    Raises:
      Refused: there is no such experiment, or it holds no Run.
    """
    if name.endswith(".json"):
        return read(Path(name))
    run = names.load_file(name, "run") if name.endswith(".py") else names.load("experiments", name, "run")
    if not isinstance(run, Run):
        raise Refused(f"`run` in {name} is {run!r:.60}: make it a llmjax.run.Run.")
    return dataclasses.replace(run, name=run.name or Path(name).stem)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted names of the fields in which two JSON values differ; *** stands for any text, as `to_json` writes it.

    A field that one of them lacks, as an older version wrote it, has its default there.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(k for k in b if k not in a)]
        pairs = [(k, *(x[k] if k in x else _default(x.get("is"), k) for x in (a, b))) for k in keys]
        return [d for k, x, y in pairs for d in differences(x, y, f"{path}.{k}" if path else k)]
    return [] if a == b or _fits(a, b) or _fits(b, a) else [path]


def _default(cls: Any, name: str) -> Any:
    """The JSON value of a field's default, of a class by the name under "is"; None where there is none."""
    module, _, path = str(cls).partition(":")
    found = getattr(sys.modules.get(module), path, None)
    fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
    for field in fields:
        if field.name == name and field.default is not dataclasses.MISSING:
            return to_json(field.default)
    return None


def _name_of(thing: Any) -> str:
    module = sys.modules[thing.__module__]
    spec = getattr(module, "__spec__", None)
    home = spec.name if spec else module.__name__  # an experiment run with -m is __main__, but importable by its name
    return f"{home}:{thing.__qualname__}"


def _written(value: Any, clean: Callable[[str], str]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: (getattr(value, f.name), redact.is_secret(f)) for f in dataclasses.fields(value) if f.init}
        return {"is": _name_of(type(value))} | {
            name: redact.HIDDEN if secret and held else _written(held, clean) for name, (held, secret) in fields.items()
        }
    if isinstance(value, dict):
        return {str(k): _written(v, clean) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written(v, clean) for v in value]
    if callable(value):
        return {"is": "function", "name": _name_of(value)}
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, (int, float, bool, type(None))):
        return value
    raise Refused(f"a run holds {value!r}, which cannot be written to run.json: use dataclasses, numbers and strings.")


def _hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields; none where one is of a name that only type checkers import."""
    try:
        return typing.get_type_hints(cls)
    except (NameError, AttributeError, TypeError):
        return {}


def _is_a(hint: Any, value: Any) -> bool:
    """Whether a value that came from JSON may be of this type; what cannot be told may be."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(one, value) for one in inner)
    if origin is typing.Annotated:
        return _is_a(inner[0], value)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple and isinstance(value, tuple):
        return all(_is_a(inner[0], one) for one in value) if inner[-1] is ... else len(value) == len(inner)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    plain = isinstance(kind, type) and (
        kind in (bool, str, dict, tuple, types.NoneType) or dataclasses.is_dataclass(kind)
    )
    return isinstance(value, kind) if plain else True


def _fits(pattern: Any, value: Any) -> bool:
    """Whether a text is one that was written with something secret in it left out."""
    if not (isinstance(pattern, str) and isinstance(value, str) and redact.HIDDEN in pattern):
        return False
    first, *between, last = pattern.split(redact.HIDDEN)
    at, end = len(first), len(value) - len(last)
    if end < at or not (value.startswith(first) and value.endswith(last)):
        return False
    for part in between:  # the first place is as good as any; an expression with many stars would take for ever
        at = value.find(part, at, end) + len(part)
        if at < len(part):
            return False
    return True


def _named(name: Any, *, imported: bool) -> Any:
    """What a name such as llmjax.mesh:Axes means, if it is defined in that module and the module may be used."""
    module, _, path = str(name).partition(":")
    if not (_trusted(module) or (imported and module in sys.modules)):
        raise Refused(
            f"run.json names {name}, which cannot be imported here (it is of none of {', '.join(_ROOTS)} and of no "
            f"installed package that requires llmjax): restore the file, or have that package require llmjax.",
            DATA,
        )
    try:
        thing: Any = importlib.import_module(module)
        for part in path.split("."):
            thing = getattr(thing, part)
        home = _name_of(thing)
    except (ImportError, AttributeError, ValueError, KeyError) as error:
        raise Refused(
            f"run.json names {name}, which cannot be imported here ({error}): install what defines it.", DATA
        ) from error
    if home != name:  # a module names many things that are not its own, such as os.system
        raise Refused(f"run.json names {name}, which is {home}: restore the file.", DATA)
    return thing


_ROOTS = ("llmjax", "experiments", "meshes")


def _trusted(module: str) -> bool:
    """Whether a module is of those made for llmjax, which may be imported because a file names it."""
    root = module.partition(".")[0]
    if root in _ROOTS or (root.startswith("llmjax_file_") and root in sys.modules):
        return True
    owners = {root, *(metadata.packages_distributions().get(root, ()) if root.isidentifier() else ())}
    for owner in owners:
        with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
            if any(re.match(r"llmjax\b(?!-)", need) for need in metadata.requires(owner) or ()):
                return True
    return False
