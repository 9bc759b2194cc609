"""Qwen 2 and 2.5: Llama with biases of queries, keys and values (arXiv:2412.15115)."""

import dataclasses

import jax

from llmjax.models import nn
from llmjax.models.llama import Llama, LlamaBlock, LlamaModel


@dataclasses.dataclass(frozen=True)
class Qwen2(Llama):
    """Shape of a Qwen 2 or 2.5 model."""

    def init(self, key: jax.Array) -> LlamaModel:
        return LlamaModel(self, key, Qwen2Block)


class Qwen2Block(LlamaBlock):
    def __init__(self, c: Qwen2, key: jax.Array):
        super().__init__(c, key)
        self.query_bias_HK = nn.full(0, "HK", c.sizes())
        self.key_bias_GK, self.value_bias_GK = (nn.full(0, "GK", c.sizes()) for _ in range(2))

    def queries_keys_values(self, x_BTD):
        q_BTHK, k_BTGK, v_BTGK = super().queries_keys_values(x_BTD)
        return (
            q_BTHK + nn.bias(self.query_bias_HK, "HK", "BTHK"),
            k_BTGK + nn.bias(self.key_bias_GK, "GK", "BTGK"),
            v_BTGK + nn.bias(self.value_bias_GK, "GK", "BTGK"),
        )
