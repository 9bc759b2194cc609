"""Seconds of a step from a TPU program in the order in which it runs: what fusions cost and what travels meanwhile."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence, Set

from jax.sharding import AbstractMesh, Mesh

from llmjax.mesh import Axes, Cluster
from llmjax.plan import collectives, hlo, links
from llmjax.plan.cost import calls, clock, cost, part_of
from llmjax.plan.hlo import Instruction, Module, Numbers

HOLDERS = {"fusion", "call", "async-start", "call-start"}  # a call-start runs on a TPU's sparse core, beside the rest


@dataclasses.dataclass(frozen=True)
class Row:
    """What one kind of collective over some mesh axes costs one part of the model in a step."""

    kind: str
    "As in `collectives.KINDS`."
    axes: tuple[str, ...]
    "Mesh axes; () where the groups of devices are no product of axes."
    module: str
    "attention, mlp, block, embedding, head, optimizer, or other."
    network: str
    "inside a slice or node, or outside: between them."
    count: float
    "Runs in a step."
    bytes: float
    "Payload V in a step, as `collectives.Collective` counts it."
    seconds: float
    "Of all of them, by `links.seconds`."
    exposed: float
    "Seconds that nothing hides."
    sources: tuple[str, ...] = ()
    "Traced operations they come from, the first few, where a program was compiled."


@dataclasses.dataclass(frozen=True)
class Time:
    """Where the seconds of a step go, by the compiler's own cycles and the links' times."""

    matmul: float
    attention: float
    memory: float
    "Fusions without a product, and what has no cycles by its bytes."
    other: float
    "What belongs to no part."
    exposed: dict[str, float]
    "Communication that nothing hides, by mesh axes joined with x."

    @property
    def step(self) -> float:
        return self.matmul + self.attention + self.memory + self.other + sum(self.exposed.values())


@dataclasses.dataclass(frozen=True)
class Moment:
    """Something that a step does from one second to another; of a loop one turn is told, stretched over all of them."""

    lane: str
    "compute, loop, or the mesh axes of a collective, joined with x; ? where they are no product of axes."
    begin: float
    end: float
    what: str
    "The part of the model, or a loop's turns."
    kind: str
    "matmul, attention, memory, other, wait, or of a collective its kind."
    waited: bool = False
    "Whether devices wait for it."


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A program's time, and what of it was not understood."""

    time: Time
    rows: tuple[Row, ...]
    unknown: dict[str, int]
    "Operations whose cost is not known, with the times they run in a step."
    moments: tuple[Moment, ...] = ()
    "In the order in which they begin; those alike that touch are one."


@dataclasses.dataclass
class _Sums:
    """What a reading has found so far, in a whole step."""

    seconds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    exposed: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    rows: dict = dataclasses.field(default_factory=dict)
    unknown: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    moments: list[Moment] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Reader:
    module: Module
    mesh: Mesh | AbstractMesh
    cluster: Cluster
    sizes: Axes
    sums: _Sums


@dataclasses.dataclass
class _Clock:
    """The time within one run of a computation, and what is on its way."""

    now: float = 0.0
    base: float = 0.0  # second of the step at which the first run begins
    stretch: float = 1.0  # seconds of the step that one of this run stands for; 0: not told
    pending: dict = dataclasses.field(default_factory=dict)  # key of a start: (end, row key, seconds)
    free: dict = dataclasses.field(
        default_factory=dict
    )  # axes: when their links are free again, and the row that has them


def read(
    module: Module,
    mesh: Mesh | AbstractMesh,
    cluster: Cluster,
    sizes: Axes,
) -> Schedule:
    """The schedule of a compiled step.

    Loops are multiplied; of a condition the slower branch counts as time, and all branches as communication. On a chip
    whose clock is not known only the collectives are of use, and all of them count as exposed.
    """
    reader = _Reader(module, mesh, cluster, sizes, _Sums())
    _run(reader, module.entry, {}, 1)
    sums = reader.sums
    _within(sums)
    exposed: dict[str, float] = collections.defaultdict(float)
    rows = []
    for (kind, axes, part), (count, size, seconds, sources, network) in sums.rows.items():
        waited = sums.exposed[kind, axes, part]
        exposed[" x ".join(axes) or "?"] += waited
        rows.append(Row(kind, axes, part, network, count, size, seconds, waited, tuple(sources[:4])))
    time = Time(*(float(sums.seconds[of]) for of in ("matmul", "attention", "memory", "other")), dict(exposed))
    rows = tuple(sorted(rows, key=lambda row: -row.seconds))
    return Schedule(time, rows, dict(sums.unknown), tuple(_touching(sums.moments, time.step)))


def _touching(moments: Sequence[Moment], total: float) -> list[Moment]:
    """Moments that are alike and touch, as one; what no picture could show is left out."""
    last: dict[str, Moment] = {}
    found = []
    for moment in sorted(moments, key=lambda moment: moment.begin):
        before = last.get(moment.lane)
        alike = before and (before.what, before.kind, before.waited) == (moment.what, moment.kind, moment.waited)
        if alike and moment.begin - before.end < 1e-4 * total:
            found.remove(before)
            moment = dataclasses.replace(moment, begin=before.begin, end=max(before.end, moment.end))
        last[moment.lane] = moment
        found.append(moment)
    return sorted((m for m in found if m.end - m.begin > 2e-4 * total), key=lambda moment: moment.begin)


def _tell(reader: _Reader, at: _Clock, lane: str, begin: float, end: float, *what) -> None:
    """Notes a moment of this run of a computation, in seconds of the step."""
    if at.stretch and end > begin:
        first, last = (at.base + at.stretch * second for second in (begin, end))
        reader.sums.moments.append(Moment(lane, first, last, *what))


def _within(sums: _Sums) -> None:
    """Waiting for links is charged to the last of those in their queue: moves to the others what exceeds its time."""
    for key, row in sums.rows.items():
        over = sums.exposed[key] - row[2]
        for other, another in sums.rows.items():
            if over > 0 and other[1] == key[1] and (room := another[2] - sums.exposed[other]) > 0:
                moved = min(over, room)
                sums.exposed[other] += moved
                sums.exposed[key] -= moved
                over -= moved


def _run(
    reader: _Reader, computation: str, known: Numbers, count: int, base: float = 0.0, stretch: float = 1.0
) -> float:
    """Seconds of one run of a computation that runs `count` times in a step."""
    at = _Clock(base=base, stretch=stretch)
    for x in reader.module.computations[computation].values():
        _instruction(reader, computation, x, known, count, at)
    return at.now


def _instruction(reader: _Reader, computation: str, x: Instruction, known: Numbers, count: int, at: _Clock) -> None:
    if x.opcode == "while":
        body, often = x.attribute("body"), hlo.turns(reader.module, computation, x, known)
        if often is None:
            reader.sums.unknown[f"while whose turns depend on data, {x.operation() or x.name}"] += count
            often = 1
        inside = hlo.unchanged(reader.module, body, hlo.start(reader.module, computation, x, known))
        before, base = at.now, at.base + at.stretch * at.now
        at.now += often * _run(reader, body, inside, count * often, base, at.stretch * often)
        _tell(reader, at, "loop", before, at.now, _turns(reader.module, body, often), "loop")
    elif x.opcode == "conditional":
        at.now += max(_run(reader, name, {}, count, stretch=0.0) for name in x.called())
    elif x.opcode == "call-done" and x.operands[0] not in at.pending:
        pass
    elif x.opcode in ("call", "async-start") and not _travels(reader.module, computation, x):
        for name in x.called():
            at.now += _run(reader, name, {}, count, at.base + at.stretch * at.now, at.stretch)
    elif (key := _ends(reader.module, computation, x)) is not None and key in at.pending:
        end, row, seconds = at.pending.pop(key)
        waited = min(max(0.0, end - at.now), seconds)
        _tell(reader, at, "compute", at.now, at.now + waited, "waiting for the network", "wait")
        _tell(reader, at, _lane(row), at.now, at.now + waited, f"{row[0]} for {row[2]}", row[0], True)
        _tell(reader, at, _lane(row), end - seconds, at.now, f"{row[0]} for {row[2]}", row[0])
        at.now += waited
        reader.sums.exposed[row] += count * waited
    elif found := _travels(reader.module, computation, x):
        _send(reader, computation, x, *found, count, at)
    else:
        found = cost(reader.module, computation, x, reader.cluster.chip)
        reader.sums.seconds[found.part] += count * found.seconds
        reader.sums.unknown.update({found.unknown: count} if found.unknown else {})
        if found.seconds:
            part = part_of(hlo.origin(reader.module, computation, x))
            _tell(reader, at, "compute", at.now, at.now + found.seconds, part, found.part)
        at.now += found.seconds


def _lane(row: tuple[str, tuple[str, ...], str]) -> str:
    return " x ".join(row[1]) or "?"


def _turns(module: Module, body: str, often: int) -> str:
    """A loop in words: how often it turns, and whether it goes back through what another went through."""
    inside = [x.operation() for x in module.computations[body].values() if "/" in x.operation()]
    back = sum("transpose(jvp" in operation for operation in inside) > len(inside) / 2
    return f"{often} turns{', backward' * back}"


def _send(
    reader: _Reader, computation: str, x: Instruction, where: str, collective: Instruction, count: int, at: _Clock
) -> None:
    """Counts a collective, which is waited for at once, or until its end if this is only its start."""
    found = collectives.read(reader.module, where, collective, reader.mesh, reader.cluster.slices)
    if found is None:
        return
    span = _span(reader, found.axes, collectives.rendezvous(collective) is not None)
    seconds = links.seconds(found.kind, found.bytes, span, reader.cluster)
    part = part_of(hlo.origin(reader.module, where, collective) or hlo.origin(reader.module, computation, x))
    row = found.kind, found.axes, part
    runs, size, total, sources, network = reader.sums.rows.get(row, (0, 0, 0.0, [], ""))
    network = "outside" if span.outside > 1 else network or "inside"
    source = found.source if "/" in found.source else reader.module.source(x)
    if source not in sources:
        sources = [*sources, source]
    reader.sums.rows[row] = runs + count, size + count * found.bytes, total + count * seconds, sources, network
    beginning, before = max((at.now, row), at.free.get(found.axes, (0.0, row)), key=lambda one: one[0])
    at.free[found.axes] = beginning + seconds, row
    if _starts(reader.module, x):
        at.pending[_key(x, collective)] = beginning + seconds, row, seconds
    else:
        reader.sums.exposed[before] += count * (beginning - at.now)
        reader.sums.exposed[row] += count * seconds
        _tell(reader, at, "compute", at.now, beginning + seconds, "waiting for the network", "wait")
        _tell(reader, at, _lane(row), beginning, beginning + seconds, f"{row[0]} for {row[2]}", row[0], True)
        at.now = beginning + seconds
    cycles = x.cycles() if not _starts(reader.module, x) else None
    if cycles and (rate := clock(reader.cluster.chip)):  # a product in one fusion with the collective
        _tell(reader, at, "compute", at.now, at.now + cycles / rate, part, "matmul")
        reader.sums.seconds["matmul"] += count * cycles / rate
        at.now += cycles / rate


def _span(reader: _Reader, axes: tuple[str, ...], between: bool) -> links.Span:
    """Where a group lies; everything that the hosts do not carry stays within a slice."""
    cluster, sizes = reader.cluster, reader.sizes
    if between:
        return links.Span(1, cluster.slices)
    if cluster.slices > 1:
        sizes = dataclasses.replace(sizes, data=sizes.data // cluster.slices)
        cluster = dataclasses.replace(cluster, slices=1, chips=math.prod(sizes.sizes()))
    return links.span(cluster, sizes, axes or tuple(name for name, size in vars(sizes).items() if size > 1))


def _key(x: Instruction, collective: Instruction) -> str:
    """What a start and its end have in common: the channel within a computation, or else the start's name."""
    if between := collectives.rendezvous(collective):
        return between
    chain = re.search(r'chain_id="(\d+)"', collective.attributes)
    channel = re.search(r"channel_id=(\d+)", collective.attributes)
    return f"chain {chain[1]} {channel[1]}" if chain and channel else x.name


def _starts(module: Module, x: Instruction) -> bool:
    return x.opcode.endswith("-start") or x.opcode == "send" or calls(module, x, "AsyncCollectiveStart")


def _ends(module: Module, computation: str, x: Instruction) -> str | None:
    """The key of the start that an instruction waits for."""
    if x.opcode == "recv-done":
        beside = module.computations[computation]
        return collectives.rendezvous(beside[x.operands[0]]) if x.operands[0] in beside else None
    if x.opcode.endswith("-done"):
        return x.operands[0] if x.operands else None
    if calls(module, x, "AsyncCollectiveDone"):
        inside = (y for name in x.called() for y in module.computations[name].values())
        return next((_key(x, y) for y in inside if collectives.kind_of(y)), None)
    return None


def _travels(module: Module, computation: str, x: Instruction) -> tuple[str, Instruction] | None:
    """(computation, collective) that an instruction is or holds; None for a fusion that only runs beside one."""
    if collectives.kind_of(x):
        return computation, x
    if x.opcode not in HOLDERS:
        return None
    for name in x.called():
        for y in module.computations[name].values():
            beside = 'chain_id="' in y.attributes and not _starts(module, x)
            if not beside and (found := _travels(module, name, y)):
                return found
    return None


def warnings(rows: Sequence[Row], stream: Set[str] = frozenset()) -> Iterator[str]:
    """What in a program's communication is worth a look, a sentence each.

    Over the axes `stream` the positions of the residual stream are cut, so that a block's result is summed in parts.
    """
    for row in rows:
        each = row.bytes / max(row.count, 1)
        if row.kind != "all-reduce" or each <= 1e6:
            continue
        sums = f"{row.count} all-reduces of {each / 1e6:.1f} MB over {' x '.join(row.axes)} in {row.module}, where"
        if "fsdp" in row.axes and row.module != "optimizer":
            yield f"{sums} gathers or scatters would send half as much."
        elif set(row.axes) & stream and row.module in ("attention", "mlp", "block"):
            yield (
                f"{sums} scatters would send half as much: of a single row on a device XLA's TPU compiler sums the "
                "whole; fewer microbatches (--accumulate) give a device more rows."
            )
