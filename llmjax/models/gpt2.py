"""GPT-2: learned positions, LayerNorm, GELU, biases, a tied head (Radford et al., 2019)."""

import dataclasses
import functools

import jax
from flax import nnx

from llmjax.models import nn, shapes
from llmjax.models.attention import attention
from llmjax.models.shapes import Matrix


@dataclasses.dataclass(frozen=True)
class GPT2:
    """Shape of a GPT-2 model; the defaults are the 124 M one with its vocabulary padded to a multiple of 128."""

    vocab: int = 50304
    "Vocabulary size, V."
    layers: int = 12
    "Number of blocks, L."
    width: int = 768
    "Width of the residual stream, D."
    heads: int = 12
    "Heads, H."
    head_dim: int = 64
    "Width of one head, K."
    ff: int = 3072
    "Width of the feed-forward layer, F."
    positions: int = 1024
    "Longest sequence, and rows of the position table."
    epsilon: float = 1e-5
    "Added to the variance in LayerNorm."

    def sizes(self) -> nn.Sizes:
        """Size of every letter of a weight."""
        return dict(
            V=self.vocab, D=self.width, H=self.heads, G=self.heads, K=self.head_dim, F=self.ff, P=self.positions
        )

    def init(self, key: jax.Array) -> "GPT2Model":
        """The model with fresh weights."""
        return GPT2Model(self, key)

    def matrices(self) -> shapes.Matrices:
        """The weights that tokens are multiplied by, of one layer and of the ends; see `shapes.Matrix`."""
        attention = Matrix("DHK", 3), Matrix("HKD")
        return dict(attention=attention, mlp=(Matrix("DF"), Matrix("FD")), head=(Matrix("VD"),))

    def flops_per_token(self, sequence: int) -> tuple[float, float]:
        """Training FLOPs per token, (causal, full)."""
        return shapes.flops_per_token(self, sequence)


class GPT2Block(nnx.Module):
    def __init__(self, c: GPT2, key: jax.Array):
        keys, sizes = jax.random.split(key, 6), c.sizes()
        into, out = 0.02, 0.02 * (2 * c.layers) ** -0.5
        self.c = c
        self.attention_scale_D, self.attention_bias_D = nn.full(1, "D", sizes), nn.full(0, "D", sizes)
        self.query_DHK = nn.normal(keys[0], "DHK", sizes, into)
        self.key_DHK = nn.normal(keys[1], "DHK", sizes, into)
        self.value_DHK = nn.normal(keys[2], "DHK", sizes, into)
        self.query_bias_HK, self.key_bias_HK, self.value_bias_HK = (nn.full(0, "HK", sizes) for _ in range(3))
        self.out_HKD, self.out_bias_D = nn.normal(keys[3], "HKD", sizes, out), nn.full(0, "D", sizes)
        self.mlp_scale_D, self.mlp_bias_D = nn.full(1, "D", sizes), nn.full(0, "D", sizes)
        self.up_DF, self.up_bias_F = nn.normal(keys[4], "DF", sizes, into), nn.full(0, "F", sizes)
        self.down_FD, self.down_bias_D = nn.normal(keys[5], "FD", sizes, out), nn.full(0, "D", sizes)

    @jax.named_scope("block")
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        e = self.c.epsilon
        h_BTD = nn.layer_norm(x_BTD, self.attention_scale_D, self.attention_bias_D, e)
        x_BTD = x_BTD + self.attention(nn.enter(h_BTD), segments_BT)
        h_BTD = nn.layer_norm(x_BTD, self.mlp_scale_D, self.mlp_bias_D, e)
        return x_BTD + self.mlp(nn.enter(h_BTD))

    @jax.named_scope("attention")
    def attention(self, x_BTD, segments_BT):
        weights = self.query_DHK, self.key_DHK, self.value_DHK
        biases = self.query_bias_HK, self.key_bias_HK, self.value_bias_HK
        projected = nn.project_all(("BTD,DHK->BTHK",) * 3, x_BTD, *weights)
        qkv = (x_BTHK + nn.bias(bias, "HK", "BTHK") for x_BTHK, bias in zip(projected, biases, strict=True))
        o_BTD = nn.project("BTHK,HKD->BTD", attention(*qkv, segments_BT), self.out_HKD)
        return o_BTD + nn.bias(self.out_bias_D, "D", "BTD")

    @jax.named_scope("mlp")
    def mlp(self, x_BTD):
        h_BTF = nn.project("BTD,DF->BTF", x_BTD, self.up_DF) + nn.bias(self.up_bias_F, "F", "BTF")
        return nn.project("BTF,FD->BTD", jax.nn.gelu(h_BTF), self.down_FD) + nn.bias(self.down_bias_D, "D", "BTD")


class GPT2Model(nnx.Module):
    """`tokens_BT -> logits_BTV`; see `nn.Decoder`."""

    def __init__(self, c: GPT2, key: jax.Array):
        keys, sizes = jax.random.split(key, 3), c.sizes()
        self.c = c
        self.embed_VD = nn.normal(keys[0], "VD", sizes, 0.02)
        self.position_PD = nn.normal(keys[1], "PD", sizes, 0.01)
        self.blocks = nn.stack(functools.partial(GPT2Block, c), keys[2], c.layers)
        self.final_scale_D, self.final_bias_D = nn.full(1, "D", sizes), nn.full(0, "D", sizes)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        position_PD = nn.use(self.position_PD, "PD").astype(nn.how().activations)
        positions_BT = nn.positions(tokens_BT.shape[1])
        rows, place = jax.typeof(positions_BT).sharding.spec[0], nn.how().layout.gathered("_TD")
        position_BTD = position_PD.at[positions_BT].get(out_sharding=jax.P(rows, *place[1:]))
        x_BTD = nn.embed(tokens_BT, self.embed_VD)
        return x_BTD + jax.reshard(position_BTD, jax.P(rows, *jax.typeof(x_BTD).sharding.spec[1:]))

    def layer(self, block: GPT2Block, x_BTD: jax.Array, segments_BT: jax.Array | None) -> tuple[jax.Array, None]:
        return block(x_BTD, segments_BT), None

    def head(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = nn.enter(nn.layer_norm(x_BTD, self.final_scale_D, self.final_bias_D, self.c.epsilon))
        return nn.project("BTD,VD->BTV", x_BTD, self.embed_VD)

    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
        return nn.decode(self, tokens_BT, segments_BT)[0]
