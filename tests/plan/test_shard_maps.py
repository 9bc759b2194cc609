"""Where devices lie and what they hold, against JAX's own shardings and the rules of the torus."""

import dataclasses
import importlib.util
import itertools
import math

import jax
import pytest
from jax.sharding import NamedSharding

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax import names
from llmjax.checkpoint.checkpoints import like, named
from llmjax.mesh import AXES, Axes
from llmjax.models.llama import Llama
from llmjax.plan import arrays, links, places
from llmjax.run import load
from llmjax.train.program import make, resolve

TINY = Llama(vocab=64, layers=4, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=32)
RUN = dataclasses.replace(load("stdlib_tiny"), model=TINY, batch=32, sequence=16, dtype="float32")


def on_eight(name: str):
    run = dataclasses.replace(RUN, layout=layouts.preset(name))
    mesh = meshes.device_mesh(resolve(run, 8), jax.devices()[:8])
    return make(run, mesh, meshes.chip_of(run.mesh, jax.devices())), Axes(**mesh.shape)


@pytest.mark.parametrize("name", ["dp", "fsdp", "tp", "fsdp_tp", "fsdp_pp", "pp_vp"])
def test_every_device_holds_the_part_of_a_weight_that_jax_gives_it(name):
    program, sizes = on_eight(name)
    state = like(program.abstract_state().model, program.mesh)
    found = arrays.parameters(program)
    assert [array.name for array in found] == list(named(state))
    for array, x in zip(found, named(state).values(), strict=True):
        assert math.prod(x.sharding.shard_shape(x.shape)) * 4 == arrays.bytes_held(x.shape, array.rest, sizes, 4)
        held = x.sharding.devices_indices_map(x.shape)
        for at in itertools.product(*(range(size) for size in sizes.sizes())):
            where = dict(zip(AXES, at, strict=True))
            slices = held[program.mesh.devices[at]]
            for size, axes, there in zip(x.shape, array.rest, slices, strict=True):
                index, parts = arrays.piece(axes, where, sizes)
                assert there.indices(size)[:2] == (index * size // parts, (index + 1) * size // parts), array.name


def test_what_is_gathered_and_summed_follows_the_layout():
    told = {}
    for name in ("dp", "fsdp", "tp", "fsdp_tp"):
        program, _ = on_eight(name)
        up = next(array for array in arrays.parameters(program) if array.name.endswith("up_DF"))
        told[name] = up.dims, arrays.gathered(up), arrays.summed(up, program)
    assert told == {
        "dp": ("LDF", (), ("data",)),
        "fsdp": ("LDF", ("fsdp",), ()),
        "tp": ("LDF", (), ("data",)) if on_eight("tp")[1].data > 1 else ("LDF", (), ()),
        "fsdp_tp": ("LDF", ("fsdp",), ()),
    }


def test_an_activation_has_the_bytes_of_its_sharding():
    program, sizes = on_eight("fsdp_tp")
    logits = next(array for array in arrays.activations(program) if array.dims == "BTV")
    sharding = NamedSharding(program.mesh, program.run.layout.activation("BTV"))
    own = math.prod(sharding.shard_shape(logits.shape)) * 4
    assert arrays.bytes_held(logits.shape, logits.rest, sizes, logits.number) == own
    assert logits.shape == (32 // program.accumulate, 16, 64)


@pytest.mark.parametrize("mesh", [name for name in names.names("meshes") if name != "local"])
def test_every_device_of_a_mesh_has_a_place_of_its_own(mesh):
    cluster = names.load("meshes", mesh, "cluster")
    for kind in ("dp", "fsdp", "fsdp_tp"):
        run = dataclasses.replace(RUN, mesh=cluster, layout=layouts.preset(kind))
        sizes = resolve(run, cluster.chips)
        found = places.of(cluster, sizes)
        assert len({(place.group, place.position) for place in found.places}) == cluster.chips
        assert found.groups * math.prod(found.shape) == cluster.chips
        assert len({place.coordinates for place in found.places}) == cluster.chips
        assert {place.group for place in found.places} == set(range(found.groups))


def test_a_mesh_axis_lies_where_its_links_are_reckoned():
    cluster = names.load("meshes", "v5p_64", "cluster")
    sizes = Axes(1, 1, 16, 1, 1, 4)
    found = places.of(cluster, sizes)
    assert places.moving(found) == {0: ("tensor",), 1: ("fsdp",), 2: ("fsdp",)}
    lying = links.lying(cluster, sizes)
    assert {axis: tuple(part.length for part in along) for axis, along in lying.items()} == links.torus(cluster, sizes)
    split = links.lying(cluster, Axes(2, 1, 32, 1, 1, 1))
    assert sorted((part.dim, part.length) for part in split["fsdp"]) == [(0, 4), (1, 4), (2, 2)]
    assert split["data"] == (links.Along(2, 2, 2),)


def test_gpus_lie_in_nodes_and_slices_are_joined_by_data():
    cluster = names.load("meshes", "h100x64", "cluster")
    found = places.of(cluster, Axes(1, 1, 8, 1, 1, 8))
    assert (found.groups, found.shape, found.kind) == (8, (8,), "node")
    assert all(place.group == place.coordinates[2] for place in found.places)
    two = names.load("meshes", "v5p_128_x2", "cluster")
    found = places.of(two, Axes(2, 1, 128, 1, 1, 1))
    assert all(place.group == place.coordinates[0] for place in found.places)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_the_rules_place_axes_on_the_torus_as_jax_does():
    cluster = names.load("meshes", "v5p_64", "cluster")
    sizes = Axes(1, 1, 16, 1, 1, 4)
    exact = places.by_jax(cluster, sizes)
    by_rule = places.of(cluster, sizes)
    assert exact.shape == by_rule.shape and exact.exact
    assert sorted(places.moving(exact).values()) == sorted(places.moving(by_rule).values())
