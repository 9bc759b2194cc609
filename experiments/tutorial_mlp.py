"""The tutorial's network: Dense(16, relu) -> Dense(1, sigmoid), binary cross-entropy, Adam, batch 32, five epochs.

Any nnx.Module with a loss function trains on the same loop, data-parallel on any number of devices:

    llmjax train tutorial_mlp
    llmjax train tutorial_mlp --mesh cpu8 --name tutorial_mlp_on_8

Adam has Keras's averages (b1 0.9, b2 0.999, where AdamW's default for language models is 0.95), no weight decay and a
constant rate. Both end with the same weights to float32 rounding, at a held-out loss of 0.48 nats (0.75 before the
first step). What the loss sums up besides `weight` is shown per example in evaluations: here the share of examples for
which p is on the side of y, 0.80.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmjax.data.dataset import ArrayDataset
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Constant
from llmjax.run import Run
from meshes import local


@dataclasses.dataclass(frozen=True)
class MLP:
    """Shape of the network."""

    features: int = 8
    "Numbers per example."
    hidden: int = 16
    "Width of the hidden layer."

    def init(self, key: jax.Array) -> "Network":
        """The network with fresh weights."""
        return Network(self, nnx.Rngs(key))


class Network(nnx.Module):
    def __init__(self, c: MLP, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(c.features, c.hidden, rngs=rngs)
        self.out = nnx.Linear(c.hidden, 1, rngs=rngs)

    def __call__(self, x_BF: jax.Array) -> jax.Array:
        """The chance of class 1, [B]."""
        return jax.nn.sigmoid(self.out(jax.nn.relu(self.hidden(x_BF)))[:, 0])


def binary_cross_entropy(model: Network, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-y log p - (1 - y) log(1 - p), summed over examples; how many there are, and for how many p is on y's side."""
    chance_B = jnp.clip(model(batch["x"]), 1e-7, 1 - 1e-7)
    nats_B = -batch["y"] * jnp.log(chance_B) - (1 - batch["y"]) * jnp.log(1 - chance_B)
    right_B = (chance_B > 0.5) == (batch["y"] > 0.5)
    sums = dict(weight=jnp.sum(batch["weights"]), accuracy=jnp.sum(right_B * batch["weights"]))
    return jnp.sum(nats_B * batch["weights"]), sums


@dataclasses.dataclass(frozen=True)
class Points:
    """Random points; class 1 lies outside a sphere."""

    rows: int = 1024
    "Training examples; a quarter as many are held out."
    features: int = 8
    "Numbers per example."
    seed: int = 0
    "Seeds the points."

    def open(self, sequence: int, cache: Path, say) -> ArrayDataset:
        """The points as arrays `x` [n, F] and `y` [n]."""
        x = np.random.default_rng(self.seed).normal(size=(self.rows + self.rows // 4, self.features)).astype(np.float32)
        y = (np.sum(x * x, axis=1) > self.features).astype(np.float32)
        return ArrayDataset(
            train={"x": x[: self.rows], "y": y[: self.rows]}, heldout={"x": x[self.rows :], "y": y[self.rows :]}
        )


run = Run(
    model=MLP(),
    data=Points(),
    optimizer=AdamW(lr=1e-2, schedule=Constant(), b2=0.999, weight_decay=0.0),
    loss=binary_cross_entropy,
    mesh=local.cluster,
    steps=5 * 1024 // 32,
    batch=32,
    sequence=1,
    clip=0.0,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
