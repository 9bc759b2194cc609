"""AdamW in the maximal update parametrization, muP."""

import dataclasses
import math
from typing import Any

import jax
import optax

from llmjax.errors import Refused
from llmjax.optim.moments import Moments, kept
from llmjax.optim.schedules import Cosine, Schedule, rate
from llmjax.optim.weights import matrices, sides

WIDE = frozenset("DFHG")  # the letters whose sizes grow with the width of a model


@dataclasses.dataclass(frozen=True)
class MuP:
    """AdamW whose best learning rate is the same at every width (arXiv:2203.03466, table 8; arXiv:2011.14522).

    The width D is compared with `base`, that of the small model at which the rate was found; at `base` itself this is
    AdamW, number for number. Elsewhere, with rows the inputs of a weight and columns its outputs:

        matrices whose rows grow with the width, hidden ones and the head     rate * base / D
        weights from the width to numbers that stay, the head and routers     also start at sqrt(base / D) as much
        embeddings, scales, biases                                            as under AdamW

    A step of a weight then changes what the weight gives by as much at any width. The head's start is as 1/D in all,
    since models here draw it with a deviation of 1/sqrt(D); a head of its own is needed, as one tied to the embedding
    cannot start small. A matrix loses lr * weight_decay of itself per step at any width.

    Widths are to grow by more heads of one size, with feed-forward and key heads in proportion, at the same depth,
    batch and number of steps: what rate is best at other ones of these is another question. `epsilon` is not scaled,
    and is to be small beside the root of v, which falls about as 1/D. State as AdamW's.
    """

    base: int
    "Width D of the model at which the learning rate was found."
    lr: float = 3e-4
    "Peak learning rate, at that width."
    schedule: Schedule = Cosine()
    "Which share of the peak each step takes."
    b1: float = 0.9
    "Decay of the average of gradients."
    b2: float = 0.95
    "Decay of the average of squared gradients."
    epsilon: float = 1e-8
    "Added to the root of that average."
    weight_decay: float = 0.1
    "Share of a matrix that is taken off per step, times the learning rate, at any width."
    moments: Moments = "float32"
    "Precision of both averages between steps; see `llmjax.optim.moments`. bfloat16: half their memory."

    def build(self, steps: int) -> optax.GradientTransformation:
        """See `llmjax.optim.schedules.Optimizer.build`; training is to begin with what `start` gives."""
        if self.base < 1:
            raise Refused(f"optimizer.base is {self.base}: give the width (model.width) that the rate was found at.")
        lr = rate(self, steps)
        tx = optax.chain(
            optax.scale_by_adam(self.b1, self.b2, self.epsilon),
            optax.stateless(lambda updates, params: self._scaled(updates)),
            optax.add_decayed_weights(self.weight_decay, mask=matrices),
            optax.scale_by_learning_rate(lr),
        )
        return kept(tx, self.moments)

    def start(self, model: Any) -> Any:
        """The model that training begins with, given a fresh one: placed as that, and of the same types.

        Raises:
          Refused: it has no head of its own.
        """
        if not any("V" in sides(path, x)[1] for path, x in _leaves(model)):
            raise Refused(
                f"optimizer is MuP, but {type(model).__name__} has no output head of its own (a weight whose name ends "
                f"in DV) to start small: set model.tied to False where there is such a field, or use AdamW."
            )
        share = math.sqrt(self.base / width(model))

        def started(path, x):
            rows, columns = sides(path, x)
            return x * share if WIDE & set(rows) and not WIDE & set(columns) else x

        return jax.tree_util.tree_map_with_path(started, model)

    def _scaled(self, updates: Any) -> Any:
        share = self.base / width(updates)
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x * share if share != 1 and WIDE & set(sides(path, x)[0]) else x, updates
        )


def width(tree: Any) -> int:
    """D of a model, or of a tree like it.

    Raises:
      Refused: no weight's name has a D.
    """
    for path, x in _leaves(tree):
        letters = "".join(sides(path, x))
        if "D" in letters:
            return x.shape[letters.index("D") - len(letters)]
    raise Refused(
        "optimizer is MuP, but no weight of the model has a dim called D in its name, from which to tell the width: "
        "name weights by their dims, such as up_DF, or use AdamW."
    )


def _leaves(tree: Any) -> list[tuple[Any, jax.Array]]:
    return jax.tree_util.tree_leaves_with_path(tree)
