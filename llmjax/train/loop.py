"""The loop: batches in, steps on the device; metrics, evaluations and checkpoints out.

It dispatches a step and then reads the metrics of the one before, so it never waits on the device in order to print.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import numpy as np
from flax import nnx

import llmjax
from llmjax import processes
from llmjax.data import mixture
from llmjax.data.batches import order, place, prefetch, ranked
from llmjax.errors import IO, NON_FINITE, Refused
from llmjax.optim import schedules
from llmjax.run import FREE, Run, fingerprint, to_json
from llmjax.train import blackbox, corruption, digest, diloco
from llmjax.train.ledger import Ledger
from llmjax.train.profile import Tracer
from llmjax.train.program import Program
from llmjax.train.records import TASK
from llmjax.train.step import State
from llmjax.train.timed import Timed

SHOWN = 12  # scores of tasks on the terminal
# Of a model, and of whether to stop: scores of tasks under names that begin with TASK, None where it stopped.
Tasks = Callable[[nnx.Module, Callable[[], bool]], dict[str, float] | None]
BASE = "base"  # what the facts of a checkpoint call the frozen weights: where they came from, and their digest


class Rewind(Exception):
    """Step number `step`, counted from 1, was bad, and the run is to go back to a checkpoint and leave it out."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step, counted from 0, that was dispatched and whose metrics have not been read."""

    step: int
    batch: Any
    metrics: dict[str, jax.Array]
    waited_ms: float


def steps(
    program: Program,
    state: State,
    start: int,
    dataset,
    ledger: Ledger,
    stop: Callable[[], bool],
    left_out: Set[int] = frozenset(),
    tasks: Tasks | None = None,
    sample: Callable[[State, int], None] = lambda state, step: None,
) -> tuple[State, int]:
    """Trains from step `start`; returns the state and the number of steps done when the run ends or must stop.

    `stop` says, alike on every process, whether it was asked to; `left_out` are the steps, counted from 1, whose
    batches are not used; `tasks` asks the run's tasks, `sample` completes its prompts.

    Raises:
      Refused: a step was bad and the run's guard does not bear it.
      Rewind: a step was bad and the run is to go back.
    """
    run = program.run

    def batch_of(step):
        if step + 1 in left_out:
            return None
        rows = rows_of(run, dataset, step)
        return place(dataset, "train", rows, accumulate=program.accumulate, sharding=program.batch_sharding())

    report, done = Reporter(program, dataset, ledger, start, left_out), start
    clock, tracer = Timed(60 * run.save_minutes, start), Tracer(run, start, ledger)
    with (
        contextlib.closing(prefetch(batch_of, start, run.steps)) as batches,
        contextlib.closing(tracer),
        ledger.display.progress(start, run.steps),
    ):
        missed = start and evaluates(run, start) and not processes.share(ledger.evaluated(start))
        if missed and evaluate(program, state, dataset, ledger, start, rows=run.eval_rows, stop=stop) is None:
            return state, start
        missed = start and asks(run, start) and not processes.share(ledger.evaluated(start, TASK))
        if missed and ask(program.whole(state), ledger, start, tasks, stop=stop) is None:
            return state, start
        if start and samples(run, start) and not processes.share(ledger.sampled(start)):
            sample(state, start)
        for step, batch, waited_ms in batches:
            if tracer.begins(step + 1):
                state = report.settle(state)
                tracer.start()
            if batch is None:
                state = program.pass_over(report.settle(state))
                report.passed_over(step)
            else:
                with tracer.step(step + 1):
                    state = report.take(state, step, batch, waited_ms)
            done = step + 1
            if tracer.ends(done):
                state = report.settle(state)
                tracer.stop()
            saves = due(done, run.save_every)
            meanwhile = evaluates(run, done) or asks(run, done) or samples(run, done)
            if saves or meanwhile or clock.looks(done) or done == run.steps:
                state = report.settle(state)
            if due(done, run.guard.replicas):  # before what is wrong could be saved
                corruption.replicas(state.model if state.frozen is None else (state.model, state.frozen), program.mesh)
            evaluated = {}
            if evaluates(run, done):
                evaluated = evaluate(program, state, dataset, ledger, done, rows=run.eval_rows, stop=stop)
            if (clock.due(done) or saves) and done < run.steps:
                clock.saved(done)
                save(program, state, done, dataset, ledger, evaluated or {})
            if asks(run, done):  # after the save, as it may take long
                ask(program.whole(state), ledger, done, tasks, stop=stop)
            if samples(run, done):
                sample(state, done)
            if stop():
                break
        state = report.settle(state)
    ledger.account(now=True)
    return state, done


def rows_of(run: Run, dataset, step: int) -> np.ndarray:
    """The rows of the global batch of a step, counted from 0."""
    if isinstance(dataset, mixture.MixtureDataset):
        return mixture.order(dataset, step, batch=run.batch, seed=run.seed)
    return order(step, batch=run.batch, size=dataset.size("train"), seed=run.seed, ranked=ranked(dataset))


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


class Reporter:
    """Dispatches steps; reads the metrics of finished ones, in order, times them, and has a bad one dealt with."""

    def __init__(self, program: Program, dataset, ledger: Ledger, start: int, left_out: Set[int]):
        run = program.run
        self.program, self.dataset, self.ledger = program, dataset, ledger
        self.tokens = run.tokens
        self.rates = learning_rates(run.optimizer, run.steps)
        self.missed = sum(step <= start for step in left_out)  # schedules count the steps that were taken
        self.pending: Pending | None = None
        self.bad_in_a_row = 0
        self.recent: list[float] = []

    def take(self, state: State, step: int, batch: Any, waited_ms: float) -> State:
        """Dispatches a step, and then reads what the one before it gave; returns the state after the new one."""
        before, self.pending = self.pending, None
        new, metrics = self.dispatch(state, step, batch)
        if before is not None and not self.read(before):
            state = self.bear(before, new)
            if state.watch is not None:  # else the new step has been taken, as none waits for the host
                new, metrics = self.dispatch(state, step, batch)
        self.pending = Pending(step, batch, metrics, waited_ms)
        return new

    def dispatch(self, state: State, step: int, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        """The step, or twice the step where it is to be compared with itself."""
        every = self.program.run.guard.repeat
        if every and (step + 1) % every == 0:
            return corruption.repeat(self.program.step, state, batch, number=step + 1)
        return self.program.step(state, batch)

    def settle(self, state: State) -> State:
        """Reads what is still pending; returns the state as it then is."""
        pending, self.pending = self.pending, None
        if pending is not None and not self.read(pending):
            return self.bear(pending, state)
        return state

    def passed_over(self, step: int) -> None:
        """A step, counted from 0, whose batch was left out from the start."""
        self.missed += 1
        self.ledger.metrics(step=step + 1, skipped=True)

    def read(self, pending: Pending) -> bool:
        """Records a step; returns whether it was a good one."""
        run, step, spent = self.program.run, pending.step, self.ledger.spent
        loss, grad_norm = (diloco.mean(pending.metrics, name) for name in ("loss", "grad_norm"))
        good = all(np.asarray(shard.data).all() for shard in pending.metrics["good"].addressable_shards)
        first = not spent.totals()["compile"]  # of this process, so it compiled
        seconds = spent.mark("compile") if first else spent.mark_split("data", "steps", pending.waited_ms / 1e3)
        if not first:
            self.recent = [*self.recent[-49:], seconds]
        rate = self.tokens / seconds
        facts = getattr(run.loss, "facts", lambda sums, tokens: {})(pending.metrics, self.tokens)
        if first:
            facts["compiled"] = True
        if not good and run.guard.policy == "skip":
            facts["skipped"] = True
        self.ledger.metrics(
            step=step + 1, loss=loss, grad_norm=grad_norm, lr=float(self.rates[step - self.missed]),
            tokens=(step + 1) * self.tokens, tokens_per_s=rate, step_ms=1e3 * seconds, mfu=self.mfu(rate),
            data_wait_ms=pending.waited_ms, **facts,
        )  # fmt: skip
        self.ledger.account()
        self.ledger.heartbeat(step + 1, "train")
        mean = sum(self.recent or [seconds]) / len(self.recent or [seconds])
        self.ledger.display.step(
            step + 1, run.steps, loss, self.tokens / mean, 1e3 * mean, (run.steps - step - 1) * mean
        )
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
        return good

    def bear(self, pending: Pending, state: State) -> State:
        """What the run's guard wants done about a bad step; returns the state to go on with."""
        guard, step, ledger = self.program.run.guard, pending.step + 1, self.ledger
        rows = rows_of(self.program.run, self.dataset, pending.step)
        loss, grad_norm = (diloco.mean(pending.metrics, name) for name in ("loss", "grad_norm"))
        facts = blackbox.contents(self.program, state, step, pending.batch, rows, loss, grad_norm)
        reason = "a spike" if math.isfinite(loss) and math.isfinite(grad_norm) else "not finite"
        ledger.fault(facts | dict(reason=reason))
        if guard.policy == "abort" or self.bad_in_a_row > guard.limit:
            if state.watch is not None:  # then it is the state that the step began with
                save(self.program, self.program.try_again(state), pending.step, self.dataset, ledger)
            raise Refused(self._sentence(step, loss, grad_norm, facts, reason), NON_FINITE)
        if guard.policy == "rewind":
            raise Rewind(step)
        ledger.event("skip", step=step)
        ledger.display.say(f"step {step}: the loss is {loss:.4g} and the gradient norm {grad_norm:.4g}: skipped.")
        self.missed += 1
        return state if state.watch is None else self.program.pass_over(state)

    def _sentence(self, step: int, loss: float, grad_norm: float, facts: dict[str, Any], reason: str) -> str:
        rows = ", ".join(map(str, facts["rows"][:16])) + (", ..." if len(facts["rows"]) > 16 else "")
        leaf = blackbox.first_bad(facts)
        many = f", as in the {self.bad_in_a_row - 1} before it" if self.bad_in_a_row > 1 else ""
        return (
            f"step {step}: the loss is {loss} and the gradient norm {grad_norm}, which is {reason}{many}"
            f"{f', in the gradient of {leaf} first' if leaf else ''}, so training stopped and this step was not saved "
            f"(rows {rows}): lower --optimizer.lr, look at it with `llmjax replay {self.program.run.folder()} "
            f"--step {step}`, or leave it out with --guard.policy skip."
        )

    def mfu(self, tokens_per_s: float) -> float | None:
        """Share of the chips' bfloat16 peak that the model's causal FLOPs take; None where it is not known."""
        return None if not self.program.peak else tokens_per_s * self.program.flops_per_token / self.program.peak


def learning_rates(optimizer, steps: int) -> np.ndarray:
    """The learning rate of every step, for the records."""
    return np.asarray(jax.vmap(schedules.rate(optimizer, steps))(np.arange(steps)))


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
