"""The loop: batches in, steps on the device, metrics out; `train.between` does what is due between two steps.

It dispatches a step and then reads the metrics of the one before, so it never waits on the device in order to print.
"""

import contextlib
import dataclasses
import math
from collections.abc import Set
from typing import Any

import jax
import numpy as np

from llmjax.data import mixture
from llmjax.data.batches import order, place, prefetch, ranked
from llmjax.errors import NON_FINITE, Refused
from llmjax.optim import schedules
from llmjax.run import Run
from llmjax.train import between, blackbox, corruption, diloco
from llmjax.train.ledger import Ledger
from llmjax.train.profile import Tracer
from llmjax.train.program import Program
from llmjax.train.step import State
from llmjax.train.timed import Timed


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
    around: between.Around,
    left_out: Set[int] = frozenset(),
) -> tuple[State, int]:
    """Trains from step `start`; returns the state and the number of steps done when the run ends or must stop.

    `left_out` are the steps, counted from 1, whose batches are not used.

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
        if start and not between.catch_up(program, state, dataset, ledger, start, around):
            return state, start
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
            if between.anything(run, done) or clock.looks(done):
                state = report.settle(state)
            between.after(program, state, dataset, ledger, done, around, clock)
            if around.stop():
                break
        state = report.settle(state)
    ledger.account(now=True)
    return state, done


def rows_of(run: Run, dataset, step: int) -> np.ndarray:
    """The rows of the global batch of a step, counted from 0."""
    if isinstance(dataset, mixture.MixtureDataset):
        return mixture.order(dataset, step, batch=run.batch, seed=run.seed)
    return order(step, batch=run.batch, size=dataset.size("train"), seed=run.seed, ranked=ranked(dataset))


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
                between.save(self.program, self.program.try_again(state), pending.step, self.dataset, ledger)
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
