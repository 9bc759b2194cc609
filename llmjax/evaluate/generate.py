"""Completing text: greedy or sampled, from any model that maps `tokens_BT` to `logits_BTV`.

Correct first: every new token runs the whole sequence again. The loop over tokens is inside one jit.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P

from llmjax.errors import Refused
from llmjax.layout import axes_of
from llmjax.models import nn


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    tokens: int = 64
    "New tokens per prompt; a prompt that reaches the end of its text stops earlier."
    temperature: float = 0.0
    "Divides the logits; 0 takes the likeliest token."
    top_k: int = 0
    "Sample among the k likeliest tokens; 0: all."
    top_p: float = 1.0
    "Sample among the likeliest tokens that together have this probability (arXiv:1904.09751)."
    seed: int = 0
    "Seeds the samples."


def check(how: Sampling) -> None:
    """Refuses values that no sampling can have."""
    if how.tokens < 1:
        raise Refused(f"tokens is {how.tokens}: give at least 1.")
    if how.temperature < 0:
        raise Refused(f"temperature is {how.temperature}: give 0 for the likeliest token or a positive number.")
    if how.top_k < 0:
        raise Refused(f"top-k is {how.top_k}: give a positive number, or 0 for no limit.")
    if not 0 < how.top_p <= 1:
        raise Refused(f"top-p is {how.top_p}: give a number above 0 and at most 1.")


def choose(logits_BV: jax.Array, key: jax.Array, how: Sampling) -> jax.Array:
    """The next token of every row, int32 [B]."""
    if how.temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / how.temperature
    ranked_BV = -jnp.sort(-logits_BV, axis=-1)
    if how.top_k:
        least_B1 = ranked_BV[:, min(how.top_k, ranked_BV.shape[-1]) - 1][:, None]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
        ranked_BV = jnp.where(ranked_BV < least_B1, -jnp.inf, ranked_BV)
    if how.top_p < 1:
        chance_BV = jax.nn.softmax(ranked_BV, -1)
        before_BV = jnp.cumsum(chance_BV, -1) - chance_BV  # the first token is always kept
        least_B1 = jnp.min(jnp.where(before_BV < how.top_p, ranked_BV, jnp.inf), -1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(3,))
def continue_tokens(model: nnx.Module, tokens_BT: jax.Array, length_B: jax.Array, how: Sampling) -> jax.Array:
    """Fills in `how.tokens` positions after the first `length_B` of every row."""
    rows = jnp.arange(tokens_BT.shape[0])
    place_T = jnp.asarray(np.argsort(nn.order(tokens_BT.shape[1])))  # of each position among the model's outputs

    def turn(i, tokens_BT):
        logits_BTV = jax.reshard(model(nn.in_order(tokens_BT)).astype(jnp.float32), P(None, None, None))
        logits_BV = logits_BTV[rows, place_T[length_B + i - 1]]
        chosen_B = choose(logits_BV, jax.random.fold_in(jax.random.key(how.seed), i), how)
        return tokens_BT.at[rows, length_B + i].set(chosen_B)

    return jax.lax.fori_loop(0, how.tokens, turn, tokens_BT)


def complete(
    model: nnx.Module, prompts: Sequence[Sequence[int]], how: Sampling, *, positions: int, end: int | None = None
) -> list[list[int]]:
    """New tokens for every prompt, cut before `end`. Call it in the context of the model's program.

    Raises:
      Refused: a prompt is empty or, with the new tokens, longer than `positions`.
    """
    check(how)
    longest = max(len(p) for p in prompts)
    if longest + how.tokens > positions:
        raise Refused(
            f"the prompt has {longest} tokens and {how.tokens} more are asked for, but the model has {positions} "
            f"positions: shorten the prompt or lower --tokens."
        )
    shape = jax.sharding.get_abstract_mesh().shape
    ways = math.prod(shape[a] for a in axes_of(nn.how().layout.inner.get("B")))
    stream = 2 * math.prod(shape[a] for a in axes_of(nn.how().layout.stream.get("T")))  # a ring has two pieces each
    rows = -(-len(prompts) // ways) * ways  # whole rows for every device; the spare ones repeat the first prompt
    width = min(positions, -(-(longest + how.tokens) // math.lcm(stream, 64)) * math.lcm(stream, 64))
    tokens_BT, length_B = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row in range(rows):
        prompt = prompts[row] if row < len(prompts) else prompts[0]
        if not prompt:
            raise Refused("a prompt is empty and the tokenizer has no token to begin with: give --prompt some text.")
        tokens_BT[row, : len(prompt)], length_B[row] = prompt, len(prompt)
    with nn.compute(dataclasses.replace(nn.how(), attention="reference")):  # which takes prompts of any length
        out_BT = np.asarray(continue_tokens(model, jnp.asarray(tokens_BT), jnp.asarray(length_B), how))
    new = [out_BT[row, length_B[row] : length_B[row] + how.tokens].tolist() for row in range(len(prompts))]
    return [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in new]
