"""Meshes hold the facts of real hardware, and every axis gets a size that makes sense or is refused."""

import dataclasses
import importlib
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import meshes
from llmjax import layout as layouts
from llmjax import mesh as meshes_of
from llmjax import processes
from llmjax.errors import Refused
from llmjax.mesh import AXES, Axes, fill
from meshes import chips

NAMES = sorted(path.stem for path in Path(meshes.__path__[0]).glob("*.py") if path.stem not in ("__init__", "chips"))
CLUSTERS = {name: importlib.import_module(f"meshes.{name}").cluster for name in NAMES}
REAL = [name for name in NAMES if CLUSTERS[name].chip not in (None, chips.CPU)]
LAYOUTS = [layouts.preset(name) for name in ("dp", "fsdp", "tp", "fsdp_tp", "fsdp_tp_sp")]

# bfloat16 FLOP/s, memory in bytes, memory bytes/s, and bytes/s of one link or of NVLink, as hardware tables give them
FACTS = {
    "A100": (312e12, 80e9, 2.0e12, 300e9),
    "H100": (989e12, 80e9, 3.4e12, 450e9),
    "H200": (989e12, 141e9, 4.8e12, 450e9),
    "B200": (2.3e15, 192e9, 8.0e12, 900e9),
    "TPU v4": (275e12, 32e9, 1.2e12, 45e9),
    "TPU v5e": (197e12, 16e9, 0.81e12, 45e9),
    "TPU v5p": (459e12, 96e9, 2.8e12, 90e9),
    "TPU v6e": (918e12, 32e9, 1.6e12, 90e9),
    "TPU 7x": (2307e12 / 2, 192e9 / 2, 7.4e12 / 2, 90e9 / 2),  # JAX shows half a chip
}


def filled(axes: Axes, devices: int, layout, **cluster) -> Axes:
    return fill(axes, devices, used=layout.axes(), rest=layout.rest(), **cluster)


def test_the_clusters_that_people_rent_are_there():
    required = "local cpu8 h200 h100x8 h100x64 v5e_256 v5p_64 v5p_512 v6e_256 tpu7x_64 v5p_128_x2"
    assert set(required.split()) <= set(NAMES)


def test_chips_are_the_published_ones_and_a_cpu_claims_no_peak():
    assert {chip.name for chip in chips.KNOWN} == {"cpu", *FACTS}
    assert (chips.CPU.flops, chips.CPU.memory) == (None, None)
    for chip in chips.KNOWN[1:]:
        assert (chip.flops, chip.memory, chip.bandwidth, chip.link) == pytest.approx(FACTS[chip.name], rel=1e-3)


def test_a_device_kind_means_one_chip():
    kinds = [kind for chip in chips.KNOWN for kind in chip.kinds]
    assert len(kinds) == len(set(kinds)) and all(chip.kinds for chip in chips.KNOWN)
    assert chips.TPU_V5E.named("tpu v5 lite") and not chips.TPU_V5P.named("TPU v5 lite")
    assert not chips.H200.named("NVIDIA GH200 480GB")


@pytest.mark.parametrize("name", NAMES)
def test_a_cluster_is_named_as_its_file_and_its_slices_hold_its_chips(name):
    cluster = CLUSTERS[name]
    assert cluster.name == name
    if cluster.topology:
        cores = 2 if cluster.chip is chips.TPU_7X else 1
        inside = math.prod(int(side) for side in cluster.topology.split("x"))
        assert cluster.chips == cluster.slices * cores * inside


@pytest.mark.parametrize("name", REAL)
def test_every_layout_cuts_a_real_cluster_by_default_with_no_device_at_hand(name):
    cluster = CLUSTERS[name]
    assert cluster.chip in chips.KNOWN
    for layout in LAYOUTS:
        axes = filled(Axes(), cluster.chips, layout, tensor=cluster.tensor, slices=cluster.slices)
        assert meshes_of.abstract_mesh(axes).size == cluster.chips
        assert axes.data % cluster.slices == 0  # nothing but data parallelism crosses the slow network
        assert axes.tensor == (cluster.tensor if "tensor" in layout.axes() else 1)


def test_v5p_128_x2_is_two_slices_of_128():
    cluster = CLUSTERS["v5p_128_x2"]
    assert (cluster.slices, cluster.chips // cluster.slices) == (2, 128)


@pytest.mark.parametrize("name", ["local", "cpu8"])
def test_this_machine_makes_the_meshes_that_need_no_accelerator(name):
    cluster = CLUSTERS[name]
    devices = processes.start(cluster)
    axes = filled(Axes(), len(devices), layouts.fsdp_tp, tensor=cluster.tensor)
    mesh = meshes_of.device_mesh(axes, devices)
    assert mesh.axis_names == AXES and mesh.size == len(jax.devices()) == 8
    assert meshes_of.chip_of(cluster, devices) == chips.CPU
    neighbours = [device.id for device in mesh.devices.reshape(-1, axes.tensor)[0]]
    assert neighbours == list(range(axes.tensor))  # tensor-parallel devices stay side by side


def test_local_knows_every_chip_by_its_kind_and_claims_nothing_of_an_unknown_one():
    for chip in chips.KNOWN:
        for kind in chip.kinds:
            assert (
                meshes_of.chip_of(CLUSTERS["local"], [SimpleNamespace(platform=chip.platform, device_kind=kind)])
                == chip
            )
    unknown = meshes_of.chip_of(CLUSTERS["local"], [SimpleNamespace(platform="gpu", device_kind="NVIDIA X1")])
    assert (unknown.name, unknown.platform, unknown.flops) == ("NVIDIA X1", "gpu", None)


def test_axes_fill_the_devices_and_keep_what_was_asked_for():
    for layout, devices, tensor, fsdp in itertools.product(LAYOUTS, (1, 2, 6, 8, 512), (1, 2, 8), (0, 1, 2)):
        asked = Axes(fsdp=fsdp)
        if devices % (fsdp or 1):
            continue
        axes = filled(asked, devices, layout, tensor=tensor)
        assert math.prod(axes.sizes()) == devices
        assert not fsdp or axes.fsdp == fsdp
        assert all(size == 1 for axis, size in vars(axes).items() if axis not in layout.axes())


@pytest.mark.parametrize(
    ("asked", "layout", "expected"),
    [
        (Axes(), layouts.dp, Axes(8, 1, 1, 1, 1, 1)),
        (Axes(), layouts.fsdp, Axes(1, 1, 8, 1, 1, 1)),
        (Axes(), layouts.tp, Axes(4, 1, 1, 1, 1, 2)),  # the cluster suggests 2
        (Axes(), layouts.fsdp_tp, Axes(1, 1, 4, 1, 1, 2)),
        (Axes(tensor=8), layouts.tp, Axes(1, 1, 1, 1, 1, 8)),
        (Axes(data=2), layouts.fsdp_tp, Axes(2, 1, 2, 1, 1, 2)),
        (Axes(fsdp=2), layouts.fsdp_tp, Axes(2, 1, 2, 1, 1, 2)),  # data takes what fsdp may not
        (Axes(data=1, fsdp=2), layouts.fsdp_tp, Axes(1, 1, 2, 1, 1, 4)),
        (Axes(fsdp=8), layouts.fsdp_tp, Axes(1, 1, 8, 1, 1, 1)),  # the suggestion yields to what was asked for
    ],
)
def test_axes_that_are_not_given_are_derived(asked, layout, expected):
    assert filled(asked, 8, layout, tensor=2) == expected


@pytest.mark.parametrize(
    ("asked", "layout", "words"),
    [
        (Axes(fsdp=3), layouts.fsdp, "axes multiply to 3 (fsdp 3), but there are 8 devices"),
        (Axes(data=2, fsdp=2), layouts.dp, "axes multiply to 4 (data 2 x fsdp 2), but there are 8 devices"),
        (Axes(fsdp=16), layouts.fsdp, "axes multiply to 16 (fsdp 16), but there are 8 devices"),
        (Axes(tensor=2), layouts.fsdp, "axes.tensor is 2, but the layout cuts nothing over 'tensor'"),
        (Axes(stage=2), layouts.dp, "axes.stage is 2, but the layout cuts nothing over 'stage'"),
        (Axes(fsdp=-1), layouts.fsdp, "axes.fsdp is -1: give a positive size, or 0"),
    ],
)
def test_axes_that_cannot_be_are_refused(asked, layout, words):
    with pytest.raises(Refused) as refusal:
        filled(asked, 8, layout)
    assert words in str(refusal.value) and refusal.value.code == 2


def test_one_device_is_one_device():
    with pytest.raises(Refused, match="there is 1 device"):
        filled(Axes(fsdp=2), 1, layouts.fsdp)


@dataclasses.dataclass(frozen=True)
class FakeTPU:
    """What mesh_utils reads of a device."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5p"


def two_slices() -> list[FakeTPU]:
    """Two slices of 4x4x4, in no order."""
    places = itertools.product(range(2), range(4), range(4), range(4))
    chips_ = [FakeTPU(i, s, (x, y, z), 16 * s + i % 64 // 4) for i, (s, z, y, x) in enumerate(places)]
    return [chips_[i] for i in np.random.default_rng(0).permutation(len(chips_))]


@pytest.mark.parametrize(
    "axes",
    [
        Axes(data=2, stage=1, fsdp=16, expert=1, context=1, tensor=4),
        Axes(data=8, stage=1, fsdp=4, expert=1, context=1, tensor=4),
        Axes(data=2, stage=4, fsdp=1, expert=4, context=4, tensor=1),
    ],
)
def test_only_data_crosses_the_slow_network_between_slices(axes):
    grid = meshes_of.device_grid(axes, two_slices(), slices=2)
    slices = np.vectorize(lambda device: device.slice_index)(grid).reshape(axes.data, -1)
    assert grid.shape == axes.sizes() and len({device.id for device in grid.ravel()}) == 128
    assert all(len(set(row)) == 1 for row in slices)  # whatever `data` is, the rest of the mesh stays in one slice
    assert sorted(set(slices[:, 0])) == [0, 1]


def test_the_last_axis_lies_on_neighbours_of_the_torus():
    grid = meshes_of.device_grid(Axes(data=2, stage=1, fsdp=16, expert=1, context=1, tensor=4), two_slices(), slices=2)
    for ring in grid.reshape(-1, 4):
        for a, b in itertools.pairwise([*ring, ring[0]]):
            apart = [min((p - q) % 4, (q - p) % 4) for p, q in zip(a.coords, b.coords, strict=True)]
            assert sum(apart) == 1, ring


def test_data_that_does_not_span_the_slices_is_refused():
    with pytest.raises(Refused, match=r"axes.data is 1, but there are 2 slices .*: set axes.data to a multiple of 2"):
        meshes_of.device_grid(Axes(1, 1, 32, 1, 1, 4), two_slices(), slices=2)
