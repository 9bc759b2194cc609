"""A layout is three maps from letters to mesh axes, and everything else follows from them."""

import dataclasses
import itertools

import pytest
from jax import P

from llmjax import layout as layouts
from llmjax.errors import Refused
from llmjax.layout import axes_of
from llmjax.mesh import AXES

PRESETS = [layouts.dp, layouts.fsdp, layouts.tp, layouts.fsdp_tp, layouts.fsdp_tp_sp]
BATCH = ("data", "fsdp")
WHOLE, CUT = P(BATCH, None, None), P(BATCH, None, "tensor")
WEIGHTS = ("VD", "DV", "DHK", "DGK", "HKD", "DF", "FD", "D", "HK", "F", "PD")


@pytest.mark.parametrize(
    ("layout", "at_rest", "in_use", "stream", "inside"),
    [
        (layouts.dp, P(None, None), P(None, None), WHOLE, WHOLE),
        (layouts.fsdp, P("fsdp", None), P(None, None), WHOLE, WHOLE),
        (layouts.tp, P(None, "tensor"), P(None, "tensor"), WHOLE, CUT),
        (layouts.fsdp_tp, P("fsdp", "tensor"), P(None, "tensor"), WHOLE, CUT),
        (layouts.fsdp_tp_sp, P("fsdp", "tensor"), P(None, "tensor"), P(BATCH, "tensor", None), CUT),
    ],
)  # fmt: skip
def test_presets_place_a_feed_forward_weight_and_its_activations(layout, at_rest, in_use, stream, inside):
    assert layout.at_rest("DF") == at_rest
    assert [axes_of(entry) for entry in layout.in_use("DF")] == [axes_of(entry) for entry in in_use]
    assert layout.activation("BTD") == stream
    assert layout.activation("BTF") == inside


def test_a_weight_in_use_is_the_weight_at_rest_gathered_over_the_axes_that_cut_the_batch():
    for layout, dims in itertools.product(PRESETS, WEIGHTS):
        batch = axes_of(layout.inner["B"])
        for rest, use in zip(layout.at_rest(dims), layout.in_use(dims), strict=True):
            assert axes_of(use) == tuple(axis for axis in axes_of(rest) if axis not in batch)


def test_the_stream_enters_a_block_whole_along_the_sequence():
    for layout in PRESETS:
        assert layout.gathered("BTD") == WHOLE


def test_layouts_name_axes_that_meshes_have_and_cut_no_array_twice_over_one():
    for layout in PRESETS:
        assert layout.axes() <= set(AXES)
        for place in (*map(layout.at_rest, WEIGHTS), *map(layout.activation, ("BTD", "BTHK", "BSGK", "BTF", "BTV"))):
            axes = [axis for entry in place for axis in axes_of(entry)]
            assert len(axes) == len(set(axes))


def test_devices_nobody_asked_for_go_to_fsdp_where_parameters_are_cut_over_it():
    assert {layout.name: layout.rest() for layout in PRESETS} == {
        "dp": "data", "tp": "data", "fsdp": "fsdp", "fsdp_tp": "fsdp", "fsdp_tp_sp": "fsdp",
    }  # fmt: skip


def test_layouts_that_differ_anywhere_never_share_a_program():
    changed = dataclasses.replace(layouts.dp, params={"D": "fsdp"})
    assert len({*PRESETS, changed}) == len(PRESETS) + 1 and hash(changed) != hash(layouts.dp)
    assert hash(dataclasses.replace(layouts.dp)) == hash(layouts.dp)


def test_presets_are_found_by_name_and_an_unknown_one_is_refused_with_the_nearest():
    assert all(layouts.preset(layout.name) == layout for layout in PRESETS)
    with pytest.raises(Refused, match="there is no layout named 'fdsp': did you mean fsdp"):
        layouts.preset("fdsp")
    with pytest.raises(Refused, match="'pipeline': join any of dp, fsdp, tp, sp, cp, ring, ep, pp, vp with _"):
        layouts.preset("pipeline")


def test_kinds_join_to_what_either_cuts():
    both = layouts.fsdp | layouts.tp | layouts.ring
    assert both.name == "fsdp_tp_ring" and both == layouts.preset("fsdp_tp_ring")
    assert both.params == layouts.fsdp_tp.params
    assert both.activation("BTD") == P(BATCH, "context", None)
    assert both.activation("BTF") == P(BATCH, "context", "tensor")


def test_sequence_parallelism_cuts_what_context_parallelism_leaves():
    both = layouts.preset("tp_sp_cp")
    assert both.activation("BTD") == P(BATCH, ("context", "tensor"), None)  # the slower network cuts first
    assert both.gathered("BTD") == P(BATCH, "context", None)


def test_experts_stay_where_they_are_although_their_axis_cuts_the_batch():
    both = layouts.preset("fsdp_ep")
    assert [axes_of(entry) for entry in both.at_rest("EDF")] == [("expert",), ("fsdp",), ()]
    assert [axes_of(entry) for entry in both.in_use("EDF")] == [("expert",), (), ()]
    assert axes_of(both.activation("BTD")[0]) == (*BATCH, "expert")


def test_a_layout_without_an_axis_cuts_nothing_over_it():
    inside = layouts.preset("fsdp_tp_ring").without("data")
    assert "data" not in inside.axes() and inside.axes() == {"fsdp", "tensor", "context"}
    assert axes_of(inside.activation("BTD")[0]) == ("fsdp",)
