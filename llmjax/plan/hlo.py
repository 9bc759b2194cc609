"""Reading the text of compiled HLO: computations, instructions, array types, constants, turns of loops."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

Numbers = Mapping[int, int]  # the integers known among the elements of a tuple
TURNS = 1 << 16  # where turns have to be followed one by one, a loop of more is taken to have no known end

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """Type of one array on one device."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or ["0"])[0])
        return math.prod(self.shape) * bits // 8

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation, in its parts."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    inside: str  # what stands in the parentheses: operands, or a constant's value, or a parameter's number
    attributes: str

    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, a tuple's one after another."""
        return arrays_of(self.type)

    def attribute(self, name: str) -> str | None:
        """A one-word attribute such as body=%region."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    def attribute_set(self, name: str) -> str:
        """An attribute in braces such as dimensions={0}, without them."""
        found = re.search(rf"\b{name}=\{{([^}}]*)\}}", self.attributes)
        return found[1] if found else ""

    def operation(self) -> str:
        """The traced operation it comes from, such as jit(step)/block/mlp/mul; nothing where it names none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def cycles(self) -> int | None:
        """How long the TPU's compiler thinks it runs."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self) -> tuple[str, ...]:
        """Names of the computations it runs once, a loop's not among them."""
        found = _CALLED.findall(self.attributes)
        return tuple(name for names in found for name in re.findall(r"[\w.\-]+", names))


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: its computations, each a map from name to instruction, the root last."""

    computations: Mapping[str, Mapping[str, Instruction]]
    roots: Mapping[str, str]
    entry: str
    frames: Mapping[str, str]  # from stack_frame_id to file:line

    def root(self, computation: str) -> Instruction:
        return self.computations[computation][self.roots[computation]]

    def place(self, instruction: Instruction) -> str:
        """file:line that an instruction comes from, or nothing where the program does not say."""
        file = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes)
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        return f"{file[1]}:{file[2]}" if file else self.frames.get(frame[1], "") if frame else ""

    def source(self, instruction: Instruction) -> str:
        """The traced operation an instruction comes from, with file and line where the program says them."""
        parts = instruction.operation() or instruction.name, self.place(instruction)
        return " at ".join(part for part in parts if part)


def arrays_of(text: str) -> tuple[Array, ...]:
    """The array types in a piece of text."""
    sizes = ((dtype, size.replace("<=", "").split(",")) for dtype, size in _ARRAY.findall(text))
    return tuple(Array(dtype, tuple(int(s) for s in size if s)) for dtype, size in sizes)


def parse(text: str) -> Module:
    """The module that a `compiled.as_text()` shows.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations, roots, entry, current = {}, {}, None, None
    whole = re.sub(r'\n(?="|\}\})', " ", text)  # what is said of a kernel goes on over lines
    for line in whole.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = head[2]
                computations[current] = {}
                entry = current if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _instruction(line):
            instruction, is_root = found
            computations[current][instruction.name] = instruction
            if is_root:
                roots[current] = instruction.name
    if entry is None:
        raise ValueError("the text holds no ENTRY computation: give what compiled.as_text() returns.")
    return Module(computations, roots, entry, _frames(text))


def _instruction(line: str) -> tuple[Instruction, bool] | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[found.end() :])
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode = rest[: rest.index("(")]
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(re.findall(r"[\w.\-]+", inside))
    return Instruction(found[2], kind, opcode, operands, inside, rest[close:]), bool(found[1])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis opened at `start` has been closed."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.end()
    raise ValueError(f"a parenthesis is never closed in: {text[:200]}")


def _frames(text: str) -> dict[str, str]:
    """file:line of every stack frame, from the tables that lead a module's text."""
    parts = {}
    for title in ("FileNames", "FileLocations", "StackFrames"):
        found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        parts[title] = dict(line.split(" ", 1) for line in found[1].splitlines()) if found else {}
    files = {i: name.strip('"') for i, name in parts["FileNames"].items()}
    places = {}
    for i, location in parts["FileLocations"].items():
        values = dict(re.findall(r"(\w+)=(\d+)", location))
        places[i] = f"{files.get(values.get('file_name_id'), '?')}:{values.get('line', '?')}"
    frames = ((i, re.search(r"file_location_id=(\d+)", frame)) for i, frame in parts["StackFrames"].items())
    return {i: places.get(location[1], "") for i, location in frames if location}


def origin(module: Module, computation: str, x: Instruction) -> str:
    """The traced operation of an instruction, or where the compiler gives none, of what uses it or what it uses."""
    if "/" in x.operation() or x.opcode == "parameter":
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


def turns(module: Module, computation: str, loop: Instruction, known: Numbers) -> int | None:
    """How often a while loop's body runs; None where that depends on data.

    XLA notes it for most loops. For the others the loop's integers are followed from turn to turn until its condition
    fails. `known` are the integers that a loop around it never changes.
    """
    noted = re.search(r'"?known_trip_count"?:?\s*=?\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition, body = loop.attribute("condition"), loop.attribute("body")
    values = start(module, computation, loop, known)
    for turn in range(TURNS):
        again = _evaluate(module, condition, module.root(condition), values)
        if again is None:
            return None
        if not again:
            return turn
        values = _elements(module, body, module.root(body), values)
    return None


def start(module: Module, computation: str, loop: Instruction, known: Numbers) -> Numbers:
    """The integers known among a loop's elements before its first turn."""
    return _elements(module, computation, module.computations[computation][loop.operands[0]], known)


def unchanged(module: Module, body: str, values: Numbers) -> Numbers:
    """Those of a loop's elements that its body passes on as they are."""
    instructions, root = module.computations[body], module.root(body)
    kept = {}
    for i, name in enumerate(root.operands if root.opcode == "tuple" else ()):
        element = instructions.get(name)
        same = element is not None and element.opcode == "get-tuple-element" and element.attribute("index") == str(i)
        if same and i in values and instructions[element.operands[0]].opcode == "parameter":
            kept[i] = values[i]
    return kept


def _elements(module: Module, computation: str, value: Instruction, known: Numbers) -> Numbers:
    if value.opcode == "parameter":
        return known
    if value.opcode != "tuple":
        return {}
    instructions = module.computations[computation]
    scalars = ((i, instructions[name]) for i, name in enumerate(value.operands))
    found = ((i, _evaluate(module, computation, x, known)) for i, x in scalars if re.match(r"[su]\d+\[\]", x.type))
    return {i: number for i, number in found if number is not None}


_MATHS = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "LT": lambda a, b: int(a < b),
    "LE": lambda a, b: int(a <= b),
    "GT": lambda a, b: int(a > b),
    "GE": lambda a, b: int(a >= b),
    "EQ": lambda a, b: int(a == b),
    "NE": lambda a, b: int(a != b),
}


def _evaluate(
    module: Module, computation: str, x: Instruction, known: Numbers, arguments: tuple[int | None, ...] = ()
) -> int | None:
    """The value of an integer, if it follows from constants, the `known` elements of the parameter and `arguments`."""
    instructions = module.computations[computation]
    go = functools.partial(_evaluate, module, computation, known=known, arguments=arguments)
    if x.opcode == "constant":
        words = {"true": "1", "false": "0"}
        number = words.get(x.inside, x.inside)
        return int(number) if re.fullmatch(r"-?\d+", number) else None
    if x.opcode == "parameter":
        number = int(x.inside)
        return arguments[number] if number < len(arguments) else None
    if x.opcode == "get-tuple-element":
        index, whole = int(x.attribute("index")), instructions[x.operands[0]]
        if whole.opcode == "parameter":
            return known.get(index)
        return go(instructions[whole.operands[index]]) if whole.opcode == "tuple" else None
    operands = [instructions.get(name) for name in x.operands]
    if x.opcode in ("copy", "bitcast", "convert", "reshape") and x.arrays()[0].shape == ():
        return go(operands[0])
    if x.opcode in ("fusion", "call"):
        [inner] = x.called()
        given = tuple(operand and go(operand) for operand in operands)
        return _evaluate(module, inner, module.root(inner), {}, given)
    maths = _MATHS.get(x.attribute("direction") if x.opcode == "compare" else x.opcode)
    values = [go(operand) for operand in operands] if maths else [None]
    return maths(*values) if None not in values else None


@dataclasses.dataclass(frozen=True)
class Ran:
    """An instruction, and how often it runs when the program does."""

    computation: str
    instruction: Instruction
    count: int | None  # None: below a loop whose turns depend on data
    loop: Instruction | None = None  # that loop
    schedule: str = ""  # the computation in whose order it runs: its own, or the one that holds the fusion it is in


def walk(module: Module, default: int | None = None) -> Iterator[Ran]:
    """Everything that runs. Both branches of a condition count as run.

    A loop whose turns depend on data is taken to turn `default` times.
    """
    return _walk(module, module.entry, {}, default, 1, None, module.entry)


def _walk(module, computation, known, default, count, loop, schedule) -> Iterator[Ran]:
    for x in module.computations[computation].values():
        yield Ran(computation, x, count, loop, schedule)
        if x.opcode == "while":
            body, often = x.attribute("body"), turns(module, computation, x, known)
            often = default if often is None else often
            inside = unchanged(module, body, start(module, computation, x, known))
            hidden = (None, loop or x) if often is None or count is None else (count * often, None)
            yield from _walk(module, body, inside, default, *hidden, body)
        elif not x.opcode.endswith(("-done", "-update")):  # the start of something asynchronous has been counted
            for name in x.called():
                within = schedule if x.opcode == "fusion" else name
                yield from _walk(module, name, {}, default, count, loop, within)
