"""Mixtral: Llama with a mixture of experts for its feed-forward (arXiv:2401.04088).

With `router="sigmoid"` and shared experts the mixture is DeepSeek-V3's (arXiv:2412.19437, section 2.1.2).
"""

import dataclasses
from typing import Literal

import jax

from llmjax.errors import Refused
from llmjax.models import memory, moe, nn, routers, shapes
from llmjax.models.llama import Llama, LlamaBlock, LlamaModel, Sums, swiglu
from llmjax.models.shapes import Matrix


@dataclasses.dataclass(frozen=True)
class Mixtral(Llama):
    """Shape of a Llama with experts in every layer; `ff` is the width of one expert.

    Raises:
      Refused: the experts and the router do not fit together.
    """

    experts: int = 8
    "Experts per layer, E."
    top_k: int = 2
    "Experts that a token goes to."
    shared: int = 0
    "Experts that every token goes to besides."
    router: Literal["softmax", "sigmoid"] = "softmax"
    "softmax: over the chosen logits. sigmoid: balanced by a bias that the loss moves, instead of by a loss."
    capacity: float = 0.0
    "Tokens of a sequence that an expert takes, in multiples of the mean; those beyond are dropped. 0: none is."

    def __post_init__(self):
        super().__post_init__()
        if self.experts < 1:
            raise Refused(f"model.experts is {self.experts}: give at least 1.")
        if not 1 <= self.top_k <= self.experts:
            raise Refused(
                f"model.top_k is {self.top_k}, and there are {self.experts} experts: give 1 to {self.experts}."
            )
        if self.shared < 0:
            raise Refused(f"model.shared is {self.shared}: give the number of shared experts, or 0 for none.")
        if not self.capacity >= 0:
            raise Refused(f"model.capacity is {self.capacity}: give a multiple such as 1.25, or 0 to drop no token.")

    def sizes(self) -> nn.Sizes:
        return {**super().sizes(), "E": self.experts}

    def init(self, key: jax.Array) -> "MixtralModel":
        return MixtralModel(self, key, MixtralBlock)

    def matrices(self) -> shapes.Matrices:
        met = self.top_k / self.experts
        routed = Matrix("DE"), Matrix("EDF", 2, met), Matrix("EFD", 1, met)
        shared = (Matrix("DF", 2 * self.shared), Matrix("FD", self.shared)) if self.shared else ()
        return {**super().matrices(), "mlp": routed + shared}


class MixtralBlock(LlamaBlock):
    def feed_forward(self, keys: jax.Array, sizes: nn.Sizes, into: float, out: float) -> None:
        c, more = self.c, jax.random.split(keys[0], 4)
        self.router_DE = nn.normal(more[0], "DE", sizes, into)
        if c.router == "sigmoid":
            self.router_bias_E = nn.full(0, "E", sizes)
        self.gate_EDF = nn.normal(more[1], "EDF", sizes, into)
        self.up_EDF = nn.normal(more[2], "EDF", sizes, into)
        self.down_EFD = nn.normal(more[3], "EFD", sizes, out)
        if c.shared:
            more, sizes = jax.random.split(keys[1], 3), {**sizes, "F": c.shared * c.ff}
            self.shared_gate_DF = nn.normal(more[0], "DF", sizes, into)
            self.shared_up_DF = nn.normal(more[1], "DF", sizes, into)
            self.shared_down_FD = nn.normal(more[2], "FD", sizes, out * c.shared**-0.5)

    @jax.named_scope("mlp")
    def mlp(self, x_BTD: jax.Array) -> tuple[jax.Array, Sums]:
        c, T = self.c, x_BTD.shape[1]
        logits_BTE = self.router_logits(x_BTD)
        choice = self.choice(logits_BTE)
        capacity = 0 if memory.of() else c.capacity  # of all tokens of a sequence, which are not here
        slots = routers.slots(capacity, T, c.top_k, c.experts) if capacity else T
        keep_BTJ = routers.within(choice.chosen_BTJ, c.experts, slots) if capacity else None
        y_BTD = self.experts(x_BTD, choice, keep_BTJ, slots)
        if c.shared:
            y_BTD += swiglu(x_BTD, self.shared_gate_DF, self.shared_up_DF, self.shared_down_FD)
        return y_BTD, routers.sums(logits_BTE, choice, keep_BTJ)

    def router_logits(self, x_BTD: jax.Array) -> jax.Array:
        """How much a token favours each expert, [B, T, E]."""
        return routers.logits(x_BTD, self.router_DE)

    def choice(self, logits_BTE: jax.Array) -> routers.Choice:
        """The experts that every token goes to."""
        if self.c.router == "softmax":
            return routers.softmax(logits_BTE, self.c.top_k)
        return routers.sigmoid(logits_BTE, self.router_bias_E, self.c.top_k)

    def experts(self, x_BTD: jax.Array, choice: routers.Choice, keep_BTJ: jax.Array | None, slots: int) -> jax.Array:
        """What they make of it; see `moe.experts`."""
        return moe.experts(x_BTD, choice, keep_BTJ, slots, (self.gate_EDF, self.up_EDF, self.down_EFD))


class MixtralModel(LlamaModel):
    """`tokens_BT -> logits_BTV`; see `nn.Decoder`. Its layers count what `routers.sums` names."""
