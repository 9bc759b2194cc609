"""Every way to compute attention gives the numbers of the reference, forward and back."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import stdlib_tiny
from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.errors import Refused
from llmjax.models import blocked, nn, splash
from llmjax.models.attention import attention
from llmjax.train import program
from meshes import cpu8, h200, v5p_64

T = 256


@functools.cache
def attended(kernel: str, layout: str, G: int, window: int, documents: bool, **axes: int) -> list[np.ndarray]:
    """Attention and its gradients in q, k and v."""
    random = np.random.default_rng(0)
    q_BTHK, k_BTGK, v_BTGK, weight_BTHK = (random.normal(size=(2, T, n, 64)).astype(np.float32) for n in (4, G, G, 4))
    segments_BT = np.cumsum(random.random((2, T)) < 0.02, 1).astype(np.int32)
    axes = meshes.Axes(**(dict.fromkeys(meshes.AXES, 1) | axes))
    mesh = meshes.device_mesh(axes, jax.devices()[: int(np.prod(axes.sizes()))])
    how = nn.Compute(layout=layouts.preset(layout), attention=kernel, block=128, interpret=True)

    @jax.jit
    def both(q, k, v, weight, segments):
        def put(x, dims):
            return jax.reshard(x, nn.how().layout.gathered(dims))

        def weighed(q, k, v):
            o = attention(q, k, v, put(segments, "BT") if documents else None, window)
            return jnp.sum(o * put(weight, "BTHK")), o

        grads, o = jax.grad(weighed, (0, 1, 2), has_aux=True)(put(q, "BTHK"), put(k, "BTGK"), put(v, "BTGK"))
        return o, *grads

    with jax.set_mesh(mesh), nn.compute(how):
        return [np.asarray(x) for x in both(q_BTHK, k_BTGK, v_BTGK, weight_BTHK, segments_BT)]


def same(found, expected):
    for name, a, b in zip(("result", "dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("window", [0, 1, 100, 128, 1000])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_blocks_give_the_numbers_of_all_scores_at_once(G, window, documents):
    same(attended("blocked", "dp", G, window, documents), attended("reference", "dp", G, window, documents))


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
    assert [blocked.block(n) for n in (64, 128, 256, 1000, 509, 8192)] == [64, 128, 128, 125, 509, 128]
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
        ("splash", {}, "attention is splash, but splash runs on TPUs, and this is a CPU: use blocked or reference."),
        ("cudnn", {}, "attention is cudnn, but cudnn runs on GPUs"),
        ("splash", dict(mesh=v5p_64.cluster, sequence=96), "multiples of 128 positions on a device, and there are 96"),
        ("cudnn", dict(mesh=h200.cluster, dtype="float32"), "cudnn takes bfloat16, and products are float32"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_refused_when_asked_for(kernel, changes, said):
    run = dataclasses.replace(stdlib_tiny.run, mesh=cpu8.cluster, attention=kernel)
    run = dataclasses.replace(run, **changes)
    with pytest.raises(Refused, match=re.escape(said)):
        program.kernel(run, meshes.Axes(*[1] * 6), run.mesh.chip)
