"""A run's own step compiled for a cluster that is not there, and the report of it."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from llmjax import layout
from llmjax.errors import Refused
from llmjax.mesh import Axes, Cluster
from llmjax.models.llama import Llama
from llmjax.names import load
from llmjax.plan import compiled, estimate
from llmjax.run import Remat, Run, from_json, to_json
from llmjax.train import program
from meshes.chips import H100, TPU_V5E

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)
TINY = Llama(vocab=512, layers=3, width=256, heads=2, kv_heads=2, head_dim=128, ff=512, positions=256)
H100X4, V5E_4 = Cluster("h100x4", H100, chips=4), Cluster("v5e_4", TPU_V5E, chips=4, topology="2x2")


def tiny(cluster: Cluster, **changes) -> Run:
    base = load("experiments", "stdlib_tiny", "run")
    return dataclasses.replace(
        base, model=TINY, mesh=cluster, layout=layout.fsdp, batch=8, sequence=128, accumulate=1, axes=Axes(), **changes
    )


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory):
    """(folder of the cache, report of a run on four GPUs)."""
    folder = tmp_path_factory.mktemp("plans")
    run = tiny(H100X4)
    return folder, compiled.report(run, program.resolve(run, 4), cache=folder)


def test_a_gpu_cluster_is_compiled_for_emulated_devices(on_gpus):
    _, report = on_gpus
    numbers = 2 * 512 * 256 + 3 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256) + 256
    assert report.memory.parameters == numbers * 4 / 4
    assert report.memory.optimizer == pytest.approx(2 * report.memory.parameters, rel=1e-3)
    assert report.memory.batch == 2 * 128 * (4 + 4 + 4)
    assert report.memory.total == report.memory.arguments + report.memory.outputs - report.memory.aliased + (
        report.memory.temporaries + report.memory.code
    )
    assert report.fits and report.memory.capacity == 80e9
    assert report.time is None and not report.refusal and not report.cached


def test_a_run_that_takes_the_gpu_s_own_attention_is_compiled_with_one_that_emulated_devices_have():
    run = dataclasses.replace(tiny(H100X4), attention="cudnn")
    found = estimate.estimate(run)
    estimate.type_check(found)
    report = compiled.report(run, found.sizes)
    assert report.fits and not report.refusal


def test_communication_is_listed_by_module_with_the_turns_of_the_layers(on_gpus):
    _, report = on_gpus
    gathered = {row.module: row for row in report.rows if row.kind == "all-gather"}
    assert {"attention", "mlp", "embedding", "head"} <= set(gathered)
    assert gathered["mlp"].bytes % (3 * 3 * 256 * 512) == 0, "three layers of three matrices"
    assert all(row.axes == ("fsdp",) and row.network == "inside" for row in report.rows)
    assert all(row.seconds == row.exposed > 0 for row in report.rows)


def test_the_largest_buffers_come_first_and_say_where_they_are_made(on_gpus):
    _, report = on_gpus
    assert [b.bytes for b in report.buffers] == sorted((b.bytes for b in report.buffers), reverse=True)
    assert any("block/mlp" in b.operation and b.what == "temporary" for b in report.buffers)


def test_a_report_is_json_and_back(on_gpus):
    _, report = on_gpus
    assert from_json(json.loads(json.dumps(to_json(report)))) == report


def test_a_second_plan_compiles_nothing(on_gpus, monkeypatch):
    folder, report = on_gpus
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled again"))
    run = tiny(H100X4)
    again = compiled.report(run, program.resolve(run, 4), cache=folder)
    assert again.cached and dataclasses.replace(again, cached=False, seconds=report.seconds) == report


@pytest.mark.parametrize("broken", ["", "{", "[1]", '{"is": "no.such.Thing"}', '{"is": "llmjax.plan.compiled.Report"}'])
def test_a_broken_cache_file_is_compiled_again(on_gpus, tmp_path, broken):
    folder, report = on_gpus
    [kept] = folder.iterdir()
    (tmp_path / kept.name).write_text(broken)
    run = tiny(H100X4)
    again = compiled.report(run, program.resolve(run, 4), cache=tmp_path)
    assert not again.cached and again.rows == report.rows
    assert compiled.report(run, program.resolve(run, 4), cache=tmp_path).cached


def test_another_run_is_another_report(on_gpus, tmp_path):
    folder, report = on_gpus
    run = tiny(H100X4, remat=Remat("full"))
    other = compiled.report(run, program.resolve(run, 4), cache=folder)
    assert not other.cached and other.memory.temporaries != report.memory.temporaries


def test_more_devices_than_there_are_take_another_process():
    assert len(jax.devices()) == 8
    run = dataclasses.replace(tiny(dataclasses.replace(H100X4, chips=16)), batch=16)
    report = compiled.report(run, program.resolve(run, 16))
    assert report.axes.fsdp == 16 and {row.network for row in report.rows} == {"outside"}


def test_an_open_chip_is_refused():
    run = tiny(Cluster("local"))
    with pytest.raises(Refused, match="mesh local leaves its chip open"):
        compiled.report(run, program.resolve(run, 1))


@needs_libtpu
def test_a_tpu_slice_is_compiled_for_without_a_tpu(tmp_path):
    run = tiny(V5E_4)
    report = compiled.report(run, program.resolve(run, 4), cache=tmp_path)
    assert not report.refusal and report.fits and report.memory.peak > report.memory.arguments
    assert report.time.matmul > 0 and report.time.attention > 0 and report.time.memory > 0
    assert report.time.exposed.keys() == {"fsdp"}
    assert {"attention", "mlp", "head", "embedding"} <= {row.module for row in report.rows}
    assert all(0 <= row.exposed <= row.seconds * 1.0001 for row in report.rows)
    named = [buffer for buffer in report.buffers if buffer.what == "parameter"]
    assert named and all(buffer.operation.startswith("state.model.") for buffer in named)
    assert compiled.report(run, program.resolve(run, 4), cache=tmp_path).cached


@needs_libtpu
@pytest.mark.slow
def test_a_step_that_a_tpu_has_no_room_for_is_a_report_that_names_the_largest_buffers():
    run = dataclasses.replace(tiny(V5E_4), batch=4 * 2**12)
    report = compiled.report(run, program.resolve(run, 4))
    assert report.refusal.startswith("the compiler needs ") and not report.fits
    assert report.memory.total > report.memory.capacity > 15 * 2**30
    assert report.time is None and report.rows == ()
    assert report.buffers[0].bytes > 2**30 and report.buffers[0].what == "temporary"
    assert all(buffer.operation for buffer in report.buffers)
