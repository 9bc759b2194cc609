"""Losses. A loss maps (model, batch) to the sum over targets and the sum of their weights.

Sums, not means: they add over microbatches, devices and masks, so that the mean over all targets is the same number
however the batch is cut.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token in nats, in float32.

    The batch holds `tokens` and `targets` (int32 [B, T]) and `weights` (float32 [B, T]; 0 leaves a target out).
    """

    z: float = 0.0
    "Weight of log²(Z), which keeps logits from drifting (arXiv:2204.02311, section 5)."

    def __call__(self, model: nnx.Module, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits_BTV = model(batch["tokens"]).astype(jnp.float32)
        nats_BT, log_z_BT = cross_entropy(logits_BTV, batch["targets"])
        weights_BT = jax.reshard(batch["weights"], jax.typeof(nats_BT).sharding.spec)
        if self.z:
            nats_BT = nats_BT + self.z * log_z_BT**2
        return jnp.sum(nats_BT * weights_BT), jnp.sum(weights_BT)

    @property
    def held_out(self) -> "NextToken":
        """The loss that evaluation reports: the cross-entropy alone."""
        return NextToken()


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(nats, log Z) per target. Logits may be cut over V: targets are found by comparison, not by indexing."""
    place = jax.typeof(logits_BTV).sharding
    targets_BT1 = jax.reshard(targets_BT, P(*place.spec[:2]))[..., None]
    hit_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2, out_sharding=place) == targets_BT1
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return log_z_BT - jnp.sum(jnp.where(hit_BTV, logits_BTV, 0), axis=-1), log_z_BT
