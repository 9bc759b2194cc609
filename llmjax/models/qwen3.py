"""Qwen 3: Llama with every query and key normalised (arXiv:2505.09388)."""

import dataclasses

import jax

from llmjax.models import nn
from llmjax.models.llama import Llama, LlamaBlock, LlamaModel


@dataclasses.dataclass(frozen=True)
class Qwen3(Llama):
    """Shape of a dense Qwen 3 model."""

    def init(self, key: jax.Array) -> LlamaModel:
        return LlamaModel(self, key, Qwen3Block)


class Qwen3Block(LlamaBlock):
    normed = True

    def __init__(self, c: Qwen3, key: jax.Array):
        super().__init__(c, key)
        self.query_scale_K, self.key_scale_K = (nn.full(1, "K", c.sizes()) for _ in range(2))

    def queries_keys_values(self, x_BTD):
        q_BTHK, k_BTGK, v_BTGK = super().queries_keys_values(x_BTD)
        q_BTHK = nn.rms_norm(q_BTHK, self.query_scale_K, self.c.epsilon, "K")
        return q_BTHK, nn.rms_norm(k_BTGK, self.key_scale_K, self.c.epsilon, "K"), v_BTGK
