"""Collectives take the time that their bytes need on the wires they lie on."""

import dataclasses

import pytest

from llmjax.mesh import AXES, Axes, Cluster
from llmjax.plan import links
from llmjax.plan.links import Span
from meshes import chips, v5e_256, v5p_64, v5p_128_x2

BIG = 1e9  # bytes: starting costs nothing beside them
PLAIN = dataclasses.replace(chips.H100.efficiency, link=1.0, network=1.0)
H100 = dataclasses.replace(chips.H100, efficiency=PLAIN)
NODES = Cluster("nodes", H100, chips=64)


def axes(**sizes: int) -> Axes:
    return Axes(**dict.fromkeys(AXES, 1) | sizes)


@pytest.mark.parametrize(
    ("sizes", "over", "inside", "outside"),
    [
        (axes(data=8, tensor=8), ("tensor",), 8, 1),
        (axes(data=8, tensor=8), ("data",), 1, 8),
        (axes(fsdp=64), ("fsdp",), 8, 8),
        (axes(data=2, fsdp=8, tensor=4), ("fsdp",), 2, 4),
        (axes(data=2, fsdp=8, tensor=4), ("data", "fsdp"), 2, 8),
    ],
)
def test_the_last_axes_lie_inside_a_node_and_the_first_across_nodes(sizes, over, inside, outside):
    where = links.span(NODES, sizes, over)
    assert (where.inside, where.outside) == (inside, outside)


def test_only_data_crosses_slices():
    sizes = axes(data=2, fsdp=32, tensor=4)
    assert links.span(v5p_128_x2.cluster, sizes, ("data",)).outside == 2
    assert links.span(v5p_128_x2.cluster, sizes, ("fsdp", "tensor")).outside == 1


@pytest.mark.parametrize(
    ("cluster", "sizes", "found"),
    [
        (v5p_64.cluster, axes(fsdp=64), {"fsdp": (4, 4, 4)}),
        (v5p_64.cluster, axes(fsdp=16, tensor=4), {"fsdp": (4, 4), "tensor": (4,)}),
        (v5p_64.cluster, axes(fsdp=32, tensor=2), {"fsdp": (4, 4, 2), "tensor": (2,)}),
        (v5e_256.cluster, axes(fsdp=16, tensor=16), {"fsdp": (16,), "tensor": (16,)}),
    ],
)
def test_mesh_axes_take_whole_axes_of_the_torus_where_they_can(cluster, sizes, found):
    taken = {axis: tuple(sorted(lengths, reverse=True)) for axis, lengths in links.torus(cluster, sizes).items()}
    assert taken == found


def test_a_torus_that_no_name_gives_is_as_even_as_it_can_be():
    assert links.dimensions(Cluster("x", chips.TPU_V5P, chips=64), 64) == (4, 4, 4)
    assert links.dimensions(Cluster("x", chips.TPU_V5E, chips=32), 32) == (4, 8)
    # a chip of two devices
    assert links.dimensions(Cluster("x", chips.TPU_7X, chips=512, topology="4x8x8"), 512) == (4, 8, 8, 2)


@pytest.mark.parametrize(
    ("kind", "where", "seconds"),
    [  # in a node V (N-1) / (N W), and twice that for an all-reduce; across nodes each device sends with its own card
        ("all-gather", Span(8, 1), BIG * 7 / 8 / 450e9),
        ("reduce-scatter", Span(8, 1), BIG * 7 / 8 / 450e9),
        ("all-reduce", Span(8, 1), 2 * BIG * 7 / 8 / 450e9),
        ("collective-permute", Span(8, 1), BIG / 450e9),
        ("all-reduce", Span(1, 4), 2 * BIG * 3 / 4 / 50e9),
        ("all-gather", Span(8, 8), BIG * 7 / 8 / 400e9),  # the slower of both at once
        ("all-to-all", Span(1, 4), BIG * 3 / 4 / 50e9),
    ],
)
def test_gpus_take_the_time_of_the_formulas(kind, where, seconds):
    assert links.seconds(kind, BIG, where, NODES) == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "where", "seconds"),
    [  # on a torus V / (W n), W being both directions of an axis and n the axes used; half of it where none wraps
        ("all-gather", Span(64, 1, 3), BIG * 63 / 64 / (2 * 9e10 * 3)),
        ("all-reduce", Span(16, 1, 2), 2 * BIG * 15 / 16 / (2 * 9e10 * 2)),
        ("all-reduce", Span(16, 1, 2, wrapped=False), 2 * BIG * 15 / 16 / (9e10 * 2)),
        ("all-to-all", Span(4, 1, 1), BIG / 4 / (2 * 9e10)),
        ("collective-permute", Span(4, 1, 1), BIG / 9e10),
    ],
)
def test_a_torus_takes_the_time_of_the_formulas(kind, where, seconds):
    chip = dataclasses.replace(chips.TPU_V5P, efficiency=PLAIN)
    assert links.seconds(kind, BIG, where, Cluster("v5p", chip, chips=64)) == pytest.approx(seconds)


def test_a_small_message_still_takes_a_hop_or_a_start():
    assert links.seconds("all-gather", 8, Span(64, 1, 3), v5p_64.cluster) >= links.HOP
    assert links.seconds("all-reduce", 8, Span(8, 1), NODES) >= links.START["node"]


def test_one_device_waits_for_nobody():
    assert links.seconds("all-reduce", BIG, Span(1, 1), NODES) == 0
