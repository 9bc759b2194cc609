"""The loop: batches in, steps on the device; metrics, evaluations and checkpoints out.

It dispatches a step and then reads the metrics of the one before, so it never waits on the device in order to print.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

import llmjax
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.data.batches import order, place, prefetch
from llmjax.errors import NON_FINITE, Refused
from llmjax.optim import schedules
from llmjax.run import fingerprint
from llmjax.train import diloco
from llmjax.train.display import Display
from llmjax.train.program import Program
from llmjax.train.records import Records
from llmjax.train.step import State
from llmjax.train.timed import Timed


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What the loop writes to; the records are None on every process but the first."""

    display: Display
    checkpoints: Checkpoints
    records: Records | None

    def metrics(self, **facts) -> None:
        if self.records:
            self.records.metrics(facts)

    def event(self, kind: str, **facts) -> None:
        if self.records:
            self.records.event(kind, **facts)


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step that was dispatched and whose metrics have not been read."""

    step: int
    metrics: dict[str, jax.Array]
    waited_ms: float


def steps(program: Program, state: State, start: int, dataset, ledger: Ledger, stop: Callable[[int], bool]):
    """Trains from step `start`; returns the state and the number of steps done when the run ends or must stop."""
    run, sharding = program.run, program.batch_sharding()

    def batch_of(step):
        rows = order(step, batch=run.batch, size=dataset.size("train"), seed=run.seed)
        return place(dataset, "train", rows, accumulate=program.accumulate, sharding=sharding)

    report, pending, done = Reporter(program, ledger, start), None, start
    clock = Timed(60 * run.save_minutes, start)
    with contextlib.closing(prefetch(batch_of, start, run.steps)) as batches, ledger.display.progress(start, run.steps):
        for step, batch, waited_ms in batches:
            state, metrics = program.step(state, batch)
            if pending:
                report(pending)
            pending, done = Pending(step, metrics, waited_ms), step + 1
            saves, evaluates = due(done, run.save_every), due(done, run.eval_every) and done < run.steps
            if saves or evaluates or clock.looks(done) or done == run.steps:
                report(pending)
                pending = None
            evaluated = {}
            if evaluates:
                evaluated = evaluate(program, state, dataset, ledger, done, rows=run.eval_rows)
                report.restart()
            if (clock.due(done) or saves) and done < run.steps:
                clock.saved(done)
                save(program, state, done, dataset, ledger, evaluated)
            if stop(done):
                break
        if pending:
            report(pending)
    return state, done


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every > 0 and step % every == 0


class Reporter:
    """Reads the metrics of finished steps, in order, and times them."""

    def __init__(self, program: Program, ledger: Ledger, start: int):
        run = program.run
        self.program, self.ledger, self.start = program, ledger, start
        self.tokens = run.batch * run.sequence
        self.rates = learning_rates(run.optimizer, run.steps)
        self.restart()

    def restart(self) -> None:
        """Leaves out of the timing what happened since the last step."""
        self.last = time.perf_counter()
        self.recent: list[float] = getattr(self, "recent", [])

    def __call__(self, pending: Pending) -> None:
        run, step = self.program.run, pending.step
        loss, grad_norm = (diloco.mean(pending.metrics, name) for name in ("loss", "grad_norm"))
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        if step > self.start:  # the first step compiles
            self.recent = [*self.recent[-49:], seconds]
        rate = self.tokens / seconds
        facts = getattr(run.loss, "facts", lambda sums, tokens: {})(pending.metrics, self.tokens)
        self.ledger.metrics(
            step=step + 1, loss=loss, grad_norm=grad_norm, lr=float(self.rates[step]), tokens=(step + 1) * self.tokens,
            tokens_per_s=rate, step_ms=1e3 * seconds, mfu=self.mfu(rate), data_wait_ms=pending.waited_ms, **facts,
        )  # fmt: skip
        mean = sum(self.recent or [seconds]) / len(self.recent or [seconds])
        self.ledger.display.step(
            step + 1, run.steps, loss, self.tokens / mean, 1e3 * mean, (run.steps - step - 1) * mean
        )
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.ledger.event("fault", step=step + 1, reason="not finite")
            raise Refused(
                f"step {step + 1}: the loss is {loss} and the gradient norm {grad_norm}, so training stopped and this "
                f"step was not saved: lower --optimizer.lr, or look at the data of this step.",
                NON_FINITE,
            )

    def mfu(self, tokens_per_s: float) -> float | None:
        """Share of the chips' bfloat16 peak that the model's causal FLOPs take; None where it is not known."""
        return None if not self.program.peak else tokens_per_s * self.program.flops_per_token / self.program.peak


def learning_rates(optimizer, steps: int) -> np.ndarray:
    """The learning rate of every step, for the records."""
    return np.asarray(jax.vmap(schedules.rate(optimizer, steps))(np.arange(steps)))


def evaluate(
    program: Program, state: State, dataset, ledger: Ledger, step: int, rows: int | None = None
) -> dict[str, float]:
    """Held-out loss in nats per target, and bits per byte where the data is text.

    Over all rows, or over `rows` of them, spread evenly.
    """
    size, batch = dataset.size("heldout"), program.run.batch
    chosen = np.arange(size) if rows is None else np.unique(np.linspace(0, size - 1, rows).astype(int))
    chosen = np.append(chosen, np.full(-len(chosen) % batch, size))  # rows past the end have weight 0
    total, running = np.zeros(2), ()
    for wanted in chosen.reshape(-1, batch):
        arrays = place(dataset, "heldout", wanted, accumulate=program.accumulate, sharding=program.batch_sharding())
        # One at a time: the collectives of two programs side by side may meet in another order on another process,
        # and then both wait for ever.
        total += np.asarray(jax.device_get(running) or (0, 0), np.float64)
        running = program.evaluate(state.model, arrays)
    nats, weight = (total + np.asarray(jax.device_get(running), np.float64)).tolist()
    facts = dict(eval_loss=nats / weight)
    if dataset.heldout_bytes:
        facts["bits_per_byte"] = nats / weight / math.log(2) * dataset.heldout_tokens / dataset.heldout_bytes
    ledger.metrics(step=step, **facts, eval_targets=weight)
    bits = f"  {facts['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in facts else ""
    ledger.display.say(f"step {step}: held-out loss {facts['eval_loss']:.4f}{bits}  ({weight:,.0f} targets)")
    return facts


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what computes a run."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
    return dict(llmjax=llmjax.__version__) | {name: importlib.metadata.version(name) for name in packages}


def save(
    program: Program, state: State, step: int, dataset, ledger: Ledger, evaluated: Mapping[str, float] = {}
) -> None:
    """Starts a checkpoint of the state after `step` steps, unless it is there; `evaluated` is what `evaluate` found."""
    if ledger.checkpoints.has(step):
        return
    run = program.run
    facts = dict(
        step=step, tokens=step * run.batch * run.sequence, data=dataset.fingerprint, config=fingerprint(run),
        mesh=dict(program.mesh.shape), layout=run.layout.name, processes=jax.process_count(),
        versions=versions(),
        **{name: evaluated[name] for name in ("eval_loss",) if name in evaluated},
    )  # fmt: skip
    ledger.checkpoints.save(step, state, facts)
    ledger.event("save", step=step)


@contextlib.contextmanager
def interrupts(say: Callable[[str], None]) -> Iterator[Callable[[int], bool]]:
    """Turns Ctrl-C and SIGTERM into an answer to "stop after this step?"; a second Ctrl-C leaves at once.

    Several processes agree on the step through JAX's preemption sync point, which owns SIGTERM there.
    """
    asked = []

    def handle(number, frame):
        if asked:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        asked.append(number)
        say("Stopping after this step; saving. Press Ctrl-C again to leave at once.")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        if jax.process_count() > 1:
            yield multihost_utils.reached_preemption_sync_point
        else:
            yield lambda step: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
