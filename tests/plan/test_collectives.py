"""Every collective of a compiled program is found, with its axes, bytes and turns."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, Mesh, NamedSharding

from llmjax.plan.collectives import collectives, table

SHAPE, BYTES = (4, 8), 4 * 4 * 8  # what one device holds, in float32
PAIRS = [(0, 1), (1, 0)]


def cube() -> Mesh:
    """2 x 2 x 2 devices, in an order that is not that of their ids."""
    order = np.random.default_rng(0).permutation(8)
    return Mesh(np.array(jax.devices())[order].reshape(2, 2, 2), tuple("xyz"), axis_types=(AxisType.Explicit,) * 3)


def halves(x):
    return x[: len(x) // 2] + x[len(x) // 2 :]


ALONE = {  # each gives back the shape it takes
    "psum": (lambda x: jax.lax.psum(x, "y"), "all-reduce", "y", BYTES),
    "psum over two axes": (lambda x: jax.lax.psum(x, ("x", "z")), "all-reduce", "xz", BYTES),
    "psum over all": (lambda x: jax.lax.psum(x, ("x", "y", "z")), "all-reduce", "xyz", BYTES),
    "all_gather": (lambda x: halves(jax.lax.all_gather(x, "x", tiled=True)), "all-gather", "x", 2 * BYTES),
    "psum_scatter": (
        lambda x: jnp.tile(jax.lax.psum_scatter(x, "z", tiled=True), (2, 1)),
        "reduce-scatter",
        "z",
        BYTES,
    ),
    "all_to_all": (lambda x: jax.lax.all_to_all(x, "y", 0, 0, tiled=True), "all-to-all", "y", BYTES),
    "ppermute": (lambda x: jax.lax.ppermute(x, "z", PAIRS), "collective-permute", "z", BYTES),
}


def scanned(op, turns: int):
    return lambda x: jax.lax.scan(lambda x, _: (jnp.sin(op(x)), None), x, length=turns)[0]


AROUND = {
    "alone": (lambda op: op, 1),
    "in a scan": (lambda op: scanned(op, 5), 5),
    "in a scan in a scan": (lambda op: scanned(scanned(op, 5), 3), 15),
    "in a branch in a scan": (lambda op: scanned(lambda x: jax.lax.cond(x[0, 0] > 0, op, jnp.sin, x), 5), 5),
    "under remat": (lambda op: jax.checkpoint(op), 1),
}


def compiled(op) -> jax.stages.Compiled:
    """`op` of every device's own array, in which it may speak to the others."""
    mesh = cube()
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct(
            (8 * SHAPE[0], SHAPE[1]), jnp.float32, sharding=NamedSharding(mesh, P(("x", "y", "z")))
        )
        mapped = jax.shard_map(op, in_specs=P(("x", "y", "z")), out_specs=P(("x", "y", "z")), check_vma=False)
        return jax.jit(mapped).lower(x).compile()


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("op", ALONE)
def test_a_collective_is_found_with_its_axes_bytes_and_turns(op, around):
    (call, kind, axes, size), (wrap, count) = ALONE[op], AROUND[around]
    [found] = collectives(compiled(wrap(call)), cube())
    assert (found.kind, found.axes, found.bytes, found.count) == (kind, tuple(axes), size, count)
    assert found.ways == 2 ** len(axes) and found.per_step == size * count
    assert re.search(r"jit\(.*\)/.* at .*test_collectives\.py:\d+", found.source)


def test_turns_are_followed_where_xla_does_not_note_them():
    program = compiled(scanned(scanned(ALONE["psum"][0], 5), 3)).as_text()
    bare = re.sub(r',?"known_trip_count":\{[^}]*\}', "", program)
    assert program != bare
    assert collectives(bare, cube()) == collectives(program, cube())


def test_a_loop_that_data_ends_is_an_error_unless_its_turns_are_given():
    program = compiled(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: jax.lax.psum(x, "x") + 1, x))
    with pytest.raises(ValueError, match=r"how often .* depends on data, in jit.*while.*: give `turns`"):
        collectives(program, cube())
    [found] = collectives(program, cube(), turns=7)
    assert found.count == 7


def test_arrays_that_travel_together_are_summed_and_scalars_can_be_left_out():
    found = collectives(compiled(lambda x: jax.lax.psum((x, x[:1] * 2, x[0, 0]), "x")[0] + 1), cube())
    assert table(found) == {("all-reduce", ("x",)): BYTES}  # what nobody uses is not computed
    found = collectives(compiled(lambda x: sum(map(jnp.sum, jax.lax.psum((x, x[:1] * 2, x[0, 0]), "x"))) + x), cube())
    assert table(found) == {("all-reduce", ("x",)): BYTES + 32 + 4}
    assert table(found, above=4) == {("all-reduce", ("x",)): BYTES + 32}


def written(line: str) -> str:
    """A program of one collective, as XLA writes it."""
    return f"""HloModule a, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}

ENTRY %main (p: bf16[4,6]) -> bf16[4,6] {{
  %p = bf16[4,6]{{1,0:T(8,128)(2,1)}} parameter(0)
  {line}
  ROOT %q = bf16[4,6]{{1,0}} copy(%p)
}}
"""


GROUPS = {
    "{{0,1},{2,3},{4,5},{6,7}}": "z",
    "{{0,4},{1,5},{2,6},{3,7}}": "x",
    "{{0,2,4,6},{1,3,5,7}}": "xy",
    "{{1,0},{3,2},{5,4},{7,6}}": "z",
    "{{0,1,2,3,4,5,6,7}}": "xyz",
    "{}": "xyz",
    "[4,2]<=[8]": "z",
    "[2,4]<=[8]": "yz",
    "[4,2]<=[2,4]T(1,0)": "x",
    "[4,2]<=[2,2,2]T(0,2,1)": "y",
    "[2,4]<=[4,2]T(1,0)": "xy",
    "mesh['a'=2,'b'=4] {'a'}": "x",
    "mesh['a'=2,'b'=4] {'b'}": "yz",
    "mesh['a'=2,'b'=2,'c'=2,'d'=1] {'a','c'}": "xz",
    "mesh['a'=2,'b'=4] {'a','b':(2)2}": "xz",
    "mesh['a'=8] {'a':(2)2}": "y",
    "mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}": "z",
    "{{0,3},{1,2},{4,7},{5,6}}": "",
    "{{0,1},{2,3}}": "",
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_of_devices_are_named_by_mesh_axes_however_they_are_written(groups):
    line = f"%r = bf16[4,6]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
    [found] = collectives(written(f"{line}, use_global_device_ids=true"), cube())
    assert found.axes == tuple(GROUPS[groups])
    assert found.groups == groups and found.bytes == 48
    if not found.axes:
        assert groups in str(found)


PERMUTES = {"{{0,1},{2,3}}": "z", "{{0,1},{1,2},{2,3}}": "yz", "{{0,4},{4,0},{3,3}}": "x"}


@pytest.mark.parametrize("pairs", PERMUTES)
def test_a_permute_is_named_by_the_axes_it_crosses(pairs):
    [found] = collectives(written(f"%r = bf16[4,6]{{1,0}} collective-permute(%p), source_target_pairs={pairs}"), cube())
    assert found.axes == tuple(PERMUTES[pairs])


def test_what_stays_on_its_device_is_no_communication():
    alone = "%r = bf16[4,6]{1,0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add"
    home = "%s = bf16[4,6]{1,0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}"
    assert collectives(written(f"{alone}\n  {home}"), cube()) == []


def test_something_asynchronous_counts_once():
    lines = """%s = (bf16[4,6]{1,0}, bf16[8,6]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}
  %d = bf16[8,6]{1,0} all-gather-done(%s)
  %t = ((bf16[4,6]{1,0}), bf16[2,6]{1,0}, u32[]) reduce-scatter-start(%p), replica_groups=[4,2]<=[8], to_apply=%add
  %e = bf16[2,6]{1,0} reduce-scatter-done(%t)"""
    found = collectives(written(lines), cube())
    assert table(found) == {("all-gather", ("z",)): 96, ("reduce-scatter", ("z",)): 48}


def test_bytes_sent_are_those_of_a_ring():
    line = "%r = bf16[4,6]{{1,0}} {kind}(%p), replica_groups=[2,4]<=[8], dimensions={{0}}, to_apply=%add"
    sent = {}
    for kind in ("all-reduce", "reduce-scatter", "all-to-all", "all-gather"):
        [found] = collectives(written(line.format(kind=kind)), cube())
        sent[kind] = found.sent
    [found] = collectives(written("%r = bf16[4,6] collective-permute(%p), source_target_pairs={{0,1}}"), cube())
    assert sent == {"all-reduce": 72, "reduce-scatter": 36, "all-to-all": 36, "all-gather": 4 * 36}
    assert found.sent == 48
