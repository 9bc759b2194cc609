"""The promise of the project: every parallelism, alone and with others, gives the numbers of one device."""

import functools
import itertools
import math

import jax
import pytest

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.evaluate import parity
from llmjax.evaluate.parity import Tolerance, Trace
from llmjax.layout import Pipeline
from llmjax.mesh import AXES, Axes
from llmjax.models.deepseek_v3 import DeepseekV3
from llmjax.models.gemma2 import Gemma2
from llmjax.models.gemma3 import Gemma3
from llmjax.models.gpt2 import GPT2
from llmjax.models.gpt_oss import GptOss
from llmjax.models.llama import Llama
from llmjax.models.mistral import Mistral
from llmjax.models.mixtral import Mixtral
from llmjax.models.olmo2 import Olmo2
from llmjax.models.qwen2 import Qwen2
from llmjax.models.qwen3 import Qwen3
from llmjax.models.qwen3_moe import Qwen3Moe
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Constant
from llmjax.run import Remat, Run
from llmjax.train.loss import NextToken
from llmjax.train.routed import RoutedNextToken
from meshes import cpu8

KIND = dict(data="dp", stage="pp", fsdp="fsdp", expert="ep", context="ring", tensor="tp")
SMALL = dict(vocab=96, layers=2, width=32, heads=4, head_dim=8, ff=64, positions=16)
EXPERTS = dict(kv_heads=2, experts=4, top_k=2) | SMALL
DEEPSEEK = SMALL | dict(
    layers=3, dense=1, kv_heads=4, head_dim=12, rotary=4, value_dim=6, query_latent=12, latent=16, dense_ff=48,
    experts=8, top_k=2, groups=4, top_groups=2,
)  # fmt: skip
MODELS = {
    "dense": (Llama(kv_heads=2, **SMALL), NextToken()),
    "gpt2": (GPT2(**SMALL), NextToken(z=1e-3)),
    "experts": (Mixtral(**EXPERTS), RoutedNextToken()),
    "mistral": (Mistral(kv_heads=2, window=5, **SMALL), NextToken()),
    "qwen2": (Qwen2(kv_heads=2, **SMALL), NextToken()),
    "qwen3": (Qwen3(kv_heads=2, **SMALL), NextToken()),
    "qwen3_moe": (Qwen3Moe(normalised=False, **EXPERTS), RoutedNextToken()),
    "olmo2": (Olmo2(kv_heads=2, **SMALL), NextToken()),
    "gemma2": (Gemma2(kv_heads=2, window=5, **SMALL | dict(layers=4)), NextToken()),
    "gemma3": (Gemma3(kv_heads=2, window=5, every=2, **SMALL | dict(layers=5)), NextToken()),
    "gpt_oss": (GptOss(window=5, **EXPERTS | dict(layers=4)), RoutedNextToken()),
    "deepseek_v3": (DeepseekV3(**DEEPSEEK), RoutedNextToken(balance=1e-4)),
    "further": (DeepseekV3(ahead=2, **DEEPSEEK), RoutedNextToken(balance=1e-4)),
    "slots": (Mixtral(router="sigmoid", shared=1, capacity=1.25, **EXPERTS), RoutedNextToken(balance=1e-4)),
}
DENSE = tuple(axis for axis in AXES if axis != "expert")
FEW = Tolerance(loss=1e-5, gradient=1e-4)


@functools.cache
def traced(model: str, layout: str, sizes: tuple[tuple[str, int], ...], schedule: str = "gpipe") -> Trace:
    """Five steps of a model under a layout on a mesh."""
    config, loss = MODELS[model]
    run = Run(
        model=config, data=None, optimizer=AdamW(lr=3e-3, schedule=Constant()), loss=loss, mesh=cpu8.cluster,
        layout=layouts.preset(layout), pipeline=Pipeline(schedule), batch=8, sequence=16, accumulate=1,
        remat=Remat("full"),
    )  # fmt: skip
    axes = Axes(**(dict.fromkeys(AXES, 1) | dict(sizes)))
    mesh = meshes.device_mesh(axes, jax.devices()[: math.prod(axes.sizes())])
    return parity.trace(run, mesh, cpu8.cluster.chip, 5)


def shows_the_numbers_of_one_device(model: str, layout: str, capfd=None, schedule="gpipe", **sizes: int) -> None:
    one = traced(model, "dp", ())
    assert one.losses[-1] < one.losses[0], "it does not learn, so the curve says nothing"
    verdict = parity.compare(one, traced(model, layout, tuple(sizes.items()), schedule), FEW)
    assert verdict.passed, verdict
    if capfd:
        assert "rematerialization" not in capfd.readouterr().err


def named(axes) -> str:
    return "_".join(KIND[axis] for axis in axes)


@pytest.mark.parametrize("axis", DENSE)
def test_every_axis_alone(axis, capfd):
    shows_the_numbers_of_one_device("dense", KIND[axis], capfd, **{axis: 2 if axis in ("stage", "tensor") else 4})


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.combinations(DENSE, 2)), ids=named)
def test_every_pair_of_axes(pair, capfd):
    shows_the_numbers_of_one_device("dense", named(pair), capfd, **dict.fromkeys(pair, 2))


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        ("fsdp_tp_ring", ("fsdp", "tensor", "context")),
        ("fsdp_tp_sp_ring", ("fsdp", "tensor", "context")),
        ("fsdp_tp_sp_cp", ("fsdp", "tensor", "context")),
        ("fsdp_tp_pp", ("fsdp", "tensor", "stage")),
        ("fsdp_ring_pp", ("fsdp", "context", "stage")),
        ("tp_pp", ("data", "tensor", "stage")),
        ("tp_ring_pp", ("tensor", "context", "stage")),
    ],
)
def test_several_triples_of_axes(layout, axes, capfd):
    shows_the_numbers_of_one_device("dense", layout, capfd, **dict.fromkeys(axes, 2))


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_alone_with_experts(axis, capfd):
    shows_the_numbers_of_one_device("experts", KIND[axis], capfd, **{axis: 2 if axis in ("stage", "tensor") else 4})


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.combinations(AXES, 2)), ids=named)
def test_every_pair_of_axes_with_experts(pair, capfd):
    shows_the_numbers_of_one_device("slots", named(pair), capfd, **dict.fromkeys(pair, 2))


@pytest.mark.parametrize(
    "triple", [("fsdp", "expert", "tensor"), ("stage", "fsdp", "expert"), ("data", "expert", "context")], ids=named
)
def test_several_triples_of_axes_with_experts(triple, capfd):
    shows_the_numbers_of_one_device("experts", named(triple), capfd, **dict.fromkeys(triple, 2))


@pytest.mark.parametrize("layout", ["fsdp_tp_sp_ring", "fsdp_pp"])
def test_the_other_family_too(layout, capfd):
    shows_the_numbers_of_one_device(
        "gpt2", layout, capfd, fsdp=2, **({"stage": 2} if "pp" in layout else {"context": 2, "tensor": 2})
    )


FAMILIES = ("mistral", "qwen2", "qwen3", "qwen3_moe", "olmo2", "gemma2", "gemma3", "gpt_oss", "deepseek_v3")
UNLIKE = ("olmo2", "gemma3", "gpt_oss", "deepseek_v3")  # norms over cut heads; turns; biases and sinks; latents


@pytest.mark.parametrize(
    "model", [name if name in UNLIKE else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_cut_in_three_ways(model, capfd):
    shows_the_numbers_of_one_device(model, "fsdp_tp_sp", capfd, fsdp=2, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize(("layout", "axis"), [("fsdp_pp", "stage"), ("fsdp_cp", "context"), ("fsdp_ep", "expert")])
def test_every_family_in_stages_and_with_the_sequence_cut(model, layout, axis, capfd):
    if axis != "expert" or hasattr(MODELS[model][0], "experts"):
        shows_the_numbers_of_one_device(model, layout, capfd, fsdp=2, **{axis: 2})


@pytest.mark.parametrize(
    ("layout", "axes"),
    [("fsdp_tp_sp", ("fsdp", "tensor")), pytest.param("ring_pp", ("stage", "context"), marks=pytest.mark.slow)],
)
def test_predicting_further_tokens(layout, axes, capfd):
    shows_the_numbers_of_one_device("further", layout, capfd, **dict.fromkeys(axes, 2))


@pytest.mark.parametrize(("model", "axes"), [("slots", ("stage", "fsdp", "expert")), ("experts", ("stage", "tensor"))])
def test_a_backward_pass_placed_by_hand_with_experts(model, axes, capfd):
    shows_the_numbers_of_one_device(model, named(axes), capfd, "1f1b", **dict.fromkeys(axes, 2))
