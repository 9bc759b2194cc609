"""Lion."""

import dataclasses

import optax

from llmjax.optim.moments import Moments, kept
from llmjax.optim.schedules import Cosine, Schedule, rate
from llmjax.optim.weights import matrices


@dataclasses.dataclass(frozen=True)
class Lion:
    """The sign of momentum (arXiv:2302.06675).

    A step is lr * (sign(b1 * m + (1 - b1) * gradient) + weight_decay * w), with m the average of gradients that b2
    decays; scales and biases do not decay. One number of state per parameter, placed as the parameter. As every weight
    moves by lr, the paper takes a rate 3 to 10 times lower than AdamW's, and a weight decay as much higher.
    """

    lr: float = 1e-4
    "Peak learning rate."
    schedule: Schedule = Cosine()
    "Which share of the peak each step takes."
    b1: float = 0.9
    "Weight of the average against the newest gradient in a step."
    b2: float = 0.99
    "Decay of the average of gradients."
    weight_decay: float = 0.3
    "Share of a matrix that is taken off per step, times the learning rate."
    moments: Moments = "float32"
    "Precision of the average between steps; see `llmjax.optim.moments`. bfloat16: half its memory."

    def build(self, steps: int) -> optax.GradientTransformation:
        """See `llmjax.optim.schedules.Optimizer.build`."""
        tx = optax.lion(rate(self, steps), self.b1, self.b2, weight_decay=self.weight_decay, mask=matrices)
        return kept(tx, self.moments)
