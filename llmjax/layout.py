"""The alphabet, and how its letters are laid over the mesh.

    B batch · T position · S key position · D model · H query heads · G key/value heads · K head dim · F feed-forward
    V vocabulary · L layers · E experts · C expert capacity · N microbatches in flight · A accumulation steps

The same letters name array dims (`x_BTD`), einsum subscripts and the keys of a layout. "axis" means mesh axis, "dim"
means tensor dimension.
"""

import dataclasses
from collections.abc import Mapping

from jax import P

from llmjax.errors import Refused, did_you_mean

Placement = Mapping[str, str | tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Three maps from letter to mesh axis (or axes): parameters at rest, the residual stream, everything inside.

    Data parallelism, ZeRO-3, tensor parallelism, sequence parallelism and their products are values of this class.
    Where a weight lives while it is used is derived: its resting place minus the axes that cut the batch, which is
    what ZeRO-3 means (arXiv:1910.02054).
    """

    name: str
    params: Placement
    stream: Placement
    inner: Placement

    def __hash__(self):  # part of every jit key: two layouts must never share a program
        return hash(repr(self))

    def at_rest(self, dims: str) -> P:
        """Where a parameter with these dims is stored."""
        return P(*(self.params.get(d) for d in dims))

    def in_use(self, dims: str) -> P:
        """Where a parameter lives while it is used: gathered over every axis that cuts the batch."""
        batch = axes_of(self.inner.get("B"))
        return P(*(tuple(a for a in axes_of(self.params.get(d)) if a not in batch) or None for d in dims))

    def activation(self, dims: str) -> P:
        """Where an activation lives: "BTD" is the residual stream, anything else is inside a block."""
        return P(*((self.stream if dims == "BTD" else self.inner).get(d) for d in dims))

    def gathered(self, dims: str) -> P:
        """Where the residual stream lives once it has entered a block."""
        return P(*(self.inner.get(d) for d in dims))

    def axes(self) -> frozenset[str]:
        """The mesh axes this layout cuts anything over."""
        return frozenset(
            a for m in (self.params, self.stream, self.inner) for value in m.values() for a in axes_of(value)
        )

    def rest(self) -> str:
        """The axis that takes the devices nobody asked for: `fsdp` where parameters are cut over it, else `data`."""
        return "fsdp" if any("fsdp" in axes_of(value) for value in self.params.values()) else "data"


def axes_of(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """A placement as a tuple of axes."""
    return (value,) if isinstance(value, str) else tuple(value or ())


_BATCH = {"B": ("data", "fsdp")}
_TENSOR = {"H": "tensor", "G": "tensor", "F": "tensor", "V": "tensor"}

dp = Layout("dp", params={}, stream=_BATCH, inner=_BATCH)
fsdp = Layout("fsdp", params={"D": "fsdp"}, stream=_BATCH, inner=_BATCH)
tp = Layout("tp", params=_TENSOR, stream=_BATCH, inner=_BATCH | _TENSOR)
fsdp_tp = Layout("fsdp_tp", params={"D": "fsdp"} | _TENSOR, stream=_BATCH, inner=_BATCH | _TENSOR)
fsdp_tp_sp = Layout("fsdp_tp_sp", fsdp_tp.params, stream=_BATCH | {"T": "tensor"}, inner=fsdp_tp.inner)

PRESETS = {layout.name: layout for layout in (dp, fsdp, tp, fsdp_tp, fsdp_tp_sp)}


def preset(name: str) -> Layout:
    """The preset of that name.

    Raises:
      Refused: there is none.
    """
    if name not in PRESETS:
        raise Refused(
            f"there is no layout named '{name}': {did_you_mean(name, PRESETS)}choose one of {', '.join(PRESETS)}."
        )
    return PRESETS[name]
