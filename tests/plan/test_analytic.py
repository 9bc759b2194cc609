"""The analytic time of a step has the parts that its work has."""

import dataclasses
import importlib

import pytest

from llmjax import layout as layouts
from llmjax.layout import Pipeline
from llmjax.mesh import AXES, Axes
from llmjax.models.mixtral import Mixtral
from llmjax.plan import analytic, work
from llmjax.plan.work import Again, Method
from llmjax.run import Remat
from meshes import chips

RUN = importlib.import_module("experiments.llama3_8b_v5p_64").run
FUSED = Method(fused=True)


def axes(**sizes: int) -> Axes:
    return Axes(**dict.fromkeys(AXES, 1) | sizes)


def planned(layout: str, sizes: Axes, method: Method = Method(), accumulate: int = 1, **changes):
    run = dataclasses.replace(RUN, layout=layouts.preset(layout), accumulate=accumulate, **changes)
    done = work.count(run, sizes, accumulate, method)
    return done, analytic.predict(done, run.mesh, sizes)


def test_products_take_six_flops_per_weight_and_token_at_the_rate_that_products_reach():
    done, time = planned("fsdp", axes(fsdp=64), remat=Remat("none"))
    causal, full = RUN.model.flops_per_token(RUN.sequence)
    weights = (2 * causal - full) * RUN.batch * RUN.sequence / 64  # without attention
    assert sum(done.products.values()) == pytest.approx(weights)
    assert time.matmul == pytest.approx(weights / (chips.TPU_V5P.flops * chips.TPU_V5P.efficiency.matmul))


def test_full_remat_adds_the_forward_pass_of_the_layers_but_for_the_product_that_ends_them():
    sizes = RUN.model.sizes()
    none, full = (planned("fsdp", axes(fsdp=64), remat=Remat(remat))[0].products for remat in ("none", "full"))
    assert full["attention"] / none["attention"] == pytest.approx(4 / 3)
    assert full["mlp"] / none["mlp"] == pytest.approx((3 + 2 / 3) / 3)
    assert full["head"] == none["head"]
    last = planned("fsdp", axes(fsdp=64), Method(again=Again(1, 1, 1, last=True)))[0].products
    assert last["mlp"] / none["mlp"] == pytest.approx(4 / 3) and sizes["F"] > 0


def test_fused_attention_computes_the_triangle_and_keeps_scores_out_of_memory():
    plain, fused = (planned("fsdp", axes(fsdp=64), attention=way)[0] for way in ("reference", "splash"))
    assert fused == planned("fsdp", axes(fsdp=64))[0] == planned("fsdp", axes(fsdp=64), FUSED, attention="reference")[0]
    assert fused.attention == pytest.approx(plain.attention / 2)
    assert "scores" in plain.traffic and "scores" not in fused.traffic


def test_a_ring_computes_little_more_than_the_triangle():
    cut = axes(fsdp=16, context=4)
    whole, ring = planned("fsdp_cp", cut, attention="reference")[0], planned("fsdp_ring", cut)[0]
    assert ring.attention / whole.attention == pytest.approx(9 / 16)


@pytest.mark.parametrize(
    ("layout", "sizes", "where"),
    [
        ("fsdp_tp", axes(fsdp=16, tensor=4), {"fsdp", "tensor"}),
        ("fsdp_ring", axes(fsdp=16, context=4), {"fsdp", "context", "fsdp x context"}),
        ("dp", axes(data=64), {"data"}),
        ("fsdp_pp", axes(stage=4, fsdp=16), {"fsdp", "stage"}),
    ],
)
def test_time_is_waited_for_over_the_axes_that_cut_something(layout, sizes, where):
    assert set(planned(layout, sizes)[1].exposed) <= where


def test_messages_of_weights_hide_behind_compute_and_those_of_activations_do_not():
    done, time = planned("fsdp", axes(fsdp=64))
    sent = sum(analytic.seconds(m, RUN.mesh, axes(fsdp=64)) for m in done.messages)
    assert time.exposed["fsdp"] < 0.6 * sent
    slow = dataclasses.replace(RUN.mesh, chip=dataclasses.replace(RUN.mesh.chip, link=1e8))
    much = analytic.predict(done, slow, axes(fsdp=64))
    assert much.exposed["fsdp"] > 5 * (much.matmul + much.attention)


def test_a_pipeline_idles_as_many_microbatches_as_it_has_stages_to_fill():
    _, few = planned("fsdp_pp", axes(stage=4, fsdp=16), pipeline=Pipeline(microbatches=4))
    _, many = planned("fsdp_pp", axes(stage=4, fsdp=16), pipeline=Pipeline(microbatches=16))
    busy = [time.step - time.bubble - time.host for time in (few, many)]
    assert few.bubble / busy[0] == pytest.approx(3 / 4) and many.bubble / busy[1] == pytest.approx(3 / 16)


def test_a_stage_of_1f1b_computes_its_forward_pass_again():
    gpipe, by_hand = (
        planned("fsdp_pp", axes(stage=4, fsdp=16), remat=Remat("none"), pipeline=Pipeline(schedule))[0]
        for schedule in ("gpipe", "1f1b")
    )
    assert by_hand.products["mlp"] / gpipe.products["mlp"] == pytest.approx(4 / 3)
    assert by_hand.products["head"] == gpipe.products["head"]


def test_more_slices_lose_the_share_of_a_step_that_runs_have_shown():
    two = importlib.import_module("meshes.v5p_128_x2").cluster
    assert analytic.lost(two, axes(data=2, fsdp=128)) == chips.TPU_V5P.efficiency.doubling
    assert analytic.lost(RUN.mesh, axes(fsdp=64)) == 0


def test_experts_add_what_travels_and_only_the_experts_that_a_token_goes_to():
    model = Mixtral(vocab=32_000, layers=8, width=2048, heads=16, kv_heads=8, head_dim=128, ff=4096)
    done, _ = planned("fsdp_ep", axes(fsdp=8, expert=8), model=model, remat=Remat("none"))
    routed = [m for m in done.messages if m.kind == "all-to-all"]
    assert {m.axes for m in routed} == {("expert",)}
    tokens = RUN.batch * RUN.sequence / 64
    assert routed[0].bytes == pytest.approx(2 * tokens * model.width * model.top_k)
    active = 3 * model.width * model.ff * model.top_k + model.width * model.experts
    assert done.products["mlp"] == pytest.approx(6 * tokens * active * model.layers)


def test_an_expert_axis_means_nothing_to_a_dense_model():
    done, _ = planned("ep", axes(expert=64))
    assert not [m for m in done.messages if m.kind == "all-to-all"]


def test_int8_halves_two_of_three_products_of_layers_and_the_bytes_of_their_weights_on_the_network():
    (plain, _), (quick, _) = (
        planned("fsdp", axes(fsdp=64), remat=Remat("none"), dtype=d) for d in ("bfloat16", "int8")
    )
    for module in ("attention", "mlp"):
        assert quick.products[module] == pytest.approx(2 / 3 * plain.products[module])
    assert quick.products["head"] == plain.products["head"]

    def sent(work, kind, module):
        return sum(m.bytes * m.count for m in work.messages if (m.kind, m.module) == (kind, module))

    assert sent(quick, "all-gather", "mlp") == sent(plain, "all-gather", "mlp") / 2
    for kind, module in (("reduce-scatter", "mlp"), ("all-gather", "head")):
        assert sent(quick, kind, module) == sent(plain, kind, module) > 0


def test_a_chip_whose_rate_in_eight_bits_is_not_known_is_planned_as_in_bfloat16():
    unknown = dataclasses.replace(RUN.mesh, chip=dataclasses.replace(RUN.mesh.chip, int8=None))
    plain, eight = (planned("fsdp", axes(fsdp=64), mesh=unknown, dtype=d)[0] for d in ("bfloat16", "int8"))
    assert eight.products == plain.products
