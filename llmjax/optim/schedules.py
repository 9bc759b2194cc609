"""Learning-rate schedules: which share of an optimizer's peak rate a step takes.

A schedule is any frozen dataclass with the method of `Schedule`; one in an experiment's own file does as well as these.
Lengths are counted so that no step is wasted: the first step of a warmup of w steps takes 1/w of the peak, as if the
rate had been 0 one step before it, and a fall reaches `final` one step after the last.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import optax

from llmjax.errors import Refused


@runtime_checkable
class Schedule(Protocol):
    """What a schedule offers."""

    def build(self, steps: int) -> optax.Schedule:
        """A function from step, 0 to steps - 1, to a factor in [0, 1]; it may be traced.

        Raises:
          Refused: a field does not fit a run of so many steps.
        """
        ...


class Optimizer(Protocol):
    """What an optimizer offers.

    One whose gradients are not taken at the model's own parameters also has `point(model, opt)`, which gives the model
    they are taken at from it and the state of `build`, or one that holds that state.

    One that changes how a model's head starts has `start(model)`, which gives the model that training begins with from
    a fresh one; see `llmjax.optim.mup`. Models that tie the head to the embedding are refused then.
    """

    lr: float
    schedule: Schedule

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a run of so many steps; its steps take `rate(self, steps)`."""
        ...


def rate(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """A function from step to learning rate: the optimizer's `lr` times the factor of its schedule.

    Raises:
      Refused: `lr` is no learning rate, or the schedule does not fit a run of so many steps.
    """
    if not 0 <= optimizer.lr < math.inf:
        raise Refused(f"optimizer.lr is {optimizer.lr}: give a positive number.")
    factor = optimizer.schedule.build(steps)
    return lambda step: optimizer.lr * factor(step)


@dataclasses.dataclass(frozen=True)
class Constant:
    """A warmup, then the peak to the end."""

    warmup: float = 0
    "Steps from nothing to the peak; below 1, a fraction of the run."

    def build(self, steps: int) -> optax.Schedule:
        """See `Schedule.build`."""
        return _warmed(_warmup(self.warmup, steps), optax.schedules.constant_schedule(1.0))


@dataclasses.dataclass(frozen=True)
class Cosine:
    """A warmup, then half a cosine down to `final` (arXiv:1608.03983)."""

    warmup: float = 0.05
    "Steps from nothing to the peak; below 1, a fraction of the run."
    final: float = 0.1
    "Fraction of the peak at the end."

    def build(self, steps: int) -> optax.Schedule:
        """See `Schedule.build`."""
        warmup, final = _warmup(self.warmup, steps), _final(self.final)
        return _warmed(warmup, optax.schedules.cosine_decay_schedule(1.0, steps - warmup + 1, final))


@dataclasses.dataclass(frozen=True)
class Linear:
    """A warmup, then a straight line down to `final`."""

    warmup: float = 0.05
    "Steps from nothing to the peak; below 1, a fraction of the run."
    final: float = 0.0
    "Fraction of the peak at the end."

    def build(self, steps: int) -> optax.Schedule:
        """See `Schedule.build`."""
        warmup, final = _warmup(self.warmup, steps), _final(self.final)
        return _warmed(warmup, optax.schedules.linear_schedule(1.0, final, steps - warmup + 1))


@dataclasses.dataclass(frozen=True)
class WSD:
    """Warmup, stable, decay (arXiv:2404.06395): the peak for most of the run, then a straight line down to `final`.

    With lengths given in steps, the rate before the decay does not depend on the length of the run.
    """

    warmup: float = 0.01
    "Steps from nothing to the peak; below 1, a fraction of the run."
    decay: float = 0.1
    "Steps of the decay at the end; below 1, a fraction of the run."
    final: float = 0.0
    "Fraction of the peak at the end."

    def build(self, steps: int) -> optax.Schedule:
        """See `Schedule.build`."""
        warmup, final = _warmup(self.warmup, steps), _final(self.final)
        decay = _steps("decay", self.decay, steps)
        if warmup + decay > steps:
            raise Refused(
                f"optimizer.schedule.decay is {self.decay:g}, but only {steps - warmup} of the run's {steps} steps "
                f"follow the one that reaches the peak: lower --optimizer.schedule.decay, or raise --steps."
            )
        falling = optax.schedules.linear_schedule(1.0, final, decay + 1, transition_begin=steps - decay - warmup)
        return _warmed(warmup, falling)


def _warmed(warmup: int, then: optax.Schedule) -> optax.Schedule:
    """A rise over `warmup` steps, whose last one has the peak and is step 0 of `then`."""
    rising = optax.schedules.linear_schedule(1 / warmup, 1.0, warmup - 1)
    return optax.schedules.join_schedules([rising, then], [warmup - 1])


def _warmup(warmup: float, steps: int) -> int:
    """The steps of a warmup; at least one, as the first step at the peak is a warmup of one step."""
    count = _steps("warmup", warmup, steps)
    if count >= steps:
        raise Refused(
            f"optimizer.schedule.warmup is {warmup:g}, not less than the run's steps, {steps}: "
            f"lower --optimizer.schedule.warmup, or raise --steps."
        )
    return max(count, 1)


def _steps(field: str, value: float, steps: int) -> int:
    if not 0 <= value < math.inf:
        raise Refused(
            f"optimizer.schedule.{field} is {value}: give a number of steps, or a fraction of the run below 1."
        )
    return round(value) if value >= 1 else min(round(value * steps), steps - 1)  # a fraction is never the whole


def _final(final: float) -> float:
    if not 0 <= final <= 1:
        raise Refused(f"optimizer.schedule.final is {final}: give a fraction of the peak, from 0 to 1.")
    return final
