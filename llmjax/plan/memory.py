"""Bytes of one device in a train step, from the run's fields alone: the model that needs no compiler."""

import dataclasses
import functools
import math
from typing import Any

import jax

from llmjax import mesh as meshes
from llmjax.layout import axes_of
from llmjax.mesh import AXES, Axes
from llmjax.models import nn
from llmjax.models.shapes import LAYER
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
    activations: int
    "What the forward pass leaves for the backward pass."
    temporaries: int
    "What comes and goes: gathered weights, attention scores, logits."

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.activations + self.temporaries


def state(run: Run, sizes: Axes) -> tuple[int, int]:
    """(parameters, optimizer) of one device, exactly."""
    parameters, optimizer = _leaves(run.model, run.optimizer, run.clip, run.steps, run.layout, run.local)
    return tuple(sum(_bytes(leaf, sizes) for leaf in leaves) for leaves in (parameters, optimizer))


def _bytes(leaf: Leaf, sizes: Axes) -> int:
    shape, each, cuts = leaf
    parts = (math.prod(getattr(sizes, axis) for axis in axes) for axes in cuts)
    return each * math.prod(-(-size // n) for size, n in zip(shape, parts, strict=True))


@functools.lru_cache(maxsize=256)
def _leaves(model, optimizer, clip, length, layout, local) -> tuple[tuple[Leaf, ...], tuple[Leaf, ...]]:
    run = Run(model, None, optimizer, None, None, layout=layout, clip=clip, steps=length, local=local)
    with jax.sharding.use_abstract_mesh(meshes.abstract_mesh(Axes(*[1] * len(AXES)))), nn.compute(nn.Compute(layout)):
        made = jax.eval_shape(
            functools.partial(steps.init, model.init, program.transformation(run)),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
    return tuple(map(_leaf, jax.tree.leaves(made.model))), tuple(map(_leaf, jax.tree.leaves(made.opt)))


def _leaf(x: Any) -> Leaf:
    spec = tuple(x.sharding.spec) if getattr(x, "sharding", None) is not None else ()
    cuts = tuple(axes_of(part) for part in spec)
    return x.shape, x.dtype.itemsize, cuts + ((),) * (len(x.shape) - len(cuts))


def predict(run: Run, sizes: Axes, accumulate: int) -> Memory:
    """What one device holds at the peak of a step of this run on axes of these sizes."""
    parameters, optimizer = state(run, sizes)
    layout, letters = run.layout, dict(run.model.sizes())
    stages = ways(layout.params.get("L"), sizes)
    layers = run.model.layers // stages
    rows = run.batch / ways(layout.inner.get("B"), sizes) / accumulate
    parts = run.pipeline.parts(int(rows), stages) if stages > 1 else 1
    width = 2
    inner = rows / parts * run.sequence / ways(layout.inner.get("T"), sizes)
    stream = rows / parts * run.sequence / ways(layout.stream.get("T"), sizes)
    D, K = letters["D"], letters["K"]
    H, G, F, V = (letters[d] / ways(layout.inner.get(d), sizes) for d in "HGFV")
    saved = (
        {
            "full": stream * D,
            "dots": stream * D * 3 + inner * (K * (2 * H + 2 * G) + 2 * F + D),
            "none": stream * D * 4 + inner * (2 * D + K * (4 * H + 4 * G) + 4 * F),
        }[run.remat]
        * width
        * layers
        * parts
    )
    once = inner * (K * (6 * H + 4 * G) + 6 * F + 4 * D) * width
    scores = rows / parts * H * run.sequence**2 / ways(layout.inner.get("T"), sizes) * 4 * 2
    logits = inner * V * (width + 4 + 4)
    gathered = sum(2 * cut(layout, m, letters, sizes, "in_use") for name in LAYER for m in run.model.matrices()[name])
    return Memory(parameters, optimizer, parameters, int(saved), int(max(scores + once, logits) + 2 * gathered))
