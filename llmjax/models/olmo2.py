"""OLMo 2: Llama that normalises what layers add, and all queries and all keys at once (arXiv:2501.00656)."""

import dataclasses

import jax

from llmjax.models import nn
from llmjax.models.llama import Llama, LlamaBlock, LlamaModel


@dataclasses.dataclass(frozen=True)
class Olmo2(Llama):
    """Shape of an OLMo 2 model."""

    def init(self, key: jax.Array) -> LlamaModel:
        return LlamaModel(self, key, Olmo2Block)


class Olmo2Block(LlamaBlock):
    normed = True

    def __init__(self, c: Olmo2, key: jax.Array):
        super().__init__(c, key)
        self.query_scale_HK, self.key_scale_GK = nn.full(1, "HK", c.sizes()), nn.full(1, "GK", c.sizes())

    @jax.named_scope("block")
    def __call__(self, x_BTD, segments_BT):
        o_BTD = self.attention(nn.enter(x_BTD), segments_BT)
        x_BTD = x_BTD + nn.rms_norm(o_BTD, self.attention_scale_D, self.c.epsilon)
        y_BTD, sums = self.mlp(nn.enter(x_BTD))
        return x_BTD + nn.rms_norm(y_BTD, self.mlp_scale_D, self.c.epsilon), sums

    def queries_keys_values(self, x_BTD):
        q_BTHK, k_BTGK, v_BTGK = super().queries_keys_values(x_BTD)
        q_BTHK = nn.rms_norm(q_BTHK, self.query_scale_HK, self.c.epsilon, "HK")
        return q_BTHK, nn.rms_norm(k_BTGK, self.key_scale_GK, self.c.epsilon, "GK"), v_BTGK
