"""The loss of a mixture of experts: next tokens, and what keeps routers even."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmjax.models import nn, routers
from llmjax.train import pieces
from llmjax.train.loss import Batch, NextToken, Sums


@dataclasses.dataclass(frozen=True)
class RoutedNextToken:
    """`NextToken`, plus losses of the routers over all tokens, added over layers; see `routers.sums` for what they are.

    Per token: nats + `balance` · Σ_layers balance + `router_z` · Σ_layers log²(Z of the router). A router with a bias
    has it moved after every step, by what all experts got in the whole step.
    """

    z: float = 0.0
    "Weight of log²(Z) of the model's logits, as in NextToken."
    balance: float = 0.01
    "Weight of the load-balance loss of every sequence (arXiv:2412.19437); with biases, 0.0001 or none."
    router_z: float = 0.001
    "Weight of log²(Z) of the router's logits (ST-MoE, arXiv:2202.08906)."
    bias_rate: float = 0.001
    "How far a step moves the bias of an expert with more or less than the mean load (arXiv:2408.15664)."
    ahead: float = 0.3
    "Weight of the mean loss of further tokens, where the model predicts any (arXiv:2412.19437, section 2.2)."

    def __call__(self, model: nnx.Module, batch: Batch) -> tuple[jax.Array, Sums]:
        given, batch = batch, jax.tree.map(nn.in_order, batch)
        x_BTD, counted = nn.stream(model, batch["tokens"], batch.get("segments"))
        total, sums = pieces.of_stream(self.of, model, x_BTD, batch)
        if hasattr(model, "ahead"):
            further, beyond = self.of_further(model, x_BTD, given)
            counted = jax.tree.map(lambda x, more: jnp.concatenate([whole(x), whole(more)]), counted, beyond)
            total, sums = total + self.ahead * further, sums | dict(ahead=further)
        more, routed = self.of_layers(counted)
        return total + more, sums | routed

    def of_further(self, model: nnx.Module, x_BTD: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(the mean over further tokens of their losses, what their layers counted), given the stream and the batch."""
        later = [jax.tree.map(nn.in_order, behind(batch, k + 1)) for k in range(model.c.ahead)]
        total, counted, tokens = 0.0, [], [each["tokens"] for each in later]
        beyond = model.beyond(x_BTD, tokens, later[0].get("segments"))
        for each, (ends, y_BTD, sums) in zip(later, beyond, strict=True):
            total += pieces.of_stream(self.of, ends, y_BTD, each)[0]
            counted.append(sums)
        return total / len(later), jax.tree.map(lambda *each: jnp.concatenate(each), *counted)

    def of(self, logits_BTV: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """The loss of these logits; the batch is in their order."""
        return NextToken(self.z).of(logits_BTV, batch)

    def of_layers(self, counted: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
        """The loss of what the layers counted, each with a leading L."""
        sums = {name: jnp.sum(counted[name]) for name in ("dropped", "balance", "router_z")}
        loss = self.balance * sums["balance"] + self.router_z * sums["router_z"]
        return loss, dict(load_LE=whole(counted["load_E"]), **sums)

    def rebalance(self, model: nnx.Module, sums: Sums) -> nnx.Module:
        """The model with its routers' biases moved towards an even load, given the sums of a whole step."""

        def moved(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if "router_bias_E" not in name:
                return x
            load_LE = sums["load_LE"]
            own_LE = load_LE[-len(x) :] if name.startswith("ahead.") else load_LE[: len(x)]
            return routers.rebalanced(x, own_LE, self.bias_rate)

        return jax.tree_util.tree_map_with_path(moved, model)

    def facts(self, sums: dict[str, np.ndarray], tokens: int) -> dict[str, Any]:
        """What the records say of a step over so many tokens.

        dropped: share of choices that found no slot · load_max: of the fullest expert, in multiples of its layer's mean
        · balance and router_z: per token, mean over layers · load: choices per expert, a list for every layer
        · ahead: nats per further token, where there are any, whose layers come last.
        """
        load_LE = np.asarray(sums["load_LE"], np.float64)
        per_token = 1 / (tokens * len(load_LE))
        return dict(
            dropped=float(sums["dropped"]) / load_LE.sum(),
            load_max=float((load_LE / load_LE.mean(1, keepdims=True)).max()),
            balance=float(sums["balance"]) * per_token,
            router_z=float(sums["router_z"]) * per_token,
            load=load_LE.astype(int).tolist(),
            **({"ahead": float(sums["ahead"]) / tokens} if "ahead" in sums else {}),
        )

    @property
    def held_out(self) -> NextToken:
        """The loss that evaluation reports: the cross-entropy alone."""
        return NextToken()


def whole(x: jax.Array) -> jax.Array:
    """The same on every device, so that every process can read it."""
    return jax.reshard(x, jax.P(*[None] * x.ndim))


def behind(batch: Batch, k: int) -> Batch:
    """What each position would see k tokens later; there is no target beyond the end of its row or of its segment."""
    moved = jax.tree.map(lambda x: jnp.roll(x, -k, 1), batch)
    there = jnp.arange(batch["tokens"].shape[1])[None] < batch["tokens"].shape[1] - k
    if "segments" in batch:
        there = there & (moved["segments"] == batch["segments"])
        moved["segments"] = batch["segments"]
    return moved | dict(weights=moved["weights"] * there)
