"""DeepSeek-V3: keys and values out of one latent, many small experts, first layers without (arXiv:2412.19437).

Letters of its own: Q and M are the latents of queries and of keys and values; Z is M and the keys' rotary part; K is
the width of queries and keys, N of keys without that part together with values, Y of values; U is twice D.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from llmjax.errors import Refused
from llmjax.models import memory, nn, routers, shapes
from llmjax.models.attention import attention, rope_angles, rotate
from llmjax.models.llama import LlamaBlock, LlamaModel, Sums
from llmjax.models.mixtral import Mixtral, MixtralBlock
from llmjax.models.shapes import Matrix

LATENT_EPSILON = 1e-6  # of the norms of latents, whatever the others have


@dataclasses.dataclass(frozen=True)
class DeepseekV3(Mixtral):
    """Shape of a DeepSeek-V3 model; `ff` is the width of one expert, and every head has its own key and value.

    Raises:
      Refused: heads, groups or layers do not fit together.
    """

    head_dim: int = 192
    theta: float = 10_000.0
    epsilon: float = 1e-6
    shared: int = 1
    router: Literal["softmax", "sigmoid"] = "sigmoid"
    rotary: int = 64
    "Of head_dim, how many at the end carry positions; all keys share theirs."
    value_dim: int = 128
    "Width of a value."
    query_latent: int = 1536
    "Width of what queries are made of; 0: they are made of the stream."
    latent: int = 512
    "Width of what keys and values are made of."
    dense: int = 1
    "First layers that have a feed-forward in place of experts."
    dense_ff: int = 2048
    "Width of that."
    groups: int = 1
    "Groups that the experts are in."
    top_groups: int = 1
    "Groups that a token's experts are in."
    normalised: bool = True
    "Divide the weights of the chosen experts by their sum."
    factor: float = 2.5
    "What the weights of the chosen experts are multiplied by."
    neighbours: bool = True
    "Rotate pairs (2k, 2k + 1) in place of (k, k + rotary / 2)."
    score_weight: float = 0.0
    "With YaRN, scores are multiplied by the square of its length with this weight; 0: they are not."
    ahead: int = 0
    "Tokens behind the next one that training predicts as well, a layer for each (section 2.2)."

    def __post_init__(self):
        super().__post_init__()
        if self.kv_heads != self.heads:
            raise Refused(f"model.kv_heads is {self.kv_heads}: give {self.heads}, as many as heads.")
        if self.rotary % 2 or not 0 < self.rotary < self.head_dim:
            raise Refused(f"model.rotary is {self.rotary}: give an even part of model.head_dim {self.head_dim}.")
        if not 0 <= self.dense < self.layers:
            raise Refused(f"model.dense is {self.dense}: give less than the {self.layers} layers.")
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise Refused(
                f"model.groups is {self.groups} and model.top_groups {self.top_groups}: give a divisor of the "
                f"{self.experts} experts, and not more top_groups than groups."
            )
        if self.top_k > self.experts // self.groups * self.top_groups:
            raise Refused(
                f"model.top_k is {self.top_k}, more than {self.top_groups} groups have: give more top_groups."
            )
        if self.ahead < 0:
            raise Refused(f"model.ahead is {self.ahead}: give how many more tokens to predict, or 0 for none.")

    @property
    def turns(self) -> int:
        """Layers with experts, which stages share."""
        return self.layers - self.dense

    def sizes(self) -> nn.Sizes:
        own = dict(Z=self.latent + self.rotary, M=self.latent, N=self.head_dim - self.rotary + self.value_dim)
        sizes = {**super().sizes(), **own, "Y": self.value_dim, "U": 2 * self.width}
        return {**sizes, "Q": self.query_latent} if self.query_latent else sizes

    def init(self, key: jax.Array) -> "DeepseekV3Model":
        return DeepseekV3Model(self, key, RoutedBlock)

    def matrices(self) -> shapes.Matrices:
        part, more, met = self.turns / self.layers, self.ahead / self.layers, self.top_k / self.experts
        queries = (Matrix("DQ"), Matrix("QHK")) if self.query_latent else (Matrix("DHK"),)
        attention = *queries, Matrix("DZ"), Matrix("MHN"), Matrix("HYD")
        wide = (part + more) * self.shared + (1 - part) * self.dense_ff / self.ff  # of an expert's width
        routed = Matrix("DE", part + more), Matrix("EDF", 2 * (part + more), met), Matrix("EFD", part + more, met)
        joined = (Matrix("UD", more),) if more else ()
        ends = super().matrices()
        return {
            **ends,
            "attention": tuple(dataclasses.replace(m, count=m.count * (1 + more)) for m in attention),
            "mlp": (*routed, Matrix("DF", 2 * wide), Matrix("FD", wide), *joined),
            "head": tuple(dataclasses.replace(m, share=1 + self.ahead) for m in ends["head"]),
        }


class LatentBlock(LlamaBlock):
    """Multi-head latent attention (arXiv:2405.04434, section 2.1)."""

    def heads(self, keys: jax.Array, sizes: nn.Sizes, into: float, out: float) -> None:
        c, more = self.c, jax.random.split(keys[0])
        if c.query_latent:
            self.query_down_DQ = nn.normal(more[0], "DQ", sizes, into)
            self.query_latent_scale_Q = nn.full(1, "Q", sizes)
            self.query_QHK = nn.normal(more[1], "QHK", sizes, c.query_latent**-0.5)
        else:
            self.query_DHK = nn.normal(more[1], "DHK", sizes, into)
        self.latent_DZ = nn.normal(keys[1], "DZ", sizes, into)
        self.latent_scale_M = nn.full(1, "M", sizes)
        self.key_value_MHN = nn.normal(keys[2], "MHN", sizes, c.latent**-0.5)
        self.out_HYD = nn.normal(keys[3], "HYD", sizes, out * (c.heads * c.value_dim) ** -0.5)

    @jax.named_scope("attention")
    def attention(self, x_BTD, segments_BT):
        found = self.found_in_latents if memory.of() else self.found
        return nn.project("BTHY,HYD->BTD", found(*self.queries_latents(x_BTD), segments_BT), self.out_HYD)

    def queries_latents(self, x_BTD):
        """(queries, their rotary part, latents, keys' rotary part), the rotary parts at their positions."""
        c, plain = self.c, self.c.head_dim - self.c.rotary
        if c.query_latent:
            subscripts, weights = ("BTD,DQ->BTQ", "BTD,DZ->BTZ"), (self.query_down_DQ, self.latent_DZ)
            q_BTQ, z_BTZ = nn.project_all(subscripts, x_BTD, *weights)
            q_BTQ = nn.rms_norm(q_BTQ, self.query_latent_scale_Q, LATENT_EPSILON, "Q")
            q_BTHK = nn.project("BTQ,QHK->BTHK", q_BTQ, self.query_QHK)
        else:
            subscripts = "BTD,DHK->BTHK", "BTD,DZ->BTZ"
            q_BTHK, z_BTZ = nn.project_all(subscripts, x_BTD, self.query_DHK, self.latent_DZ)
        kv_BTM, far_BTK = jnp.split(z_BTZ, [c.latent], -1)
        kv_BTM = nn.rms_norm(kv_BTM, self.latent_scale_M, LATENT_EPSILON, "M")
        own_BTHK, turned_BTHK = jnp.split(q_BTHK * self.sharpness(), [plain], -1)
        return own_BTHK, self.at_positions(turned_BTHK), kv_BTM, self.at_positions(far_BTK[:, :, None])

    def found(self, own_BTHK, turned_BTHK, kv_BTM, far_BTGK, segments_BT):
        """What queries find among keys and values, [B, T, H, Y]."""
        near_BTHN = nn.project("BTM,MHN->BTHN", kv_BTM, self.key_value_MHN)
        near_BTHK, v_BTHY = jnp.split(near_BTHN, [own_BTHK.shape[-1]], -1)
        far_BTHK = jnp.broadcast_to(far_BTGK, turned_BTHK.shape, out_sharding=nn.how().layout.gathered("BTHK"))
        q_BTHK = jnp.concatenate([own_BTHK, turned_BTHK], -1)
        return attention(q_BTHK, jnp.concatenate([near_BTHK, far_BTHK], -1), v_BTHY, segments_BT)

    def found_in_latents(self, own_BTHK, turned_BTHK, kv_BTM, far_BTGK, segments_BT):
        """The same, as q·Wc = Wᵀq·c, so that a memory holds latents and not what all heads make of them."""
        plain, latent = own_BTHK.shape[-1], kv_BTM.shape[-1]
        into_BTHM = nn.project("BTHN,MHN->BTHM", own_BTHK, self.key_value_MHN[..., :plain])
        z_BTGZ = jnp.concatenate([kv_BTM[:, :, None], far_BTGK], -1)
        wider = (z_BTGZ.shape[-1] / self.c.head_dim) ** 0.5  # attention divides by the root of this width
        q_BTHZ = jnp.concatenate([into_BTHM, turned_BTHK], -1) * wider
        o_BTHM = attention(q_BTHZ, z_BTGZ, None, segments_BT)[..., :latent]
        return nn.project("BTHM,MHN->BTHN", o_BTHM, self.key_value_MHN[..., plain:])

    def at_positions(self, x_BTHK: jax.Array) -> jax.Array:
        """The rotary part of queries or keys, turned."""
        c = self.c
        if c.neighbours:
            x_BTHK = jnp.concatenate([x_BTHK[..., 0::2], x_BTHK[..., 1::2]], -1)
        angles_BTK = rope_angles(nn.positions(x_BTHK.shape[1]), c.rotary, c.theta, c.scaling)
        return rotate(x_BTHK, angles_BTK, getattr(c.scaling, "stretch", 1.0))

    def sharpness(self) -> float:
        """What scores are multiplied by."""
        return self.c.scaling.weighted(self.c.score_weight) ** 2 if self.c.score_weight and self.c.scaling else 1.0


class DenseBlock(LatentBlock):
    """One of the first layers, with one wide feed-forward."""

    def feed_forward(self, keys: jax.Array, sizes: nn.Sizes, into: float, out: float) -> None:
        narrower = (self.c.ff / self.c.dense_ff) ** 0.5
        super().feed_forward(keys, {**sizes, "F": self.c.dense_ff}, into, out * narrower)


class RoutedBlock(LatentBlock, MixtralBlock):
    """A layer with experts."""

    def choice(self, logits_BTE: jax.Array) -> routers.Choice:
        c = self.c
        if c.router == "softmax":
            choice = routers.softmax(logits_BTE, c.top_k, c.normalised)
        else:
            bias_E = self.router_bias_E
            choice = routers.sigmoid(logits_BTE, bias_E, c.top_k, c.groups, c.top_groups, c.normalised)
        return choice._replace(share_BTJ=choice.share_BTJ * c.factor)


class AheadBlock(RoutedBlock):
    """A layer with experts over the stream joined with the embeddings of later tokens."""

    def __init__(self, c: DeepseekV3, key: jax.Array):
        own, key = jax.random.split(key)
        super().__init__(c, key)
        sizes = c.sizes()
        self.later_scale_D = nn.full(1, "D", sizes)
        self.stream_scale_D = nn.full(1, "D", sizes)
        self.join_UD = nn.normal(own, "UD", sizes, (2 * c.width) ** -0.5)
        self.final_scale_D = nn.full(1, "D", sizes)

    def joined(self, x_BTD: jax.Array, later_BTD: jax.Array) -> jax.Array:
        """What this layer begins with, of a stream and the embeddings of the tokens to go on from."""
        later_BTD = nn.enter(nn.rms_norm(later_BTD, self.later_scale_D, self.c.epsilon))
        x_BTD = nn.enter(nn.rms_norm(x_BTD, self.stream_scale_D, self.c.epsilon))
        return nn.project("BTU,UD->BTD", jnp.concatenate([later_BTD, x_BTD], -1), self.join_UD)


class DeepseekV3Model(LlamaModel):
    """`tokens_BT -> logits_BTV`; see `nn.Decoder`. Its layers with experts count what `routers.sums` names.

    `ahead`, where it is there, are layers that only a loss calls: one after another they predict tokens further on.
    """

    def add_layers(self, c: DeepseekV3, key: jax.Array, block: type[RoutedBlock]) -> None:
        before, own = jax.random.split(key)
        if c.dense:
            self.first = nn.stack(functools.partial(DenseBlock, c), before, c.dense, everywhere=True)
        self.blocks = nn.stack(functools.partial(block, c), own, c.layers - c.dense)
        if c.ahead:
            self.ahead = nn.stack(
                functools.partial(AheadBlock, c), jax.random.fold_in(own, c.layers), c.ahead, everywhere=True
            )

    def beyond(
        self, x_BTD: jax.Array, later_KBT: list[jax.Array], segments_BT: jax.Array | None
    ) -> Iterator[tuple["DeepseekV3Model", jax.Array, Sums]]:
        """For each further token: (the model with the head that predicts it, the stream, its layer's counts with an L).

        `later_KBT[k]` are the tokens k + 1 behind each position, from which the one after them is predicted.
        """
        x_BTD = nn.rms_norm(x_BTD, self.final_scale_D, self.c.epsilon)
        for k, later_BT in enumerate(later_KBT):
            block = jax.tree.map(lambda weight, k=k: weight[k], self.ahead)
            x_BTD = block.joined(x_BTD, self.embed(later_BT))
            x_BTD, sums = nn.layers(
                self.layer, jax.tree.map(lambda w, k=k: w[k : k + 1], self.ahead), x_BTD, segments_BT
            )
            ends = jax.tree.map(lambda weight: weight, self)  # a copy, whose head is behind another norm
            ends.final_scale_D = block.final_scale_D
            yield ends, x_BTD, sums
            x_BTD = nn.rms_norm(x_BTD, block.final_scale_D, self.c.epsilon)
