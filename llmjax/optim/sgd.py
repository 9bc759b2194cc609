"""Stochastic gradient descent."""

import dataclasses

import optax

from llmjax.optim.schedules import Constant, Schedule, rate


@dataclasses.dataclass(frozen=True)
class SGD:
    """The textbook's w <- w - lr * m, with m <- gradient + momentum * m.

    With `nesterov` the step is lr * (gradient + momentum * m). No weight decay. One number of state per parameter,
    placed as the parameter; none without momentum.
    """

    lr: float = 0.1
    "Peak learning rate."
    schedule: Schedule = Constant()
    "Which share of the peak each step takes."
    momentum: float = 0.9
    "How much of the step before is kept; 0: none."
    nesterov: bool = False
    "Look one step of momentum ahead."

    def build(self, steps: int) -> optax.GradientTransformation:
        """See `llmjax.optim.schedules.Optimizer.build`."""
        return optax.sgd(rate(self, steps), self.momentum or None, self.nesterov)
