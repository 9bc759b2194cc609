"""Where every array of a step lives: how its dims are cut over the mesh, and how many bytes a device holds of it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmjax.checkpoint.checkpoints import named
from llmjax.layout import axes_of
from llmjax.mesh import AXES, Axes
from llmjax.models.quantized import TYPES
from llmjax.train.program import Program

Cuts = tuple[tuple[str, ...], ...]  # for every dim the mesh axes that cut it, the major one first


@dataclasses.dataclass(frozen=True)
class Array:
    """An array, and how it is cut."""

    name: str
    dims: str
    "A letter for every dim, of the alphabet in `llmjax.layout`; ? where the name does not say."
    shape: tuple[int, ...]
    rest: Cuts
    "Where it is stored, or for an activation where it lives."
    number: int
    "Bytes of one number there."
    used: Cuts | None = None
    "A parameter while it is used."
    used_number: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def bytes_held(shape: Sequence[int], cuts: Cuts, sizes: Axes, number: int) -> int:
    """Bytes that one device holds of an array cut so."""
    parts = (math.prod(getattr(sizes, axis) for axis in axes) for axes in cuts)
    return number * math.prod(-(-size // n) for size, n in zip(shape, parts, strict=True))


def parameters(program: Program) -> list[Array]:
    """All weights of the model, in its own order."""
    found, compute = [], program.compute
    for name, x in named(program.abstract_model()).items():
        dims = _dims(name, x.ndim)
        rest, used = _cuts(x.sharding.spec, x.ndim, program), None
        if "?" not in dims:
            used = _cuts(program.run.layout.in_use(dims), x.ndim, program)
        number = 2 if compute.operands == "bfloat16" and x.ndim > 1 + dims.startswith("L") else 4
        if program.run.dtype in TYPES and x.ndim > 2 and "E" not in dims:
            number = 1
        found.append(Array(name, dims, x.shape, rest, x.dtype.itemsize, used, number))
    return found


def activations(program: Program) -> list[Array]:
    """The large activations of a layer and the ends, of one microbatch over all devices."""
    run, layout = program.run, program.run.layout
    if not hasattr(run.model, "sizes"):
        return []
    letters = dict(run.model.sizes())
    stages = math.prod(_size(program, axis) for axis in axes_of(layout.params.get("L")))
    rows = run.batch // program.accumulate
    if stages > 1:
        ways = math.prod(_size(program, axis) for axis in axes_of(layout.inner.get("B")))
        rows //= run.pipeline.parts(rows // ways, stages)
    letters |= dict(B=rows, T=run.sequence)
    number = 2 if program.compute.activations == "bfloat16" else 4
    told = [
        ("the stream between blocks", "BTD", layout.activation("BTD")),
        ("the stream inside a block", "BTD", layout.gathered("BTD")),
        ("queries", "BTHK", layout.activation("BTHK")),
        ("keys, values", "BTGK", layout.activation("BTGK")),
        ("feed-forward", "BTF", layout.activation("BTF")),
        ("logits", "BTV", layout.activation("BTV")),
    ]
    if "E" in letters:
        told = [each for each in told if each[1] != "BTF"]
    return [
        Array(name, dims, tuple(letters[d] for d in dims), _cuts(spec, len(dims), program), number)
        for name, dims, spec in told
        if set(dims) <= letters.keys()
    ]


def matrix(arrays: Sequence[Array]) -> Array | None:
    """The weight that explains most: a layer's from D to F, or else the largest with two dims or more."""
    plain = [a for a in arrays if len(a.dims.removeprefix("L")) == 2 and "?" not in a.dims]
    wide = [a for a in plain if a.dims.removeprefix("L") == "DF"]
    return max(wide or plain, key=lambda a: a.size, default=None)


def gathered(array: Array) -> tuple[str, ...]:
    """The mesh axes over which a weight is gathered for use."""
    used = {axis for axes in array.used or array.rest for axis in axes}
    return tuple(axis for axis in AXES if any(axis in axes for axes in array.rest) and axis not in used)


def summed(array: Array, program: Program) -> tuple[str, ...]:
    """The mesh axes over which its gradient is summed and every device keeps the whole sum of its part."""
    inner = program.run.layout.inner
    tokens = {*axes_of(inner.get("B")), *axes_of(inner.get("T"))}
    held = {axis for axes in array.rest for axis in axes}
    return tuple(axis for axis in AXES if axis in tokens - held and _size(program, axis) > 1)


def piece(cuts: Sequence[str], at: Mapping[str, int], sizes: Axes) -> tuple[int, int]:
    """(which part, of how many) of a dim a device with these coordinates holds."""
    index, parts = 0, 1
    for axis in cuts:
        index, parts = index * getattr(sizes, axis) + at[axis], parts * getattr(sizes, axis)
    return index, parts


def _dims(name: str, rank: int) -> str:
    suffix = name.rpartition("_")[2]
    letters = suffix if suffix.isalpha() and suffix.isupper() else ""
    if len(letters) == rank:
        return letters
    return f"L{letters}" if letters and len(letters) == rank - 1 else "?" * rank


def _cuts(spec: Any, rank: int, program: Program) -> Cuts:
    found = tuple(tuple(a for a in axes_of(part) if _size(program, a) > 1) for part in spec)
    return found + ((),) * (rank - len(found))


def _size(program: Program, axis: str) -> int:
    return program.mesh.shape[axis]
