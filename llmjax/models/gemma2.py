"""Gemma 2: local and global layers in turn, capped scores and logits, norms around every part (arXiv:2408.00118)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llmjax.models import nn, turns
from llmjax.models.attention import attention
from llmjax.models.llama import Llama, LlamaBlock, Sums
from llmjax.models.turns import TurnsModel


@dataclasses.dataclass(frozen=True)
class Gemma2(Llama):
    """Shape of a Gemma 2 model; scales are added to 1, and a token's embedding is multiplied by sqrt(width).

    Raises:
      Refused: there are not as many layers as one turn has.
    """

    theta: float = 10_000.0
    tied: bool = True
    epsilon: float = 1e-6
    window: int = 4096
    "Positions, one's own among them, that a local layer looks back."
    every: int = 2
    "Every so many layers there is a global one; the others are local."
    query_scalar: float = 0.0
    "Scores are divided by its square root; 0: by that of head_dim."
    cap: float = 50.0
    "Scores are cap · tanh(score / cap); 0: not capped."
    logit_cap: float = 30.0
    "The same for logits."

    def __post_init__(self):
        super().__post_init__()
        turns.check(self)

    @property
    def turns(self) -> int:
        """Turns of the loop over layers, which stages share."""
        return self.layers // self.every

    def windows(self) -> tuple[int, ...]:
        """How far each layer of a turn looks back; 0: all the way."""
        return turns.windows(self)

    def init(self, key: jax.Array) -> "Gemma2Model":
        return Gemma2Model(self, key, Gemma2Block)


class Gemma2Block(LlamaBlock):
    """A local layer, or a global one where the window is 0."""

    def __init__(self, c: Gemma2, window: int, key: jax.Array):
        super().__init__(c, key)
        sizes, self.window = c.sizes(), window
        self.attention_scale_D, self.mlp_scale_D = nn.full(0, "D", sizes), nn.full(0, "D", sizes)
        self.after_attention_scale_D, self.after_mlp_scale_D = nn.full(0, "D", sizes), nn.full(0, "D", sizes)

    @jax.named_scope("block")
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array | None) -> tuple[jax.Array, Sums]:
        norm = functools.partial(nn.rms_norm, epsilon=self.c.epsilon, plus=1.0)
        o_BTD = self.attention(nn.enter(norm(x_BTD, self.attention_scale_D)), segments_BT)
        x_BTD = x_BTD + norm(o_BTD, self.after_attention_scale_D)
        y_BTD, sums = self.mlp(nn.enter(norm(x_BTD, self.mlp_scale_D)))
        return x_BTD + norm(y_BTD, self.after_mlp_scale_D), sums

    def attend(self, q_BTHK, k_BTGK, v_BTGK, segments_BT):
        scale = (self.c.head_dim / (self.c.query_scalar or self.c.head_dim)) ** 0.5
        return attention(q_BTHK * scale, k_BTGK, v_BTGK, segments_BT, self.window, cap=self.c.cap)

    @jax.named_scope("mlp")
    def mlp(self, x_BTD):
        gate_BTF, up_BTF = nn.project_all(("BTD,DF->BTF",) * 2, x_BTD, self.gate_DF, self.up_DF)
        return nn.project("BTF,FD->BTD", jax.nn.gelu(gate_BTF) * up_BTF, self.down_FD), None


class Gemma2Model(TurnsModel):
    """`tokens_BT -> logits_BTV`; see `nn.Decoder`."""

    def __init__(self, c: Gemma2, key: jax.Array, block: type[Gemma2Block]):
        super().__init__(c, key, block)
        self.final_scale_D = nn.full(0, "D", c.sizes())

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = super().embed(tokens_BT)
        return x_BTD * jnp.asarray(self.c.width**0.5, x_BTD.dtype)

    def head(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = nn.enter(nn.rms_norm(x_BTD, self.final_scale_D, self.c.epsilon, plus=1.0))
        if self.c.tied:
            logits_BTV = nn.project("BTD,VD->BTV", x_BTD, self.embed_VD)
        else:
            logits_BTV = nn.project("BTD,DV->BTV", x_BTD, self.head_DV)
        cap = self.c.logit_cap
        return cap * jnp.tanh(logits_BTV / cap) if cap else logits_BTV
