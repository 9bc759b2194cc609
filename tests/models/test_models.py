"""Models compute what their papers say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import named
from llmjax.models import nn
from llmjax.models.attention import RopeScaling, attention, rope_angles, rotate
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.models.mixtral import Mixtral

LLAMA3 = dict(vocab=128_256, kv_heads=8, head_dim=128)
MIXTRAL_8X7B = Mixtral(vocab=32_000, layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, ff=14_336)
DTYPES = ("float32", "bfloat16")


@pytest.fixture(autouse=True)
def one_device():
    axes = meshes.fill(meshes.Axes(), 1, used=layouts.dp.axes(), rest="data")
    with jax.set_mesh(meshes.device_mesh(axes, jax.devices()[:1])), nn.compute(nn.Compute()):
        yield


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (GPT2(vocab=50_257), 124_439_808),
        (Llama(layers=32, width=4096, heads=32, ff=14_336, **LLAMA3), 8_030_261_248),
        (Llama(layers=80, width=8192, heads=64, ff=28_672, **LLAMA3), 70_553_706_496),
        (Llama(layers=126, width=16_384, heads=128, ff=53_248, **LLAMA3), 405_853_388_800),
        (Llama(layers=16, width=2048, heads=32, ff=8192, tied=True, **LLAMA3 | {"head_dim": 64}), 1_235_814_400),
        (MIXTRAL_8X7B, 46_702_792_704),
    ],
)
def test_parameter_counts_are_those_published(model, parameters):
    assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))) == parameters


@pytest.mark.parametrize(
    ("model", "sequence", "causal", "whole"),
    [
        (GPT2(vocab=50_257), 1024, 0.798e9, 0.855e9),
        (Llama(layers=32, width=4096, heads=32, ff=14_336, **LLAMA3), 8192, 51.5e9, 57.9e9),
        (Llama(layers=80, width=8192, heads=64, ff=28_672, **LLAMA3), 8192, 449e9, 481e9),
        (Llama(layers=126, width=16_384, heads=128, ff=53_248, **LLAMA3), 8192, 2524e9, 2625e9),
        # 12.9e9 active parameters of which 0.131e9 embed, and 12 L H K T for attention (arXiv:2401.04088, table 1)
        (MIXTRAL_8X7B, 4096, 6 * 12.748e9 + 3.22e9, 6 * 12.748e9 + 6.44e9),
    ],
)
def test_flops_per_token_are_those_of_published_logs(model, sequence, causal, whole):
    np.testing.assert_allclose(model.flops_per_token(sequence), (causal, whole), rtol=2e-3)


@pytest.mark.parametrize("G", [1, 2, 4])
def test_attention_and_its_gradients_equal_the_library_s(G):
    keys = jax.random.split(jax.random.key(0), 4)
    q_BTHK = jax.random.normal(keys[0], (2, 12, 4, 8))
    k_BSGK, v_BSGK = (jax.random.normal(key, (2, 12, G, 8)) for key in keys[1:3])
    weight_BTHK = jax.random.normal(keys[3], q_BTHK.shape)

    def library(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def weighed(f, *qkv):
        o_BTHK = f(*qkv)
        return jnp.sum(o_BTHK * weight_BTHK), o_BTHK

    @jax.jit
    def both(*qkv):
        """(gradients in q, k and v; result) of each."""
        return [jax.grad(functools.partial(weighed, f), (0, 1, 2), has_aux=True)(*qkv) for f in (attention, library)]

    (our_grads, ours), (their_grads, theirs) = both(q_BTHK, k_BSGK, v_BSGK)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for name, a, b in zip("qkv", our_grads, their_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=f"gradient in {name}")


@pytest.mark.parametrize(
    "c",
    [
        Llama(vocab=64, layers=2, width=32, heads=2, kv_heads=1, head_dim=16, ff=64, positions=16),
        GPT2(vocab=64, layers=2, width=32, heads=2, head_dim=16, ff=64, positions=16),
        Mixtral(vocab=64, layers=2, width=32, heads=2, kv_heads=1, head_dim=16, ff=32, positions=16, capacity=1.0),
        Mixtral(vocab=64, layers=2, width=32, heads=2, kv_heads=1, head_dim=16, ff=32, positions=16, router="sigmoid"),
    ],
    ids=lambda c: type(c).__name__,
)
def test_no_position_sees_a_later_one(c):
    logits = jax.jit(lambda tokens_BT: c.init(jax.random.key(0))(tokens_BT))
    tokens_BT = np.random.default_rng(1).integers(0, 64, (1, 16))
    before = logits(tokens_BT)
    tokens_BT[0, 9] = (tokens_BT[0, 9] + 1) % 64
    after = logits(tokens_BT)
    np.testing.assert_array_equal(before[0, :9], after[0, :9], err_msg="a position before 9 sees token 9")
    for position in range(9, 16):
        assert not np.allclose(before[0, position], after[0, position]), f"position {position} does not see token 9"


def test_rotation_keeps_lengths_and_makes_products_depend_on_distance_alone():
    q_BTHK, k_BTHK = (jax.random.normal(jax.random.key(i), (1, 1, 1, 16)) for i in range(2))
    at = lambda x, position: rotate(x, rope_angles(jnp.array([[position]]), 16, 1e4))  # noqa: E731
    np.testing.assert_allclose(jnp.linalg.norm(at(q_BTHK, 7)), jnp.linalg.norm(q_BTHK), rtol=1e-6)
    near, far = (jnp.sum(at(q_BTHK, 5 + shift) * at(k_BTHK, 2 + shift)) for shift in (0, 40))
    np.testing.assert_allclose(near, far, rtol=1e-4)


def test_llama_31_scaling_keeps_short_waves_and_stretches_long_ones():
    plain, scaled = (rope_angles(jnp.array([[1]]), 128, 5e5, s)[0, 0] for s in (None, RopeScaling()))
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any() and np.all((scaled < plain)[between]) and np.all((scaled > plain / 8)[between])


def test_bfloat16_products_stay_close_to_float32():
    c = Llama(vocab=64, layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ff=128, positions=32)
    ways = {activations: nn.Compute(operands="bfloat16", activations=activations) for activations in DTYPES}

    @jax.jit
    def logits(tokens_BT):
        model, found = c.init(jax.random.key(0)), {}
        for name, way in dict(exact=nn.Compute(), **ways).items():
            with nn.compute(way):
                found[name] = model(tokens_BT)
        return found

    found = {name: np.asarray(x) for name, x in logits(np.random.default_rng(1).integers(0, 64, (2, 32))).items()}
    for activations in DTYPES:
        rounded, exact = found[activations], found["exact"]
        assert rounded.dtype == activations
        off = np.abs(rounded - exact).max() / np.abs(exact).max()
        assert 0 < off < 0.05, f"activations in {activations} are off by {off}"


@functools.cache
def gradient(remat: str):
    """(gradient, bytes of temporary memory) of a model of 8 layers."""
    c = Llama(vocab=64, layers=8, width=64, heads=4, kv_heads=2, head_dim=16, ff=256, positions=64)
    tokens_BT = np.random.default_rng(1).integers(0, 64, (8, 64))
    model = jax.jit(c.init)(jax.random.key(0))
    with nn.compute(nn.Compute(remat=remat)):
        compiled = jax.jit(jax.grad(lambda model: jnp.mean(model(tokens_BT) ** 2))).lower(model).compile()
    return named(compiled(model)), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_memory_and_not_the_gradient(remat):
    (expected, plain), (found, less) = gradient("none"), gradient(remat)
    assert less < 0.8 * plain, f"{less} bytes with remat, {plain} without"
    for name, grad in expected.items():
        np.testing.assert_allclose(found[name], grad, rtol=1e-4, atol=1e-6, err_msg=f"gradient of {name}")


def products_of_a_backward_pass(model, remat: str) -> int:
    """Products in the traced gradient of a loss, as often as they stand there: a layer's once."""
    tokens = jnp.zeros((2, 8), jnp.int32)
    with nn.compute(nn.Compute(remat=remat)):
        weights = jax.eval_shape(model.init, jax.random.key(0))
        return str(jax.make_jaxpr(jax.grad(lambda w: w(tokens).sum()))(weights)).count("dot_general")


@pytest.mark.parametrize("model", [GPT2(vocab=32, layers=2, width=16, heads=2, head_dim=8, ff=32), Llama(vocab=32)])
def test_remat_dots_computes_no_product_again_attention_those_of_the_feed_forward_and_full_all(model):
    counts = {remat: products_of_a_backward_pass(model, remat) for remat in ("none", "dots", "attention", "full")}
    own, wide = (sum(m.count for m in model.matrices()[module]) for module in ("attention", "mlp"))
    assert counts["dots"] == counts["none"]
    assert counts["attention"] - counts["dots"] >= wide - 1  # all but the one that ends the layer: nobody needs it
    scores = 2  # queries by keys, weights by values
    assert counts["full"] - counts["dots"] >= own + wide - 1 + scores
