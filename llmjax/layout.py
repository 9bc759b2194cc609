"""The alphabet, and how its letters are laid over the mesh.

    B batch · T position · S key position · D model · H query heads · G key/value heads · K head dim · F feed-forward
    V vocabulary · L layers · E experts · C expert capacity · N microbatches in flight · A accumulation steps
    R rank of an adapter, which no layout cuts

The same letters name array dims (`x_BTD`), einsum subscripts and the keys of a layout. "axis" means mesh axis, "dim"
means tensor dimension.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal

from jax import P

from llmjax.errors import Refused, did_you_mean
from llmjax.mesh import AXES, Axes

Placement = Mapping[str, str | tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Three maps from letter to mesh axis (or axes): parameters at rest, the residual stream, everything inside.

    Every kind of parallelism is a value of this class, and so is every product of kinds: `fsdp | tp | ring`. Where a
    weight lives while it is used is derived: its resting place minus the axes that cut the batch, which is what ZeRO-3
    means (arXiv:1910.02054), unless it is that very dim that is cut inside, as experts are.
    """

    name: str
    params: Placement
    stream: Placement
    inner: Placement

    def __hash__(self):  # part of every jit key: two layouts must never share a program
        return hash(repr(self))

    def at_rest(self, dims: str) -> P:
        """Where a parameter with these dims is stored."""
        return self._place(self.params, dims)

    def in_use(self, dims: str) -> P:
        """Where a parameter lives while it is used: gathered over every axis that cuts the batch."""
        batch = axes_of(self.inner.get("B"))
        kept = {
            d: tuple(a for a in axes_of(self.params.get(d)) if a not in batch or a in axes_of(self.inner.get(d)))
            for d in dims
        }
        return self._place(kept, dims)

    def activation(self, dims: str) -> P:
        """Where an activation lives: "BTD" is the residual stream, anything else is inside a block."""
        return self._place(self.stream if dims == "BTD" else self.inner, dims)

    def gathered(self, dims: str) -> P:
        """Where the residual stream lives once it has entered a block."""
        return self._place(self.inner, dims)

    def _place(self, placement: Placement, dims: str) -> P:
        axes = [axis for d in dims for axis in axes_of(placement.get(d))]
        if twice := {axis for axis in axes if axes.count(axis) > 1}:
            raise Refused(
                f"layout {self.name} cuts two dims of an array {dims} over '{min(twice)}': "
                f"name an axis for one of {' and '.join(d for d in dims if min(twice) in axes_of(placement.get(d)))}."
            )
        return P(*(placement.get(d) or None for d in dims))

    def __or__(self, other: "Layout") -> "Layout":
        """Both at once: what either cuts is cut, over the axes of both."""
        return Layout(
            f"{self.name}_{other.name}".removeprefix("dp_"),
            _joined(self.params, other.params),
            _joined(self.stream, other.stream),
            _joined(self.inner, other.inner),
        )

    def without(self, axis: str) -> "Layout":
        """The layout inside a part of the program that has `axis` to itself."""

        def drop(placement):
            return {d: tuple(a for a in axes_of(v) if a != axis) for d, v in placement.items()}

        return Layout(self.name, drop(self.params), drop(self.stream), drop(self.inner))

    def axes(self) -> frozenset[str]:
        """The mesh axes this layout cuts anything over."""
        return frozenset(
            a for m in (self.params, self.stream, self.inner) for value in m.values() for a in axes_of(value)
        )

    def rest(self) -> str:
        """The axis that takes the devices nobody asked for: `fsdp` where parameters are cut over it, else `data`."""
        return "fsdp" if any("fsdp" in axes_of(value) for value in self.params.values()) else "data"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How microbatches pass through the stages that a layout cuts L into; `llmjax.models.pipeline` draws it."""

    schedule: Literal["gpipe", "circular", "1f1b"] = "gpipe"
    "All forward, then all backward; the same in laps; or one forward, one backward, which bounds memory by stages."
    microbatches: int = 0
    "Parts, N, that the rows of a device are cut into; 0: as many as divide them, up to two per stage."
    repeats: int = 2
    "Laps of the circular schedule: each stage holds so many groups of layers that are not neighbours."
    gather_once: bool = True
    "Gather weights cut over fsdp, and sum gradients over data and fsdp, once per step instead of in every tick."

    @property
    def laps(self) -> int:
        """How often a microbatch passes every stage, R."""
        return self.repeats if self.schedule == "circular" else 1

    def parts(self, rows: int, stages: int) -> int:
        """The number of microbatches, N: what is wished for, or the next smaller one that divides the rows."""
        most = min(rows, self.microbatches or 2 * stages)
        return next(n for n in range(most, 0, -1) if rows % n == 0)


def axes_of(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """A placement as a tuple of axes."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def ways(placement: str | tuple[str, ...] | None, sizes: Axes) -> int:
    """Into how many parts a dim with this placement is cut."""
    return math.prod(getattr(sizes, axis) for axis in axes_of(placement))


def _joined(a: Placement, b: Placement) -> Placement:
    def axes(d):
        both = axes_of(a.get(d)) + axes_of(b.get(d))
        unique = tuple(sorted(set(both), key=AXES.index))
        return unique[0] if len(unique) == 1 else unique

    return {d: axes(d) for d in (*a, *(d for d in b if d not in a))}


_BATCH = {"B": ("data", "fsdp")}
_TENSOR = {"H": "tensor", "G": "tensor", "F": "tensor", "V": "tensor"}

dp = Layout("dp", params={}, stream=_BATCH, inner=_BATCH)
fsdp = Layout("fsdp", params={"D": "fsdp"}, stream=_BATCH, inner=_BATCH)
tp = Layout("tp", params=_TENSOR, stream=_BATCH, inner=_BATCH | _TENSOR)
sp = Layout("sp", params={}, stream=_BATCH | {"T": "tensor"}, inner=_BATCH)
cp = Layout("cp", params={}, stream=_BATCH | {"T": "context"}, inner=_BATCH | {"T": "context"})
ring = Layout("ring", params={}, stream=cp.stream, inner=cp.inner | {"S": "context"})
ep = Layout("ep", {"E": "expert"}, {"B": (*_BATCH["B"], "expert")}, {"B": (*_BATCH["B"], "expert"), "E": "expert"})
pp = Layout("pp", params={"L": "stage"}, stream=_BATCH, inner=_BATCH)
# For pp_vp: every stage holds, and computes, its part of the embedding and the head instead of all of them.
vp = Layout("vp", {"V": "stage"}, _BATCH, _BATCH | {"V": "stage"})
fsdp_tp = fsdp | tp
fsdp_tp_sp = fsdp | tp | sp

KINDS = {layout.name: layout for layout in (dp, fsdp, tp, sp, cp, ring, ep, pp, vp)}


def preset(name: str) -> Layout:
    """The layout of that name: one of KINDS, or several joined by `_`, such as fsdp_tp_ring.

    Raises:
      Refused: a part of the name is no kind.
    """
    for part in name.split("_"):
        if part not in KINDS:
            raise Refused(
                f"there is no layout named '{name}': {did_you_mean(part, KINDS)}"
                f"join any of {', '.join(KINDS)} with _, as in fsdp_tp."
            )
    return functools.reduce(Layout.__or__, (KINDS[part] for part in name.split("_")))
