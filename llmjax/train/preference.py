"""Direct preference optimisation: of two answers to a prompt, the better one becomes likelier (arXiv:2305.18290).

What is compared with are the weights that training began with: a frozen copy of them or, with adapters, the weights
beside which these stand, which cost nothing more. Their log-probabilities are computed in the step and not beforehand:
so a batch is a function of the data alone, on any mesh and after any restart, and nothing can be out of date. That is
one more forward pass, a fourth of a step.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P

from llmjax.errors import Refused
from llmjax.models import nn
from llmjax.train.loss import Batch, Sums, cross_entropy


@dataclasses.dataclass(frozen=True)
class DPO:
    """-log σ(reward of the chosen answer - that of the rejected), reward = beta · log(p / p of the reference).

    The batch holds `tokens`, `targets` and `weights`, [B, 2, T]: the chosen answer and the rejected one, each after the
    prompt; a weight is 1 where the target is of the answer. The loss is a sum over pairs, `weight` their number. Of
    experts, no loss that keeps them even is added.
    """

    beta: float = 0.1
    "How dear it is to move away from the reference."

    reference: ClassVar[bool] = True  # it takes the frozen weights as well
    sequences: ClassVar[int] = 2  # of an example
    weighs: ClassVar[str] = "pairs"  # what evaluation calls its `weight`

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise Refused(f"loss.beta is {self.beta}: give a positive number, such as 0.1.")

    def __call__(self, model: nnx.Module, batch: Batch, reference: nnx.Module) -> tuple[jax.Array, Sums]:
        beyond_B2 = log_chances(model, batch) - jax.lax.stop_gradient(log_chances(reference, batch))
        real_B = (jnp.sum(batch["weights"], (1, 2)) > 0).astype(jnp.float32)
        reward_B2 = self.beta * beyond_B2
        margin_B = reward_B2[:, 0] - reward_B2[:, 1]
        sums = dict(
            weight=real_B, reward_margin=margin_B, reward_accuracy=margin_B > 0, reward_chosen=reward_B2[:, 0],
            reward_rejected=reward_B2[:, 1],
        )  # fmt: skip
        return -jnp.sum(jax.nn.log_sigmoid(margin_B) * real_B), {name: jnp.sum(x * real_B) for name, x in sums.items()}

    def facts(self, sums: dict[str, np.ndarray], tokens: int) -> dict[str, Any]:
        """What the records say of a step: mean rewards, and the share of pairs in which the chosen one's is larger."""
        names = "reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected"
        return {name: float(sums[name]) / max(float(sums["weight"]), 1.0) for name in names}


def log_chances(model: nnx.Module, batch: Batch) -> jax.Array:
    """The log-probability of every answer, float32 [B, 2]: a sum over its tokens."""
    pairs, sequences = jax.typeof(batch["tokens"]).sharding.spec[0], batch["tokens"].shape[1]

    def flat(x_B2T):  # the two of a pair are on one device
        return jnp.reshape(x_B2T, (-1, x_B2T.shape[2]), out_sharding=P(pairs, None))

    rows = jax.tree.map(lambda x: nn.in_order(flat(x)), batch)
    logits_BTV = model(rows["tokens"], rows.get("segments")).astype(jnp.float32)
    nats_BT, _ = cross_entropy(logits_BTV, rows["targets"])
    chance_B = jnp.sum(-nats_BT * rows["weights"], 1)
    return jnp.reshape(chance_B, (-1, sequences), out_sharding=P(jax.typeof(chance_B).sharding.spec[0], None))
