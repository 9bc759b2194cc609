"""Attention and rotary positions. `q_BTHK` asks, `k_BSGK` answers, `v_BSGK` is what is passed on."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from llmjax.models import nn


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies for contexts longer than the original (arXiv:2407.21783)."""

    factor: float = 8.0
    "How much longer the context became."
    low: float = 1.0
    "Wavelengths above `original / low` are stretched by the whole factor."
    high: float = 4.0
    "Wavelengths below `original / high` stay."
    original: int = 8192
    "Context length of the first training."


def rope_angles(positions_T: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Rotation angles [T, K/2] in float32 (arXiv:2104.09864)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        turns = scaling.original * frequency / (2 * math.pi)  # over the original context
        keep = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    return positions_T.astype(jnp.float32)[:, None] * frequency[None, :]


def rotate(x_BTHK: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the pairs (k, k + K/2) of every head by the angle of their position."""
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHK.dtype)


def attention(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array) -> jax.Array:
    """softmax(q·k / sqrt(K)) v over the positions up to one's own; H is a multiple of G (arXiv:2305.13245).

    Scores and softmax are float32. The letter R counts the query heads that share a key head.
    """
    place, (B, T, H, K), G = nn.how().layout.gathered, q_BTHK.shape, k_BSGK.shape[2]
    q_BTGRK = jnp.reshape(q_BTHK, (B, T, G, H // G, K), out_sharding=place("BTGRK"))
    score_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK * K**-0.5, k_BSGK, preferred_element_type=jnp.float32)
    past_TS = jnp.tril(jnp.ones((T, T), bool))
    chance_BGRTS = jax.nn.softmax(jnp.where(past_TS[None, None, None], score_BGRTS, -1e30), axis=-1)
    o_BTGRK = jnp.einsum("BGRTS,BSGK->BTGRK", chance_BGRTS.astype(v_BSGK.dtype), v_BSGK)
    return jnp.reshape(o_BTGRK, (B, T, H, K), out_sharding=place("BTHK"))
