"""AdamW."""

import dataclasses

import optax

from llmjax.optim.moments import Moments, kept
from llmjax.optim.schedules import Cosine, Schedule, rate
from llmjax.optim.weights import matrices


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101); with `weight_decay` 0, Adam (arXiv:1412.6980).

    A step is lr * (m / (sqrt(v) + epsilon) + weight_decay * w), with bias-corrected averages m of the gradient and v of
    its square; scales and biases do not decay. Two numbers of state per parameter, placed as the parameter.
    """

    lr: float = 3e-4
    "Peak learning rate."
    schedule: Schedule = Cosine()
    "Which share of the peak each step takes."
    b1: float = 0.9
    "Decay of the average of gradients."
    b2: float = 0.95
    "Decay of the average of squared gradients."
    epsilon: float = 1e-8
    "Added to the root of that average."
    weight_decay: float = 0.1
    "Share of a matrix that is taken off per step, times the learning rate."
    moments: Moments = "float32"
    "Precision of both averages between steps; see `llmjax.optim.moments`. bfloat16: half their memory."

    def build(self, steps: int) -> optax.GradientTransformation:
        """See `llmjax.optim.schedules.Optimizer.build`."""
        lr = rate(self, steps)
        tx = optax.adamw(lr, self.b1, self.b2, self.epsilon, weight_decay=self.weight_decay, mask=matrices)
        return kept(tx, self.moments)
