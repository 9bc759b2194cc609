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
from llmjax.checks import turns
from llmjax.layout import axes_of, ways
from llmjax.mesh import AXES, Axes, Chip
from llmjax.models import blocked, nn
from llmjax.models.moe import SLACK
from llmjax.models.pipeline import ticks
from llmjax.models.shapes import LAYER, Matrix
from llmjax.plan.work import cut
from llmjax.run import Run
from llmjax.train import diloco, kernels, pieces, program
from llmjax.train import step as steps

MOVING = 2  # layers whose kept arrays are on their way to the host, or back
Leaf = tuple[tuple[int, ...], int, tuple[tuple[str, ...], ...]]  # shape, bytes of a number, axes that cut each dim


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one device holds at the peak of a step."""

    parameters: int
    optimizer: int
    gradients: int
    "Of a microbatch, as the parameters, and of all in float32 where there are several."
    activations: int
    "What the forward pass leaves for the backward pass."
    temporaries: int
    "What comes and goes: gathered weights, attention scores, logits."

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.activations + self.temporaries


@dataclasses.dataclass(frozen=True)
class Habits:
    """How many arrays XLA keeps at once in the backward pass of a layer and at the loss, seen in compiled programs.

    `tests/plan/test_memory.py` shows how near they come.
    """

    scores: float
    "Bytes per attention score in attention's backward pass."
    scores_beside: float
    "The same in the feed-forward's: what attention computed again already waits there."
    hidden: float
    "Arrays as wide as the feed-forward, in its backward pass."
    hidden_beside: float
    "The same in attention's."
    stream: float
    "Arrays as wide as the stream."
    logits: float
    "Bytes per logit at the loss."
    casts: float
    "Share of the layers' weights at rest that are cast once for all microbatches, ahead of the loop."
    slopes: float = 2
    "Gradients of a layer's largest weight that wait, whole, for the sum over devices."
    ends: int = 1
    "Of the gradients of the head and of the embedding, how many are whole at once before devices sum them."
    ends_wait: bool = False
    "Whether these wait for the layers' backward pass in any case, and not only where all devices cut D."
    logits_wait: bool = False
    "Whether the gradient of the logits waits for that, where the embedding is the head and both add to one gradient."
    piece: float = 0
    "Bytes per logit beyond `logits` where the loss is taken in pieces, and each goes forward and back at once."
    sets: int = 2
    "Gradients of a whole stage in a pipeline: the sum so far, and what is added."


# CPU devices compute in float32; a TPU writes the logits in bfloat16 and never the exponentials.
TPU = Habits(scores=6, scores_beside=4, hidden=4, hidden_beside=2, stream=3, logits=2, casts=0.7, logits_wait=True)
HOST = Habits(
    scores=16, scores_beside=4, hidden=7, hidden_beside=0, stream=6, logits=12, casts=0, ends=2, ends_wait=True, piece=4
)


def state(run: Run, sizes: Axes) -> tuple[int, int]:
    """(parameters, optimizer) of one device, exactly."""
    parameters, optimizer = _leaves(
        run.model, run.optimizer, run.clip, run.steps, run.layout, run.local, run.parameters
    )
    return sum(_bytes(leaf, sizes) for leaf in parameters), sum(_bytes(leaf, sizes) for leaf in optimizer)


def _bytes(leaf: Leaf, sizes: Axes) -> int:
    shape, each, cuts = leaf
    parts = (math.prod(getattr(sizes, axis) for axis in axes) for axes in cuts)
    return each * math.prod(-(-size // n) for size, n in zip(shape, parts, strict=True))


@functools.lru_cache(maxsize=256)
def _leaves(model, optimizer, clip, length, layout, local, parameters) -> tuple[tuple[Leaf, ...], tuple[Leaf, ...]]:
    run = Run(
        model, None, optimizer, None, None, layout=layout, clip=clip, steps=length, local=local, parameters=parameters
    )
    init = diloco.init if local.every else steps.init
    init = functools.partial(init, program.weights(run), program.transformation(run))
    # A layer's dim names the stages only where there are several.
    loops = turns(model)
    stages = next((n for n in range(2, loops + 1) if loops % n == 0), 1) if layout.params.get("L") else 1
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
    "Positions that a token's scores are of, at once: all, a block's of blocks, none, or in a ring three of 2n pieces."
    number: int
    "Bytes of an activation's number."
    layers: int
    "Layers that a microbatch passes here at once."
    passes: int
    "How many microbatches leave something for the backward pass."
    letters: dict[str, float]
    "Size of every letter in here."
    hidden: float
    "Feed-forwards that a token passes: 1, or as many as its experts' buffers have rows for it."
    routed: float
    "Those among them that it travels to."
    copies: int
    "Of what experts compute: a round that may be skipped keeps its own, its condition's, and what is computed again."
    pieces: int = 1
    "In which the loss is taken."

    @property
    def scores(self) -> float:
        return self.tokens * self.keys * self.letters["H"]


def part(run: Run, sizes: Axes, accumulate: int, bfloat16: bool, attention: str) -> Part:
    """The part of this device, whose attention is computed so."""
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
    inside, ring = ways(layout.inner.get("T"), sizes), ways(layout.inner.get("S"), sizes)
    local = {d: size / ways(layout.inner.get(d), sizes) for d, size in letters.items() if d not in "DE"}
    outward = [m for m in run.model.matrices()["mlp"] if m.dims.endswith("FD")]
    met = sum(m.count * m.share * letters["E"] for m in outward if "E" in m.dims)
    capacity = getattr(run.model, "capacity", 0)
    rounds = bool(met) and not capacity and ways(layout.inner.get("E"), sizes) > 1
    routed = met * (capacity or (SLACK if rounds else 1))
    size = blocked.block(run.sequence // inside, blocked.BLOCK)
    at_once = dict(
        blocked=size * size * inside / run.sequence, ring=3 / 2 * run.sequence / (2 * ring), splash=0, cudnn=0
    )
    return Part(
        tokens=tokens / inside,
        stream=tokens / ways(layout.stream.get("T"), sizes),
        keys=at_once.get(attention, run.sequence),
        number=2 if bfloat16 else 4,
        layers=layers,
        passes=passes,
        letters=local | {"D": letters["D"]},
        hidden=routed + sum(m.count for m in outward if "E" not in m.dims),
        routed=routed,
        copies=3 if rounds else 1,
    )


def saved(run: Run, one: Part) -> float:
    """Bytes that one layer leaves for the backward pass of one microbatch."""
    D, H, G, K, F = (one.letters[d] for d in "DHGKF")
    if run.remat.policy == "full":
        return one.stream * D * one.number
    if run.remat.policy != "none":  # the stream, attention and products needed: not the last, none of travelling tokens
        kept = run.remat.policy == "dots"
        into_F = sum(m.count for m in run.model.matrices()["mlp"] if m.dims == "DF" and kept)
        return one.number * (2 * one.stream * D + one.tokens * (2 * (H + G) * K + into_F * F)) + 4 * one.tokens * H
    norms = one.stream * (4 * 4 * D)  # two norms keep their input and its normalised form in float32
    ends = 2 * one.tokens * D * one.number  # the norms' results, gathered
    heads = one.tokens * (K * (3 * H + 2 * G) * one.number + 4 * H)
    routed = 0 if one.copies > 1 else one.routed  # nothing is kept of a round
    hidden = one.tokens * (one.hidden - one.routed + routed) * 6 * F * one.number
    travelled = one.tokens * routed * D * (one.number + 4)
    return norms + ends + heads + hidden + travelled


def predict(run: Run, sizes: Axes, accumulate: int, chip: Chip | None = None) -> Memory:
    """What one device holds at the peak of a step of this run on axes of these sizes.

    The chip is the cluster's unless one is given; an unknown one computes as an accelerator does. Of anything but a TPU
    it is what programs for emulated CPU devices take.
    """
    chip = chip or run.mesh.chip
    platform = chip.platform if chip else ""
    habits = TPU if platform == "tpu" else HOST
    bfloat16 = run.in_bfloat16(platform)
    parameters, optimizer = state(run, sizes)
    attention = kernels.kernel(run, sizes, chip)[0] if chip else run.attention
    one = part(run, sizes, accumulate, bfloat16 and platform != "cpu", attention)
    one = dataclasses.replace(one, pieces=pieces_of(run, sizes, accumulate, chip))
    turns = one.layers * one.passes
    kept = saved(run, one) * (min(turns, MOVING) if run.remat.offload else turns)
    several, stages = accumulate > 1, ways(run.layout.params.get("L"), sizes)
    if stages > 1:
        gradients, passing = _stage(run, sizes, one, habits, accumulate)
    else:
        ahead = _ahead(run, sizes, habits, bfloat16)
        waits = 0 if several and not habits.ends_wait else _ends(run, sizes, one, habits)
        if habits.logits_wait and one.pieces == 1 and "embedding" not in run.model.matrices():
            waits += one.tokens * one.letters["V"] * one.number
        summed = several * parameters * (2 if run.parameters == "bfloat16" else 1)  # over microbatches, in float32
        in_layer = parameters + summed, _layer(run, sizes, one, habits) + ahead + waits
        at_loss = summed, _loss(run, sizes, one, one.tokens, habits) + ahead
        gradients, passing = max(in_layer, at_loss, key=sum)
    if platform == "cpu" and jax.__version_info__ < (0, 11):
        passing += (min(one.layers, run.unroll or program.UNROLLED) - 1) * _merged(run, sizes, one)
    if run.offload_optimizer:  # it comes for the update, when what the layers left is gone
        passing = max(passing, parameters + optimizer - gradients - kept)
        optimizer = 0
    return Memory(parameters, optimizer, int(gradients), int(kept), int(passing))


def pieces_of(run: Run, sizes: Axes, accumulate: int, chip: Chip | None) -> int:
    """In how many pieces the loss is taken."""
    if chip is None:
        return 1
    chunk = program.chunk(run, sizes, accumulate, chip)
    return pieces.number(run.sequence, chunk, ways(run.layout.stream.get("T"), sizes))


def _layer(run: Run, sizes: Axes, one: Part, habits: Habits) -> float:
    """The peak in the backward pass of one layer."""
    D, F = one.letters["D"], one.letters["F"]
    hidden, stream = one.tokens * one.hidden * F * one.number, one.tokens * D * one.number
    arrays = habits.hidden + (2 if run.remat.policy == "attention" else 0)  # what goes in is computed again
    attention = habits.scores * one.scores + habits.hidden_beside * hidden
    mlp = habits.scores_beside * one.scores + one.copies * (arrays * hidden + 2 * one.routed * stream)
    whole = max(_whole(run, sizes, m) / m.count for m in _matrices(run))
    return max(attention, mlp) + habits.stream * stream + 4 * habits.slopes * whole


def _loss(run: Run, sizes: Axes, one: Part, tokens: float, habits: Habits) -> float:
    """The peak at the loss: logits, the head gathered, and its gradient before devices sum it."""
    D, V = one.letters["D"], one.letters["V"]
    several = ways(run.layout.params.get("D"), sizes) > 1 or one.pieces > 1
    whole = habits.ends if several else 1
    return _logits(one, tokens, habits) + D * V * (one.number + 4 * whole)


def _logits(one: Part, tokens: float, habits: Habits) -> float:
    each = habits.logits + (habits.piece if one.pieces > 1 else 0)
    return each * tokens / one.pieces * one.letters["V"]


def _ends(run: Run, sizes: Axes, one: Part, habits: Habits) -> float:
    """Gradients of head and embedding that wait, whole, for the backward pass of the layers to end."""
    cuts = ways(run.layout.params.get("D"), sizes)
    waits = cuts > 1 and (habits.ends_wait or cuts == math.prod(sizes.sizes()))
    return 4 * habits.ends * one.letters["D"] * one.letters["V"] if waits else 0


def _stage(run: Run, sizes: Axes, one: Part, habits: Habits, accumulate: int) -> tuple[float, float]:
    """(gradients, what comes and goes) of a pipeline's stage."""
    how, letters = run.pipeline, one.letters
    layers = run.model.layers / ways(run.layout.params.get("L"), sizes)
    where = "in_use" if how.gather_once else "at_rest"
    gathered = layers * sum(cut(run.layout, m, dict(run.model.sizes()), sizes, where) for m in _matrices(run))
    ends = sum(_whole(run, sizes, m) for m in _matrices(run, ("embedding", "head")))
    stream = one.tokens * letters["D"] * one.number  # of one microbatch
    rows = run.batch // ways(run.layout.inner.get("B"), sizes) // accumulate
    parts = how.parts(rows, ways(run.layout.params.get("L"), sizes))
    inside = _layer(run, sizes, one, habits)
    if how.schedule == "1f1b":
        kept = stream * (2 * ways(run.layout.params.get("L"), sizes) - 1)
        tick = inside + _logits(one, one.tokens, habits)
        return 4 * (2 * gathered + 2 * ends), kept + tick + one.number * (gathered + ends)
    ticking = 4 * habits.sets * gathered, inside
    losing = 0.0, _loss(run, sizes, one, one.tokens * parts, habits)
    gradients, passing = max(ticking, losing, key=sum)
    return gradients, passing + one.number * gathered + 2 * stream * parts


def _merged(run: Run, sizes: Axes, one: Part) -> float:
    """What every further layer of an unrolled loop keeps, as XLA of jax 0.10 computes nothing there twice."""
    more = 4 * one.scores
    if run.remat.policy == "none":
        more -= one.tokens * one.hidden * one.letters["F"] * one.number
    else:
        more += one.tokens * (4 * one.hidden * one.letters["F"] + one.letters["D"]) * one.number
        more += 4 * sum(_whole(run, sizes, m) for m in _matrices(run))
    return more


def _matrices(run: Run, modules: tuple[str, ...] = LAYER) -> list[Matrix]:
    return [m for module in modules for m in run.model.matrices().get(module, ())]


def _whole(run: Run, sizes: Axes, matrix: Matrix) -> float:
    return cut(run.layout, matrix, dict(run.model.sizes()), sizes, "in_use")


def _ahead(run: Run, sizes: Axes, habits: Habits, bfloat16: bool) -> float:
    if run.parameters == "bfloat16":
        return 0
    at_rest = sum(cut(run.layout, m, dict(run.model.sizes()), sizes, "at_rest") for m in _matrices(run))
    return 2 * bfloat16 * habits.casts * at_rest * run.model.layers
