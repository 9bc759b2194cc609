"""What a family's config says of its sizes, from which FLOPs, bytes and messages are counted without a trace."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight that tokens are multiplied by, or several alike."""

    dims: str
    count: float = 1
    "How many there are, in each layer if they are a layer's: a mean, where some layers have others."
    share: float = 1
    "The part of it that one token meets: of 8 experts of whom each token goes to 2, a quarter; of a table, nothing."

    def size(self, sizes: Mapping[str, int]) -> float:
        """Numbers in all of them."""
        return self.count * math.prod(sizes[d] for d in self.dims)


Matrices = Mapping[str, tuple[Matrix, ...]]  # of one layer: attention, mlp; of the model: embedding, head
LAYER = ("attention", "mlp")


def seen(model: Any, sequence: int) -> float:
    """The part of the causal triangle that windows leave, mean over layers.

    Kinds of layers take turns, and those that fit no turn come first; `model.windows()` says how far each kind looks
    back, 0 for all the way.
    """
    kinds = model.windows() if hasattr(model, "windows") else (0,)
    full, ahead = divmod(model.layers, len(kinds))

    def part(window: int) -> float:
        return 1 if window == 0 or window >= sequence else window * (2 * sequence - window) / sequence**2

    each = [part(window) for window in kinds]
    return (full * sum(each) + sum(each[len(kinds) - ahead :])) / model.layers


def flops_per_token(model: Any, sequence: int) -> tuple[float, float]:
    """Training FLOPs per token, (causal, full): 6 per weight that it meets and 12·L·T·H·K for the whole T² square.

    K is the mean of the widths of keys and of values (Y), where these differ.

    Causal ones are those of what windows leave of the triangle.
    """
    sizes, met = model.sizes(), 0.0
    for module, matrices in model.matrices().items():
        met += (model.layers if module in LAYER else 1) * sum(m.share * m.size(sizes) for m in matrices)
    layers = model.layers + getattr(model, "ahead", 0)
    square = 6 * layers * sequence * sizes["H"] * (sizes["K"] + sizes.get("Y", sizes["K"]))
    return 6 * met + square / 2 * seen(model, sequence), 6 * met + square
