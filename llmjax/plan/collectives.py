"""What a compiled step communicates: every collective, over which mesh axes, how many bytes, how often."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from llmjax.plan import hlo
from llmjax.plan.hlo import Array, Instruction

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
    "send",
)
SCALAR = 8  # bytes; arrays up to this size are sums of losses, weights and norms, told apart from payload

_BETWEEN_SLICES = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
}

Groups = tuple[tuple[int, ...], ...]
Key = tuple[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as one device sees it."""

    kind: str
    "One of KINDS."
    axes: tuple[str, ...]
    "Mesh axes it communicates over, none of size 1; () where its groups of devices are no product of axes."
    ways: int
    "Devices in a group, n."
    arrays: tuple[Array, ...]
    "The payload V: what one device puts in, but for an all-gather what it gets out. Several if XLA combined them."
    count: int
    "Times run in a step: the turns of the loops around it."
    source: str
    "The traced operation and, where known, file:line. For a combined one, of all or of the first."
    groups: str
    "The groups of devices as the program writes them."
    computation: str
    "The part of the program that holds it, such as a loop's body or a condition's branch, by its name there."

    @property
    def bytes(self) -> int:
        """V of one run, in bytes."""
        return sum(array.bytes for array in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that a device sends over its links in one run, by a ring of n devices.

        2V(n-1)/n for an all-reduce, V for a permute, a send or a broadcast, and V(n-1)/n for anything else.
        """
        share = (self.ways - 1) / self.ways
        whole = self.kind in ("collective-permute", "send", "collective-broadcast")
        return self.bytes * (1 if whole else 2 * share if self.kind == "all-reduce" else share)

    @property
    def per_step(self) -> int:
        """Bytes V in a step."""
        return self.count * self.bytes

    def __str__(self):
        arrays = ", ".join(map(str, self.arrays[:4])) + (", ..." if len(self.arrays) > 4 else "")
        over = " x ".join(self.axes) or f"devices {self.groups}"
        return f"{self.kind} over {over} of {arrays}: {self.count} x {self.bytes:,} bytes, from {self.source}"


def collectives(
    program: jax.stages.Compiled | str, mesh: Mesh | AbstractMesh, turns: int | None = None, slices: int = 1
) -> list[Collective]:
    """Every collective of a compiled program, or of its HLO text, that sends anything.

    Both branches of a condition count as run. What the start of an asynchronous collective moves is counted there, and
    not where it is done. `turns` is taken for loops whose turns depend on data.

    Raises:
      ValueError: such a loop holds a collective and `turns` is not given, or a line is not understood.
    """
    return of_module(hlo.parse(program if isinstance(program, str) else program.as_text()), mesh, turns, slices)


def of_module(
    module: hlo.Module, mesh: Mesh | AbstractMesh, turns: int | None = None, slices: int = 1
) -> list[Collective]:
    """`collectives` of a program that has been read."""
    found, seen = [], set()
    for ran in hlo.walk(module, turns):
        x = ran.instruction
        if kind_of(x) is None or (part := _part(ran)) in seen:
            continue
        seen.add(part)
        one = read(module, ran.computation, x, mesh, slices)
        if one is None:
            continue
        if ran.count is None:
            raise ValueError(f"how often {x.name} runs depends on data, in {module.source(ran.loop)}: give `turns`.")
        found.append(dataclasses.replace(one, count=ran.count))
    return found


def _part(ran: hlo.Ran) -> tuple[str, ...]:
    """What a collective is a part of. A TPU repeats an asynchronous one in every fusion that it runs beside."""
    attributes = ran.instruction.attributes
    chain = re.search(r'chain_id="(\d+)"', attributes)
    channel = re.search(r"channel_id=(\d+)", attributes)
    if chain and channel:
        return ran.schedule, chain[1], channel[1]
    return ran.computation, ran.instruction.name


def read(
    module: hlo.Module, computation: str, x: Instruction, mesh: Mesh | AbstractMesh, slices: int = 1
) -> Collective | None:
    """The collective that an instruction is, run once; None where nothing leaves a device.

    An all-reduce of which only a part is kept, in a fusion of its own, is how a TPU writes a reduce-scatter. With
    several slices the program is that of one, and the first mesh axis is cut over them.
    """
    if rendezvous(x):
        across = next(iter(mesh.shape))
        arrays = hlo.arrays_of(x.type)[:1]
        return Collective(kind_of(x), (across,), slices, arrays, 1, module.source(x), "between slices", computation)
    if slices > 1:
        first, *rest = mesh.shape.values()
        mesh = AbstractMesh((first // slices, *rest), tuple(mesh.shape))
    kind, (groups, raw) = kind_of(x), _groups(x, mesh.size)
    ways = max(map(len, groups), default=mesh.size)
    if groups and not _moves(kind, groups):
        return None
    arrays = _payload(kind, x, module.computations[computation], ways)
    axes = _axes(groups, mesh, kind == "collective-permute")
    root = module.root(computation) if computation in module.roots else None
    if kind == "all-reduce" and root and root.opcode == "dynamic-slice" and root.operands[0] == x.name:
        kind = "reduce-scatter"
    return Collective(kind, axes, ways, arrays, 1, module.source(x), raw, computation)


def table(found: Iterable[Collective], above: int = 0) -> dict[Key, int]:
    """Payload bytes in a step by (kind, axes), of the arrays larger than `above` bytes."""
    sums = collections.Counter()
    for x in found:
        sums[x.kind, x.axes] += x.count * sum(array.bytes for array in x.arrays if array.bytes > above)
    return {key: total for key, total in sums.items() if total}


def departures(found: Sequence[Collective], expected: Mapping[Key, int], above: int = SCALAR) -> list[str]:
    """Where a program communicates other than expected: a sentence for each, with the operations it comes from.

    `expected` has the payload bytes in a step by (kind, axes); what it lacks must not be there at all. Arrays of up to
    `above` bytes count for nothing.
    """
    sums, said = table(found, above), []
    for key in sorted({*sums, *expected}):
        has, wants = sums.get(key, 0), expected.get(key, 0)
        if has != wants:
            those = [x for x in found if (x.kind, x.axes) == key and any(array.bytes > above for array in x.arrays)]
            what = f"{has:,} bytes in a step, not {wants:,}" if wants else f"{has:,} bytes in a step, unexpected"
            said.append("\n  ".join([f"{key[0]} over {' x '.join(key[1]) or '?'}: {what}", *map(str, those)]))
    return said


def report(found: Sequence[Collective]) -> str:
    """The table as text, with what a device sends over its links, the most first."""
    rows = [("collective", "over", "runs", "bytes", "sent per device")]
    keys = sorted({(x.kind, x.axes) for x in found}, key=lambda key: -_sent(found, key))
    for kind, axes in keys:
        same = [x for x in found if (x.kind, x.axes) == (kind, axes)]
        runs, size = sum(x.count for x in same), sum(x.per_step for x in same)
        rows.append((kind, " x ".join(axes) or "?", f"{runs:,}", f"{size:,}", f"{_sent(found, (kind, axes)):,.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        f"{kind:<{widths[0]}}  {over:<{widths[1]}}  {runs:>{widths[2]}}  {size:>{widths[3]}}  {sent:>{widths[4]}}"
        for kind, over, runs, size, sent in rows
    )
    return "\n".join(lines)


def _sent(found: Iterable[Collective], key: Key) -> float:
    return sum(x.count * x.sent for x in found if (x.kind, x.axes) == key)


def kind_of(x: Instruction) -> str | None:
    """One of KINDS, or None for anything else, the ends of asynchronous ones among them.

    Between TPU slices it is the host that communicates, and says as what.
    """
    if "is_host_transfer=true" in x.attributes:
        between = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.attributes)
        return _BETWEEN_SLICES.get(between[1], "send") if between and x.opcode == "send" else None
    kind = x.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def rendezvous(x: Instruction) -> str | None:
    """What the two ends of a transfer between slices have in common."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', x.attributes)
    return found and found[1]


def _payload(kind: str, x: Instruction, beside: dict[str, Instruction], ways: int) -> tuple[Array, ...]:
    arrays = hlo.arrays_of(x.inside)  # some printers write the operands' types, others leave them to be looked up
    if not arrays:
        arrays = tuple(array for name in x.operands for array in beside[name].arrays())
    if kind == "ragged-all-to-all":
        arrays = arrays[:1]  # the others say what goes where
    if kind == "all-gather":
        [dim] = _numbers(x.attribute_set("dimensions"))
        return tuple(Array(a.dtype, (*a.shape[:dim], a.shape[dim] * ways, *a.shape[dim + 1 :])) for a in arrays)
    return arrays


def _groups(x: Instruction, devices: int) -> tuple[Groups, str]:
    """(groups of positions in the mesh, the text they were read from); no groups where it is not understood."""
    found = re.search(r"(?:replica_groups|source_target_pairs)=", x.attributes)
    if not found:
        return (), ""
    text = x.attributes[found.end() :]
    if text.startswith("{"):
        raw = re.match(r"\{(?:[^{}]|\{[^{}]*\})*\}", text)[0]
        groups = tuple(tuple(map(int, ids.split(","))) for ids in re.findall(r"\{([\d,]+)\}", raw))
        return groups or (tuple(range(devices)),), raw
    if text.startswith("["):
        raw = re.match(r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?", text)[0]
        shape, iota = raw.split("<=")
        return _rows(_iota(iota).reshape(_numbers(shape))), raw
    found = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]+\))?)\))? \{([^}]*)\}", text)
    if not found:
        return (), text[:80]
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    order = _iota(found[2]) if found[2] else np.arange(math.prod(sizes.values()))
    return _named_groups(order, sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3])), found[0]


def _named_groups(order: np.ndarray, sizes: dict[str, int], axes: list[tuple[str, str, str]]) -> Groups:
    """Groups over named axes of XLA's own mesh; 'a':(2)3 means the 3 in the middle of an axis cut as (2, 3, rest)."""
    shape, together = [], []
    for name, size in sizes.items():
        parts = {int(before): int(part) for axis, before, part in axes if axis == name and before}
        whole = any(axis == name and not before for axis, before, _ in axes)
        done = 1
        while done < size or not size:
            part = size if whole else parts.get(done)
            if part:
                together.append(len(shape))
            else:
                part = min((before for before in parts if before > done), default=size) // done
            shape.append(part)
            done *= part
    apart = [i for i in range(len(shape)) if i not in together]
    moved = order.reshape(shape).transpose(apart + together)
    return _rows(moved.reshape(-1, math.prod(shape[i] for i in together)))


def _iota(text: str) -> np.ndarray:
    """[4,2]T(1,0): the numbers from 0 on in that shape, transposed, flat."""
    shape, _, axes = text.partition("T")
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (numbers.transpose(_numbers(axes)) if axes else numbers).reshape(-1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _rows(groups: np.ndarray) -> Groups:
    return tuple(tuple(int(i) for i in row) for row in groups)


def _moves(kind: str, groups: Groups) -> bool:
    """Whether anything leaves a device."""
    return any(a != b for a, b in groups) if kind == "collective-permute" else any(len(group) > 1 for group in groups)


def _axes(groups: Groups, mesh: Mesh | AbstractMesh, pairs: bool) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ, if the groups are all of the mesh cut along those.

    A program numbers devices by their place in the mesh it was compiled for, whatever their own ids are.
    """
    sizes, names = tuple(mesh.shape.values()), tuple(mesh.shape)
    place = np.stack(np.unravel_index(np.arange(mesh.size), sizes), -1)
    if not groups or max(map(max, groups)) >= mesh.size:
        return ()
    differ = np.any([(place[list(group)] != place[group[0]]).any(0) for group in groups], axis=0)
    axes = tuple(name for name, yes in zip(names, differ, strict=True) if yes)
    cut = math.prod(mesh.shape[axis] for axis in axes)
    whole = all(len(set(group)) == cut for group in groups) and sorted(sum(groups, ())) == list(range(mesh.size))
    return axes if pairs or whole else ()
