"""Every way to compute attention gives the numbers of the reference, forward and back."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import stdlib_tiny
from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.errors import Refused
from llmjax.models import blocked, nn, splash
from llmjax.models.attention import attention
from llmjax.models.gemma2 import Gemma2
from llmjax.plan import topology
from llmjax.run import DiLoCo
from llmjax.train import kernels, program
from meshes import cpu8, h200, v5p_64
from meshes.chips import TPU_V5E, TPU_V5P, TPU_V6E

T = 256


@functools.cache
def attended(
    kernel: str, layout: str, G: int, window: int, documents: bool, cap: float = 0.0, sinks: bool = False, **axes: int
) -> list[np.ndarray]:
    """Attention and its gradients in q, k and v and, where there are, in the sinks."""
    random = np.random.default_rng(0)
    q_BTHK, k_BTGK, v_BTGK, weight_BTHK = (random.normal(size=(2, T, n, 64)).astype(np.float32) for n in (4, G, G, 4))
    segments_BT = np.cumsum(random.random((2, T)) < 0.02, 1).astype(np.int32)
    sinks_H = random.normal(size=4).astype(np.float32)
    axes = meshes.Axes(**(dict.fromkeys(meshes.AXES, 1) | axes))
    mesh = meshes.device_mesh(axes, jax.devices()[: int(np.prod(axes.sizes()))])
    how = nn.Compute(layout=layouts.preset(layout), attention=kernel, block=128, interpret=True)

    @jax.jit
    def both(q, k, v, sink, weight, segments):
        def put(x, dims):
            return jax.reshard(x, nn.how().layout.gathered(dims))

        def weighed(q, k, v, sink):
            within = put(segments, "BT") if documents else None
            o = attention(q, k, v, within, window, cap=cap, sinks_H=nnx.Param(sink) if sinks else None)
            return jnp.sum(o * put(weight, "BTHK")), o

        given = put(q, "BTHK"), put(k, "BTGK"), put(v, "BTGK"), put(sink, "H")
        grads, o = jax.grad(weighed, (0, 1, 2, 3), has_aux=True)(*given)
        return o, *grads

    with jax.set_mesh(mesh), nn.compute(how):
        return [np.asarray(x) for x in both(q_BTHK, k_BTGK, v_BTGK, sinks_H, weight_BTHK, segments_BT)]


def same(found, expected):
    for name, a, b in zip(("result", "dq", "dk", "dv", "dsinks"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("window", [0, 1, 100, 128, 1000])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_blocks_give_the_numbers_of_all_scores_at_once(G, window, documents):
    same(attended("blocked", "dp", G, window, documents), attended("reference", "dp", G, window, documents))


def plainly(cap: float, sinks: bool, window: int) -> list[np.ndarray]:
    """What `attended` computes, written out for JAX to differentiate: sinks are one more score, of no value."""
    random = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(random.normal(size=(2, T, n, 64)), jnp.float32) for n in (4, 2, 2, 4))
    random.random((2, T))
    sinks_H = jnp.asarray(random.normal(size=4), jnp.float32)

    def weighed(q, k, v, sinks_H):
        k, v = (jnp.repeat(x, 2, 2) for x in (k, v))
        score = jnp.einsum("BTHK,BSHK->BHTS", q, k) / 8
        score = cap * jnp.tanh(score / cap) if cap else score
        back = jnp.arange(T)[:, None] - jnp.arange(T)[None]
        score = jnp.where(((back >= 0) & (back < (window or T)))[None, None], score, -1e30)
        more = jnp.broadcast_to(sinks_H[None, :, None, None], (2, 4, T, 1)) if sinks else score[..., :0]
        chance = jax.nn.softmax(jnp.concatenate([score, more], -1))[..., :T]
        o = jnp.einsum("BHTS,BSHK->BTHK", chance, v)
        return jnp.sum(o * weight), o

    grads, o = jax.jit(jax.grad(weighed, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks_H)
    return [np.asarray(x) for x in (o, *grads)]


@pytest.mark.parametrize("kernel", ["reference", "blocked", "splash"])
@pytest.mark.parametrize(("cap", "sinks", "window"), [(0.7, False, 0), (0, True, 0), (0.7, True, 100)])
def test_capped_scores_and_sinks_are_what_they_say_in_every_kernel_that_takes_them(kernel, cap, sinks, window):
    given = dict(cap=cap, sinks=sinks)
    if kernel == "splash" and sinks:
        with pytest.raises(Refused, match="splash has no attention sinks: use blocked or reference"):
            attended(kernel, "dp", 2, window, False, **given)
    else:
        same(attended(kernel, "dp", 2, window, False, **given), plainly(cap, sinks, window))


@pytest.mark.parametrize("kernel", ["reference", "blocked"])
def test_capped_scores_and_sinks_stay_what_they_are_where_heads_and_positions_are_cut(kernel):
    given = dict(cap=0.7, sinks=True)
    cut = attended(kernel, "dp_cp_tp", 2, 0, True, **given, data=2, context=2, tensor=2)
    same(cut, attended("reference", "dp", 2, 0, True, **given))


@pytest.mark.parametrize("kernel", ["blocked", "splash"])
def test_values_may_be_of_another_width_than_keys(kernel):
    random = np.random.default_rng(0)
    given = tuple(jnp.asarray(random.normal(size=(1, T, 2, width)), jnp.float32) for width in (64, 64, 32))
    mesh, found = meshes.device_mesh(meshes.Axes(*[1] * 6), jax.devices()[:1]), {}
    for name in ("reference", kernel):
        how = nn.Compute(attention=name, block=128, interpret=True)
        with jax.set_mesh(mesh), nn.compute(how):
            found[name] = jax.jit(jax.grad(lambda *qkv: jnp.sum(jnp.sin(attention(*qkv))), (0, 1, 2)))(*given)
    for a, b in zip(found[kernel], found["reference"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kernel", ["reference", "blocked"])
def test_a_window_hides_what_is_further_back(kernel):
    """Against the library, which counts the keys on the left besides one's own."""
    random = np.random.default_rng(1)
    q, k, v = (random.normal(size=(1, T, 2, 16)).astype(np.float32) for _ in range(3))
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(69, 0))
    mesh = meshes.device_mesh(meshes.Axes(*[1] * 6), jax.devices()[:1])
    with jax.set_mesh(mesh), nn.compute(nn.Compute(attention=kernel)):
        found = jax.jit(lambda *x: attention(*x, window=70))(q, k, v)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "documents"), [(0, False), (0, True), (100, False)])
@pytest.mark.parametrize("G", [1, 2])
def test_the_kernel_for_tpus_interpreted_gives_the_numbers_of_the_reference(G, window, documents):
    same(attended("splash", "dp", G, window, documents), attended("reference", "dp", G, window, documents))


@pytest.mark.parametrize("kernel", ["blocked", "splash"])
@pytest.mark.parametrize(
    ("layout", "axes"),
    [("fsdp_tp", dict(fsdp=2, tensor=2)), ("cp", dict(context=2)), ("dp_cp_tp", dict(data=2, context=2, tensor=2))],
    ids=["fsdp_tp", "cp", "dp_cp_tp"],
)
def test_cut_over_devices_the_numbers_stay(kernel, layout, axes):
    same(attended(kernel, layout, 2, 0, True, **axes), attended("reference", "dp", 2, 0, True))


def test_blocks_divide_the_sequence_and_are_not_tiny():
    assert [blocked.block(n, 512) for n in (64, 256, 1000, 509, 521, 8192)] == [64, 256, 500, 509, 521, 512]
    assert [splash.largest(n, 1024) for n in (128, 384, 4096, 64, 1000)] == [128, 128, 1024, 0, 0]


def test_blocks_hold_no_scores_of_the_whole_square():
    def held(kernel: str, length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
        mesh = meshes.device_mesh(meshes.Axes(*[1] * 6), jax.devices()[:1])
        with jax.set_mesh(mesh), nn.compute(nn.Compute(attention=kernel)):
            step = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v) ** 2), (0, 1, 2)))
            return step.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert held("blocked", 4096) < 2.1 * held("blocked", 2048)  # in proportion to the length
    assert held("blocked", 4096) < held("reference", 4096) / 10


@pytest.mark.parametrize(
    ("kernel", "changes", "said"),
    [
        ("splash", {}, "splash, but splash runs on TPUs, and this is a CPU: use auto, blocked or reference."),
        ("cudnn", {}, "attention is cudnn, but cudnn runs on GPUs"),
        ("splash", dict(mesh=v5p_64.cluster, sequence=96), "multiples of 128 positions on a device, and there are 96"),
        ("cudnn", dict(mesh=h200.cluster, dtype="float32"), "cudnn takes bfloat16, and products are float32"),
        ("cudnn", dict(mesh=h200.cluster, model=Gemma2()), "cudnn does not cap scores, and model.cap is 50"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_refused_when_asked_for(kernel, changes, said):
    run = dataclasses.replace(stdlib_tiny.run, mesh=cpu8.cluster, attention=kernel)
    run = dataclasses.replace(run, **changes)
    with pytest.raises(Refused, match=re.escape(said)):
        program.make(run, meshes.abstract_mesh(meshes.Axes(*[1] * 6)), run.mesh.chip)


@pytest.mark.parametrize(
    ("changes", "way", "said"),
    [
        (dict(mesh=v5p_64.cluster), "splash", ""),
        (dict(mesh=v5p_64.cluster, sequence=96), "reference", "multiples of 128 positions"),
        (dict(mesh=v5p_64.cluster, sequence=2000), "blocked", "multiples of 128 positions"),
        (dict(mesh=v5p_64.cluster, layout=layouts.preset("fsdp_pp")), "reference", "inside a pipeline's stages"),
        (dict(mesh=h200.cluster), "cudnn", ""),
        (dict(mesh=h200.cluster, dtype="float32"), "reference", "cudnn takes bfloat16"),
        (dict(mesh=cpu8.cluster), "reference", ""),
        (dict(mesh=cpu8.cluster, sequence=4096), "blocked", ""),
    ],
)
def test_a_run_takes_the_kernel_of_its_platform_by_itself_and_says_why_where_it_cannot(changes, way, said):
    model = dataclasses.replace(stdlib_tiny.run.model, positions=4096)
    run = dataclasses.replace(stdlib_tiny.run, model=model, **changes)
    found, lacking = kernels.kernel(run, meshes.Axes(1, 2, 1, 1, 1, 1), run.mesh.chip)
    assert found == way
    assert said in lacking and bool(said) == bool(lacking)


@pytest.mark.parametrize(
    ("layout", "sizes", "local", "way"),
    [
        ("fsdp", dict(data=2, fsdp=4), DiLoCo(every=4), "splash"),
        ("fsdp_cp", dict(fsdp=4, context=2), DiLoCo(every=0), "splash"),
        ("fsdp_pp", dict(fsdp=4, stage=2), DiLoCo(every=0), "reference"),
    ],
)
def test_the_step_of_a_tpu_can_be_differentiated_where_a_part_of_it_has_an_axis_to_itself(layout, sizes, local, way):
    run = dataclasses.replace(stdlib_tiny.run, mesh=v5p_64.cluster, layout=layouts.preset(layout), local=local)
    run = dataclasses.replace(run, batch=16, accumulate=1)
    axes = meshes.Axes(**dict.fromkeys(meshes.AXES, 1) | sizes)
    made = program.make(run, meshes.abstract_mesh(axes), run.mesh.chip)
    assert made.compute.attention == way
    made.abstract_step()


def test_a_ring_has_its_own_way_and_no_windows():
    run = dataclasses.replace(stdlib_tiny.run, mesh=cpu8.cluster, layout=layouts.ring, attention="blocked")
    assert kernels.kernel(run, meshes.Axes(1, 1, 1, 1, 2, 1), cpu8.cluster.chip) == ("ring", "")
    with pytest.raises(Refused, match="attention has a window of 100 positions, and a ring has none"):
        attended("ring", "ring", 2, 100, False, context=2)


@pytest.mark.parametrize("window", [0, 100])
def test_cudnn_is_asked_for_a_causal_mask_and_a_window_and_never_for_a_mask_of_all_pairs(window, monkeypatch):
    """The program for a GPU, as it is lowered; nothing of it runs here."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91200)
    mesh = meshes.device_mesh(meshes.Axes(1, 1, 2, 1, 1, 2), jax.devices()[:4])
    how = nn.Compute(layouts.fsdp_tp, operands="bfloat16", activations="bfloat16", attention="cudnn")

    def weighed(q, k, v):
        q, k, v = (jax.reshard(x, how.layout.gathered(dims)) for x, dims in ((q, "BTHK"), (k, "BTGK"), (v, "BTGK")))
        return jnp.sum(attention(q, k, v, window=window).astype(jnp.float32))

    with jax.set_mesh(mesh), nn.compute(how):
        q, k = (jax.ShapeDtypeStruct((2, T, heads, 64), jnp.bfloat16) for heads in (4, 2))
        text = jax.jit(jax.grad(weighed, (0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn[$\w]+", text)) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert set(re.findall(r"mask_type\\22: \\22(\w+)", text)) == {"CAUSAL"}
    assert set(re.findall(r"sliding_window_length\\22: (\d+)", text)) == {str(window)}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("chip", "slice_"), [(TPU_V5E, "2x2"), (TPU_V5P, "2x2x1"), (TPU_V6E, "2x2")], ids=["v5e", "v5p", "v6e"]
)
def test_the_kernel_compiles_for_tpus_with_the_blocks_it_gets_there(chip, slice_, head_dim, documents):
    cluster = meshes.Cluster("four", chip, chips=4, topology=slice_)
    mesh = meshes.device_mesh(meshes.Axes(1, 1, 2, 1, 1, 2), topology.devices(cluster))
    block = kernels.BLOCK.get(chip.name, kernels.NARROWER)
    how = nn.Compute(layouts.fsdp_tp, "bfloat16", "bfloat16", attention="splash", block=block)

    def weighed(q, k, v, segments):
        return jnp.sum(attention(q, k, v, segments if documents else None).astype(jnp.float32))

    def shape(dims, *sizes, dtype=jnp.bfloat16):
        place = jax.NamedSharding(mesh, how.layout.gathered(dims))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    with jax.set_mesh(mesh), nn.compute(how):
        q, k = shape("BTHK", 2, 4096, 8, head_dim), shape("BTGK", 2, 4096, 2, head_dim)
        segments = shape("BT", 2, 4096, dtype=jnp.int32)
        text = jax.jit(jax.grad(weighed, (0, 1, 2))).lower(q, k, k, segments).compile().as_text()
    assert text.count("tpu_custom_call") >= 2  # forward, and one for all gradients
    assert f'block_q": {block}' in text.replace("\\", "")
