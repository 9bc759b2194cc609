"""Bytes of one device in a train step, from the run's fields alone: the model that needs no compiler.

Parameters and optimizer are exact. The rest is what the step keeps by its own code (`llmjax.models.nn.layers`, the
residuals of `attention`, of the norms and of the feed-forward, `llmjax.models.pipeline`) at the moment of the peak,
which is either in the backward pass of a layer or at the loss; what a compiler keeps besides is in `Habits`.
"""

import dataclasses
import functools
import math
from typing import Any

import jax

from llmjax import mesh as meshes
from llmjax.layout import axes_of
from llmjax.mesh import AXES, Axes, Chip
from llmjax.models import nn
from llmjax.models.pipeline import ticks
from llmjax.models.shapes import LAYER, Matrix
from llmjax.plan.work import cut, ways
from llmjax.run import Run
from llmjax.train import program
from llmjax.train import step as steps

Leaf = tuple[tuple[int, ...], int, tuple[tuple[str, ...], ...]]  # shape, bytes of a number, axes that cut each dim


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one device holds at the peak of a step."""

    parameters: int
    optimizer: int
    gradients: int
    "In float32: of all layers, and of a microbatch besides where there are several."
    activations: int
    "What the forward pass leaves for the backward pass."
    temporaries: int
    "What comes and goes: gathered weights, attention scores, logits."

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.activations + self.temporaries


@dataclasses.dataclass(frozen=True)
class Habits:
    """What XLA keeps at once, seen in compiled programs by `tests/plan/test_memory.py`. Bytes unless said otherwise."""

    scores: float = 6
    "Per attention score in the backward pass of a layer: float32, and bfloat16 for the products."
    ring: float = 12
    "Per score of a pair of pieces of a ring."
    logits: float = 8
    "Per logit at the loss."
    hidden: float = 2
    "Activations as wide as the feed-forward that a layer's backward pass keeps beside the scores."
    stream: float = 3
    "Activations as wide as the stream, likewise."
    casts: float = 0.7
    "Share of the layers' weights at rest that are cast once for all microbatches, ahead of the loop."
    slopes: float = 2
    "Gradients of a layer's largest weight that wait, whole, for the sum over devices."


TPU = Habits()


def state(run: Run, sizes: Axes) -> tuple[int, int]:
    """(parameters, optimizer) of one device, exactly."""
    parameters, optimizer = _leaves(run.model, run.optimizer, run.clip, run.steps, run.layout, run.local)
    return sum(_bytes(leaf, sizes) for leaf in parameters), sum(_bytes(leaf, sizes) for leaf in optimizer)


def _bytes(leaf: Leaf, sizes: Axes) -> int:
    shape, each, cuts = leaf
    parts = (math.prod(getattr(sizes, axis) for axis in axes) for axes in cuts)
    return each * math.prod(-(-size // n) for size, n in zip(shape, parts, strict=True))


@functools.lru_cache(maxsize=256)
def _leaves(model, optimizer, clip, length, layout, local) -> tuple[tuple[Leaf, ...], tuple[Leaf, ...]]:
    run = Run(model, None, optimizer, None, None, layout=layout, clip=clip, steps=length, local=local)
    init = functools.partial(steps.init, model.init, program.transformation(run))
    # A layer's dim names the stages only where there are several.
    stages = next((n for n in range(2, model.layers + 1) if model.layers % n == 0), 1) if layout.params.get("L") else 1
    ones = Axes(**{axis: stages if axis == "stage" else 1 for axis in AXES})
    with jax.sharding.use_abstract_mesh(meshes.abstract_mesh(ones)), nn.compute(nn.Compute(layout)):
        made = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    return tuple(map(_leaf, jax.tree.leaves(made.model))), tuple(map(_leaf, jax.tree.leaves(made.opt)))


def _leaf(x: Any) -> Leaf:
    spec = tuple(x.sharding.spec) if getattr(x, "sharding", None) is not None else ()
    cuts = tuple(axes_of(part) for part in spec)
    return x.shape, x.dtype.itemsize, cuts + ((),) * (len(x.shape) - len(cuts))


@dataclasses.dataclass(frozen=True)
class Part:
    """What one device sees of a microbatch, and of the model."""

    tokens: float
    "Inside blocks."
    stream: float
    "Between blocks."
    keys: float
    "Positions that a token's scores are of."
    number: int
    "Bytes of an activation's number."
    layers: int
    "Layers that a microbatch passes here at once."
    passes: int
    "How many microbatches leave something for the backward pass."
    letters: dict[str, float]
    "Size of every letter in here."
    experts: float
    "Rows that experts multiply, per token; 0: none do."

    @property
    def scores(self) -> float:
        return self.tokens * self.keys * self.letters["H"]


def part(run: Run, sizes: Axes, accumulate: int, bfloat16: bool) -> Part:
    """The part of this device."""
    layout, letters = run.layout, dict(run.model.sizes())
    stages = ways(layout.params.get("L"), sizes)
    rows = run.batch // ways(layout.inner.get("B"), sizes) // accumulate
    parts = run.pipeline.parts(rows, stages) if stages > 1 else 1
    laps = run.pipeline.laps if stages > 1 else 1
    layers = run.model.layers // stages // laps
    passes = parts
    if stages > 1:
        passes = 1 if run.pipeline.schedule == "1f1b" else ticks("circular", stages, parts, laps)[0]
    tokens = rows / parts * run.sequence
    inside = ways(layout.inner.get("T"), sizes)
    local = {d: size / ways(layout.inner.get(d), sizes) for d, size in letters.items() if d not in "DE"}
    met = max((m.share for m in run.model.matrices()["mlp"] if "E" in m.dims), default=0.0) * letters.get("E", 0)
    return Part(
        tokens=tokens / inside,
        stream=tokens / ways(layout.stream.get("T"), sizes),
        keys=run.sequence,
        number=2 if bfloat16 else 4,
        layers=layers,
        passes=passes,
        letters=local | {"D": letters["D"]},
        experts=met * (getattr(run.model, "capacity", 0) or 1),
    )


def saved(run: Run, one: Part) -> float:
    """Bytes that one layer leaves for the backward pass of one microbatch."""
    D, H, G, K, F = (one.letters[d] for d in "DHGKF")
    if run.remat != "none":  # the stream alone: no policy sees into the products, whose derivative is our own
        return one.stream * D * one.number
    norms = one.stream * (4 * 4 * D)  # two norms keep their input and its normalised form in float32
    ends = 2 * one.tokens * D * one.number  # the norms' results, gathered
    heads = one.tokens * (K * (3 * H + 2 * G) * one.number + 4 * H)
    rows = one.tokens * (one.experts or 1)
    hidden = 6 * rows * F * one.number
    routed = one.experts and rows * D * (one.number + 4)
    return norms + ends + heads + hidden + routed


def predict(run: Run, sizes: Axes, accumulate: int, chip: Chip | None = None) -> Memory:
    """What one device holds at the peak of a step of this run on axes of these sizes.

    The chip is the cluster's unless one is given; an unknown one computes as an accelerator does.
    """
    chip = chip or run.mesh.chip
    habits, on_cpu = TPU, chip is not None and chip.platform == "cpu"
    bfloat16 = run.dtype == "bfloat16" or (run.dtype == "auto" and not on_cpu)
    parameters, optimizer = state(run, sizes)
    one = part(run, sizes, accumulate, bfloat16 and not on_cpu)
    kept = saved(run, one) * one.layers * one.passes
    several = accumulate > 1
    ahead = _ahead(run, sizes, habits, 2 if bfloat16 else 0)
    head = 0 if several else _head(run, sizes, one)
    in_layer = parameters * (2 if several else 1), _layer(run, sizes, one, habits) + ahead + head
    at_loss = parameters * (1 if several else 0), _loss(run, sizes, one, habits) + ahead + _head(run, sizes, one)
    gradients, passing = max(in_layer, at_loss, key=sum)
    return Memory(parameters, optimizer, int(gradients), int(kept), int(passing))


def _layer(run: Run, sizes: Axes, one: Part, habits: Habits) -> float:
    """The peak in the backward pass of one layer."""
    D, F = one.letters["D"], one.letters["F"]
    rows = one.tokens * (one.experts or 1)
    whole = max(_whole(run, sizes, m) for name in LAYER for m in run.model.matrices()[name])
    slopes = 4 * habits.slopes * whole
    hidden = habits.hidden * rows * F * one.number
    return habits.scores * one.scores + hidden + slopes + habits.stream * one.tokens * D * one.number


def _head(run: Run, sizes: Axes, one: Part) -> float:
    """The gradient of the head, whole where XLA sums it so over all devices."""
    whole = 4 * one.letters["D"] * one.letters["V"]
    return whole if 1 < sizes.fsdp == math.prod(sizes.sizes()) else 0


def _whole(run: Run, sizes: Axes, matrix: Matrix) -> float:
    return cut(run.layout, matrix, dict(run.model.sizes()), sizes, "in_use") / matrix.count


def _loss(run: Run, sizes: Axes, one: Part, habits: Habits) -> float:
    D, V = one.letters["D"], one.letters["V"]
    return habits.logits * one.tokens * V + D * V * one.number


def _ahead(run: Run, sizes: Axes, habits: Habits, each: int) -> float:
    layers = run.model.layers / ways(run.layout.params.get("L"), sizes)
    letters = dict(run.model.sizes())
    at_rest = sum(cut(run.layout, m, letters, sizes, "at_rest") for name in LAYER for m in run.model.matrices()[name])
    return each * habits.casts * at_rest * layers
