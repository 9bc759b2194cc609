"""Chips, clusters, and the six mesh axes that every run uses.

The axes are fixed once for every cluster, slowest network first. An axis that a run does not use has size 1, so the
same program runs on one device.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from llmjax.errors import Refused

AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What training reaches of a chip's peaks. Where each number comes from stands in `meshes/efficiency.py`."""

    matmul: float = 0.7  # of the FLOP/s: large products with weights
    attention: float = 0.4  # of the FLOP/s: fused causal attention, counting the triangle alone
    memory: float = 0.8  # of the memory's bandwidth
    link: float = 0.8  # of the fast network's bandwidth
    network: float = 0.8  # of the slow network's bandwidth
    overlap: float = 0.5  # of the time of communication, what compute hides
    doubling: float = 0.0  # time lost, as a share of the step, by every doubling of the parts that a slow network joins


@dataclasses.dataclass(frozen=True)
class Chip:
    """Facts of one JAX device. Where they come from stands beside each value in `meshes/chips.py`."""

    name: str
    platform: str  # as jax.devices()[0].platform says: cpu, gpu or tpu
    kinds: tuple[str, ...] = ()  # the values of jax.Device.device_kind that mean this chip
    flops: float | None = None  # dense bfloat16 peak, FLOP/s; None: not known
    int8: float | None = None  # the same of int8; None: not known
    fp8: float | None = None  # the same of fp8; None: it does not multiply that faster, or at all
    memory: float | None = None  # bytes; None: whatever the host has
    bandwidth: float | None = None  # memory, bytes/s
    link: float | None = None  # fast network, bytes/s, one way: one ICI axis, or NVLink egress
    network: float | None = None  # slow network, bytes/s per chip
    devices: int = 1  # JAX devices that one sold chip is; all figures here are of one device
    domain: int = 0  # chips that the fast network joins; 0: all of a slice
    torus: int = 0  # axes of the torus in which the fast network joins them; 0: each reaches every other
    efficiency: Efficiency = Efficiency()

    def named(self, kind: str) -> bool:
        """Whether `device_kind` means this chip: the whole name, as a GH200 is no H200 and an H200 NVL is slower."""
        return kind.lower() in (known.lower() for known in self.kinds)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A set of equal chips.

    `chips` is the number of JAX devices over all slices (a TPU 7x chip is two), or None for every device this process
    group finds. `emulated` asks for that many CPU devices on one machine. `tensor` is how many chips a tensor-parallel
    layout uses for one matrix unless the run says otherwise.
    """

    name: str
    chip: Chip | None = None  # None: looked up among `known` from the devices found
    chips: int | None = None
    slices: int = 1
    topology: str = ""  # of one slice, as the TPU compiler names it, e.g. "4x4x4"
    tensor: int = 1
    emulated: bool = False
    known: tuple[Chip, ...] = ()


@dataclasses.dataclass(frozen=True)
class Axes:
    """Sizes of the mesh axes; 0 leaves a size to the layout and the device count."""

    data: int = 0
    "Data parallelism, over the slowest network."
    stage: int = 0
    "Pipeline stages."
    fsdp: int = 0
    "Fully sharded data parallelism: parameters are cut over this axis and gathered for use."
    expert: int = 0
    "Expert parallelism."
    context: int = 0
    "Parallelism over the positions of one sequence."
    tensor: int = 0
    "Tensor parallelism: heads, feed-forward and vocabulary are cut over this axis."

    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)


def fill(axes: Axes, devices: int, *, used: Iterable[str], rest: str, tensor: int = 1, slices: int = 1) -> Axes:
    """Gives every axis a size so that their product is `devices`.

    What the user set stays. Of the others that the layout uses, `tensor` takes the cluster's suggestion, `data` the
    number of slices, and `context`, `expert` and `stage` take 2 each; but what remains goes to the first of `rest`,
    `data` and `tensor` that is free.

    Raises:
      Refused: an axis the layout does not use is larger than 1, or the product cannot be `devices`.
    """
    used = frozenset(used)
    for axis, size in zip(AXES, axes.sizes(), strict=True):
        if size < 0:
            raise Refused(f"axes.{axis} is {size}: give a positive size, or 0 to have it derived.")
        if size > 1 and axis not in used:
            raise Refused(
                f"axes.{axis} is {size}, but the layout cuts nothing over '{axis}': set it to 1 or choose a layout "
                f"that uses it (this one uses {', '.join(a for a in AXES if a in used)})."
            )
    given = math.prod(size for size in axes.sizes() if size)
    free = devices // given if devices % given == 0 else 0
    sizes = {axis: size for axis, size in zip(AXES, axes.sizes(), strict=True) if size}
    taker = next((axis for axis in (rest, "data", "tensor") if axis in used and axis not in sizes), None)
    for axis, wanted in (("tensor", tensor), ("data", slices), ("context", 2), ("expert", 2), ("stage", 2)):
        if free and axis in used and axis not in sizes and axis != taker:
            sizes[axis] = math.gcd(free, wanted)
            free //= sizes[axis]
    if free and taker:
        sizes[taker] = free
    filled = Axes(**{axis: sizes.get(axis, 1) for axis in AXES})
    product = math.prod(filled.sizes())
    if product != devices:
        shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "none given"
        there = "is 1 device" if devices == 1 else f"are {devices} devices"
        raise Refused(
            f"axes multiply to {product} ({shown}), but there {there}: "
            f"give sizes whose product is {devices}, or leave one of them at 0 to have it derived."
        )
    return filled


def abstract_mesh(axes: Axes) -> AbstractMesh:
    """The mesh as a type: enough to check a program's shardings with no device at all."""
    return AbstractMesh(axes.sizes(), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def device_mesh(axes: Axes, devices: list[jax.Device], slices: int = 1) -> Mesh:
    """The mesh over real devices, ordered so that neighbouring axes stay on fast links.

    With several TPU slices, `data` spans them and everything else stays inside one.

    Raises:
      Refused: `data` cannot span the slices found.
    """
    return Mesh(device_grid(axes, devices, slices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def device_grid(axes: Axes, devices: list[jax.Device], slices: int = 1) -> np.ndarray:
    """The devices as an array with one dim per mesh axis; see `device_mesh`.

    Only TPUs have a torus to follow. Other devices come ordered by process, so the last axes stay inside a node.
    """
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(axes.sizes())
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and found != slices:
        raise Refused(f"the mesh has {slices} slices, but the devices are of {found}: choose a mesh of {found}.")
    if axes.data % found:
        raise Refused(
            f"axes.data is {axes.data}, but there are {found} slices with a slow network between them: "
            f"set axes.data to a multiple of {found}."
        )
    # An axis may take part of a torus axis (tensor 4 on 16x16): JAX splits one only where no whole axes fit.
    if found == 1:
        return mesh_utils.create_device_mesh(axes.sizes(), devices, allow_split_physical_axes=True)
    inside = (axes.data // found, *axes.sizes()[1:])
    across = (found, *[1] * (len(AXES) - 1))
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def chip_of(cluster: Cluster, devices: list[jax.Device]) -> Chip:
    """The chip these devices are; a chip of unknown peak where the cluster's list does not have it."""
    if cluster.chip is not None:
        return cluster.chip
    device = devices[0]
    for chip in cluster.known:
        if chip.platform == device.platform and chip.named(device.device_kind):
            return chip
    return Chip(name=device.device_kind, platform=device.platform)
