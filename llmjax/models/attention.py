"""Attention and rotary positions. `q_BTHK` asks, `k_BSGK` answers, `v_BSGK` is what is passed on."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.errors import Refused
from llmjax.models import blocked, cudnn, memory, nn, reference, ring, splash
from llmjax.models.scores import Scores


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

    def __call__(self, frequency_K: jax.Array, theta: float) -> jax.Array:
        """The new frequencies."""
        turns = self.original * frequency_K / (2 * math.pi)  # over the original context
        keep = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequency_K * (keep + (1 - keep) / self.factor)


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All rotary wavelengths stretched alike, as if positions were closer together (arXiv:2306.15595)."""

    factor: float = 8.0
    "How much longer the context became."

    def __call__(self, frequency_K: jax.Array, theta: float) -> jax.Array:
        """The new frequencies."""
        return frequency_K / self.factor


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN's stretch: by a ramp over the pairs of a head, and rotated vectors made longer (arXiv:2309.00071)."""

    factor: float = 32.0
    "How much longer the context became."
    fast: float = 32.0
    "Pairs that turn more often than this over the original context stay."
    slow: float = 1.0
    "Pairs that turn less often than this are stretched by the whole factor."
    original: int = 4096
    "Context length of the first training."
    length: float = 0.0
    "What rotated queries and keys are multiplied by; 0: 0.1 ln(factor) + 1."
    truncate: bool = True
    "Let the ramp begin and end at whole pairs."

    def __call__(self, frequency_K: jax.Array, theta: float) -> jax.Array:
        """The new frequencies."""
        pairs = frequency_K.shape[0]

        def pair(turns):  # which turns so often over the original context
            return pairs * math.log(self.original / (turns * 2 * math.pi)) / math.log(theta)

        begin, end = pair(self.fast), pair(self.slow)
        if self.truncate:
            begin, end = math.floor(begin), math.ceil(end)
        begin, end = max(begin, 0), min(end, 2 * pairs - 1)
        ramp_K = jnp.clip((jnp.arange(pairs, dtype=jnp.float32) - begin) / (max(end - begin, 0.001)), 0, 1)
        return frequency_K * ((1 - ramp_K) + ramp_K / self.factor)

    @property
    def stretch(self) -> float:
        """What rotated vectors are multiplied by."""
        return self.length or self.weighted(1.0)

    def weighted(self, weight: float) -> float:
        """The paper's length, with a weight for the part that grows with the factor."""
        return 0.1 * weight * math.log(self.factor) + 1 if self.factor > 1 else 1.0


Scaling = RopeScaling | LinearScaling | Yarn


def rope_angles(positions_BT: jax.Array, head_dim: int, theta: float, scaling: Scaling | None = None) -> jax.Array:
    """Rotation angles [B, T, K/2] in float32 (arXiv:2104.09864)."""
    frequency_K = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequency_K = scaling(frequency_K, theta)
    return positions_BT.astype(jnp.float32)[..., None] * frequency_K[None, None]


def rotate(x_BTHK: jax.Array, angles_BTK: jax.Array, stretch: float = 1.0) -> jax.Array:
    """Rotates the pairs (k, k + K/2) of every head by the angle of their position, and stretches them.

    A B of 1 is for all rows.
    """
    cos, sin = (stretch * turned(angles_BTK)[:, :, None] for turned in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHK.dtype)


def attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array | None,
    segments_BT: jax.Array | None = None,
    window: int = 0,
    *,
    cap: float = 0.0,
    sinks_H: nnx.Param | None = None,
) -> jax.Array:
    """softmax(q·k / sqrt(K)) v over the positions up to one's own; H is a multiple of G (arXiv:2305.13245).

    With a `window`, over the last so many of them; with `segments_BT`, over those in one's own segment. With a `cap`,
    scores are cap · tanh(score / cap); `sinks_H` take a part of every softmax (`llmjax.models.scores`). The K of values
    may be another; where there are none, keys are passed on. Positions come in the order that `nn.order` says. Scores
    and softmax are float32. Nothing of size T² is kept for the backward pass (arXiv:2205.14135). The letter R counts
    the query heads that share a key head. `nn.Compute.attention` says how; where there is a memory
    (`llmjax.models.memory`), that answers.

    Raises:
      Refused: the kernel in force has no such scores.
    """
    if (kept := memory.of()) is not None:
        sinks_H = None if sinks_H is None else nn.vector(sinks_H, "H")
        return kept.attend(Scores(window, cap), q_BTHK, k_BTGK, v_BTGK, sinks_H)
    v_BTGK = k_BTGK if v_BTGK is None else v_BTGK
    place, (B, T, H, K), G = nn.how().layout.gathered, q_BTHK.shape, k_BTGK.shape[2]
    window = window if window < T else 0
    q_BTGRK = jnp.reshape(q_BTHK, (B, T, G, H // G, K), out_sharding=place("BTGRK"))
    sinks_GR = None
    if sinks_H is not None:
        sinks_GR = jnp.reshape(nn.vector(sinks_H, "H"), (G, H // G), out_sharding=place("GR"))
    with jax.named_scope("scores"):
        if nn.ring():
            if window:
                raise Refused(f"attention has a window of {window} positions, and a ring has none: use cp instead.")
            o_BTGRK = ring.attend(cap, q_BTGRK, k_BTGK, v_BTGK, segments_BT, sinks_GR)
        else:  # every device sees all keys: no layout cuts the dim "_"
            k_BSGK, v_BSGK = (jax.reshard(x, place("B_GK")) for x in (k_BTGK, v_BTGK))
            segments = None if segments_BT is None else (segments_BT, jax.reshard(segments_BT, place("B_")))
            o_BTGRK = _kernel()(Scores(window, cap), q_BTGRK, k_BSGK, v_BSGK, segments, sinks_GR)
    return jnp.reshape(o_BTGRK, (B, T, H, o_BTGRK.shape[-1]), out_sharding=place("BTHK"))


def _kernel():
    match nn.how().attention:
        case "reference":
            return reference.attend
        case "blocked":
            return blocked.attend
        case "splash":
            return splash.attend
        case "cudnn":
            return cudnn.attend
