"""The families beside Llama have the sizes that were published, and say them of themselves."""

import jax
import pytest

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import named
from llmjax.checks import check
from llmjax.errors import Refused
from llmjax.evaluate.parity import small
from llmjax.interop import folder
from llmjax.models import nn, shapes
from llmjax.models.deepseek_v3 import DeepseekV3
from llmjax.models.gemma2 import Gemma2
from llmjax.models.gemma3 import Gemma3
from llmjax.models.gpt_oss import GptOss
from llmjax.models.llama import Llama
from llmjax.models.mistral import Mistral
from llmjax.models.qwen2 import Qwen2
from llmjax.models.qwen3 import Qwen3
from llmjax.models.qwen3_moe import Qwen3Moe
from llmjax.optim.adamw import AdamW
from llmjax.run import Run
from meshes import cpu8

SMALL = dict(vocab=96, width=32, ff=64)


@pytest.fixture(autouse=True)
def one_device():
    axes = meshes.fill(meshes.Axes(), 1, used=layouts.dp.axes(), rest="data")
    with jax.set_mesh(meshes.device_mesh(axes, jax.devices()[:1])), nn.compute(nn.Compute()):
        yield


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (Mistral(vocab=32_000, layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, ff=14_336), 7_241_732_096),
        (Qwen2(vocab=151_936, layers=24, width=896, heads=14, kv_heads=2, ff=4864, tied=True), 494_032_768),
        (
            Qwen3(vocab=151_936, layers=28, width=1024, heads=16, kv_heads=8, head_dim=128, ff=3072, tied=True),
            596_049_920,
        ),
        (
            Qwen3Moe(vocab=151_936, layers=48, width=2048, heads=32, kv_heads=4, head_dim=128, ff=768, experts=128),
            30_532_122_624,
        ),
        (
            DeepseekV3(
                vocab=129_280,
                layers=61,
                width=7168,
                heads=128,
                kv_heads=128,
                ff=2048,
                experts=256,
                top_k=8,
                dense=3,
                dense_ff=18_432,
                groups=8,
                top_groups=4,
            ),
            671_026_419_200,
        ),
        (
            GptOss(
                vocab=201_088, layers=24, width=2880, heads=64, kv_heads=8, head_dim=64, ff=2880, experts=32, top_k=4
            ),
            20_914_757_184,
        ),
        (Gemma2(vocab=256_000, layers=26, width=2304, heads=8, kv_heads=4, head_dim=256, ff=9216), 2_614_341_888),
        (Gemma3(vocab=262_144, layers=26, width=1152, heads=4, kv_heads=1, head_dim=256, ff=6912), 999_885_952),
    ],
    ids=lambda x: type(x).__name__ if hasattr(x, "vocab") else "",
)
def test_parameter_counts_are_those_published(model, parameters):
    assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))) == parameters


@pytest.mark.parametrize("family", folder.known(), ids=lambda family: family.model.__name__)
def test_a_config_counts_the_matrices_that_its_model_has(family):
    model = family.model(**SMALL)
    sizes, counted = model.sizes(), 0
    for module, matrices in model.matrices().items():
        counted += sum(m.size(sizes) for m in matrices) * (model.layers if module in shapes.LAYER else 1)
    weights = named(jax.eval_shape(model.init, jax.random.key(0)))
    held = {name: x.size for name, x in weights.items() if not {"scale", "bias"} & set(name.split("_"))}
    vectors = "position", "sinks"
    assert sum(size for name, size in held.items() if not any(word in name for word in vectors)) == counted


def test_windows_leave_a_part_of_the_causal_triangle():
    c = dict(layers=6, heads=4, kv_heads=4, head_dim=16, **SMALL)
    whole, local = Llama(**c).flops_per_token(64)[0], Mistral(window=16, **c).flops_per_token(64)[0]
    triangle = 6 * 6 * 64 * 4 * 16  # 12 L T H K, and half of that
    assert whole - local == pytest.approx(triangle * (1 - (16 * 64 - 16**2 / 2) / (64**2 / 2)))
    in_turns = Gemma3(**c | dict(layers=8), window=9, every=3)
    assert in_turns.windows() == (0, 9, 9)  # after two that come first
    assert shapes.seen(in_turns, 18) == pytest.approx((6 * 0.75 + 2) / 8)


@pytest.mark.parametrize("family", folder.known(), ids=lambda family: family.model.__name__)
def test_every_family_can_be_made_small_for_a_comparison_and_keeps_its_shape(family):
    big = dict(layers=12, width=512, heads=16, ff=2048)
    more = dict(kv_heads=16) if family.model is DeepseekV3 else {}
    found = small(run_of(family.model(**big, **more), "dp")).model
    assert found.width == 64 and found.layers == 4
    kinds = [len(set(c.windows())) if hasattr(c, "windows") else 1 for c in (found, family.model(**big, **more))]
    assert kinds[0] == kinds[1]


def run_of(model, layout: str, **fields) -> Run:
    return Run(model=model, data=None, optimizer=AdamW(), loss=None, mesh=cpu8.cluster, layout=layouts.preset(layout),
               batch=16, sequence=32, **fields)  # fmt: skip


def test_what_turns_and_windows_cannot_do_is_refused_by_name():
    gemma = Gemma3(**SMALL, layers=12, every=3, window=8)
    axes = dict.fromkeys(meshes.AXES, 1)
    check(run_of(gemma, "pp"), meshes.Axes(**axes | dict(stage=4)), 1)
    with pytest.raises(Refused, match=r"model\.layers is 12, which stage 3 does not divide.*a multiple of 9"):
        check(run_of(gemma, "pp"), meshes.Axes(**axes | dict(stage=3)), 1)
    with pytest.raises(Refused, match=r"model\.window is 8, and around a ring attention has no window: use cp"):
        check(run_of(gemma, "ring"), meshes.Axes(**axes | dict(context=2)), 1)
    check(run_of(Mistral(**SMALL, window=32), "ring"), meshes.Axes(**axes | dict(context=2)), 1)  # hides nothing
    with pytest.raises(Refused, match=r"model\.layers is 2, fewer than model\.every 6, so that no layer is global"):
        Gemma3(**SMALL, layers=2)
