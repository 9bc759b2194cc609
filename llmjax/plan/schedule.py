"""Seconds of a step from a TPU program in the order in which it runs: what each fusion costs, what travels meanwhile."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from jax.sharding import AbstractMesh, Mesh

from llmjax.mesh import Axes, Chip, Cluster
from llmjax.plan import collectives, hlo, links
from llmjax.plan.hlo import Instruction, Module, Numbers

# Cycles per second. A chip's peak is FLOP/cycle x clock. FLOP/cycle is 2 x side² x units: v4 and v5p 8 units of 128²,
# v5e 4 of 128² (cloud.google.com/tpu/docs); with them the compiler's cycles of a large product are 75 to 95% of peak.
FLOP_PER_CYCLE = {"TPU v4": 2 * 8 * 128**2, "TPU v5e": 2 * 4 * 128**2, "TPU v5p": 2 * 8 * 128**2,
                  "TPU v6e": 2 * 4 * 256**2, "TPU 7x": 2 * 4 * 256**2}  # fmt: skip
FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all opt-barrier partition-id replica-id domain "
    "add-dependency copy-start copy-done slice-start slice-done dynamic-slice-start dynamic-slice-done "
    "dynamic-update-slice-start dynamic-update-slice-done async-update".split()
)  # copies between a chip's memories run beside everything else
KNOWN_CALLS = frozenset("AllocateBuffer AssumeGatherIndicesInBound Sharding AsyncCollectiveStart "
                        "AsyncCollectiveDone ConcatBitcast".split())  # fmt: skip
SMALL = 1 << 16  # bytes below which something that the compiler gives no cycles for takes no time

Roofline = Callable[[Instruction], float | None]


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
    count: int
    "Runs in a step."
    bytes: int
    "Payload V in a step, as `collectives.Collective` counts it."
    seconds: float
    "Of all of them, by `links.seconds`."
    exposed: float
    "Seconds that nothing hides in the compiler's schedule."
    sources: tuple[str, ...]
    "Traced operations they come from, the first few."


@dataclasses.dataclass(frozen=True)
class Time:
    """Where the seconds of a step go, by the compiler's own cycles and the links' times."""

    matmul: float
    attention: float
    memory: float
    "Fusions without a product, and what has no cycles by its bytes."
    other: float
    "Custom calls, by the roofline given."
    exposed: dict[str, float]
    "Communication that nothing hides, by mesh axes joined with x."

    @property
    def step(self) -> float:
        return self.matmul + self.attention + self.memory + self.other + sum(self.exposed.values())


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A program's time, and what of it was not understood."""

    time: Time
    rows: tuple[Row, ...]
    unknown: dict[str, int]
    "Operations whose cost is not known, with the times they run in a step."


def clock(chip: Chip) -> float | None:
    """Cycles per second of a TPU."""
    per_cycle = FLOP_PER_CYCLE.get(chip.name)
    return chip.flops / per_cycle if per_cycle and chip.flops else None


@dataclasses.dataclass
class _Sums:
    """What a reading has found so far, in a whole step."""

    seconds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    exposed: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    rows: dict = dataclasses.field(default_factory=dict)
    unknown: collections.Counter = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(frozen=True)
class _Reader:
    module: Module
    mesh: Mesh | AbstractMesh
    cluster: Cluster
    sizes: Axes
    roofline: Roofline
    sums: _Sums


@dataclasses.dataclass
class _Clock:
    """The time within one run of a computation, and what is on its way."""

    now: float = 0.0
    pending: dict = dataclasses.field(default_factory=dict)  # key of a start: (end, row key, seconds)
    free: dict = dataclasses.field(
        default_factory=dict
    )  # axes: when their links are free again, and the row that has them


def read(
    module: Module,
    mesh: Mesh | AbstractMesh,
    cluster: Cluster,
    sizes: Axes,
    roofline: Roofline = lambda call: None,
) -> Schedule:
    """The schedule of a compiled step. `roofline` gives the seconds of a custom call, or None if it knows none.

    Loops are multiplied; of a condition the slower branch counts as time, and all branches as communication. On a chip
    whose clock is not known only the collectives are of use, and all of them count as exposed.
    """
    reader = _Reader(module, mesh, cluster, sizes, roofline, _Sums())
    _run(reader, module.entry, {}, 1)
    sums = reader.sums
    exposed: dict[str, float] = collections.defaultdict(float)
    rows = []
    for (kind, axes, part), (count, size, seconds, sources) in sums.rows.items():
        where = links.span(cluster, sizes, axes) if axes else None
        network = "outside" if where and where.outside > 1 else "inside"
        waited = sums.exposed[kind, axes, part]
        exposed[" x ".join(axes) or "?"] += waited
        rows.append(Row(kind, axes, part, network, count, size, seconds, waited, tuple(sources[:4])))
    time = Time(*(float(sums.seconds[of]) for of in ("matmul", "attention", "memory", "other")), dict(exposed))
    return Schedule(time, tuple(sorted(rows, key=lambda row: -row.seconds)), dict(sums.unknown))


def _run(reader: _Reader, computation: str, known: Numbers, count: int) -> float:
    """Seconds of one run of a computation that runs `count` times in a step."""
    at = _Clock()
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
        at.now += often * _run(reader, body, inside, count * often)
    elif x.opcode == "conditional":
        at.now += max(_run(reader, name, {}, count) for name in x.called())
    elif x.opcode in ("call", "async-start") and not _travels(reader.module, x):
        at.now += sum(_run(reader, name, {}, count) for name in x.called())
    elif (key := _ends(reader.module, computation, x)) is not None and key in at.pending:
        end, row, seconds = at.pending.pop(key)
        waited = min(max(0.0, end - at.now), seconds)
        at.now += waited
        reader.sums.exposed[row] += count * waited
    elif found := _travels(reader.module, x):
        _send(reader, x, *found, count, at)
    else:
        part, seconds = _cost(reader, x, count)
        reader.sums.seconds[part] += count * seconds
        at.now += seconds


def _send(reader: _Reader, x: Instruction, where: str, collective: Instruction, count: int, at: _Clock) -> None:
    """Counts a collective, which is waited for at once, or until its end if this is only its start."""
    found = collectives.read(reader.module, where, collective, reader.mesh)
    if found is None:
        return
    span = links.span(reader.cluster, reader.sizes, found.axes or _all(reader.sizes))
    seconds = links.seconds(found.kind, found.bytes, span, reader.cluster)
    part = part_of(origin(reader.module, where, collective) or origin(reader.module, _holder(reader, x), x))
    row = found.kind, found.axes, part
    runs, size, total, sources = reader.sums.rows.get(row, (0, 0, 0.0, []))
    source = found.source if "/" in found.source else reader.module.source(x)
    if source not in sources:
        sources = [*sources, source]
    reader.sums.rows[row] = runs + count, size + count * found.bytes, total + count * seconds, sources
    beginning, before = max((at.now, row), at.free.get(found.axes, (0.0, row)), key=lambda one: one[0])
    at.free[found.axes] = beginning + seconds, row
    if _starts(reader.module, x):
        at.pending[_key(x, collective)] = beginning + seconds, row, seconds
    else:
        reader.sums.exposed[before] += count * (beginning - at.now)
        reader.sums.exposed[row] += count * seconds
        at.now = beginning + seconds
    cycles = x.cycles() if not _starts(reader.module, x) else None
    if cycles and (rate := clock(reader.cluster.chip)):  # a product in one fusion with the collective
        reader.sums.seconds["matmul"] += count * cycles / rate
        at.now += cycles / rate


def _all(sizes: Axes) -> tuple[str, ...]:
    return tuple(name for name, size in vars(sizes).items() if size > 1)


def _holder(reader: _Reader, x: Instruction) -> str:
    return next((name for name, inside in reader.module.computations.items() if inside.get(x.name) is x), "")


def _key(x: Instruction, collective: Instruction) -> str:
    """What a start and its end have in common: the channel within a computation, or else the start's name."""
    chain = re.search(r'chain_id="(\d+)"', collective.attributes)
    channel = re.search(r"channel_id=(\d+)", collective.attributes)
    return f"chain {chain[1]} {channel[1]}" if chain and channel else x.name


def _called_with(module: Module, x: Instruction, target: str) -> Instruction | None:
    """The custom call of that name in what a fusion calls."""
    if x.opcode != "fusion":
        return None
    inside = (y for name in x.called() for y in module.computations[name].values())
    return next((y for y in inside if y.opcode == "custom-call" and y.target() == target), None)


def _starts(module: Module, x: Instruction) -> bool:
    return x.opcode.endswith("-start") or _called_with(module, x, "AsyncCollectiveStart") is not None


def _ends(module: Module, computation: str, x: Instruction) -> str | None:
    """The key of the start that an instruction waits for."""
    if x.opcode.endswith("-done"):
        return x.operands[0] if x.operands else None
    if _called_with(module, x, "AsyncCollectiveDone"):
        inside = (y for name in x.called() for y in module.computations[name].values())
        return next((_key(x, y) for y in inside if collectives.kind_of(y)), None)
    return None


def _travels(module: Module, x: Instruction) -> tuple[str, Instruction] | None:
    """(computation, collective) that an instruction is or holds; None for a fusion that only runs beside one."""
    if collectives.kind_of(x):
        return next(name for name, inside in module.computations.items() if inside.get(x.name) is x), x
    if x.opcode not in ("fusion", "async-start", "call"):
        return None
    for name in x.called():
        for y in module.computations[name].values():
            beside = 'chain_id="' in y.attributes and not _starts(module, x)
            if collectives.kind_of(y) and not beside:
                return name, y
    return None


def _cost(reader: _Reader, x: Instruction, count: int) -> tuple[str, float]:
    """(what it is, seconds) of an instruction that computes."""
    rate, chip = clock(reader.cluster.chip), reader.cluster.chip
    if x.opcode in FREE or rate is None:
        return "other", 0.0
    if x.opcode == "custom-call" and x.target() not in KNOWN_CALLS:
        seconds = reader.roofline(x)
        if seconds is None:
            reader.sums.unknown[f"custom-call {x.target()}, {x.operation() or x.name}"] += count
        return "other", seconds or 0.0
    if x.opcode == "custom-call" or _called_with(reader.module, x, "AsyncCollectiveDone"):
        return "other", 0.0
    cycles = x.cycles()
    if cycles is None:
        size = _written(reader, x)
        if size > SMALL:
            reader.sums.unknown[f"{x.opcode} without cycles"] += count
        return "memory", 2 * size / chip.bandwidth if size > SMALL else 0.0
    operation = origin(reader.module, _holder(reader, x), x)
    if "scores" in operation.split("/"):
        return "attention", cycles / rate
    return "matmul" if multiplies(reader.module, x) else "memory", cycles / rate


def _written(reader: _Reader, x: Instruction) -> int:
    """Bytes that an instruction writes; an update in place writes only what is new."""
    if x.opcode == "dynamic-update-slice":
        beside = reader.module.computations[_holder(reader, x)]
        x = beside.get(x.operands[1], x)
    return sum(array.bytes for array in x.arrays())


def multiplies(module: Module, x: Instruction) -> bool:
    """Whether an instruction holds a matrix product."""
    if x.opcode in ("convolution", "dot"):
        return True
    inside = (y for name in x.called() if x.opcode == "fusion" for y in module.computations[name].values())
    return any(multiplies(module, y) for y in inside)


def origin(module: Module, computation: str, x: Instruction) -> str:
    """The traced operation of an instruction, or where the compiler gives none, of what uses it or what it uses."""
    if "/" in x.operation() or not computation:
        return x.operation()
    beside: Mapping[str, Instruction] = module.computations[computation]
    names, seen = [x.name], set()
    for _ in range(4):  # a few hands further
        users = [y for y in beside.values() if set(names) & set(y.operands) and y.name not in seen]
        for y in users:
            if "/" in y.operation() and y.opcode != "while":
                return y.operation()
        seen |= {y.name for y in users}
        names = [y.name for y in users if y.opcode != "tuple"]
    for name in x.operands:
        if name in beside and "/" in beside[name].operation():
            return beside[name].operation()
    return ""


_PARTS = (("attention", r"\battention\b"), ("mlp", r"\bmlp\b"), ("block", r"\bblock\b"),
          ("embedding", r"\bembedding\b"), ("head", r"jvp"))  # fmt: skip


def part_of(operation: str) -> str:
    """The part of the model that a traced operation belongs to, by the scopes that models name."""
    for part, pattern in _PARTS:
        if re.search(pattern, operation):
            return part
    return "optimizer" if operation.startswith("jit(") and "/while" not in operation else "other"


def warnings(rows: Sequence[Row], sizes: Axes) -> Iterator[str]:
    """What in a program's communication is worth a look, a sentence each."""
    for row in rows:
        at_once = [axis for axis in row.axes if axis == "fsdp"]
        if row.kind == "all-reduce" and at_once and row.module in ("attention", "mlp", "block", "head", "embedding"):
            if row.bytes / max(row.count, 1) > SMALL * 16:
                yield (
                    f"{row.count} all-reduces of {row.bytes / row.count / 1e6:.1f} MB over {' x '.join(row.axes)} in "
                    f"{row.module}, where an all-gather or a reduce-scatter would send half as much."
                )
