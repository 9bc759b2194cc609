"""The largest buffers of a compiled step: those live at its peak, or those that a compiler names when it refuses."""

import dataclasses
import math
import re
from collections.abc import Mapping

from llmjax.plan import hlo
from llmjax.plan.hlo import Instruction, Module

KEPT = 16  # buffers listed
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
INHERIT = {"bitcast", "get-tuple-element", "tuple", "while", "opt-barrier", "copy-done", "async-done", "async-update",
           "all-gather-done", "all-reduce-done", "collective-permute-done", "dynamic-update-slice", "call"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array in a device's memory."""

    bytes: int
    "Of all of them, as laid out in tiles."
    shape: str
    "Of one, such as bf16[8,128]."
    count: int
    "How many of this shape and origin there are at once."
    what: str
    "parameter, optimizer, batch, or temporary."
    operation: str
    "The path of a parameter, such as state.model.blocks.up_DF.value, or the traced operation."
    source: str
    "file:line, or nothing."


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What a compiler says when a program does not fit."""

    needed: int
    "Bytes of temporaries, or of all; 0 where it does not say."
    capacity: int
    "Bytes that it may use; 0 where it does not say."
    sentence: str
    buffers: tuple[Buffer, ...]


def what(operation: str) -> str:
    """The kind of array that an operation's or argument's name means."""
    for start, kind in (("state.model", "parameter"), ("state.", "optimizer"), ("batch[", "batch")):
        if operation.startswith(start):
            return kind
    return "temporary"


def refusal(message: str) -> Refusal:
    """Reads a compiler's error. What is not understood becomes the sentence as it is, cut to one line."""
    size = r"([\d.]+[KMGT]?)"
    found = tuple(_named(part) for part in re.split(r"\n\s*\d+\. Size: ", message)[1:])
    for pattern in (rf"Used {size} of {size} \w+", rf"\({size}\) exceeds available \w+ \({size}\)"):
        if said := re.search(pattern, message):
            needed, capacity = _bytes(said[1]), _bytes(said[2])
            return Refusal(needed, capacity, f"the compiler needs {said[1]} of {said[2]} of memory", found[:KEPT])
    asked = re.search(r"(?:allocate|allocating) (\d+) ?(?:B\b|bytes)", message)
    return Refusal(int(asked[1]) if asked else 0, 0, message.strip().splitlines()[0][:300], found[:KEPT])


def _bytes(text: str) -> int:
    return round(float(text.rstrip("KMGT")) * UNITS[text.lstrip("0123456789.")])


def _named(text: str) -> Buffer:
    def field(pattern):
        found = re.search(pattern, text)
        return found[1] if found else ""

    size = re.match(r"[\d.]+[KMGT]?", text)
    operation = field(r'op_name="([^"]*)"')
    line = field(r"source_line=(\d+)")
    source = field(r'source_file="([^"]*)"') + (f":{line}" if line else "")
    shape = field(r"Shape: ([a-z0-9]+\[[\d,]*\])")
    return Buffer(
        _bytes(size[0]) if size else 0, shape, 1, what(operation), operation or field(r"XLA label: (.*)"), source
    )


def largest(module: Module, kept: int = KEPT) -> tuple[Buffer, ...]:
    """The largest buffers live at a program's peak, equal ones together.

    Found from the order of the program: a buffer lives from its instruction to the last use. What updates in place
    is taken to share its operand's buffer, so it can differ from the compiler's own assignment, which no TPU shows.
    """
    _, live = _peak(module, module.entry, {})
    sums: dict[tuple[str, str, str], list[int]] = {}
    for size, shape, operation, source in live.values():
        sums.setdefault((shape, operation, source), []).append(size)
    found = (Buffer(sum(s), shape, len(s), what(op), op, source) for (shape, op, source), s in sums.items())
    return tuple(sorted(found, key=lambda buffer: -buffer.bytes)[:kept])


Live = dict[str, tuple[int, str, str, str]]  # a buffer's key: (bytes, shape, operation, source)


def _peak(module: Module, computation: str, done: dict[str, tuple[int, Live]]) -> tuple[int, Live]:
    """(bytes, buffers) at the peak of one computation, without what a loop is given from outside."""
    if computation in done:
        return done[computation]
    instructions = list(module.computations[computation].values())
    owners = _owners(module, computation)
    last: dict[str, int] = {}
    for i, x in enumerate(instructions):
        for name in x.operands:
            for owner in owners.get(name, ()):
                last[owner] = i
    for owner in owners.get(module.roots.get(computation, ""), ()):
        last[owner] = len(instructions)
    entry = computation == module.entry
    live, now, best = {}, 0, (0, {})
    for i, x in enumerate(instructions):
        given = x.opcode == "parameter" and not entry
        if owners.get(x.name) == (x.name,) and x.opcode not in INHERIT and not given:
            size = padded(x.type) - sum(padded(kind) for kind in _shared(x, module.computations[computation]))
            if size > 0:
                last.setdefault(x.name, i)
                if x.opcode == "parameter":
                    last[x.name] = len(instructions)  # nobody else may have an argument's memory
                live[x.name] = size, shape_of(x), hlo.origin(module, computation, x) or x.name, module.place(x)
                now += size
        inner, more = 0, {}
        for name in _runs(x):
            inner, more = max((inner, more), _peak(module, name, done), key=lambda one: one[0])
        if now + inner > best[0]:
            best = now + inner, dict(live) | {f"{x.name}/{key}": value for key, value in more.items()}
        for owner in [owner for owner in live if last.get(owner, i) <= i]:
            now -= live.pop(owner)[0]
    done[computation] = best
    return best


def _shared(x: Instruction, beside: Mapping[str, Instruction]) -> tuple[str, ...]:
    """Types of the operands that lie in a result as they are: of a start's all, of a fusion's those it says."""
    numbers = re.findall(r"\((\d+), \{", x.attributes[: x.attributes.find("calls=")])
    names = x.operands if x.opcode.endswith("-start") else [x.operands[int(n)] for n in numbers]
    aliased = x.opcode.endswith("-start") or "output_to_operand_aliasing" in x.attributes
    return tuple(beside[name].type for name in names if name in beside) if aliased else ()


def _runs(x: Instruction) -> tuple[str, ...]:
    """The computations with buffers of their own that an instruction runs."""
    if x.opcode == "while":
        return (x.attribute("body"),)
    return x.called() if x.opcode in ("call", "conditional") else ()


def _owners(module: Module, computation: str) -> Mapping[str, tuple[str, ...]]:
    """For every instruction the instructions whose buffers its value lies in."""
    beside, owners = module.computations[computation], {}
    for x in beside.values():
        of = [owners.get(name, ()) for name in x.operands]
        if x.opcode == "get-tuple-element" and beside.get(x.operands[0]) is not None:
            whole, index = beside[x.operands[0]], int(x.attribute("index"))
            source = _tuple(beside, whole)
            owners[x.name] = owners.get(source.operands[index], ()) if source is not None else of[0]
        elif x.opcode == "dynamic-update-slice" or (x.opcode.endswith("-done") and of):
            owners[x.name] = of[0]
        elif x.opcode in INHERIT:
            owners[x.name] = tuple({owner for each in of for owner in each})
        elif (taken := _in_place(module, x, beside)) is not None:
            owners[x.name] = owners.get(taken, (x.name,))
        else:
            owners[x.name] = (x.name,)
    return owners


def _tuple(beside: Mapping[str, Instruction], x: Instruction) -> Instruction | None:
    """The tuple instruction that a value is, through the loops that only pass it on."""
    while x is not None and x.opcode in ("while", "opt-barrier"):
        x = beside.get(x.operands[0])
    return x if x is not None and x.opcode == "tuple" else None


def _in_place(module: Module, x: Instruction, beside: Mapping[str, Instruction]) -> str | None:
    """The operand that a fusion updates a slice of."""
    if x.opcode != "fusion" or not x.called() or x.called()[0] not in module.roots:
        return None
    if module.root(x.called()[0]).opcode != "dynamic-update-slice":
        return None
    same = (name for name in x.operands if name in beside and beside[name].arrays() == x.arrays())
    return next(same, None)


def shape_of(x: Instruction) -> str:
    arrays = sorted(x.arrays(), key=lambda array: -array.bytes)
    return str(arrays[0]) if arrays else x.type


_LAID = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")


def padded(kind: str) -> int:
    """Bytes of a type in a TPU's main memory, whose tiles pad the last dims; what lies in another memory is nothing."""
    total = 0
    for dtype, size, order, layout in _LAID.findall(kind):
        shape = [int(n) for n in size.split(",") if n]
        if re.search(r"S\([1-9]\d*\)", layout):
            continue
        tile = re.match(r"T\(([\d,]+)\)", layout)
        if tile and order:
            sides = [int(n) for n in tile[1].split(",")]
            for dim, side in zip(map(int, order.split(",")), reversed(sides), strict=False):
                shape[dim] = math.ceil(shape[dim] / side) * side
        total += hlo.Array(dtype, tuple(shape)).bytes
    return total
