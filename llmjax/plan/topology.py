"""TPU slices that are not there: the shapes that exist, and their devices as the compiler sees them."""

import fnmatch
import importlib.metadata
import math
import re
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from llmjax import processes
from llmjax.errors import Refused
from llmjax.mesh import Cluster

COMPILER = {"TPU v4": "v4", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e", "TPU 7x": "tpu7x"}
# Longest sides of a slice, cloud.google.com/tpu/docs, the page of each version.
LARGEST = {"v4": (16, 16, 16), "v5e": (16, 16), "v5p": (16, 16, 24), "v6e": (16, 16), "tpu7x": (16, 24, 24)}
SMALL = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
Shape = tuple[int, ...]


class NoCompiler(Refused):
    """There is no compiler for the chip on this machine: only the analytic model can say something."""


def devices(cluster: Cluster) -> list[jax.Device]:
    """The devices of all slices of a TPU cluster; they can be compiled for, not run on.

    Raises:
      NoCompiler: libtpu is not installed, or is another one than jax works with.
      Refused: no slice has this shape or number of chips.
    """
    _check_libtpu()
    generation = COMPILER.get(cluster.chip.name)
    if generation is None:
        raise NoCompiler(
            f"mesh {cluster.name} has chips {cluster.chip.name}: compiled plans know {', '.join(COMPILER)}."
        )
    shape = slice_shape(cluster)
    processes.compiler_only()
    options = dict(chips_per_host_bounds=(1, 1, 1)) if math.prod(shape) == 1 else {}
    if cluster.slices > 1:
        options["num_slices"] = cluster.slices
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # its two cores are one JAX device
    name = f"{generation}:{'x'.join(map(str, shape))}"
    try:
        return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        problem = str(error).splitlines()[0]
        raise NoCompiler(f"the TPU compiler gives no topology {name} ({problem}): see `llmjax meshes`.") from error


def slice_shape(cluster: Cluster) -> Shape:
    """The shape of one slice: what the cluster's topology says, or the most even one of its number of chips.

    Raises:
      Refused: no slice of this chip has that shape or number of chips.
    """
    generation, per_chip = COMPILER[cluster.chip.name], cluster.chip.devices
    chips, known = (cluster.chips or 0) // cluster.slices // per_chip, sorted(shapes(generation), key=math.prod)
    if not cluster.topology:
        found = [shape for shape in known if math.prod(shape) == chips]
        if not found:
            raise Refused(f"{cluster.chip.name} has no slice of {chips} chips: {_near(known, chips)}.")
        return min(found, key=max)
    shape = tuple(int(side) for side in re.findall(r"\d+", cluster.topology.rpartition(":")[2]))
    if shape not in known:
        near = _near(known, math.prod(shape))
        raise Refused(f"topology of mesh {cluster.name} is {cluster.topology}, no {cluster.chip.name} slice: {near}.")
    if cluster.chips and math.prod(shape) != chips:
        count = math.prod(shape) * cluster.slices * per_chip
        raise Refused(
            f"mesh {cluster.name} has chips {cluster.chips}, but its topology has {count}: set chips={count}."
        )
    return shape


def shapes(generation: str) -> Iterator[Shape]:
    """Every shape of a slice of this generation."""
    largest = LARGEST[generation]
    if len(largest) == 2:
        yield from FLAT
        return
    yield from SMALL
    a, b, c = (range(4, side + 1, 4) for side in largest)
    yield from ((x, y, z) for x in a for y in b for z in c if x <= y <= z)


def _near(known: list[Shape], chips: int) -> str:
    near = sorted(known, key=lambda shape: abs(math.log(math.prod(shape) / max(chips, 1))))[:3]
    names = (f"{'x'.join(map(str, shape))} ({math.prod(shape)} chips)" for shape in sorted(near, key=math.prod))
    return f"the nearest are {', '.join(names)}"


def _check_libtpu() -> None:
    pinned = next((re.search(r"libtpu==([\d.*]+)", line) for line in importlib.metadata.requires("jax") or ()
                   if line.startswith("libtpu==")), None)  # fmt: skip
    try:
        installed = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise NoCompiler(
            "libtpu, the TPU compiler, is not installed: start with `uv run --extra tpu llmjax plan ...`."
        ) from None
    if pinned and not fnmatch.fnmatch(installed, pinned[1]):
        raise NoCompiler(
            f"libtpu is {installed}, but jax {jax.__version__} works with {pinned[1]}: install libtpu=={pinned[1]}."
        )
