"""Which checkpoints stay."""

import dataclasses
import heapq
import math
from collections.abc import Mapping, Set


@dataclasses.dataclass(frozen=True)
class Retention:
    """A checkpoint stays if any of these wants it; so does, always, the newest that was read back and found whole."""

    last: int = 2
    "As many of the newest stay."
    every: int = 0
    "Those of a step that is a multiple of this stay; 0: none for that reason."
    best: int = 0
    "As many with the lowest held-out loss stay; a step without an evaluation has none."

    def kept(self, losses: Mapping[int, float | None], verified: Set[int]) -> set[int]:
        """The steps that stay, of {step: its held-out loss} and of the ones that were read back."""
        known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return {
            *heapq.nlargest(self.last, losses),
            *(step for step in losses if self.every and step % self.every == 0),
            *heapq.nsmallest(self.best, known, key=lambda step: (known[step], -step)),
            *heapq.nlargest(1, losses.keys() & verified),
        }
