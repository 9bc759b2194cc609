"""What one instruction of a TPU program costs, and which part of the model it belongs to."""

import dataclasses
import math
import re
from collections.abc import Mapping

from llmjax.mesh import Chip
from llmjax.plan import hlo
from llmjax.plan.hlo import Instruction, Module

# Cycles per second are the chip's peak / (2 x side² x units): v4 and v5p have 8 units of 128², v5e 4 of 128²
# (cloud.google.com/tpu/docs), v6e and each device of a 7x 4 of 256²: so say the compiler's own cycles, whose products
# of 8192³ take 70 to 93% of that peak on all five. The clocks are then 1.05, 1.75, 1.5, 1.75 and 2.2 GHz.
FLOP_PER_CYCLE = {"TPU v4": 2 * 8 * 128**2, "TPU v5e": 2 * 4 * 128**2, "TPU v5p": 2 * 8 * 128**2,
                  "TPU v6e": 2 * 4 * 256**2, "TPU 7x": 2 * 4 * 256**2}  # fmt: skip
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "partition-id",
        "replica-id", "domain", "add-dependency", "copy-start", "copy-done", "slice-start", "slice-done",
        "dynamic-slice-start", "dynamic-slice-done", "async-update", "send-done", "recv", "recv-done"}  # fmt: skip
# Copies between a chip's memories run beside everything else.
KNOWN_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "AsyncCollectiveStart",
               "AsyncCollectiveDone", "PrepareAsyncCallStart", "PrepareAsyncCallDone", "ConcatBitcast", "SliceId",
               "ZeroCrop"}  # fmt: skip
SMALL = 1 << 16  # bytes below which something that the compiler gives no cycles for takes no time


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an instruction takes when it runs once."""

    seconds: float = 0.0
    part: str = "other"
    "matmul, attention, memory or other."
    unknown: str = ""
    "What is not understood about it, or nothing."


def clock(chip: Chip) -> float | None:
    """Cycles per second of a TPU."""
    per_cycle = FLOP_PER_CYCLE.get(chip.name)
    return chip.flops / per_cycle if per_cycle and chip.flops else None


def cost(module: Module, computation: str, x: Instruction, chip: Chip) -> Cost:
    """The compiler's cycles of an instruction that computes; what has none costs what its bytes take to pass."""
    rate, cycles = clock(chip), x.cycles()
    if x.opcode in FREE or rate is None or (x.opcode == "custom-call" and x.target() in KNOWN_CALLS):
        return Cost()
    if x.opcode == "call-start":
        return Cost(unknown="call-start on the sparse core, taken to be hidden")
    origin = hlo.origin(module, computation, x)
    part = "attention" if "scores" in origin.split("/") else ""
    if x.opcode == "custom-call":
        if flops := attention_flops(x):
            return Cost(flops / (chip.flops * chip.efficiency.attention), "attention")
        return Cost(0.0, part or "other", f"custom-call {x.target()}, {_kernel(x)}")
    if part and "_splash_attention" in origin:
        return Cost(part=part)  # what is done around the kernel: its efficiency, fitted to whole steps, holds that too
    if cycles is None:
        size = _written(module.computations[computation], x)
        known = size <= SMALL or calls(module, x, "AsyncCollectiveDone")
        return Cost() if known else Cost(2 * size / chip.bandwidth, "memory", f"{x.opcode} without cycles")
    return Cost(cycles / rate, part or ("matmul" if multiplies(module, x) else "memory"))


def attention_flops(x: Instruction) -> float:
    """FLOPs of a call of splash attention, of the causal triangle alone; 0: it is another call.

    Two products of T x S x K for every head forward; and five for the gradients, the scores again among them.
    """
    products = 2 * x.name.startswith("splash_mha_fwd") + 5 * x.name.startswith("splash_mha_dkv")
    if not products:
        return 0.0
    q, k, *_ = (
        array
        for array in hlo.arrays_of(x.attributes.partition("operand_layout_constraints=")[2])
        if "f" in array.dtype and len(array.shape) > 2
    )
    return products * 2 * math.prod(q.shape) * k.shape[-2] / 2


def calls(module: Module, x: Instruction, target: str) -> bool:
    """Whether a fusion holds the custom call of that name."""
    inside = (y for name in x.called() if x.opcode == "fusion" for y in module.computations[name].values())
    return any(y.opcode == "custom-call" and y.target() == target for y in inside)


def _kernel(x: Instruction) -> str:
    """Which kernel a custom call is, by the scopes nearest to it."""
    return "/".join(x.operation().split("/")[-2:]) or re.sub(r"[.\d]+$", "", x.name)


def _written(beside: Mapping[str, Instruction], x: Instruction) -> int:
    """Bytes that an instruction writes; an update in place writes only what is new."""
    if x.opcode == "dynamic-update-slice":
        x = beside.get(x.operands[1], x)
    return sum(array.bytes for array in x.arrays())


def multiplies(module: Module, x: Instruction) -> bool:
    """Whether an instruction holds a matrix product."""
    if x.opcode in ("convolution", "dot"):
        return True
    inside = (y for name in x.called() if x.opcode == "fusion" for y in module.computations[name].values())
    return any(multiplies(module, y) for y in inside)


_PARTS = (("attention", r"\battention\b"), ("mlp", r"\bmlp\b"), ("block", r"\bblock\b"),
          ("embedding", r"\bembedding\b"), ("head", r"jvp"))  # fmt: skip


def part_of(operation: str) -> str:
    """The part of the model that a traced operation belongs to, by the scopes that models name."""
    if "attention" in operation and re.search(r"\bmlp\b", operation):
        return "block"  # what the compiler has put together
    for part, pattern in _PARTS:
        if re.search(pattern, operation):
            return part
    return "optimizer" if operation.startswith("jit(") and "/while" not in operation else "other"
