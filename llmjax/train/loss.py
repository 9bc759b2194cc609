"""Losses. A loss maps (model, batch) to its sum over targets and a dict of sums, `weight` (of the targets) among them.

Sums, not means: they add over microbatches, devices and masks, so that the mean over all targets is the same number
however the batch is cut. Evaluations show every other sum that is one number, such as `accuracy`, per target.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.models import nn
from llmjax.train import pieces

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token in nats, in float32.

    The batch holds `tokens` and `targets` (int32 [B, T]) and `weights` (float32 [B, T]; 0 leaves a target out), and
    may hold `segments` (int32 [B, T]): attention then stays among tokens of equal numbers, such as one document's.
    """

    z: float = 0.0
    "Weight of log²(Z), which keeps logits from drifting (arXiv:2204.02311, section 5)."

    def __call__(self, model: nnx.Module, batch: Batch) -> tuple[jax.Array, Sums]:
        return of_model(self.of, model, batch)

    def of(self, logits_BTV: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """The loss of these logits; the batch is in their order."""
        nats_BT, log_z_BT = cross_entropy(logits_BTV.astype(jnp.float32), batch["targets"])
        if self.z:
            nats_BT = nats_BT + self.z * log_z_BT**2
        return jnp.sum(nats_BT * batch["weights"]), {"weight": jnp.sum(batch["weights"])}

    @property
    def held_out(self) -> "NextToken":
        """The loss that evaluation reports: the cross-entropy alone."""
        return NextToken()


def of_model(of: Callable, model: nnx.Module, batch: Batch) -> tuple[jax.Array, Sums]:
    """`of(logits_BTV, batch)`, with the batch in the order of the logits, in pieces as `pieces.of_stream` says."""
    batch = jax.tree.map(nn.in_order, batch)
    if not nn.how().chunk:  # then a model need be no nn.Decoder
        return of(model(batch["tokens"], batch.get("segments")), batch)
    x_BTD, _ = nn.stream(model, batch["tokens"], batch.get("segments"))
    return pieces.of_stream(of, model, x_BTD, batch)


@dataclasses.dataclass(frozen=True)
class Classes:
    """Cross-entropy of one class per example in nats, in float32, and `accuracy`: of how many it is the likeliest.

    The batch holds `x` (whatever the model takes), `y` (the class, int32 [B]) and `weights` (float32 [B]; 0 leaves an
    example out). `model(x)` gives a logit per class.
    """

    def __call__(self, model: nnx.Module, batch: Batch) -> tuple[jax.Array, Sums]:
        logits, y_B, weights_B = model(batch["x"]).astype(jnp.float32), batch["y"], batch["weights"]
        nats_B, _ = cross_entropy(logits, y_B)
        right_B = jnp.argmax(logits, -1) == y_B
        sums = dict(weight=jnp.sum(weights_B), accuracy=jnp.sum(right_B * weights_B))
        return jnp.sum(nats_B * weights_B), sums


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(nats, log Z) per target. Logits may be cut over V: targets are found by comparison, not by indexing."""
    place, last = jax.typeof(logits_BTV).sharding, logits_BTV.ndim - 1
    hit_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, last, out_sharding=place) == targets_BT[..., None]
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return log_z_BT - jnp.sum(jnp.where(hit_BTV, logits_BTV, 0), axis=-1), log_z_BT
