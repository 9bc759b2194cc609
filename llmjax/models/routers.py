"""Routers: which experts a token goes to, how evenly, and which of its choices find a slot.

J counts the experts that a token chooses. A dim E is whole here; only the experts' own weights are cut over it.

Everything counted is a sum over tokens or over sequences, and what a token gets depends on its own sequence alone, so
neither mesh nor microbatches change a number.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P

from llmjax.models import nn


class Choice(NamedTuple):
    """What a router says of every token."""

    score_BTE: jax.Array  # how much it favours each expert; adds up to 1
    share_BTJ: jax.Array  # the weights of the experts chosen
    chosen_BTJ: jax.Array  # their numbers


def logits(x_BTD: jax.Array, router_DE: nnx.Param) -> jax.Array:
    """Router logits [B, T, E] in float32, products included: rounding must not choose."""
    whole_DE, place = jax.reshard(router_DE[...], P(None, None)), P(*nn.how().layout.gathered("BT"), None)
    return jnp.einsum(
        "BTD,DE->BTE", x_BTD.astype(jnp.float32), whole_DE, precision=jax.lax.Precision.HIGHEST, out_sharding=place
    )


def softmax(logits_BTE: jax.Array, top_k: int, normalised: bool = True) -> Choice:
    """The `top_k` largest logits, weighed by a softmax over them alone (Mixtral, arXiv:2401.04088).

    Not normalised, their weights are those of a softmax over all experts (Switch, arXiv:2101.03961).
    """
    chosen_BTJ, score_BTE = highest(logits_BTE, top_k), jax.nn.softmax(logits_BTE)
    if not normalised:
        return Choice(score_BTE, jnp.take_along_axis(score_BTE, chosen_BTJ, -1), chosen_BTJ)
    highest_BTJ = jnp.take_along_axis(logits_BTE, chosen_BTJ, -1)
    return Choice(score_BTE, jax.nn.softmax(highest_BTJ), chosen_BTJ)


def sigmoid(
    logits_BTE: jax.Array,
    bias_E: nnx.Param,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    normalised: bool = True,
) -> Choice:
    """Sigmoid scores, to which a bias is added for choosing only (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    The weights are the scores of the chosen, over their sum if normalised. The bias has no gradient: `rebalanced` moves
    it. With `groups` of neighbours, experts are chosen from the `top_groups` whose two best are best.
    """
    score_BTE = jax.nn.sigmoid(logits_BTE)
    bias_E = jax.lax.stop_gradient(jax.reshard(bias_E[...], P(None)))
    favour_BTE = score_BTE + bias_E[None, None]
    if groups > 1:
        favour_BTE = jnp.where(_in_best(favour_BTE, groups, top_groups), favour_BTE, -jnp.inf)
    chosen_BTJ = highest(favour_BTE, top_k)
    share_BTJ = jnp.take_along_axis(score_BTE, chosen_BTJ, -1)
    return Choice(_normalised(score_BTE), _normalised(share_BTJ) if normalised else share_BTJ, chosen_BTJ)


def _in_best(favour_BTE, groups, top_groups):
    """Which experts are in the groups whose two best are best, [B, T, E]."""
    B, T, E = favour_BTE.shape
    of_groups = jax.lax.stop_gradient(favour_BTE).reshape(B, T, groups, E // groups)
    best = highest(jnp.sum(-jnp.sort(-of_groups, -1)[..., :2], -1), top_groups)
    return jnp.repeat(hits(best, groups) > 0, E // groups, -1)


def highest(score_BTE: jax.Array, top_k: int) -> jax.Array:
    """The numbers of the `top_k` experts with the highest scores, [B, T, J], the highest first, of equals the first.

    Each device sorts its own tokens: for `jax.lax.top_k` XLA gathers those of all devices.
    """
    return jnp.argsort(-jax.lax.stop_gradient(score_BTE), -1)[..., :top_k]


def rebalanced(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """The bias after a step: up by `rate` where the load was below the mean, down where above (arXiv:2408.15664).

    Dims in front, such as L, are experts of their own. `load_E` is the load over the whole step.
    """
    lack_E = jnp.mean(load_E, -1, keepdims=True) - load_E
    return bias_E + jax.reshard(rate * jnp.sign(lack_E).astype(bias_E.dtype), jax.typeof(bias_E).sharding)


def slots(capacity: float, sequence: int, top_k: int, experts: int) -> int:
    """How many tokens of one sequence an expert takes, C: `capacity` times the mean, rounded up."""
    return min(sequence, math.ceil(capacity * sequence * top_k / experts))


def within(chosen_BTJ: jax.Array, experts: int, slots: int) -> jax.Array:
    """Which choices find a slot, [B, T, J]: in each sequence an expert takes its first `slots` tokens by position.

    So no token depends on a later one. The choices of whole sequences are gathered to count them.
    """
    place = nn.how().layout.gathered("BT")
    sequences, order = P(place[0], None, None), nn.order(chosen_BTJ.shape[1])
    whole_BTJ = jax.reshard(chosen_BTJ, sequences).at[:, np.argsort(order)].get(out_sharding=sequences)
    before_BTE = jnp.cumsum(hits(whole_BTJ, experts), 1) - 1  # read only where it is hit
    keep_BTJ = jnp.take_along_axis(before_BTE, whole_BTJ, -1) < slots
    return keep_BTJ.at[:, order].get(out_sharding=P(*place, None))


def _normalised(x):
    return x / jnp.sum(x, -1, keepdims=True)


def hits(chosen_BTJ: jax.Array, experts: int) -> jax.Array:
    """Who chose whom: int32 [B, T, E] of 0 and 1."""
    return jnp.sum(jax.nn.one_hot(chosen_BTJ, experts, dtype=jnp.int32), 2)


def sums(logits_BTE: jax.Array, choice: Choice, keep_BTJ: jax.Array | None) -> dict[str, jax.Array]:
    """What one layer counts over its tokens, in float32.

    load_E: choices per expert, dropped ones included · dropped: choices that found no slot · balance: `balance` ·
    router_z: log² of the sum of the logits' exponentials (ST-MoE, arXiv:2202.08906).
    """
    load_BTE = hits(choice.chosen_BTJ, logits_BTE.shape[-1]).astype(jnp.float32)
    dropped = jnp.float32(0) if keep_BTJ is None else jnp.sum(~keep_BTJ, dtype=jnp.float32)
    return dict(
        load_E=jnp.sum(load_BTE, (0, 1)),
        dropped=dropped,
        balance=balance(choice.score_BTE, load_BTE),
        router_z=jnp.sum(jax.nn.logsumexp(logits_BTE, -1) ** 2),
    )


def balance(score_BTE: jax.Array, load_BTE: jax.Array) -> jax.Array:
    """Sequence-wise load-balance loss, T · E/k · Σ_e f_e P_e, added over sequences (arXiv:2412.19437, section 2.1.2).

    f_e is the share of a sequence's tokens that chose e, P_e the mean score of e. It is 1 per token where all experts
    are chosen equally often, and more where those that are favoured are chosen more often.
    """
    experts = score_BTE.shape[-1]
    total_BE, favour_BE = jnp.sum(load_BTE, 1), jnp.sum(score_BTE, 1)
    chosen_B1 = jnp.sum(total_BE, -1, keepdims=True)  # k T
    return experts * jnp.sum(total_BE / chosen_B1 * favour_BE)
