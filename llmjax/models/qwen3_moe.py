"""Qwen 3 with a mixture of experts in every layer (arXiv:2505.09388)."""

import dataclasses

import jax

from llmjax.models import routers
from llmjax.models.mixtral import Mixtral, MixtralBlock, MixtralModel
from llmjax.models.qwen3 import Qwen3Block


@dataclasses.dataclass(frozen=True)
class Qwen3Moe(Mixtral):
    """Shape of a Qwen 3 model with experts; `ff` is the width of one expert."""

    normalised: bool = True
    "Divide the weights of the chosen experts by their sum; else they are their share of a softmax over all."

    def init(self, key: jax.Array) -> MixtralModel:
        return MixtralModel(self, key, Qwen3MoeBlock)


class Qwen3MoeBlock(Qwen3Block, MixtralBlock):
    """Qwen 3's attention, Mixtral's experts."""

    def choice(self, logits_BTE: jax.Array) -> routers.Choice:
        return routers.softmax(logits_BTE, self.c.top_k, self.c.normalised)
