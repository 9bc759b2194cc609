"""What a run cannot be, found from its fields alone."""

import dataclasses
import importlib.util
import math
from typing import Any, get_args, get_type_hints

from llmjax import layout as layouts
from llmjax.errors import Refused
from llmjax.mesh import Axes, Chip
from llmjax.run import DiLoCo, LoRA, Remat, Run


def check(run: Run, axes: Axes, accumulate: int) -> None:
    """Refuses a run whose numbers make no sense or whose shapes cannot be cut over these axes.

    It costs nothing, so it comes before anything is read, built or compiled.

    Raises:
      Refused: naming the field, its value and what would do.
    """
    _check_integers(run)
    for field, least in _LEAST.items():
        if not getattr(run, field) >= least:
            raise Refused(f"{field} is {getattr(run, field)}: give at least {least}.")
    _check_evaluation(run)
    _check_dtype(run)
    _check_parameters(run)
    _check_guard(run)
    _check_remat(run)
    _check_profile(run)
    if run.keep_best and not (run.eval_every and (run.save_every or run.save_minutes)):
        raise Refused(
            f"keep_best is {run.keep_best}, but no step both evaluates and saves: give --eval-every and --save-every."
        )
    if "" in run.prompts:
        raise Refused("prompts holds an empty text: give each prompt some text, or none with --prompts alone.")
    if not run.sample_every >= 0:
        raise Refused(f"sample_every is {run.sample_every}: give the steps between two times, or 0 for the end alone.")
    _check_batch(run, axes, accumulate)
    if not run.local.every >= 0:
        raise Refused(f"local.every is {run.local.every}: give the steps between two exchanges, or 0 for none.")
    if run.local.every:
        _check_local(run, axes)
    if run.lora != LoRA():
        _check_lora(run)
    if hasattr(run.loss, "reference"):
        _check_reference(run)
    if hasattr(run.loss, "of_layers") and not hasattr(run.model, "experts"):
        raise Refused(
            f"loss is {type(run.loss).__name__}, but {type(run.model).__name__} has no experts to keep even: "
            f"use NextToken, or a model with experts such as Mixtral."
        )
    if hasattr(run.optimizer, "start"):
        _check_head(run)
    if hasattr(run.model, "sizes"):
        _check_model(run, axes)
    _check_pipeline(run, axes, accumulate)
    _check_ahead(run)


def check_chip(run: Run, chip: Chip) -> None:
    """Refuses what a chip cannot do."""
    if run.dtype == "fp8" and not chip.fp8:
        raise Refused(
            f"dtype is fp8, in which a {chip.name} multiplies no faster, if at all: choose bfloat16 or int8, or a mesh "
            f"of chips that say their fp8 rate, such as H100, H200, B200 and TPU 7x."
        )
    if chip.platform != "cpu":
        return
    for field, asked in {"remat.offload": run.remat.offload, "offload_optimizer": run.offload_optimizer}.items():
        if asked:
            raise Refused(
                f"{field} is True, but a CPU's memory is the host's: set it to False, or train on TPUs or GPUs."
            )
    if run.loss_chunk and run.pipeline.schedule == "1f1b" and "stage" in run.layout.axes():
        raise Refused(
            f"loss_chunk is {run.loss_chunk}, but with pipeline.schedule 1f1b XLA's CPU devices can wait for each "
            f"other for ever: set it to 0, or choose gpipe or circular."
        )


def _check_ahead(run: Run) -> None:
    ahead = getattr(run.model, "ahead", 0)
    if ahead and not hasattr(run.loss, "ahead"):
        raise Refused(
            f"model.ahead is {ahead}, but {type(run.loss).__name__} predicts the next token alone: set it to 0, or "
            f"choose RoutedNextToken."
        )
    if ahead and run.pipeline.schedule == "1f1b" and "stage" in run.layout.axes():
        raise Refused(f"model.ahead is {ahead}, which pipeline.schedule 1f1b does not do: choose gpipe or circular.")
    if ahead >= run.sequence:
        raise Refused(f"model.ahead is {ahead}, and a row has {run.sequence} tokens: give less.")


def _check_evaluation(run: Run) -> None:
    for field in ("tasks_every", "tasks_limit"):
        if not getattr(run.eval, field) >= 0:
            raise Refused(f"eval.{field} is {getattr(run.eval, field)}: give at least 0.")
    if run.eval.tasks_every and not run.eval.tasks:
        raise Refused(
            f"eval.tasks_every is {run.eval.tasks_every}, but there are no tasks: name some with --eval.tasks."
        )


def _check_dtype(run: Run) -> None:
    if run.dtype not in (dtypes := get_args(get_type_hints(Run)["dtype"])):
        raise Refused(f"dtype is {run.dtype!r}: give one of {', '.join(dtypes)}.")
    if run.dtype in ("int8", "fp8") and importlib.util.find_spec("qwix") is None:
        raise Refused(
            f"dtype is {run.dtype}, which takes the package qwix: run pip install 'llmjax[quantized]' "
            f"(uv sync --extra quantized in a clone), or choose bfloat16."
        )


def _check_parameters(run: Run) -> None:
    if run.parameters not in (kinds := get_args(get_type_hints(Run)["parameters"])):
        raise Refused(f"parameters is {run.parameters!r}: give one of {', '.join(kinds)}.")
    if run.parameters == "float32":
        return
    if run.local.every:
        raise Refused(
            f"parameters is {run.parameters}, but local.every is {run.local.every}: an exchange would round to the "
            f"nearest and lose small changes, so use float32, or 0 for synchronous training."
        )
    if hasattr(run.optimizer, "point"):
        raise Refused(
            f"parameters is {run.parameters}, but {type(run.optimizer).__name__} keeps an average that moves less than "
            f"bfloat16 tells: use float32, or another optimizer."
        )


def _check_profile(run: Run) -> None:
    profile = run.profile
    for field in ("start", "steps"):
        if getattr(profile, field) < 0:
            raise Refused(f"profile.{field} is {getattr(profile, field)}: give at least 0.")
    if profile.start and not profile.steps:
        raise Refused(f"profile.start is {profile.start}, but profile.steps is 0: say how many, as --profile.steps 5.")
    if profile.steps and profile.start > run.steps:
        raise Refused(
            f"profile.start is {profile.start}, but the run has {run.steps} steps: give a step that it takes, or more "
            f"--steps."
        )


def _check_remat(run: Run) -> None:
    remat = run.remat
    if remat.policy not in (policies := get_args(get_type_hints(Remat)["policy"])):
        raise Refused(f"remat.policy is {remat.policy!r}: give one of {', '.join(policies)}.")
    if not 0 <= remat.budget <= 1:
        raise Refused(f"remat.budget is {remat.budget}: give a share of a device's memory, such as 0.8, or 0 for none.")
    if remat.offload and remat.policy == "none" and not remat.budget:
        raise Refused(
            "remat.offload is True, but remat.policy none keeps everything: give --remat.policy full or dots."
        )


_LEAST = dict(
    steps=1, batch=1, sequence=1, accumulate=0, clip=0, seed=0, eval_every=0, eval_rows=1, save_every=0, keep=1,
    save_minutes=0, keep_every=0, keep_best=0, unroll=0, loss_chunk=0,
)  # fmt: skip
_WORDS = dict(
    D="model.width", E="model.experts", H="model.heads", G="model.kv_heads", K="model.head_dim", F="model.ff",
    V="model.vocab", P="model.positions", T="sequence",
)  # fmt: skip

_TYPICAL, _TYPICAL_WEIGHTS = ("BTD", "BTHK", "BTGK", "BTF", "BTV"), ("VD", "LDHK", "LDGK", "LEDF")


def _check_integers(value: Any, path: str = "") -> None:
    """Devices count in 32 bits."""
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        inner, name = getattr(value, field.name), f"{path}.{field.name}" if path else field.name
        if isinstance(inner, int) and abs(inner) >= 2**31:
            raise Refused(f"{name} is {inner}: give a number below 2^31.")
        if name not in ("mesh", "fallback_mesh"):  # facts, such as bytes per second
            _check_integers(inner, name)


def _check_guard(run: Run) -> None:
    least = dict(sigmas=0, limit=0, window=1, replicas=0, repeat=0)
    for field, value in least.items():
        given = getattr(run.guard, field)
        if not value <= given < math.inf:
            raise Refused(f"guard.{field} is {given}: give at least {value}.")
    if run.guard.skip and min(run.guard.skip) < 1:
        raise Refused(f"guard.skip has step {min(run.guard.skip)}: steps are counted from 1.")


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
    local, layers = run.local, turns(run.model)
    if hasattr(run.loss, "of_layers"):
        raise Refused(
            f"local.every is {local.every}, but {type(run.loss).__name__} counts loads over all workers: "
            f"use NextToken, or 0 for synchronous training."
        )
    if run.guard.policy == "rewind" or run.guard.sigmas:
        field = "policy" if run.guard.policy == "rewind" else "sigmas"
        raise Refused(
            f"guard.{field} is {getattr(run.guard, field)}, but local.every is {local.every}: workers of local SGD "
            f"judge their steps each for itself, so use abort or skip, and sigmas 0."
        )
    if hasattr(run.optimizer, "point"):
        raise Refused(
            f"local.every is {local.every}, but {type(run.optimizer).__name__} keeps an average of its own beside the "
            f"model, which an exchange would not move: use another optimizer, or 0 for synchronous training."
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


def _check_lora(run: Run) -> None:
    if run.lora.rank < 0:
        raise Refused(f"lora.rank is {run.lora.rank}: give the width of the adapters, or 0 for none.")
    if run.lora.rank == 0:
        raise Refused("lora.rank is 0, and other fields of lora are set: give --lora.rank, such as 16.")
    if not 0 < run.lora.alpha < math.inf:
        raise Refused(f"lora.alpha is {run.lora.alpha}: give a positive number.")
    if run.local.every:
        raise Refused(
            f"lora.rank is {run.lora.rank}, but local.every is {run.local.every}: workers of local SGD have no "
            f"adapters of their own, so set one of them to 0."
        )
    if run.pipeline.schedule == "1f1b" and "stage" in run.layout.axes():
        raise Refused(
            f"lora.rank is {run.lora.rank}, but pipeline.schedule 1f1b takes the gradient of all weights: choose gpipe "
            f"or circular."
        )


def _check_reference(run: Run) -> None:
    loss = type(run.loss).__name__
    if run.local.every:
        raise Refused(
            f"local.every is {run.local.every}, but {loss} compares with frozen weights, which workers of local SGD do "
            f"not have: use 0 for synchronous training."
        )
    if run.loss_chunk:
        raise Refused(
            f"loss_chunk is {run.loss_chunk}, but {loss} takes all positions of an answer at once: set it to 0, and "
            f"raise --accumulate where memory is short."
        )


def _check_head(run: Run) -> None:
    model, optimizer = type(run.model).__name__, type(run.optimizer).__name__
    matrices = run.model.matrices() if hasattr(run.model, "matrices") else {}
    if not any(head.dims.startswith("V") for head in matrices.get("head", ())):  # VD is the embedding, DV a head
        return
    if hasattr(run.model, "tied"):
        raise Refused(
            f"model.tied is {run.model.tied}, but {optimizer} needs a head that starts smaller than an embedding: set "
            f"it to False (--model.no-tied), or use another optimizer."
        )
    raise Refused(
        f"optimizer is {optimizer}, which needs a head that starts smaller than an embedding, and {model} always ties "
        f"the two: use a family with a field model.tied, such as Llama, or another optimizer."
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
            ways = layouts.ways(value, axes)
            if size is not None and size % ways:
                shown = " x ".join(f"{axis} {getattr(axes, axis)}" for axis in over)
                raise Refused(
                    f"{_WORDS.get(letter, letter)} is {size}, which axis {shown} does not divide: "
                    f"choose a multiple of {ways}, or a smaller {over[0]} axis (--axes.{over[0]})."
                )
    for axis in layouts.axes_of(run.layout.inner.get("S")):
        pieces = 2 * getattr(axes, axis)
        window = max((w for w in _windows(model) if w < run.sequence), default=0)
        if pieces > 2 and window:
            raise Refused(
                f"model.window is {window}, and around a ring attention has no window: use cp in place of ring, or "
                f"--axes.{axis} 1."
            )
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


def turns(model: Any) -> int:
    """Turns of the loop over layers, which stages share: fewer than layers where kinds of them take turns."""
    return getattr(model, "turns", getattr(model, "layers", 1))


def _windows(model: Any) -> tuple[int, ...]:
    return model.windows() if hasattr(model, "windows") else ()


def _check_pipeline(run: Run, axes: Axes, accumulate: int) -> None:
    how, stages = run.pipeline, layouts.ways(run.layout.params.get("L"), axes)
    for field, least in dict(microbatches=0, repeats=1).items():
        if getattr(how, field) < least:
            raise Refused(f"pipeline.{field} is {getattr(how, field)}: give at least {least}.")
    if stages == 1:
        return
    model, layers, loops = type(run.model).__name__, getattr(run.model, "layers", None), turns(run.model)
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
    if loops % (stages * how.laps):
        fits = stages * how.laps * max(1, layers // max(1, loops))  # kinds of layers that take turns stay together
        ways = f"stage {stages}" + f" x pipeline.repeats {how.laps} = {stages * how.laps}" * (how.laps > 1)
        raise Refused(
            f"model.layers is {layers}, which {ways} does not divide: every stage holds as many layers; "
            f"choose a multiple of {fits}, or a smaller stage axis (--axes.stage)."
        )
    devices = layouts.ways(run.layout.inner.get("B"), axes) * accumulate
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
