"""Parameters kept in bfloat16, at half the memory, that small steps move all the same.

A step is computed in float32 and its result rounded up or down at random, as often up as it lies near the upper
neighbour (arXiv:2010.06192, section 3). To the nearest, a weight would not move at all by a step of less than half of
1/128 of it, such as any late in training. The random bits are a hash of step, array and place in it: the same on any
mesh and in a resumed run.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llmjax.optim.moments import mixed, round_at_random
from llmjax.optim.weights import matrices


def stored(model: Any) -> Any:
    """The model with its matrices in bfloat16; scales and biases, which are few, stay as they are."""
    return jax.tree.map(lambda x, is_matrix: x.astype(jnp.bfloat16) if is_matrix else x, model, matrices(model))


def widened(tree: Any) -> Any:
    """The tree with float32 where it has bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, with state and steps as if parameters and gradients were float32."""

    def update(grads, state, params=None):
        return inner.update(widened(grads), state, widened(params))

    return optax.GradientTransformation(lambda params: inner.init(widened(params)), update)


def moved(params: Any, updates: Any, step: jax.Array) -> Any:
    """The parameters after this step (int32, from 0), each in the dtype it has."""
    leaves, tree = jax.tree.flatten(params)
    sums = jax.tree.leaves(optax.apply_updates(widened(params), updates))
    seeds = [mixed(mixed(step * len(leaves) + i)) for i in range(len(leaves))]
    each = zip(leaves, sums, seeds, strict=True)
    return tree.unflatten([round_at_random(x, seed) if w.dtype == jnp.bfloat16 else x for w, x, seed in each])
