"""Llama 3: RoPE, RMSNorm, SwiGLU, grouped-query attention (arXiv:2407.21783)."""

import dataclasses
import functools

import jax
from flax import nnx

from llmjax.errors import Refused
from llmjax.models import nn, shapes
from llmjax.models.attention import Scaling, attention, rope_angles, rotate
from llmjax.models.shapes import Matrix

Sums = dict[str, jax.Array] | None


@dataclasses.dataclass(frozen=True)
class Llama:
    """Shape of a Llama 3 model.

    Raises:
      Refused: `head_dim` is odd.
    """

    vocab: int = 4096
    "Vocabulary size, V."
    layers: int = 4
    "Number of blocks, L."
    width: int = 256
    "Width of the residual stream, D."
    heads: int = 4
    "Query heads, H."
    kv_heads: int = 4
    "Key/value heads, G; a divisor of heads."
    head_dim: int = 64
    "Width of one head, K."
    ff: int = 768
    "Width of the feed-forward layer, F."
    positions: int = 8192
    "Longest sequence."
    theta: float = 500_000.0
    "Base of the rotary wavelengths."
    scaling: Scaling | None = None
    "How the rotary frequencies are scaled: Llama 3.1's way, evenly, or YaRN's."
    tied: bool = False
    "Use the embedding as the output head."
    epsilon: float = 1e-5
    "Added to the mean square in RMSNorm."

    def __post_init__(self):
        if self.head_dim % 2:
            raise Refused(
                f"model.head_dim is {self.head_dim}: rotary positions turn pairs of numbers; give an even one."
            )

    def sizes(self) -> nn.Sizes:
        """Size of every letter of a weight."""
        return dict(V=self.vocab, D=self.width, H=self.heads, G=self.kv_heads, K=self.head_dim, F=self.ff)

    def init(self, key: jax.Array) -> "LlamaModel":
        """The model with fresh weights."""
        return LlamaModel(self, key)

    def matrices(self) -> shapes.Matrices:
        """The weights that tokens are multiplied by, of one layer and of the ends; see `shapes.Matrix`."""
        attention, mlp = (Matrix("DHK"), Matrix("DGK", 2), Matrix("HKD")), (Matrix("DF", 2), Matrix("FD"))
        if self.tied:
            return dict(attention=attention, mlp=mlp, head=(Matrix("VD"),))
        return dict(attention=attention, mlp=mlp, embedding=(Matrix("VD", share=0),), head=(Matrix("DV"),))

    def flops_per_token(self, sequence: int) -> tuple[float, float]:
        """Training FLOPs per token, (causal, full)."""
        return shapes.flops_per_token(self, sequence)


class LlamaBlock(nnx.Module):
    """Attention, then `mlp`.

    Other families replace either along with its weights, which `heads` and `feed_forward` make, or only a step of it.
    """

    normed = False  # whether queries and keys are normed before they are turned

    def __init__(self, c: Llama, key: jax.Array):
        keys, sizes = jax.random.split(key, 7), c.sizes()
        into, out = c.width**-0.5, (2 * c.layers) ** -0.5  # residual branches shrink with depth, as GPT-2's
        self.c = c
        self.attention_scale_D = nn.full(1, "D", sizes)
        self.heads(keys[:4], sizes, into, out)
        self.mlp_scale_D = nn.full(1, "D", sizes)
        self.feed_forward(keys[4:], sizes, into, out * c.ff**-0.5)

    def heads(self, keys: jax.Array, sizes: nn.Sizes, into: float, out: float) -> None:
        self.query_DHK = nn.normal(keys[0], "DHK", sizes, into)
        self.key_DGK = nn.normal(keys[1], "DGK", sizes, into)
        self.value_DGK = nn.normal(keys[2], "DGK", sizes, into)
        self.out_HKD = nn.normal(keys[3], "HKD", sizes, out * (sizes["H"] * sizes["K"]) ** -0.5)

    def feed_forward(self, keys: jax.Array, sizes: nn.Sizes, into: float, out: float) -> None:
        self.gate_DF = nn.normal(keys[0], "DF", sizes, into)
        self.up_DF = nn.normal(keys[1], "DF", sizes, into)
        self.down_FD = nn.normal(keys[2], "FD", sizes, out)

    @jax.named_scope("block")
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array | None) -> tuple[jax.Array, Sums]:
        """The stream after this block, and what its `mlp` counted."""
        h_BTD = nn.enter(nn.rms_norm(x_BTD, self.attention_scale_D, self.c.epsilon))
        x_BTD = x_BTD + self.attention(h_BTD, segments_BT)
        y_BTD, sums = self.mlp(nn.enter(nn.rms_norm(x_BTD, self.mlp_scale_D, self.c.epsilon)))
        return x_BTD + y_BTD, sums

    @jax.named_scope("attention")
    def attention(self, x_BTD, segments_BT):
        q_BTHK, k_BTGK, v_BTGK = self.queries_keys_values(x_BTD)
        o_BTHK = self.attend(*self.turned(q_BTHK, k_BTGK), v_BTGK, segments_BT)
        return nn.project("BTHK,HKD->BTD", o_BTHK, self.out_HKD)

    def queries_keys_values(self, x_BTD: jax.Array) -> list[jax.Array]:
        """(q_BTHK, k_BTGK, v_BTGK) before positions."""
        subscripts = "BTD,DHK->BTHK", "BTD,DGK->BTGK", "BTD,DGK->BTGK"
        return nn.project_all(subscripts, x_BTD, self.query_DHK, self.key_DGK, self.value_DGK)

    def turned(self, q_BTHK: jax.Array, k_BTGK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys at their positions."""
        c = self.c
        angles_BTK = rope_angles(nn.positions(q_BTHK.shape[1]), c.head_dim, c.theta, c.scaling)
        stretch = getattr(c.scaling, "stretch", 1.0)
        turned = rotate(q_BTHK, angles_BTK, stretch), rotate(k_BTGK, angles_BTK, stretch)
        # Kept in place of the products, which no derivative needs, unless a norm was taken of them.
        return turned if self.normed else tuple(nn.kept(x) for x in turned)

    def attend(self, q_BTHK, k_BTGK, v_BTGK, segments_BT) -> jax.Array:
        """What every query finds, [B, T, H, K]."""
        return attention(q_BTHK, k_BTGK, v_BTGK, segments_BT)

    @jax.named_scope("mlp")
    def mlp(self, x_BTD: jax.Array) -> tuple[jax.Array, Sums]:
        return swiglu(x_BTD, self.gate_DF, self.up_DF, self.down_FD), None


def swiglu(x_BTD: jax.Array, gate_DF: nnx.Param, up_DF: nnx.Param, down_FD: nnx.Param) -> jax.Array:
    """(silu(x gate) · x up) down, [B, T, D] (arXiv:2002.05202)."""
    gate_BTF, up_BTF = nn.project_all(("BTD,DF->BTF",) * 2, x_BTD, gate_DF, up_DF)
    return nn.project("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, down_FD)


class LlamaModel(nnx.Module):
    """`tokens_BT -> logits_BTV`; see `nn.Decoder`. Its blocks are `block(c, key)`."""

    def __init__(self, c: Llama, key: jax.Array, block: type[LlamaBlock] = LlamaBlock):
        keys, sizes = jax.random.split(key, 3), c.sizes()
        self.c = c
        self.embed_VD = nn.normal(keys[0], "VD", sizes, c.width**-0.5 if c.tied else 1.0)
        self.add_layers(c, keys[1], block)
        self.final_scale_D = nn.full(1, "D", sizes)
        if not c.tied:
            self.head_DV = nn.normal(keys[2], "DV", sizes, c.width**-0.5)

    def add_layers(self, c: Llama, key: jax.Array, block: type[LlamaBlock]) -> None:
        """Sets `blocks`."""
        self.blocks = nn.stack(functools.partial(block, c), key, c.layers)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        return nn.embed(tokens_BT, self.embed_VD)

    def layer(self, block: LlamaBlock, x_BTD: jax.Array, segments_BT: jax.Array | None) -> tuple[jax.Array, Sums]:
        return block(x_BTD, segments_BT)

    def head(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = nn.enter(nn.rms_norm(x_BTD, self.final_scale_D, self.c.epsilon))
        if self.c.tied:
            return nn.project("BTD,VD->BTV", x_BTD, self.embed_VD)
        return nn.project("BTD,DV->BTV", x_BTD, self.head_DV)

    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        return nn.decode(self, tokens_BT, segments_BT)[0]
