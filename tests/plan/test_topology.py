"""Slices that exist are known without the compiler, and what does not exist is refused with what is near."""

import importlib.metadata

import pytest

from llmjax.errors import Refused
from llmjax.mesh import Cluster
from llmjax.plan import topology
from llmjax.plan.topology import NoCompiler, shapes, slice_shape
from meshes.chips import TPU_7X, TPU_V4, TPU_V5E, TPU_V5P, TPU_V6E


@pytest.mark.parametrize("chip, chips, slices, shape", [
    (TPU_V5P, 64, 1, (4, 4, 4)), (TPU_V5P, 256, 2, (4, 4, 8)), (TPU_V4, 8, 1, (2, 2, 2)), (TPU_V5E, 256, 1, (16, 16)),
    (TPU_V6E, 8, 1, (2, 4)), (TPU_7X, 128, 1, (4, 4, 4)), (TPU_V5P, 4096, 1, (16, 16, 16)), (TPU_V5E, 1, 1, (1, 1)),
])  # fmt: skip
def test_a_number_of_chips_has_the_most_even_shape(chip, chips, slices, shape):
    assert slice_shape(Cluster("a", chip, chips, slices=slices)) == shape


@pytest.mark.parametrize("cluster, said", [
    (Cluster("a", TPU_V5P, 60), r"TPU v5p has no slice of 60 chips: the nearest are .*4x4x4 \(64 chips\)"),
    (Cluster("a", TPU_V5E, 15, topology="3x5"), r"topology of mesh a is 3x5, .*: the nearest are .*4x4 \(16 chips\)"),
    (Cluster("a", TPU_V6E, 1024, topology="32x32"), r"topology of mesh a is 32x32, .*16x16 \(256 chips\)"),
    (Cluster("a", TPU_V5P, 32, topology="4x4x4"), r"chips 32, but its topology has 64: set chips=64"),
])  # fmt: skip
def test_a_slice_that_does_not_exist_is_refused_with_what_is_near(cluster, said):
    with pytest.raises(Refused, match=said):
        slice_shape(cluster)


def test_every_shape_is_ordered_and_within_the_pod():
    for generation, largest in topology.LARGEST.items():
        for shape in shapes(generation):
            assert len(shape) == len(largest) and all(a <= b for a, b in zip(shape, largest, strict=True)), shape


def test_a_missing_compiler_is_named_with_the_way_to_get_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(NoCompiler, match=r"`uv run --extra tpu llmjax plan"):
        topology.devices(Cluster("a", TPU_V5E, 4))


def test_another_compiler_than_jax_works_with_is_named_with_the_one_to_install(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9")
    with pytest.raises(NoCompiler, match=r"libtpu is 9\.9\.9, but jax .* works with [\d.*]+: install libtpu==[\d.*]+"):
        topology.devices(Cluster("a", TPU_V5E, 4))
