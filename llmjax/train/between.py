"""What a run does between steps: evaluations, checkpoints, tasks, prompts; and after a preemption, what it missed."""

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

import llmjax
from llmjax import processes
from llmjax.data.batches import place
from llmjax.errors import IO, Refused
from llmjax.run import FREE, Run, fingerprint, to_json
from llmjax.train import corruption, digest
from llmjax.train.ledger import Ledger
from llmjax.train.program import Program
from llmjax.train.records import TASK
from llmjax.train.step import State
from llmjax.train.timed import Timed

SHOWN = 12  # scores of tasks on the terminal
# Of a model, and of whether to stop: scores of tasks under names that begin with TASK, None where it stopped.
Tasks = Callable[[nnx.Module, Callable[[], bool]], dict[str, float] | None]
BASE = "base"  # what the facts of a checkpoint call the frozen weights: where they came from, and their digest


@dataclasses.dataclass(frozen=True)
class Around:
    """What the loop asks of whoever runs it."""

    stop: Callable[[], bool]
    "Whether the run was asked to stop; alike on every process."
    tasks: Tasks | None = None
    "Asks the run's tasks."
    sample: Callable[[State, int], None] = lambda state, step: None
    "Completes the run's prompts after a step."


def catch_up(program: Program, state: State, dataset, ledger: Ledger, step: int, around: Around) -> bool:
    """Does what was due after a step and cut off by a preemption; returns whether it was not asked to stop again."""
    run = program.run
    missed = evaluates(run, step) and not processes.share(ledger.evaluated(step))
    if missed and evaluate(program, state, dataset, ledger, step, rows=run.eval_rows, stop=around.stop) is None:
        return False
    missed = asks(run, step) and not processes.share(ledger.evaluated(step, TASK))
    if missed and ask(program.whole(state), ledger, step, around.tasks, stop=around.stop) is None:
        return False
    if samples(run, step) and not processes.share(ledger.sampled(step)):
        around.sample(state, step)
    return True


def after(program: Program, state: State, dataset, ledger: Ledger, done: int, around: Around, clock: Timed) -> None:
    """Does what is due after so many steps: compares copies, evaluates, saves, asks tasks, completes prompts."""
    run, evaluated = program.run, None
    if due(done, run.guard.replicas):  # before what is wrong could be saved
        corruption.replicas(state.model if state.frozen is None else (state.model, state.frozen), program.mesh)
    if evaluates(run, done):
        evaluated = evaluate(program, state, dataset, ledger, done, rows=run.eval_rows, stop=around.stop)
    if (clock.due(done) or due(done, run.save_every)) and done < run.steps:
        clock.saved(done)
        save(program, state, done, dataset, ledger, evaluated or {})
    if asks(run, done):  # after the save, as it may take long
        ask(program.whole(state), ledger, done, around.tasks, stop=around.stop)
    if samples(run, done):
        around.sample(state, done)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every > 0 and step % every == 0


def evaluates(run: Run, done: int) -> bool:
    """Whether the run evaluates after so many steps, on its way."""
    return due(done, run.eval_every) and done < run.steps


def asks(run: Run, done: int) -> bool:
    """Whether the run asks its tasks after so many steps, on its way."""
    return bool(run.eval.tasks) and due(done, run.eval.tasks_every) and done < run.steps


def samples(run: Run, done: int) -> bool:
    """Whether the run completes its prompts after so many steps, on its way."""
    return due(done, run.sample_every) and done < run.steps


def anything(run: Run, done: int) -> bool:
    """Whether the state is needed after so many steps: to save, to evaluate, for tasks, for prompts, at the end."""
    others = evaluates(run, done) or asks(run, done) or samples(run, done)
    return others or due(done, run.save_every) or done == run.steps


def evaluate(
    program: Program,
    state: State,
    dataset,
    ledger: Ledger,
    step: int,
    rows: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Held-out loss in nats per target, and bits per byte where the data is text; None if it was asked to stop.

    Over all rows, or over `rows` of them, spread evenly. What else the loss sums up is there as eval_NAME, per target.
    """
    ledger.spent.mark("steps")
    ledger.heartbeat(step, "evaluate")
    size, batch = dataset.size("heldout"), program.run.batch
    chosen = np.arange(size) if rows is None else np.unique(np.linspace(0, size - 1, rows).astype(int))
    chosen = np.append(chosen, np.full(-len(chosen) % batch, size))  # rows past the end have weight 0
    total, running = {}, ()
    model, reference = program.whole(state), program.reference(state)
    for wanted in chosen.reshape(-1, batch):
        arrays = place(dataset, "heldout", wanted, accumulate=program.accumulate, sharding=program.batch_sharding())
        # One at a time: the collectives of two programs side by side may meet in another order on another process,
        # and then both wait for ever.
        total = added(total, running)
        running = program.evaluate(model, arrays, *reference)
        ledger.heartbeat(step, "evaluate")
        if stop():
            jax.block_until_ready(running)
            ledger.spent.mark("evaluate")
            return None
    total = added(total, running)
    nats, weight = total.pop("nats"), total.pop("weight")
    counted = {name: x / weight for name, x in total.items()}
    facts = {f"eval_{name}": x for name, x in counted.items()} | dict(eval_loss=nats / weight)
    if dataset.heldout_bytes:
        facts["bits_per_byte"] = nats / weight / math.log(2) * dataset.heldout_tokens / dataset.heldout_bytes
    ledger.spent.mark("evaluate")
    ledger.metrics(step=step, **facts, eval_targets=weight)
    ledger.account(now=True)
    bits = f"  {facts['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in facts else ""
    others = "".join(f"  {name.replace('_', ' ')} {x:.4g}" for name, x in counted.items())
    of = f"{weight:,.0f} {getattr(program.run.loss, 'weighs', 'targets')}"
    ledger.display.say(f"step {step}: held-out loss {facts['eval_loss']:.4f}{bits}{others}  ({of})")
    return facts


def ask(
    model: nnx.Module, ledger: Ledger, step: int, tasks: Tasks, stop: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """The model's scores in the run's tasks, under the names that the records have; None if it was asked to stop."""

    def stopped() -> bool:
        ledger.heartbeat(step, "evaluate")
        return stop()

    ledger.spent.mark("steps")
    found = tasks(model, stopped)
    ledger.spent.mark("evaluate")
    if found is None:
        return None
    ledger.metrics(step=step, **found)
    ledger.account(now=True)
    shown = [f"{name.removeprefix(TASK)} {x:.4g}" for name, x in found.items() if not name.endswith("_stderr")]
    more = f" and {len(shown) - SHOWN} more in metrics.jsonl" if len(shown) > SHOWN else ""
    ledger.display.say(f"step {step}: {', '.join(shown[:SHOWN])}{more}")
    return found


def added(total: dict[str, float], running: tuple[Any, ...]) -> dict[str, float]:
    """The total with what an `eval_step` found, the sum of its loss as `nats`; `running` is () before the first."""
    if not running:
        return total
    nats, sums = jax.device_get(running)
    return {name: total.get(name, 0.0) + float(x) for name, x in (sums | dict(nats=nats)).items()}


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what computes a run."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
    return dict(llmjax=llmjax.__version__) | {name: importlib.metadata.version(name) for name in packages}


def save(
    program: Program,
    state: State,
    step: int,
    dataset,
    ledger: Ledger,
    evaluated: Mapping[str, float] = {},
    *,
    last: bool = False,
) -> None:
    """Starts a checkpoint of the state after `step` steps, unless it is there; `evaluated` is what `evaluate` found.

    One that cannot be written is said and recorded, and training goes on with the one before; the `last` is refused.
    """
    if ledger.checkpoints.has(step):
        return
    ledger.spent.mark("steps")
    ledger.heartbeat(step, "save")
    run = program.run
    facts = dict(
        step=step, tokens=step * run.tokens, data=dataset.fingerprint, config=fingerprint(run),
        run=decisive(run), how=free(run), mesh=dict(program.mesh.shape), layout=run.layout.name,
        processes=jax.process_count(), versions=versions(), watched=state.watch is not None,
        **{name: evaluated[name] for name in ("eval_loss",) if name in evaluated},
    )  # fmt: skip
    if state.frozen is not None:  # it can be had again: what is saved is who it was
        facts |= {BASE: dict(path=run.weights, digest=digest.one(state.frozen))}
    learnt = dataclasses.replace(state, frozen=None)
    for attempt in (ledger.checkpoints.wait, lambda: ledger.checkpoints.save(step, learnt, facts)):
        try:
            attempt()
        except Refused as refusal:
            if last or refusal.code != IO:
                raise
            ledger.display.say(f"Training goes on without it: {refusal}")
            ledger.event("save_failed", reason=str(refusal))
    ledger.spent.mark("save")
    if ledger.checkpoints.has(step):
        ledger.event("save", step=step)
    ledger.account(now=True)


def free(run: Run) -> dict[str, Any]:
    """The other fields, as JSON: where and how it is computed and recorded."""
    return {name: value for name, value in to_json(run).items() if name in FREE}


def decisive(run: Run) -> dict[str, Any]:
    """The fields of a run, as JSON, that decide what it computes."""
    return {name: value for name, value in to_json(run).items() if name not in FREE | {"is", "name"}}
