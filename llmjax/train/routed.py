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

    def __call__(self, model: nnx.Module, batch: Batch) -> tuple[jax.Array, Sums]:
        batch = jax.tree.map(nn.in_order, batch)
        x_BTD, counted = nn.stream(model, batch["tokens"], batch.get("segments"))
        (total, sums), (more, routed) = pieces.of_stream(self.of, model, x_BTD, batch), self.of_layers(counted)
        return total + more, sums | routed

    def of(self, logits_BTV: jax.Array, batch: Batch) -> tuple[jax.Array, Sums]:
        """The loss of these logits; the batch is in their order."""
        return NextToken(self.z).of(logits_BTV, batch)

    def of_layers(self, counted: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
        """The loss of what the layers counted, each with a leading L."""
        sums = {name: jnp.sum(counted[name]) for name in ("dropped", "balance", "router_z")}
        loss = self.balance * sums["balance"] + self.router_z * sums["router_z"]
        load_LE = jax.reshard(counted["load_E"], jax.P(None, None))  # every process can read it
        return loss, dict(load_LE=load_LE, **sums)

    def rebalance(self, model: nnx.Module, sums: Sums) -> nnx.Module:
        """The model with its routers' biases moved towards an even load, given the sums of a whole step."""

        def moved(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return routers.rebalanced(x, sums["load_LE"], self.bias_rate) if "router_bias_E" in name else x

        return jax.tree_util.tree_map_with_path(moved, model)

    def facts(self, sums: dict[str, np.ndarray], tokens: int) -> dict[str, Any]:
        """What the records say of a step over so many tokens.

        dropped: share of choices that found no slot · load_max: of the fullest expert, in multiples of its layer's mean
        · balance and router_z: per token, mean over layers · load: choices per expert, a list for every layer.
        """
        load_LE = np.asarray(sums["load_LE"], np.float64)
        per_token = 1 / (tokens * len(load_LE))
        return dict(
            dropped=float(sums["dropped"]) / load_LE.sum(),
            load_max=float((load_LE / load_LE.mean(1, keepdims=True)).max()),
            balance=float(sums["balance"]) * per_token,
            router_z=float(sums["router_z"]) * per_token,
            load=load_LE.astype(int).tolist(),
        )

    @property
    def held_out(self) -> NextToken:
        """The loss that evaluation reports: the cross-entropy alone."""
        return NextToken()
