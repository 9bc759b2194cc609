"""The time of a step is read from real TPU programs: five layers x -> silu(x w), fully sharded over four chips.

The files are what libtpu 0.0.42 printed for `jit(train_step)` of weights [5, 2048, 2048] (v5e_overlap: two in a layer),
1024 tokens to a chip, and for products of 8192³, without the parts of `backend_config` that nothing reads.
"""

import dataclasses
import itertools
from pathlib import Path

import pytest

from llmjax.mesh import Axes, Cluster, abstract_mesh
from llmjax.plan import cost, hlo, links, schedule
from meshes.chips import TPU_7X, TPU_V4, TPU_V5E, TPU_V5P, TPU_V6E

FOLDER = Path(__file__).parent / "hlo"
WEIGHT, LAYERS = 2048 * 2048, 5
SLICES = {
    "v5p": (TPU_V5P, "2x2x1", 1),
    "v6e": (TPU_V6E, "2x2", 1),
    "v5e_overlap": (TPU_V5E, "2x2", 1),
    "v5e_two_slices": (TPU_V5E, "2x2", 2),
}


def program(name: str) -> hlo.Module:
    return hlo.parse((FOLDER / f"{name}.txt").read_text())


def read(name: str, **options) -> schedule.Schedule:
    chip, topology, slices = SLICES[name]
    cluster = Cluster(name, chip, 4 * slices, slices=slices, topology=topology)
    sizes = Axes(slices, 1, 4, 1, 1, 1)
    return schedule.read(program(name), abstract_mesh(sizes), cluster, sizes, **options)


@pytest.mark.parametrize("chip", [TPU_V4, TPU_V5E, TPU_V5P, TPU_V6E, TPU_7X], ids=lambda chip: chip.name)
def test_the_compilers_cycles_of_a_large_product_are_near_the_chips_peak(chip):
    module = program(f"{chip.name.removeprefix('TPU ').removeprefix('TPU')}_matmul")
    cycles = sum(x.cycles() or 0 for x in module.computations[module.entry].values())
    reached = 2 * 8192**3 / (cycles / cost.clock(chip)) / chip.flops
    assert 0.7 < reached < 0.95


@pytest.mark.parametrize("name, factors", [("v5p", 1), ("v6e", 1), ("v5e_overlap", 2), ("v5e_two_slices", 1)])
def test_weights_are_gathered_twice_and_gradients_scattered_once_in_every_layer(name, factors):
    rows = {(row.kind, row.axes): row for row in read(name).rows}
    gathered, scattered = rows["all-gather", ("fsdp",)], rows["reduce-scatter", ("fsdp",)]
    assert (gathered.count, gathered.bytes) == (2 * LAYERS * factors, 2 * LAYERS * factors * WEIGHT * 2)
    assert (scattered.count, scattered.bytes) == (LAYERS * factors, LAYERS * factors * WEIGHT * 2)
    assert gathered.module == scattered.module == "mlp" and gathered.network == "inside"


@pytest.mark.parametrize("name", ["v5p", "v6e"])
def test_a_synchronous_collective_hides_nothing(name):
    found = read(name)
    chip, topology, _ = SLICES[name]
    cluster, sizes = Cluster(name, chip, 4, topology=topology), Axes(1, 1, 4, 1, 1, 1)
    assert all(row.exposed == pytest.approx(row.seconds) for row in found.rows)
    [gathers] = [row for row in found.rows if row.kind == "all-gather"]
    once = links.seconds("all-gather", WEIGHT * 2, links.span(cluster, sizes, ("fsdp",)), cluster)
    assert gathers.seconds == pytest.approx(2 * LAYERS * once)


def test_what_travels_beside_a_product_is_hidden():
    [gathers] = [row for row in read("v5e_overlap").rows if row.kind == "all-gather"]
    assert 0 < gathers.exposed < 0.9 * gathers.seconds


def test_slower_links_are_exposed_once_the_products_no_longer_hide_them():
    chip, topology, _ = SLICES["v5e_overlap"]
    sizes, times = Axes(1, 1, 4, 1, 1, 1), []
    for factor in (1, 100):
        slow = dataclasses.replace(chip, link=chip.link / factor)
        cluster = Cluster("a", slow, 4, topology=topology)
        times.append(schedule.read(program("v5e_overlap"), abstract_mesh(sizes), cluster, sizes).time)
    assert times[0].matmul == times[1].matmul and times[1].exposed["fsdp"] > 90 * times[0].exposed["fsdp"]


def test_between_slices_the_hosts_communicate():
    rows = [row for row in read("v5e_two_slices").rows if row.axes == ("data",)]
    [between] = rows
    assert between.kind == "all-reduce" and between.network == "outside"
    assert between.bytes >= LAYERS * WEIGHT / 4 * 2, "gradients are cut over the four chips of a slice first"


@pytest.mark.parametrize("name", SLICES)
def test_matrix_products_take_at_least_the_time_of_the_chips_peak(name):
    chip = SLICES[name][0]
    flops = 4 * 2 * 1024 * WEIGHT * LAYERS * (2 if name == "v5e_overlap" else 1)  # forward, again, and twice back
    found = read(name)
    assert flops / chip.flops < found.time.matmul < 2 * flops / chip.flops
    assert found.time.attention == found.time.other == 0 and found.time.memory > 0
    assert found.time.step == pytest.approx(
        found.time.matmul + found.time.memory + sum(found.time.exposed.values()), rel=1e-9
    )


ONE = Axes(1, 1, 1, 1, 1, 1)
CALL = """HloModule a, is_scheduled=true

ENTRY %main (p: bf16[4096,4096]) -> bf16[4096,4096] {
  %p = bf16[4096,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[4096,4096]{1,0:T(8,128)(2,1)} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/block/attention/scores/splash"}
  %w = bf16[4096,4096]{1,0:T(8,128)(2,1)} whatever(%k)
  ROOT %q = bf16[4096,4096]{1,0:T(8,128)(2,1)} bitcast(%w)
}
"""  # noqa: E501


def test_what_is_not_understood_is_listed():
    found = schedule.read(hlo.parse(CALL), abstract_mesh(ONE), Cluster("a", TPU_V5P, 1, topology="1x1x1"), ONE)
    assert found.unknown == {"custom-call tpu_custom_call, scores/splash": 1, "whatever without cycles": 1}
    assert found.time.memory == pytest.approx(2 * 2 * 4096**2 / TPU_V5P.bandwidth)


SPLASH = """HloModule a, is_scheduled=true

ENTRY %main (q: bf16[32,8192,128], k: bf16[8,8192,128]) -> bf16[8,8192,128] {
  %q = bf16[32,8192,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[8,8192,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %m = s8[1,8,8]{2,1,0:T(8,128)(4,1)} constant(0)
  %splash_mha_fwd_residuals.2 = (f32[1024,128]{1,0:T(8,128)}, bf16[32,8192,128]{2,1,0:T(8,128)(2,1)}, f32[32,8192,128]{2,1,0:T(8,128)}) custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,8]{2,1,0}, bf16[32,8192,128]{2,1,0}, bf16[8,8192,128]{2,1,0}, bf16[8,8192,128]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="jit(f)/scores/splash_mha_fwd_residuals"}
  ROOT %splash_mha_dkv_no_residuals.1 = (f32[1024,128]{1,0:T(8,128)}, bf16[8,32,8192,128]{3,2,1,0:T(8,128)(2,1)}, bf16[8,8192,128]{2,1,0:T(8,128)(2,1)}) custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,8]{2,1,0}, bf16[32,8192,128]{2,1,0}, bf16[8,8192,128]{2,1,0}, bf16[8,8192,128]{2,1,0}}
}
"""  # noqa: E501


def test_splash_attention_takes_the_time_of_the_causal_triangle_at_the_chip_s_efficiency():
    """Forward 4 and backward 10 FLOPs per pair of positions, head and number of a head."""
    found = schedule.read(hlo.parse(SPLASH), abstract_mesh(ONE), Cluster("a", TPU_V5P, 1, topology="1x1x1"), ONE)
    pairs = 32 * 8192**2 / 2
    expected = (4 + 10) * pairs * 128 / (TPU_V5P.flops * TPU_V5P.efficiency.attention)
    assert not found.unknown and found.time.attention == pytest.approx(expected) and found.time.other == 0


@pytest.mark.parametrize("operation, part", [
    ("jit(train_step)/while/body/closed_call/jvp()/while/body/closed_call/block/attention/reshard", "attention"),
    ("jit(train_step)/while/body/closed_call/transpose(jvp())/while/body/closed_call/checkpoint/block/mlp/mul", "mlp"),
    ("jit(train_step)/while/body/closed_call/jvp()/while/body/closed_call/block/reduce_sum", "block"),
    ("jit(train_step)/transpose(jvp())/block/(mlp/dot_general:attention/dot_general)", "block"),
    ("jit(train_step)/while/body/closed_call/transpose(jvp(embedding))/scatter-add", "embedding"),
    ("jit(train_step)/while/body/closed_call/transpose(jvp(BTD,BTV->DV))/dot_general", "head"),
    ("jit(train_step)/reduce_sum", "optimizer"),
    ("", "other"),
])  # fmt: skip
def test_an_operation_belongs_to_the_part_of_the_model_that_traced_it(operation, part):
    assert cost.part_of(operation) == part


def test_sums_where_parts_would_do_are_worth_a_look():
    def row(kind, axes, module, size):
        return schedule.Row(kind, axes, module, "inside", 4, 4 * size, 1.0, 1.0, ())

    few = [
        row("all-reduce", ("data",), "mlp", 10**8),
        row("all-gather", ("fsdp",), "mlp", 10**8),
        row("all-reduce", ("fsdp",), "optimizer", 10**8),
        row("all-reduce", ("fsdp",), "block", 10**4),
    ]
    assert list(schedule.warnings(few)) == []
    [said] = schedule.warnings([*few, row("all-reduce", ("fsdp",), "mlp", 10**8)])
    assert said.startswith("4 all-reduces of 100.0 MB over fsdp in mlp")
    summed = [*few, row("all-reduce", ("tensor",), "block", 10**8), row("all-reduce", ("tensor",), "head", 10**8)]
    assert list(schedule.warnings(summed)) == []  # as `tp` alone must
    [said] = schedule.warnings(summed, {"tensor"})
    assert said.startswith("4 all-reduces of 100.0 MB over tensor in block") and "--accumulate" in said


@pytest.mark.parametrize("name", SLICES)
def test_moments_fill_the_step_and_what_is_waited_for_is_what_nothing_hides(name):
    found = read(name)
    for kinds, seconds in (
        (("matmul",), found.time.matmul),
        (("attention", "memory", "other"), found.time.attention + found.time.memory + found.time.other),
        (("wait",), sum(found.time.exposed.values())),
    ):
        told = sum(m.end - m.begin for m in found.moments if m.lane == "compute" and m.kind in kinds)
        assert told == pytest.approx(seconds, abs=0.02 * found.time.step), kinds
    assert max(m.end for m in found.moments) == pytest.approx(found.time.step, rel=0.02)
    compute = [m for m in found.moments if m.lane == "compute"]
    assert all(a.end <= b.begin + 1e-9 for a, b in itertools.pairwise(compute))


@pytest.mark.parametrize("name", ["v5p", "v5e_overlap"])
def test_a_loop_is_told_as_one_turn_stretched_over_all(name):
    loops = [m for m in read(name).moments if m.lane == "loop"]
    assert [m.what for m in loops] == [f"{LAYERS} turns", f"{LAYERS} turns, backward"]
    gathers = [m for m in read(name).moments if m.kind == "all-gather" and m.waited]
    assert gathers and all(any(x.begin <= g.begin and g.end <= x.end + 1e-9 for x in loops) for g in gathers)
