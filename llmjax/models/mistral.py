"""Mistral: Llama whose every layer looks back a fixed number of positions (arXiv:2310.06825)."""

import dataclasses

import jax

from llmjax.models.attention import attention
from llmjax.models.llama import Llama, LlamaBlock, LlamaModel


@dataclasses.dataclass(frozen=True)
class Mistral(Llama):
    """Shape of a Mistral model."""

    window: int = 4096
    "Positions, one's own among them, that attention looks back; 0: all."

    def windows(self) -> tuple[int, ...]:
        """How far each layer of a turn looks back."""
        return (self.window,)

    def init(self, key: jax.Array) -> LlamaModel:
        return LlamaModel(self, key, MistralBlock)


class MistralBlock(LlamaBlock):
    def attend(self, q_BTHK, k_BTGK, v_BTGK, segments_BT):
        return attention(q_BTHK, k_BTGK, v_BTGK, segments_BT, self.c.window)
