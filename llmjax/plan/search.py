"""Which mesh is best for a run: every legal cut of the chips, ranked by the analytic models of memory and time.

A mesh is first timed with nothing computed again and no accumulation, the fastest it can be. In that order each gets
the remat and accumulation that make it fit, until no mesh that is left can be faster than those already found.
"""

import collections
import contextlib
import dataclasses
import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from llmjax import layout as layouts
from llmjax.checks import check, turns
from llmjax.errors import Refused
from llmjax.layout import Layout, Pipeline
from llmjax.mesh import Axes, Cluster
from llmjax.plan import memory
from llmjax.plan.estimate import Estimate, estimate, fits, plannable, timed
from llmjax.run import Remat, Run
from llmjax.train.display import memory as shown
from llmjax.train.program import microbatches

REMATS = tuple(Remat(policy) for policy in ("none", "dots", "attention", "full"))
TENSOR = 64  # the widest tensor axis that is tried


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What a search found."""

    best: tuple[Estimate, ...]
    "The fastest that fit, in order."
    legal: int
    "Meshes that the run's shapes can be cut over."
    fitting: int
    "Of those looked at, how many fit."
    looked: int
    "How many had to be looked at: the others cannot be faster."


def candidates(run: Run, cluster: Cluster) -> Iterator[Run]:
    """The run on every mesh of the cluster's chips that its shapes can be cut over, with every layout and schedule.

    Nothing is computed again and nothing accumulated yet.
    """
    start = dataclasses.replace(run, mesh=cluster, remat=REMATS[0], accumulate=1)
    if cluster.chip.platform == "cpu":  # where caches decide, the run's own remat and accumulation stay
        start = dataclasses.replace(run, mesh=cluster)
    for sizes in shapes(start, cluster):
        for layout in layouts_of(sizes, run):
            for pipeline in pipelines(start, sizes):
                candidate = dataclasses.replace(start, axes=sizes, layout=layout, pipeline=pipeline)
                try:
                    check(candidate, sizes, max(1, start.accumulate))
                except Refused:
                    continue
                yield candidate


def shapes(run: Run, cluster: Cluster) -> Iterator[Axes]:
    """Every cut of the chips into axes that the run's own sizes are multiples of."""
    letters = dict(run.model.sizes())

    def by(size: int, *of: int) -> list[int]:
        return [n for n in range(1, size + 1) if size % n == 0 and all(each % n == 0 for each in of)]

    tensors = [letters[d] for d in "HGFV" if d in letters]
    for stage in by(cluster.chips // cluster.slices, turns(run.model)):
        left = cluster.chips // cluster.slices // stage
        for tensor in (n for n in by(left, *tensors) if n <= TENSOR):
            for context in by(left // tensor, run.sequence):
                for expert in by(left // tensor // context, letters.get("E", 1)):
                    rest = left // tensor // context // expert
                    for fsdp in by(rest, letters["D"]):
                        data = cluster.slices * rest // fsdp
                        if run.batch % (data * fsdp * expert) == 0:
                            yield Axes(data, stage, fsdp, expert, context, tensor)


def layouts_of(sizes: Axes, run: Run) -> list[Layout]:
    """The layouts that use exactly the axes larger than 1."""
    kinds = [["fsdp"] if sizes.fsdp > 1 else [""], ["tp", "tp_sp"] if sizes.tensor > 1 else [""]]
    kinds += [["cp", "ring"] if sizes.context > 1 else [""], ["ep"] if sizes.expert > 1 else [""]]
    kinds += [["pp", "pp_vp"] if sizes.stage > 1 else [""]]
    names = [""]
    for choices in kinds:
        names = [f"{name}_{choice}".strip("_") for name in names for choice in choices]
    return [layouts.preset(name or "dp") for name in names]


def pipelines(run: Run, sizes: Axes) -> list[Pipeline]:
    """The schedules worth a try, with two and four microbatches per stage."""
    if sizes.stage == 1:
        return [Pipeline()]
    schedules = ["gpipe", "circular", *(["1f1b"] if hasattr(run.loss, "of") else [])]
    return [Pipeline(schedule, n) for schedule in schedules for n in (2 * sizes.stage, 4 * sizes.stage)]


def settle(candidate: Run) -> Estimate | None:
    """The candidate with the remat and accumulation that make it fit at the least cost; None where nothing does."""
    if candidate.mesh.chip.platform == "cpu":
        found = estimate(candidate, candidate.axes)
        return found if found.fits else None
    found, steps = [], accumulations(candidate)
    if not fits(least(candidate), candidate):
        return None
    for remat in REMATS:
        for accumulate in steps:
            run = dataclasses.replace(candidate, remat=remat, accumulate=accumulate)
            if not fits(memory.predict(run, run.axes, accumulate).total, run):
                continue
            with contextlib.suppress(Refused):  # fewer rows than a pipeline has stages
                found.append(estimate(run, run.axes))
            break
    return min(found, key=lambda each: each.time.step, default=None)


def accumulations(candidate: Run) -> list[int]:
    """The numbers of microbatches that divide a device's rows, the powers of two."""
    rows = candidate.batch // layouts.ways(candidate.layout.inner.get("B"), candidate.axes)
    return [1 << n for n in range(rows.bit_length()) if rows % (1 << n) == 0]


def ranked(run: Run, cluster: Cluster, keep: int = 10) -> Ranking:
    """The fastest legal meshes that fit, by the analytic model.

    Raises:
      Refused: no mesh is legal, or none fits; says what is in the way.
    """
    plannable(dataclasses.replace(run, mesh=cluster))
    bounds = [(_soonest(each), i, each) for i, each in enumerate(candidates(run, cluster))]
    if not bounds:
        raise Refused(blocked(run, cluster))
    legal, looked = len(bounds), 0
    best: list[Estimate] = []
    heapq.heapify(bounds)
    while bounds and (len(best) < keep or bounds[0][0] < best[keep - 1].time.step):
        _, _, candidate = heapq.heappop(bounds)
        looked += 1
        if (settled := settle(candidate)) is not None:
            best = sorted([*best, settled], key=lambda each: (each.time.step, len(each.run.layout.name)))
    if not best:
        raise Refused(too_large(run, cluster))
    return Ranking(tuple(best[:keep]), legal, len(best), looked)


def _soonest(candidate: Run) -> float:
    accumulate = candidate.accumulate or microbatches(candidate, candidate.axes, candidate.mesh.chip)
    return timed(candidate, candidate.axes, accumulate)[1].step


def blocked(run: Run, cluster: Cluster) -> str:
    """Why a run cannot be cut for any mesh: what is in the way most often."""
    reasons, example = collections.Counter(), {}
    for sizes in _cuts(cluster):
        for layout in layouts_of(sizes, run)[:1]:
            try:
                check(dataclasses.replace(run, mesh=cluster, axes=sizes, layout=layout), sizes, 1)
            except Refused as refusal:
                field = str(refusal).split(" is ")[0]
                reasons[field] += 1
                example.setdefault(field, str(refusal))
    field, times = reasons.most_common(1)[0]
    return (
        f"no mesh of {cluster.chips} chips can be cut for {run.name}, in {times} of {reasons.total()} tries because of "
        f"{field}: {example[field]}"
    )


def _cuts(cluster: Cluster) -> Iterator[Axes]:
    """Some cuts of the chips, legal or not."""
    inside = cluster.chips // cluster.slices
    divisors = [n for n in range(1, inside + 1) if inside % n == 0]
    for tensor in divisors:
        for stage in (n for n in divisors if inside % (n * tensor) == 0):
            for context in (n for n in divisors if inside % (n * tensor * stage) == 0):
                yield Axes(cluster.slices, stage, inside // (tensor * stage * context), 1, context, tensor)


def least(candidate: Run) -> float:
    """The bytes of a device with everything computed again and one row at a time."""
    run = dataclasses.replace(candidate, remat=REMATS[-1], accumulate=accumulations(candidate)[-1])
    return memory.predict(run, run.axes, run.accumulate).total


def too_large(run: Run, cluster: Cluster) -> str:
    """What the smallest mesh would need, where none fits."""
    smallest = min(map(least, candidates(run, cluster)))
    return (
        f"mesh is {cluster.name}, where {run.name} needs at least {shown(smallest)} of a device's "
        f"{shown(cluster.chip.memory)} on every mesh: give more chips, or ones with more memory."
    )


# Each kind of parallelism by itself, and the products that large runs use.
USUAL = ("dp", "fsdp", "tp", "sp", "cp", "ring", "ep", "pp", "pp_vp", "tp_sp", "fsdp_tp", "fsdp_tp_sp", "tp_ring",
         "fsdp_pp", "tp_pp")  # fmt: skip


def usual(run: Run) -> list[Estimate]:
    """The usual layouts, with the sizes a run gets where it gives none; what the model cannot be cut by is left out."""
    found = []
    for name in (name for name in USUAL if name != "ep" or "E" in run.model.sizes()):
        with contextlib.suppress(Refused):
            found.append(estimate(dataclasses.replace(run, layout=layouts.preset(name), axes=Axes())))
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of two rows of numbers; equal numbers share their ranks."""

    def ranks(values):
        values = np.asarray(values)
        return (values[:, None] > values).sum(1) + 0.5 * (values[:, None] == values).sum(1)

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])
