"""Where the devices of a mesh lie: on which chip of which torus, or in which node."""

import dataclasses
import itertools
import math

import jax

from llmjax import mesh as meshes
from llmjax.mesh import AXES, Axes, Cluster
from llmjax.plan import links, topology


@dataclasses.dataclass(frozen=True)
class Place:
    """A device of the mesh and where it is."""

    coordinates: tuple[int, ...]
    "Along the six mesh axes."
    group: int
    "Its slice, or its node."
    position: tuple[int, ...]
    "In the slice's torus, or its number in the node."


@dataclasses.dataclass(frozen=True)
class Places:
    """All devices of a mesh, in the order of their coordinates."""

    places: tuple[Place, ...]
    shape: tuple[int, ...]
    "Of one group: the torus, or the devices of a node."
    groups: int
    kind: str
    "What a group is called: slice, node or machine."
    exact: bool
    "Whether JAX placed them, and not the rules that it follows."


def of(cluster: Cluster, sizes: Axes) -> Places:
    """By the rules that JAX follows; it takes no compiler."""
    count = math.prod(sizes.sizes())
    every = tuple(itertools.product(*(range(size) for size in sizes.sizes())))
    if not cluster.chip.torus:
        domain = min(count, cluster.chip.domain or count)
        kind = "node" if cluster.chip.platform == "gpu" else "machine"
        places = tuple(Place(c, rank // domain, (rank % domain,)) for rank, c in enumerate(every))
        return Places(places, (domain,), count // domain, kind, True)
    shape, along = links.dimensions(cluster, count // cluster.slices), links.lying(cluster, sizes)
    each = sizes.data // math.gcd(sizes.data, cluster.slices)
    places = []
    for coordinates in every:
        inside = dict(zip(AXES, coordinates, strict=True))
        group, inside["data"] = divmod(inside["data"], each)
        position = [0] * len(shape)
        for axis, parts in along.items():
            at = inside[axis]
            for part in reversed(parts):
                at, digit = divmod(at, part.length)
                position[part.dim] += digit * part.stride
        places.append(Place(coordinates, group, tuple(position)))
    return Places(tuple(places), tuple(shape), cluster.slices, "slice", False)


def by_jax(cluster: Cluster, sizes: Axes) -> Places:
    """As JAX places them on the slice that the TPU compiler knows.

    Raises:
      NoCompiler: the TPU compiler is not installed, or does not know the chip.
    """
    grid = meshes.device_grid(sizes, topology.devices(cluster), cluster.slices)
    every = tuple(itertools.product(*(range(size) for size in sizes.sizes())))
    cores = max(_core(grid[c]) for c in every) + 1
    places = []
    for c in every:
        device = grid[c]
        position = (*device.coords, _core(device)) if cores > 1 else tuple(device.coords)
        places.append(Place(c, getattr(device, "slice_index", 0) or 0, position))
    used = range(len(places[0].position))
    shape = tuple(max(place.position[i] for place in places) + 1 for i in used)
    kept = [i for i in used if i < cluster.chip.torus or shape[i] > 1]
    places = tuple(dataclasses.replace(p, position=tuple(p.position[i] for i in kept)) for p in places)
    return Places(places, tuple(shape[i] for i in kept), cluster.slices, "slice", True)


def _core(device: jax.Device) -> int:
    return getattr(device, "core_on_chip", 0) or 0


def moving(places: Places) -> dict[int, tuple[str, ...]]:
    """For every dim of the torus, the mesh axes whose coordinates change from one chip to the next along it."""
    found: dict[int, set[str]] = {dim: set() for dim in range(len(places.shape))}
    at = {(place.group, place.position): place.coordinates for place in places.places}
    for (group, position), coordinates in at.items():
        for dim in found:
            beside = at.get((group, (*position[:dim], position[dim] + 1, *position[dim + 1 :])))
            if beside is not None:
                found[dim] |= {a for a, x, y in zip(AXES, coordinates, beside, strict=True) if x != y}
    return {dim: tuple(a for a in AXES if a in axes) for dim, axes in found.items()}
