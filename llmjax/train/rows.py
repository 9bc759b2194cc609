"""What every row of a batch costs: for whoever needs more than the sum over all, such as intervals and answers' scores.

The logits and their cross-entropy are those of the training loss; only what is summed is another.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from llmjax.train.loss import Batch, Sums, cross_entropy, of_model


@jax.jit
def sums(model: nnx.Module, batch: Batch) -> Sums:
    """Of every row of a batch whose arrays lead with [A, B], sums over its targets, float32 [A, B].

    `nats` of cross-entropy · `weight` of the targets · `missed`: targets that are not the model's likeliest token.
    Every process can read them. Call it in the context of the model's program.
    """

    def microbatch(_, batch):
        return None, of_model(_of, model, batch)[1]

    _, found = jax.lax.scan(microbatch, None, batch)
    return jax.tree.map(lambda x_AB: jax.reshard(x_AB, P(None, None)), found)


def _of(logits_BTV: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
    logits_BTV, weights_BT = logits_BTV.astype(jnp.float32), batch["weights"]
    nats_BT, _ = cross_entropy(logits_BTV, batch["targets"])
    missed_BT = likeliest(logits_BTV) != batch["targets"]
    found = dict(nats=nats_BT * weights_BT, weight=weights_BT, missed=missed_BT * weights_BT)
    rows = {name: jnp.sum(x_BT, 1) for name, x_BT in found.items()}
    return jnp.sum(rows["nats"]), rows


def likeliest(logits_BTV: jax.Array) -> jax.Array:
    """The first of the largest logits, int32 [B, T], as `argmax` gives; the logits may be cut over V."""
    place = jax.typeof(logits_BTV).sharding
    token_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2, out_sharding=place)
    largest_BT1 = jnp.max(logits_BTV, -1, keepdims=True)
    return jnp.min(jnp.where(logits_BTV == largest_BT1, token_BTV, logits_BTV.shape[-1]), -1)
