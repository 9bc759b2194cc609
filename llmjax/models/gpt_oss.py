"""gpt-oss: local and global layers in turn, attention sinks, and experts with clamped gates (arXiv:2508.10925)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import P

from llmjax.models import moe, nn, turns
from llmjax.models.attention import attention
from llmjax.models.mixtral import Mixtral, MixtralBlock
from llmjax.models.turns import TurnsModel


@dataclasses.dataclass(frozen=True)
class GptOss(Mixtral):
    """Shape of a gpt-oss model; every product with a weight has a bias, and `ff` is the width of one expert."""

    theta: float = 150_000.0
    window: int = 128
    "Positions, one's own among them, that a local layer looks back."
    every: int = 2
    "Every so many layers there is a global one; the others are local."
    limit: float = 7.0
    "Gates are at most this, and what they multiply within plus and minus this."
    slope: float = 1.702
    "Gates are gate · sigmoid(slope · gate)."

    def __post_init__(self):
        super().__post_init__()
        turns.check(self)

    @property
    def sinks(self) -> bool:
        """Whether a kernel has to know of attention sinks."""
        return True

    @property
    def turns(self) -> int:
        """Turns of the loop over layers, which stages share."""
        return self.layers // self.every

    def windows(self) -> tuple[int, ...]:
        """How far each layer of a turn looks back; 0: all the way."""
        return turns.windows(self)

    def init(self, key: jax.Array) -> TurnsModel:
        return TurnsModel(self, key, GptOssBlock)


class GptOssBlock(MixtralBlock):
    """A local layer, or a global one where the window is 0."""

    def __init__(self, c: GptOss, window: int, key: jax.Array):
        super().__init__(c, key)
        sizes, self.window = c.sizes(), window
        self.query_bias_HK, self.out_bias_D = nn.full(0, "HK", sizes), nn.full(0, "D", sizes)
        self.key_bias_GK, self.value_bias_GK = nn.full(0, "GK", sizes), nn.full(0, "GK", sizes)
        self.sinks_H = nn.full(0, "H", sizes)
        self.logit_bias_E = nn.full(0, "E", sizes)
        self.gate_bias_EF, self.up_bias_EF = nn.full(0, "EF", sizes), nn.full(0, "EF", sizes)
        self.down_bias_ED = nn.full(0, "ED", sizes)

    def attention(self, x_BTD, segments_BT):
        return super().attention(x_BTD, segments_BT) + nn.bias(self.out_bias_D, "D", "BTD")

    def queries_keys_values(self, x_BTD):
        q_BTHK, k_BTGK, v_BTGK = super().queries_keys_values(x_BTD)
        return (
            q_BTHK + nn.bias(self.query_bias_HK, "HK", "BTHK"),
            k_BTGK + nn.bias(self.key_bias_GK, "GK", "BTGK"),
            v_BTGK + nn.bias(self.value_bias_GK, "GK", "BTGK"),
        )

    def attend(self, q_BTHK, k_BTGK, v_BTGK, segments_BT):
        return attention(q_BTHK, k_BTGK, v_BTGK, segments_BT, self.window, sinks_H=self.sinks_H)

    def router_logits(self, x_BTD):
        return super().router_logits(x_BTD) + jax.reshard(self.logit_bias_E[...], P(None))[None, None]

    def experts(self, x_BTD, choice, keep_BTJ, slots):
        weights, biases = (self.gate_EDF, self.up_EDF, self.down_EFD), (self.gate_bias_EF, self.up_bias_EF)
        gated = functools.partial(clamped, self.c.limit, self.c.slope)
        y_BTD = moe.experts(x_BTD, choice, keep_BTJ, slots, weights, biases, gated)
        return y_BTD + moe.mean_bias(choice, keep_BTJ, self.down_bias_ED)


def clamped(limit: float, slope: float, gate: jax.Array, up: jax.Array) -> jax.Array:
    """gate · sigmoid(slope · gate) · (up + 1), with both kept within the limit."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(slope * gate) * (up + 1)
