"""Schedule-free AdamW."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmjax.errors import Refused
from llmjax.optim.schedules import Constant, Schedule, rate
from llmjax.optim.weights import matrices


@dataclasses.dataclass(frozen=True)
class ScheduleFreeAdamW:
    """AdamW whose weights are an average over its own steps instead of the end of a schedule (arXiv:2405.15682).

    Gradients are taken at y = (1 - b1) z + b1 x, a step of Adam moves z by them, and x is the average of all z so far,
    weighted by the square of their rate:

        z <- z - lr * (gradient / (sqrt(v) + epsilon) + weight_decay * y)        x <- x + c * (z - x)

    with v the bias-corrected average of the gradient's square; scales and biases do not decay. The model's parameters
    are x at any time, so it is x that is evaluated, saved and completes prompts; a run may be stopped anywhere, and
    needs no length that is known before. The metrics' loss is that of y, which is a little higher. Two numbers of state
    per parameter, placed as the parameter, and a third while a step takes its gradient.
    """

    lr: float = 2.5e-3
    "Peak learning rate; the paper finds 1 to 10 times that of a scheduled AdamW best."
    schedule: Schedule = Constant(warmup=0.05)
    "Which share of the peak each step takes: a warmup, and no fall."
    b1: float = 0.9
    "How near to the average x, rather than to z, gradients are taken."
    b2: float = 0.95
    "Decay of the average of squared gradients."
    epsilon: float = 1e-8
    "Added to the root of that average."
    weight_decay: float = 0.1
    "Share of a matrix that is taken off per step, times the learning rate."

    def build(self, steps: int) -> optax.GradientTransformation:
        """See `llmjax.optim.schedules.Optimizer.build`; gradients are to be taken at `point`."""
        if not 0 <= self.b1 < 1:
            raise Refused(f"optimizer.b1 is {self.b1}: give a share from 0 to below 1.")
        lr = rate(self, steps)

        def init(params):
            return Averaged(jnp.int32(0), jnp.float32(0), jax.tree.map(jnp.copy, params), optax.tree.zeros_like(params))

        def update(grads, state, params):
            count, now = optax.safe_increment(state.count), lr(state.count)
            total = state.total + now**2
            share = jnp.where(total > 0, now**2 / total, 0.0)
            v = jax.tree.map(lambda v, g: self.b2 * v + (1 - self.b2) * g * g, state.v, grads)
            unbiased = 1 - self.b2**count

            def moved(z, v, g, x, decays):
                step = g / (jnp.sqrt(v / unbiased) + self.epsilon)
                return z - now * (step + self.weight_decay * decays * self._between(x, z))

            z = jax.tree.map(moved, state.z, v, grads, params, matrices(params))
            updates = jax.tree.map(lambda x, z: share * (z - x), params, z)
            return updates, Averaged(count, total, z, v)

        return optax.GradientTransformation(init, update)

    def point(self, model: Any, opt: optax.OptState) -> Any:
        """Where the gradient is taken, given the model and a state that holds the one of `build`."""
        return jax.tree.map(self._between, model, optax.tree.get(opt, "z"))

    def _between(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return z + self.b1 * (x - z)


class Averaged(NamedTuple):
    """What a step needs besides the average."""

    count: jax.Array
    total: jax.Array  # of the squared rates
    z: optax.Params
    v: optax.Params
