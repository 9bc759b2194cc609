"""What one device does in a train step, counted from the run's fields: products, attention, memory traffic, messages.

No tracing and no compiler, so a thousand meshes take a second. `llmjax.plan.analytic` turns it into seconds.
"""

import dataclasses
import math
from typing import Any

from llmjax.layout import Layout, axes_of, ways
from llmjax.mesh import AXES, Axes
from llmjax.models.quantized import TYPES
from llmjax.models.shapes import LAYER, Matrix, seen
from llmjax.run import Run
from llmjax.train.kernels import OWN, kernel


@dataclasses.dataclass(frozen=True)
class Again:
    """The shares of a layer's forward pass that the backward pass computes again."""

    attention: float = 0.0
    "Of the products with attention's weights."
    mlp: float = 0.0
    "Of the products with the feed-forward's weights."
    scores: float = 0.0
    "Of attention itself."
    last: bool = False
    "Also the product that ends a layer, though nobody needs its result: XLA leaves it out, other systems do not."

    def of(self, module: str) -> float:
        return getattr(self, module, 0.0)


# Bytes of a parameter that an update passes: weight and two moments read and written, the gradient read. Weight and
# gradient may be in bfloat16.
UPDATE = 28
REMAT = {
    "none": Again(),
    "dots": Again(),
    "attention": Again(mlp=1),
    "full": Again(1, 1, 1),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """How a trainer computes what the fields of a run leave open. The defaults are this trainer's."""

    again: Again | None = None
    "What is computed again; None: what the run's `remat` says."
    fused: bool = False
    "Attention in one kernel that skips what lies above the diagonal, instead of scores of T² in memory."
    score_bytes: int = 4
    "Bytes of a score, where attention is not fused."
    gradient_bytes: int = 4
    "Bytes of a gradient's number on the network."
    faster: float = 1.0
    "How often faster than bfloat16 the chip multiplies: twice in int8 and fp8."
    window: float = 1.0
    "The part of the causal triangle that sliding windows leave, on average over the layers."
    loss_bytes: float = 20
    "Bytes of traffic per logit, forward and back."


@dataclasses.dataclass(frozen=True)
class Message:
    """A collective that theory says a step needs."""

    kind: str
    axes: tuple[str, ...]
    module: str
    bytes: float
    "V of one run, as in `llmjax.plan.collectives`."
    count: float
    "Runs in a step."
    hidden: bool
    "Whether compute can go on meanwhile: weights and their gradients. Nothing can while activations travel."


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in a step."""

    tokens: int
    "Of the whole step, on all devices."
    products: dict[str, float]
    "FLOPs of products with weights by module, recomputation included, in bfloat16's time."
    attention: float
    "FLOPs of attention itself, recomputation included; only the causal triangle if it is fused."
    traffic: dict[str, float]
    "Bytes read and written in memory outside of products, by module."
    weights: float
    "Bytes of weights read by products."
    messages: tuple[Message, ...]
    bubble: float
    "Idle time of a pipeline, as a share of the busy time."
    passes: float
    "Layers passed in a step, forward and back: each has a fixed cost."


def repeated(run: Run, stages: int) -> Again:
    """What this trainer computes again: what `remat` says, and under 1f1b once more all that a stage computes."""
    again = REMAT[run.remat.policy]
    if stages == 1 or run.pipeline.schedule != "1f1b":
        return again
    return Again(again.attention + 1, again.mlp + 1, again.scores + 1, last=True)


def is_fused(run: Run, sizes: Axes) -> bool:
    """Whether attention is computed in a kernel of its own, which leaves no scores in memory."""
    return kernel(run, sizes, run.mesh.chip)[0] in OWN.values()


def rounds(run: Run, module: str, matrix: Matrix) -> bool:
    """Whether products with these weights take eight bits, but the one that gives the weights' gradient."""
    return run.dtype in TYPES and module in LAYER and "E" not in matrix.dims


def rate(run: Run) -> float:
    """How often faster than in bfloat16 the run's chip multiplies such; 1 where that is not known."""
    chip = run.mesh.chip
    return (getattr(chip, run.dtype, None) or chip.flops) / chip.flops if chip.flops else 1


def cut(layout: Layout, matrix: Matrix, letters: dict[str, int], sizes: Axes, where: str) -> float:
    """Numbers of a weight that one device holds `at_rest` or `in_use`."""
    spec = getattr(layout, where)(matrix.dims)
    return matrix.size(letters) / math.prod(ways(part, sizes) for part in spec)


def over(axes: Any, sizes: Axes) -> tuple[str, ...]:
    """Those of the axes that cut anything, in the order of the mesh."""
    return tuple(axis for axis in AXES if axis in axes and getattr(sizes, axis) > 1)


def count(run: Run, sizes: Axes, accumulate: int, method: Method = Method()) -> Work:
    """The work of one device in a step of this run on axes of these sizes."""
    layout, inner, model = run.layout, run.layout.inner, run.model
    letters, stages = dict(model.sizes()), ways(layout.params.get("L"), sizes)
    again = method.again or repeated(run, stages)
    layers = model.layers / stages
    tokens = run.batch * run.sequence / ways(inner.get("B"), sizes) / ways(inner.get("T"), sizes)
    rows = run.batch // ways(inner.get("B"), sizes) // accumulate
    parts = run.pipeline.parts(rows, stages) if stages > 1 else 1

    fused = method.fused or is_fused(run, sizes)
    products = {}
    for module, matrices in model.matrices().items():
        met = [m.share * m.size(letters) / _cut_products(layout, m, sizes) for m in matrices]
        quick = [each / (rate(run) if rounds(run, module, m) else 1) for each, m in zip(met, matrices, strict=True)]
        twice = sum(quick) - (quick[-1] if module == "mlp" and not again.last else 0)
        flops = 2 * tokens * (sum(met) + 2 * sum(quick) + again.of(module) * twice) / method.faster
        products[module] = flops * (layers if module in LAYER else 1)
    heads = letters["H"] / ways(inner.get("H"), sizes)
    square = tokens * run.sequence * heads * layers * (0.5 if fused else _seen(ways(inner.get("S"), sizes)))
    forward = 4 * square * method.window * letters["K"] * (seen(model, run.sequence) if fused else 1)
    attention = forward * (1 + 2.5 + again.scores)

    traffic = _traffic(run, sizes, tokens, layers, again, method)
    if not fused:  # scores are written, read for the maximum, read and written for the weights, read
        passes = 4 * (1 + again.scores) + 7
        traffic["scores"] = square * passes * method.score_bytes
    own = _numbers(run, sizes, "at_rest")
    traffic["optimizer"] = own * (UPDATE - 6 if run.parameters == "bfloat16" else UPDATE)
    used = _numbers(run, sizes, "in_use")
    return Work(
        tokens=run.batch * run.sequence,
        products=products,
        attention=attention,
        traffic=traffic,
        weights=2 * used * (3 + (again.mlp + again.attention) / 2) * accumulate * parts,
        messages=tuple(_messages(run, sizes, accumulate, parts, tokens, again, method)),
        bubble=(stages - 1) / (run.pipeline.laps * parts),
        passes=layers * accumulate * parts * (3 + again.mlp),
    )


def _cut_products(layout: Layout, matrix: Matrix, sizes: Axes) -> int:
    """Into how many parts a product with the weight is cut, the tokens aside. Experts are cut as the tokens are."""
    return math.prod(ways(layout.inner.get(d), sizes) for d in matrix.dims if d not in "DE")


def _numbers(run: Run, sizes: Axes, where: str) -> float:
    """Numbers of all matrices that one device holds; its share of the layers if these are cut."""
    letters, total = dict(run.model.sizes()), 0.0
    layers = run.model.layers / ways(run.layout.params.get("L"), sizes)
    for module, matrices in run.model.matrices().items():
        numbers = sum(cut(run.layout, m, letters, sizes, where) for m in matrices)
        total += numbers * (layers if module in LAYER else 1)
    return total


def _traffic(run: Run, sizes: Axes, tokens: float, layers: float, again: Again, method: Method):
    """Bytes of activations in bfloat16 that pass through memory: norms, rotations, gates, sums, and the loss.

    Of a layer forward: two norms and two sums read and write D about 10 times, products write what they make and read
    it again, and so do rotations and gates. Backward twice as much.
    """
    letters, inner = run.model.sizes(), run.layout.inner
    D = letters["D"] / ways(run.layout.stream.get("T"), sizes) * ways(inner.get("T"), sizes)
    HGK = (letters["H"] + 2 * letters["G"]) * letters["K"] / ways(inner.get("H"), sizes)
    met = {m.dims: m.count * m.share for m in run.model.matrices()["mlp"] if "F" in m.dims}
    F = sum(each * letters.get("E", 1) if "E" in dims else each for dims, each in met.items())
    F = F * letters["F"] / ways(inner.get("F"), sizes)
    V = letters["V"] / ways(inner.get("V"), sizes)
    forward = dict(attention=2 * tokens * (6 * D + 4 * HGK), mlp=2 * tokens * (6 * D + 3 * F))
    traffic = {module: layers * each * (3 + again.of(module)) for module, each in forward.items()}
    if run.dtype in TYPES:  # what goes in and the gradients of what comes out: each read twice and written
        traffic["attention"] += 5 * tokens * layers * (2 * D + 2 * HGK)
        traffic["mlp"] += 5 * tokens * layers * (2 * D + F) * ("E" not in letters)
    return traffic | {"head": tokens * V * method.loss_bytes}


def _messages(run: Run, sizes: Axes, accumulate: int, parts: int, tokens: float, again: Again, method: Method):
    layout, model = run.layout, run.model
    letters = dict(model.sizes())
    inner, stages = layout.inner, ways(layout.params.get("L"), sizes)
    layers = model.layers / stages
    micro = tokens / accumulate / parts  # tokens of a device that pass at a time
    stream = 2 * micro * letters["D"]
    token_axes = over([*axes_of(inner.get("B")), *axes_of(inner.get("T"))], sizes)
    often = accumulate * (1 if run.pipeline.gather_once else parts)

    for module, matrices in model.matrices().items():
        turns = layers if module in LAYER else 1
        for m in matrices:
            rest = {a for part in layout.at_rest(m.dims) for a in axes_of(part)}
            used = {a for part in layout.in_use(m.dims) for a in axes_of(part)}
            gathered, whole = over(rest - used, sizes), cut(layout, m, letters, sizes, "in_use")
            if gathered:
                gathers = 2 if module in LAYER else 1  # forward and back; the head's two uses are next to each other
                number = 1 if rounds(run, module, m) else 2
                yield Message("all-gather", gathered, module, number * whole, turns * gathers * often, True)
                size = method.gradient_bytes * whole
                yield Message("reduce-scatter", gathered, module, size, turns * often, True)
            summed = tuple(a for a in token_axes if a not in rest)
            if summed:
                size = method.gradient_bytes * cut(layout, m, letters, sizes, "at_rest")
                yield Message("all-reduce", summed, module, size, turns, True)

    tensor = over(axes_of(inner.get("H")), sizes)
    split = ways(layout.stream.get("T"), sizes) > ways(inner.get("T"), sizes)
    if tensor:  # partial sums of out and down, and of the gradients of what goes in
        for module in LAYER:
            runs = layers * accumulate * parts * (2 + (again.attention if module == "attention" else 0))
            yield from _summed(tensor, module, stream, runs, split)
    vocabulary = over(axes_of(inner.get("V")), sizes)
    if vocabulary:  # after the table, and before the head on the way back
        yield from _summed(vocabulary, "head", stream, 2 * accumulate * parts, split)

    context = over(axes_of(inner.get("T")), sizes)
    if context:
        n = ways(context, sizes)
        heads = letters["G"] / ways(inner.get("G"), sizes)
        own = 2 * micro * heads * letters["K"] * 2  # keys and values, bfloat16
        turns = layers * accumulate * parts
        if inner.get("S"):
            yield Message("collective-permute", context, "attention", own, turns * (n - 1) * (2 + again.scores), True)
            yield Message("collective-permute", context, "attention", 2 * own, turns * n, True)  # their gradients, home
        else:
            yield Message("all-gather", context, "attention", own * n, turns * (1 + again.scores), False)
            yield Message("reduce-scatter", context, "attention", 2 * own * n, turns, False)
    if stages > 1:
        hops = 2 * (run.pipeline.laps * parts + stages - 1) * accumulate
        yield Message("collective-permute", ("stage",), "pipeline", stream, hops, False)
    expert = over(axes_of(inner.get("E")), sizes)
    if expert and "E" in letters:
        routed = max(m.share for m in model.matrices()["mlp"] if m.dims == "EDF") * letters["E"]
        runs = layers * accumulate * parts * (4 + 2 * again.mlp)
        yield Message("all-to-all", expert, "mlp", stream * routed, runs, False)


def _seen(ring: int) -> float:
    """The part of the square of scores that is computed where attention is not fused.

    Around a ring of n, each device sees of 2n pieces of keys 3 pairs with its own two, and 2 with every other's.
    """
    return 1 if ring == 1 else (2 * ring + 1) / (4 * ring)


def _summed(axes: tuple[str, ...], module: str, stream: float, runs: float, split: bool):
    """Sums of the stream over the axes: to all, or to a part of the positions that is gathered where it is needed."""
    kinds = ("reduce-scatter", "all-gather") if split else ("all-reduce",)
    return (Message(kind, axes, module, stream, runs, False) for kind in kinds)
