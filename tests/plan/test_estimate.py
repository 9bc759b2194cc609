"""An analytic plan needs no device, and what it says holds together."""

import dataclasses
import importlib
import json

import jax
import pytest

from llmjax import layout as layouts
from llmjax.errors import Refused
from llmjax.mesh import Axes
from llmjax.plan import calibrate
from llmjax.plan.calibrate import Line, Machine
from llmjax.plan.estimate import Estimate, communication, estimate, fits, trusted, type_check
from meshes import chips, cpu8

MACHINE = Machine(
    devices=8,
    products={"float32": 4e11, "bfloat16": 8e11},
    attention=5e10,
    memory=2e10,
    layer=4e-4,
    collectives={kind: {"2": Line(1e-4, 1e-9), "8": Line(1e-4, 2e-9)} for kind in calibrate.KINDS},
)


def run_of(name: str):
    run = importlib.import_module(f"experiments.{name}").run
    return dataclasses.replace(run, name=name)


@pytest.fixture
def emulated(tmp_path):
    """stdlib_tiny on eight emulated devices of a machine that was measured."""
    calibrate.store(MACHINE, tmp_path)
    return dataclasses.replace(run_of("stdlib_tiny"), mesh=cpu8.cluster, runs=str(tmp_path))


def with_layout(run, name: str) -> Estimate:
    return estimate(dataclasses.replace(run, layout=layouts.preset(name), accumulate=1))


def test_speed_utilization_and_hours_follow_from_the_time_of_a_step():
    run = run_of("llama3_8b_v5p_64")
    found = estimate(run)
    causal, full = found.mfu
    assert found.per_chip * 64 * found.time.step == pytest.approx(run.batch * run.sequence)
    assert causal == pytest.approx(found.per_chip * run.model.flops_per_token(run.sequence)[0] / run.mesh.chip.flops)
    assert 0 < causal < full < 1
    assert found.hours * 3600 == pytest.approx(run.steps * found.time.step)


def test_twice_the_chips_at_twice_the_batch_is_no_faster_and_more_memory_is_free():
    run = run_of("llama3_8b_v5p_64")
    more = dataclasses.replace(
        run, mesh=dataclasses.replace(run.mesh, chips=128, topology="4x4x8"), batch=2 * run.batch, axes=Axes()
    )
    assert estimate(more).time.step >= 0.999 * estimate(run).time.step
    assert estimate(more).memory.optimizer < estimate(run).memory.optimizer


def test_a_405b_model_is_planned_and_type_checked_on_4096_chips():
    run = run_of("llama31_405b_v5p_512")
    mesh = dataclasses.replace(run.mesh, chips=4096, topology="16x16x16")
    found = estimate(dataclasses.replace(run, mesh=mesh, axes=Axes(fsdp=512, tensor=8), batch=4096))
    type_check(found)
    assert found.chips == 4096 and found.fits


def test_communication_has_all_messages_with_the_network_they_travel_on():
    found = estimate(run_of("llama3_70b_v5p_128_x2"))
    rows = communication(found)
    assert sum(row.bytes for row in rows) == pytest.approx(sum(m.count * m.bytes for m in found.work.messages))
    assert {row.network for row in rows if row.axes == ("data",)} == {"outside"}
    assert {row.network for row in rows if row.axes in (("fsdp",), ("tensor",))} == {"inside"}
    assert [row.seconds for row in rows] == sorted((row.seconds for row in rows), reverse=True)


def test_what_fits_leaves_some_of_a_chip_free():
    run = run_of("llama3_8b_h100x8")
    assert fits(0.9 * 80e9, run) and not fits(80e9, run)


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(Refused, match="tutorial_mlp is no language model: plan one of the others"):
        estimate(run_of("tutorial_mlp"))
    with pytest.raises(Refused, match="mesh is local, whose chips are not known: give a mesh that names them"):
        estimate(run_of("stdlib_tiny"))
    with pytest.raises(Refused, match="batch is 12, which"):
        estimate(dataclasses.replace(run_of("llama3_8b_v5p_64"), batch=12))


def test_emulated_devices_take_the_time_of_all_their_work_together(emulated):
    whole, split = with_layout(emulated, "dp"), with_layout(emulated, "tp")
    assert whole.time.matmul == pytest.approx(split.time.matmul)  # the same products, whoever does them
    assert with_layout(emulated, "sp").time.matmul == pytest.approx(2 * whole.time.matmul)  # each done twice
    assert with_layout(emulated, "pp").time.bubble == 0


def test_an_idle_stage_of_a_pipeline_computes_all_the_same(emulated):
    """There is no other way to run one program on all stages, and here it takes cores from the others."""
    assert with_layout(emulated, "pp").time.attention > with_layout(emulated, "dp").time.attention


def test_a_measurement_is_read_as_it_was_stored_and_a_damaged_one_refused(tmp_path):
    calibrate.store(MACHINE, tmp_path)
    assert calibrate.stored(tmp_path, 8) == MACHINE
    with pytest.raises(Refused, match="has not been measured with 4 emulated devices"):
        calibrate.stored(tmp_path, 4)
    calibrate.file(tmp_path, 2).write_text(json.dumps({"devices": 2}))
    with pytest.raises(Refused, match="is no measurement of a machine"):
        calibrate.stored(tmp_path, 2)


def test_a_machine_is_measured_with_all_its_emulated_devices():
    machine = calibrate.measure(jax.devices()[:2], repeats=2)
    assert machine.devices == 2 and set(machine.collectives) == set(calibrate.KINDS)
    assert all(set(lines) == {"2"} for lines in machine.collectives.values())
    assert min(machine.attention, machine.memory, machine.layer, *machine.products.values()) > 0


@pytest.mark.parametrize(("chip", "which"), [(chips.CPU, "analytic"), (chips.H100, "analytic")])
def test_a_compiler_is_not_trusted_with_the_time_of_a_chip_it_does_not_know(chip, which):
    assert trusted(chip, True)[0] == which
