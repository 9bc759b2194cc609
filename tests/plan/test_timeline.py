"""The timeline of a step adds up to the plan that it was made of."""

import dataclasses
import itertools
import types

import pytest

from llmjax import layout as layouts
from llmjax.mesh import Axes
from llmjax.plan import timeline
from llmjax.plan.estimate import estimate
from llmjax.plan.schedule import Moment
from llmjax.plan.timeline import COMPUTE
from llmjax.run import Remat, load

RUN = load("llama3_8b_v5p_64")
CASES = {
    "fsdp": {},
    "fsdp_tp": dict(layout=layouts.fsdp_tp, axes=Axes(data=1, fsdp=16, tensor=4)),
    "fsdp_tp_sp": dict(layout=layouts.fsdp_tp_sp, axes=Axes(data=1, fsdp=16, tensor=4), remat=Remat("full")),
    "dp_pp": dict(layout=layouts.preset("fsdp_pp"), axes=Axes(data=1, fsdp=16, stage=4), batch=512),
}


@pytest.mark.parametrize("name", CASES)
def test_a_timeline_is_as_long_as_the_step_and_its_waiting_is_the_plan_s(name):
    found = estimate(dataclasses.replace(RUN, **CASES[name]))
    shown = timeline.analytic(found)
    assert shown.total == pytest.approx(found.time.step, rel=1e-9)
    for axes, seconds in found.time.exposed.items():
        waits = sum(span.end - span.begin for span in shown.spans if span.lane == axes and span.waited)
        assert waits == pytest.approx(seconds, rel=1e-6)
    of = {kind: sum(s.end - s.begin for s in shown.spans if s.kind == kind) for kind in ("matmul", "attention")}
    assert of["matmul"] == pytest.approx(found.time.matmul) and of["attention"] == pytest.approx(found.time.attention)
    assert sum(s.end - s.begin for s in shown.spans if s.kind == "memory") == pytest.approx(found.time.memory)


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_a_lane_overlaps_and_phases_follow_each_other(name):
    shown = timeline.analytic(estimate(dataclasses.replace(RUN, **CASES[name])))
    for lane in shown.lanes():
        spans = sorted((s for s in shown.spans if s.lane == lane), key=lambda s: s.begin)
        assert all(a.end <= b.begin + 1e-9 for a, b in itertools.pairwise(spans)), lane
    assert shown.lanes()[0] == COMPUTE and shown.phases[0].begin == 0
    assert all(a.end == b.begin for a, b in itertools.pairwise(shown.phases))
    assert shown.phases[-1].end == pytest.approx(shown.total)


def test_a_compiled_step_is_drawn_in_its_own_order():
    moments = (
        Moment("compute", 0.0, 0.4, "mlp", "matmul"),
        Moment("loop", 0.0, 0.9, "2 turns", "loop"),
        Moment("fsdp", 0.1, 0.4, "all-gather for mlp", "all-gather"),
        Moment("loop", 0.1, 0.8, "5 turns, backward", "loop"),
        Moment("compute", 0.4, 0.5, "waiting for the network", "wait"),
        Moment("fsdp", 0.4, 0.5, "all-gather for mlp", "all-gather", True),
        Moment("?", 0.5, 0.6, "all-reduce for other", "all-reduce"),
        Moment("compute", 0.5, 1.0, "optimizer", "other"),
    )
    shown = timeline.compiled(types.SimpleNamespace(moments=moments, time=types.SimpleNamespace(step=1.0)))
    assert (shown.total, shown.lanes()) == (1.0, [COMPUTE, "fsdp"])
    assert [(phase.name, phase.begin, phase.end) for phase in shown.phases] == [("5 turns, backward", 0.1, 0.8)]
    assert [(span.what, span.kind) for span in shown.spans if span.lane == COMPUTE] == [
        ("mlp: matmul", "matmul"),
        ("waiting for the network", "wait"),
        ("optimizer: other", "memory"),
    ]
    assert [span.waited for span in shown.spans if span.lane == "fsdp"] == [False, True]
