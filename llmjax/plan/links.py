"""How long a collective takes on the wires of a cluster: a torus of links, NVLink within nodes, a slow network between.

Formulas and their sources: jax-ml/scaling-book, `sharding.md` (torus) and `gpus.md` (nodes).
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from llmjax.mesh import AXES, Axes, Cluster

HOP = 1e-6  # seconds from chip to chip in a torus (scaling-book, tpus.md)
START = {"torus": HOP, "node": 10e-6, "network": 20e-6}  # per collective; calculon's systems/a100_80g.json for GPUs


@dataclasses.dataclass(frozen=True)
class Span:
    """Where the members of a group of devices lie."""

    inside: int
    "Of how many chips of one slice or node the group is made."
    outside: int
    "How many slices or nodes it spans."
    rings: int = 0
    "Axes of the torus that the part inside uses; 0: there is no torus."
    wrapped: bool = True
    "Whether these close to rings, which doubles their bandwidth."


def span(cluster: Cluster, sizes: Axes, axes: Sequence[str]) -> Span:
    """Where the groups over these mesh axes lie: the last axes inside a slice or node, the first ones across."""
    chips = math.prod(sizes.sizes())
    domain = cluster.chip.domain or chips // cluster.slices
    inside, outside, stride = 1, 1, 1
    for axis in reversed(AXES):
        size = getattr(sizes, axis)
        within = math.gcd(size, max(1, domain // stride))
        if axis in axes:
            inside, outside = inside * within, outside * size // within
        stride *= size
    if not cluster.chip.torus:
        return Span(inside, outside)
    used = torus(cluster, sizes)
    lengths = [length for axis in axes for length in used.get(axis, ())]
    return Span(inside, outside, max(1, len(lengths)), all(_wraps(cluster, length) for length in lengths))


@dataclasses.dataclass(frozen=True)
class Along:
    """A torus axis, or a part of one, that a mesh axis lies along."""

    dim: int
    "Which of the torus axes."
    stride: int
    "Chips along it from one coordinate of the mesh axis to the next."
    length: int


def torus(cluster: Cluster, sizes: Axes) -> dict[str, tuple[int, ...]]:
    """The lengths of the torus axes that every mesh axis lies on; see `lying`."""
    return {axis: tuple(each.length for each in along) for axis, along in lying(cluster, sizes).items()}


def lying(cluster: Cluster, sizes: Axes) -> dict[str, tuple[Along, ...]]:
    """The torus axes that every mesh axis larger than 1 lies on, the last mesh axis choosing first, as JAX does.

    A mesh axis that is no product of whole torus axes gets a part of one.
    """
    chips = math.prod(sizes.sizes()) // cluster.slices
    free = [Along(dim, 1, length) for dim, length in enumerate(dimensions(cluster, chips))]
    found = {}
    for axis in reversed(AXES):
        size = getattr(sizes, axis)
        size = size // math.gcd(size, cluster.slices) if axis == "data" else size
        if size == 1:
            continue
        choices = (c for n in range(len(free), 0, -1) for c in itertools.combinations(free, n))
        chosen = list(next((c for c in choices if math.prod(each.length for each in c) == size), ()))
        free = [each for each in free if each not in chosen]
        if not chosen:
            rest = size
            for each in sorted(free, key=lambda each: each.length, reverse=True):
                part = math.gcd(each.length, rest)
                if part > 1:
                    free.remove(each)
                    left = Along(each.dim, each.stride * part, each.length // part)
                    free += [left] if left.length > 1 else []
                    chosen.append(Along(each.dim, each.stride, part))
                    rest //= part
        found[axis] = tuple(chosen)
    return found


def dimensions(cluster: Cluster, chips: int) -> tuple[int, ...]:
    """The lengths of a slice's torus: those of its topology, or the most even ones. A chip of two devices adds a 2."""
    given = tuple(int(n) for n in re.findall(r"\d+", cluster.topology.rpartition(":")[2]))
    if given and chips % math.prod(given) == 0:
        rest = chips // math.prod(given)
        return (*given, rest) if rest > 1 else given
    return even(chips, cluster.chip.torus)


def even(number: int, parts: int) -> tuple[int, ...]:
    """The factors, as many as `parts`, that are most alike and whose product is the number."""
    if parts <= 1:
        return (number,)
    side = max(n for n in range(1, round(number ** (1 / parts)) + 1) if number % n == 0)
    return (side, *even(number // side, parts - 1))


def _wraps(cluster: Cluster, length: int) -> bool:
    """An axis of a 2-D torus wraps when it is the pod's whole, one of a 3-D torus when it is a multiple of 4."""
    return length % 16 == 0 if cluster.chip.torus == 2 else length % 4 == 0 or length == 2


def seconds(kind: str, size: float, where: Span, cluster: Cluster) -> float:
    """Time of one collective of `size` bytes, V: what one device puts in, or for an all-gather what it gets out.

    The parts inside and across run at the same time, so the slower one counts. An unknown link costs nothing.
    """
    chip, best = cluster.chip, cluster.chip.efficiency
    n, m = where.inside, where.outside
    inside = outside = 0.0
    twice = 2 if kind == "all-reduce" else 1
    permute = kind in ("collective-permute", "send", "collective-broadcast")
    if n > 1 and chip.link:
        if where.rings:
            wide = 2 * chip.link * where.rings * (1 if where.wrapped else 0.5) * best.link
            share = 0.25 if kind == "all-to-all" else (n - 1) / n
            inside = size / (chip.link * best.link) if permute else twice * share * size / wide
            inside = max(inside, HOP * n ** (1 / where.rings))
        else:
            share = 1 if permute else (n - 1) / n
            inside = START["node"] + twice * share * size / (chip.link * best.link)
    if m > 1 and chip.network:
        together = n if kind in ("all-reduce", "all-gather", "reduce-scatter") else 1
        share = 1 if permute else (m - 1) / m
        outside = START["network"] + twice * share * size / (chip.network * together * best.network)
    return max(inside, outside)
