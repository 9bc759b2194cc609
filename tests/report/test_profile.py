"""Traces are read without a viewer: a CPU's own, and the planes of TPUs and GPUs as XProf writes them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.profiler import ProfileData

from llmjax.commands.profile import Options, profile
from llmjax.errors import Refused
from llmjax.report.profile import kind_of, newest, read

STATS = ("hlo_category", "tf_op", "hlo_op", "step_num")


def plane(name: str, lines: dict[str, list[tuple]]) -> str:
    """An XSpace's plane as text: lines of (event, begin us, long us, stats)."""
    kinds = list(dict.fromkeys(event for events in lines.values() for event, *_ in events))
    told = [f'name: "{name}"']
    for i, (line, events) in enumerate(lines.items()):
        shown = []
        for event, begin, long, stats in events:
            said = " ".join(
                f"stats {{ metadata_id: {STATS.index(key) + 1} "
                + (f"int64_value: {value}" if isinstance(value, int) else f'str_value: "{value}"')
                + " }"
                for key, value in stats.items()
            )
            shown.append(
                f"events {{ metadata_id: {kinds.index(event) + 1} offset_ps: {begin * 10**6} "
                f"duration_ps: {long * 10**6} {said} }}"
            )
        told.append(f'lines {{ id: {i + 1} name: "{line}" {" ".join(shown)} }}')
    for i, kind in enumerate(kinds, 1):
        told.append(f'event_metadata {{ key: {i} value {{ id: {i} name: "{kind}" }} }}')
    for i, stat in enumerate(STATS, 1):
        told.append(f'stat_metadata {{ key: {i} value {{ id: {i} name: "{stat}" }} }}')
    return f"planes {{ {' '.join(told)} }}"


def run_with(folder, *planes: str):
    session = folder / "profile" / "plugins" / "profile" / "2026_01_01"
    session.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    data = ProfileData.text_proto_to_serialized_xspace("\n".join(planes))
    (session / "host.xplane.pb").write_bytes(data)
    return folder


HOST = plane("/host:CPU", {"python": [("train", 0, 50, {"step_num": 20}), ("train", 50, 50, {"step_num": 21})]})
TPU = plane(
    "/device:TPU:0",
    {
        "XLA Modules": [("jit_train_step", 0, 100, {})],
        "XLA Ops": [
            ("%while.1 = (s32[]) while(...)", 0, 90, {"hlo_category": "while"}),
            ("%fusion.7 = bf16[8] fusion(...)", 0, 40, {"hlo_category": "convolution fusion", "tf_op": "a/mlp/dot:"}),
            ("%all-gather.3 = bf16[8] all-gather(...)", 40, 20, {"hlo_category": "all-gather"}),
            ("%copy.2 = bf16[8] copy(...)", 60, 10, {"hlo_category": "data formatting"}),
        ],
        "Async XLA Ops": [("all-reduce-start.1", 20, 40, {"hlo_category": "all-reduce"})],
    },
)
GPU = plane(
    "/device:GPU:0",
    {
        "Stream #1(Compute)": [("sm90_gemm_bf16", 0, 60, {"hlo_op": "gemm_fusion.4"})],
        "Stream #2(MemcpyD2D)": [("MemcpyD2D", 50, 20, {})],
        "Stream #3(Nccl)": [("ncclDevKernel_AllReduce_Sum_bf16", 40, 40, {"hlo_op": "all-reduce-start.1"})],
        "XLA Ops of steps": [],
        "Steps": [("20", 0, 80, {})],
    },
)


def test_a_tpu_s_plane_is_divided_into_compute_collectives_memory_and_idle(tmp_path):
    found = read(newest(run_with(tmp_path / "run", TPU, HOST)))
    # 0 to 40 compute, then the two collectives to 60, then a copy to 70
    assert found.shares == pytest.approx(dict(compute=4 / 7, collectives=2 / 7, memory=1 / 7, idle=0))
    assert (found.devices, found.steps, found.seconds) == (1, (20, 21), pytest.approx(70e-6))
    assert found.hidden == pytest.approx(0.5)  # of 20 to 60, compute runs until 40
    assert [(top.name, top.kind) for top in found.top[:2]] == [
        ("fusion.7", "compute"),
        ("all-reduce-start.1", "collectives"),
    ]
    assert found.top[0].source == "a/mlp/dot:" and "while.1" not in {top.name for top in found.top}


def test_a_gpu_s_streams_are_one_device_and_what_runs_beside_compute_is_hidden(tmp_path):
    found = read(newest(run_with(tmp_path / "run", GPU)))
    assert found.shares == pytest.approx(dict(compute=60 / 80, collectives=20 / 80, memory=0, idle=0))
    assert found.hidden == pytest.approx(0.5) and found.steps == ()
    assert {top.name for top in found.top} == {"gemm_fusion.4", "all-reduce-start.1", "MemcpyD2D"}


def test_two_devices_share_the_time_and_one_that_waits_idles(tmp_path):
    late = plane("/device:TPU:1", {"XLA Ops": [("%fusion.1 = f32[] fusion()", 50, 20, {})]})
    found = read(newest(run_with(tmp_path / "run", TPU, late)))
    assert found.devices == 2 and found.shares["idle"] == pytest.approx(50 / 140)
    assert sum(found.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "category", "kind"),
    [
        ("dot.3", "", "compute"),
        ("fusion.12", "loop fusion", "compute"),
        ("ynn_fusion.4", "", "compute"),
        ("broadcast_select_fusion", "", "compute"),
        ("convert_bitcast_fusion.8", "", "memory"),
        ("dynamic-update-slice.1", "", "memory"),
        ("MemcpyD2H", "", "memory"),
        ("fusion.9", "data formatting", "memory"),
        ("reduce-scatter.1", "", "collectives"),
        ("all-to-all-start.2", "", "collectives"),
        ("ncclDevKernel_AllGather_RING_LL", "", "collectives"),
        ("fusion.3", "all-reduce fusion", "collectives"),
        ("splash_mha_fwd.1", "custom-call", "compute"),
    ],
)
def test_an_operation_s_kind_is_told_from_its_name_and_category(name, category, kind):
    assert kind_of(name, category) == kind


def test_a_trace_of_emulated_devices_has_every_device_and_its_collectives(tmp_path):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    cut, whole = (jax.NamedSharding(mesh, jax.P(*spec)) for spec in (("x",), ()))
    x, w = jax.device_put(np.ones((64, 64), "f"), cut), jax.device_put(np.ones((64, 64), "f"), whole)
    step = jax.jit(lambda x, w: (x @ w).sum(0), out_shardings=whole)
    step(x, w).block_until_ready()
    folder = tmp_path / "run"
    with jax.profiler.trace(folder / "profile"):
        for number in (7, 8):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                step(x, w).block_until_ready()
    found = read(newest(folder))
    assert (found.devices, found.steps) == (4, (7, 8))
    assert "collectives" in {top.kind for top in found.top} and found.shares["compute"] > 0
    assert sum(found.shares.values()) == pytest.approx(1)


def test_the_command_shows_shares_and_operations_and_writes_them(tmp_path, capsys):
    folder, file = run_with(tmp_path / "run", TPU, HOST), tmp_path / "profile.json"
    assert profile(Options(str(folder), top=2, json=str(file))) == 0
    out = capsys.readouterr().out
    assert f"{folder}: steps 20 to 21 on 1 device" in out and "Compute hides 50% of the time of collectives." in out
    assert "fusion.7 (a/mlp/dot)" in out and "copy.2" not in out
    facts = json.loads(file.read_text())
    assert facts["shares"]["compute"] == pytest.approx(4 / 7) and len(facts["top"]) == 2


def test_the_newest_of_several_traces_is_read(tmp_path):
    folder = run_with(tmp_path / "run", TPU)
    later = folder / "profile" / "plugins" / "profile" / "2026_02_01"
    later.mkdir()
    assert [path.parent.name for path in newest(folder)] == ["2026_01_01"]  # the later one is empty
    (later / "host.xplane.pb").write_bytes(b"")
    assert [path.parent.name for path in newest(folder)] == ["2026_02_01"]


def test_a_run_without_a_trace_and_a_torn_trace_are_one_sentence(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text("{}")
    with pytest.raises(Refused, match=r"has no profile: make one with llmjax train and --profile.start 20"):
        profile(Options(str(empty)))
    folder = run_with(tmp_path / "run", TPU)
    (file,) = newest(folder)
    whole = file.read_bytes()
    for torn, why in ((whole[: len(whole) // 2], "is no whole trace"), (b"", "holds no operation of a device")):
        file.write_bytes(torn)
        with pytest.raises(Refused, match=why) as refusal:
            profile(Options(str(folder)))
        assert refusal.value.code == 65 and "\n" not in str(refusal.value)


def test_options_are_checked(tmp_path):
    with pytest.raises(Refused, match="top is 0"):
        profile(dataclasses.replace(Options("x"), top=0))
