"""Gemma 3, text: five local layers to a global one, with wavelengths of their own, and no caps (arXiv:2503.19786)."""

import dataclasses

import jax

from llmjax.models import nn
from llmjax.models.attention import rope_angles, rotate
from llmjax.models.gemma2 import Gemma2, Gemma2Block, Gemma2Model


@dataclasses.dataclass(frozen=True)
class Gemma3(Gemma2):
    """Shape of a Gemma 3 text model; `theta` and `scaling` are those of global layers."""

    layers: int = 6
    theta: float = 1_000_000.0
    window: int = 1024
    every: int = 6
    cap: float = 0.0
    logit_cap: float = 0.0
    local_theta: float = 10_000.0
    "Base of the rotary wavelengths in local layers."

    def init(self, key: jax.Array) -> Gemma2Model:
        return Gemma2Model(self, key, Gemma3Block)


class Gemma3Block(Gemma2Block):
    def __init__(self, c: Gemma3, window: int, key: jax.Array):
        super().__init__(c, window, key)
        self.query_scale_K, self.key_scale_K = (nn.full(0, "K", c.sizes()) for _ in range(2))

    def queries_keys_values(self, x_BTD):
        q_BTHK, k_BTGK, v_BTGK = super().queries_keys_values(x_BTD)
        q_BTHK = nn.rms_norm(q_BTHK, self.query_scale_K, self.c.epsilon, "K", plus=1.0)
        return q_BTHK, nn.rms_norm(k_BTGK, self.key_scale_K, self.c.epsilon, "K", plus=1.0), v_BTGK

    def turned(self, q_BTHK, k_BTGK):
        c, local = self.c, bool(self.window)
        theta, scaling = (c.local_theta, None) if local else (c.theta, c.scaling)
        angles_BTK = rope_angles(nn.positions(q_BTHK.shape[1]), c.head_dim, theta, scaling)
        return rotate(q_BTHK, angles_BTK), rotate(k_BTGK, angles_BTK)
