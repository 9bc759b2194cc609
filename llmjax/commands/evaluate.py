"""`llmjax evaluate`: the loss of any checkpoint of any run on held-out text, and its scores in tasks of lm-eval."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import tyro

from llmjax import mesh as meshes
from llmjax import names, processes
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.commands.generate import choose_step
from llmjax.data.tokenizer import load
from llmjax.errors import DATA, DONE, IO, Refused
from llmjax.evaluate import heldout, interval
from llmjax.evaluate.likelihood import Judge
from llmjax.layout import Pipeline, ways
from llmjax.mesh import Axes
from llmjax.run import DiLoCo, Remat, Run, read
from llmjax.rundir import find
from llmjax.train.display import Display
from llmjax.train.program import Program, make, resolve
from llmjax.train.resume import read_weights

TOKENS = 16_384  # that a device takes at once, where the run's batch is not smaller
SHOWN = dict(
    loss=("loss, nats per token", "{:.4f}"),
    perplexity=("perplexity", "{:.4g}"),
    bits_per_byte=("bits per byte", "{:.4f}"),
    right=("likeliest token is right", "{:.2%}"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures a run on held-out text, with 95 % intervals, or in tasks of lm-eval."""

    run: tyro.conf.Positional[str]
    "Name of a run, or the path of its directory."
    data: str = ""
    "Text file, folder of text files, or token store; empty: what the run held out."
    tasks: tuple[str, ...] = ()
    "Tasks of lm-eval in place of text: names, or task files (.yaml). Needs the extra evaluate."
    limit: int = 0
    "Questions of each task that are asked; 0: all."
    step: int = -1
    "Checkpoint to use; -1: the newest."
    mesh: str = "local"
    "Where to run: a name that `llmjax meshes` lists."
    json: Path | None = None
    "File to write the numbers to."
    runs: str = "runs"
    "Folder that holds run directories."


def evaluate(asked: Options) -> int:
    """Prints the numbers; returns an exit code.

    Raises:
      Refused: the run, a task or the data cannot be used as asked.
    """
    folder = find(asked.run, asked.runs)
    run, tokenizer = read(folder / "run.json"), folder / "tokenizer.json"
    if asked.limit < 0:
        raise Refused(f"limit is {asked.limit}: give a number of questions, or 0 for all.")
    if not tokenizer.is_file() and (asked.tasks or asked.data):
        wanted = "tasks" if asked.tasks else f"data is '{asked.data}'"
        raise Refused(f"{wanted} needs a tokenizer, and {folder} has no tokenizer.json: train a run on text.", DATA)
    if asked.json and not asked.json.absolute().parent.is_dir():
        raise Refused(f"json is {asked.json}, whose folder does not exist: make it, or give another.")
    tasks = _tasks(asked.tasks)
    program = program_of(run, asked.mesh)
    display = Display(quiet=jax.process_index() > 0)
    dataset = None if tasks and not asked.data else _dataset(asked, run, tokenizer, display)
    with program.context(), Checkpoints(folder / "checkpoints") as checkpoints:
        step = choose_step(checkpoints, asked.step, folder)
        model = read_weights(program, checkpoints, step)
        trained_on = checkpoints.facts(step).get("data")
        facts = dict(run=str(folder), step=step, mesh=dict(program.mesh.shape), devices=program.mesh.size)
        _header(asked, folder, facts, display)
        if not asked.data and dataset is not None and trained_on not in (None, dataset.fingerprint):
            display.say("The data is another than the checkpoint was trained on: what is held out now may have been.")
        if dataset is not None:
            with display.waiting(f"evaluating {dataset.size('heldout'):,} rows"):
                facts["heldout"] = heldout.judged(heldout.measure(program, model, dataset), dataset)
            show_heldout(facts["heldout"], display)
        if tasks:
            facts["tasks"] = _scores(tasks, Judge(program, model, load(tokenizer)), asked.limit, display)
    if asked.json and jax.process_index() == 0:
        _write(asked.json, facts)
    return DONE


def program_of(run: Run, mesh: str) -> Program:
    """The run's program on the devices here, to look at its weights and not to train."""
    run = dataclasses.replace(
        run, mesh=names.load("meshes", mesh, "cluster"), axes=Axes(), accumulate=0, attention="auto", remat=Remat(),
        offload_optimizer=False, local=DiLoCo(every=0), pipeline=Pipeline(), keep_best=0,
    )  # fmt: skip
    devices = processes.start(run.mesh, processes.Processes())
    axes = resolve(run, len(devices))
    parts = ways(run.layout.inner.get("B"), axes)
    rows = max(1, min(TOKENS // run.sequence, -(-run.batch // parts)))
    run = dataclasses.replace(run, batch=parts * rows)
    on_devices = meshes.device_mesh(axes, devices, run.mesh.slices)
    return make(run, on_devices, meshes.chip_of(run.mesh, devices))


def _dataset(asked: Options, run: Run, tokenizer: Path, display: Display) -> Any:
    """The text that is asked for, or the run's own data, whose held-out part counts."""
    cache = Path(asked.runs) / ".cache" / "data"
    if asked.data:
        return heldout.read(asked.data, tokenizer, run.sequence, cache)
    if hasattr(run.loss, "reference"):
        raise Refused("the run's own data is pairs of answers, not text: name a text with --data.")
    try:
        return run.data.open(run.sequence, cache, display.say)
    except Refused as refusal:
        why = str(refusal).rstrip(".")
        message = f"the run's own data is not to be had here: {why}, or name another text with --data."
        raise Refused(message, refusal.code) from refusal


def _tasks(names: tuple[str, ...]) -> Any:
    if not names:
        return None
    from llmjax.evaluate import harness

    return harness.load(names)


def _scores(tasks: Any, judge: Judge, limit: int, display: Display) -> dict[str, Any]:
    from llmjax.evaluate import harness

    found = harness.scores(tasks, judge, limit)
    show_scores(found, display)
    return {
        task: {metric: dict(value=value, stderr=error) for metric, (value, error) in metrics.items()}
        for task, metrics in found.items()
    }


def _header(asked: Options, folder: Path, facts: dict[str, Any], display: Display) -> None:
    kind = jax.devices()[0].device_kind
    what = [asked.data or "what the run held out"] if asked.data or not asked.tasks else []
    display.facts(
        f"llmjax evaluate {folder.name}",
        {
            "checkpoint": f"step {facts['step']:,} of {folder}",
            "devices": f"{facts['devices']} x {kind}",
            "data": ", ".join([*what, *asked.tasks]),
        },
    )


def show_heldout(facts: dict[str, Any], display: Display) -> None:
    """The table of a held-out text's numbers, and what their intervals mean."""
    lines = []
    for name, (label, form) in SHOWN.items():
        if name in facts:
            value, low, high = facts[name].values()
            span = "" if low is None else f"{form.format(low)} to {form.format(high)}"
            lines.append([label, form.format(value), span])
    display.table(["held-out text", "value", "95 % interval"], lines)
    many, over = facts["documents"], ""
    if facts["stretches"]:
        over = f"; intervals are over {facts['stretches']} stretches of rows"
    elif many < interval.FEWEST:
        over = ", too few for an interval"
    texts = f"{many:,} document{'' if many == 1 else 's'}"
    display.say(f"Over {facts['targets']:,.0f} tokens in {facts['rows']:,} rows that begin in {texts}{over}.")


def show_scores(found: Any, display: Display) -> None:
    """The table of the tasks' scores; an interval is 1.96 of lm-eval's standard errors to either side."""
    lines = []
    for task, metrics in found.items():
        for metric, (value, error) in metrics.items():
            lines.append([task, metric, f"{value:.4g}", "" if error is None else f"± {1.96 * error:.2g}"])
    display.table(["task", "metric", "value", "95 %"], lines)


def _write(path: Path, facts: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise Refused(f"json is {path}, which cannot be written ({error.strerror}): give another file.", IO) from error
