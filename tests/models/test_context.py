"""A sequence cut over devices: attention gives the numbers of one device, and memory falls with their number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.models import nn
from llmjax.models.attention import attention
from llmjax.models.llama import Llama
from llmjax.train import step as steps
from llmjax.train.loss import NextToken

T = 16


def inside(layout: str, context: int, **axes: int):
    """Contexts of a layout on a mesh with so many devices per sequence."""
    axes = meshes.Axes(**(dict.fromkeys(meshes.AXES, 1) | dict(context=context) | axes))
    count = int(np.prod(axes.sizes()))
    mesh = meshes.device_mesh(axes, jax.devices()[:count])
    return jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layouts.preset(layout)))


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_around_a_ring_every_device_has_the_same_share_of_the_causal_triangle(devices):
    mesh, how = inside("ring", devices)
    with mesh, how:
        held = nn.order(T).reshape(devices, -1)
    assert sorted(held.ravel()) == list(range(T))
    seen = (held + 1).sum(1)  # a query at position p sees p + 1 keys
    assert set(seen) == {T * (T + 1) // 2 // devices}


@pytest.mark.parametrize(("layout", "context"), [("ring", 1), ("cp", 4), ("dp", 1)])
def test_elsewhere_positions_stay_in_order(layout, context):
    mesh, how = inside(layout, context)
    with mesh, how:
        assert list(nn.order(T)) == list(range(T))


@functools.cache
def attended(
    layout: str, context: int, G: int, documents: bool, cap: float = 0.0, sinks: bool = False
) -> list[np.ndarray]:
    """Attention and its gradients in q, k, v and the sinks, with positions back in their order."""
    random = np.random.default_rng(0)
    q_BTHK, k_BTGK, v_BTGK, weight_BTHK = (random.normal(size=(2, T, n, 8)).astype(np.float32) for n in (4, G, G, 4))
    segments_BT = np.cumsum(random.random((2, T)) < 0.3, 1).astype(np.int32)
    sinks_H = random.normal(size=4).astype(np.float32)
    mesh, how = inside(layout, context)

    @jax.jit
    def both(q, k, v, sink, weight, segments):
        order = nn.order(T)

        def put(x, dims):
            return x.at[:, order].get(out_sharding=nn.how().layout.gathered(dims))

        def weighed(q, k, v, sink):
            within = put(segments, "BT") if documents else None
            o = attention(q, k, v, within, cap=cap, sinks_H=nnx.Param(sink) if sinks else None)
            return jnp.sum(o * put(weight, "BTHK")), o

        given = put(q, "BTHK"), put(k, "BTGK"), put(v, "BTGK"), sink
        grads, o = jax.grad(weighed, (0, 1, 2, 3), has_aux=True)(*given)
        return o, *grads

    with mesh, how:
        *found, dsinks = both(q_BTHK, k_BTGK, v_BTGK, sinks_H, weight_BTHK, segments_BT)
        return [*(np.asarray(x)[:, np.argsort(nn.order(T))] for x in found), np.asarray(dsinks)]


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize(("layout", "devices"), [("cp", 4), ("ring", 2), ("ring", 8)])
def test_attention_and_its_gradients_are_those_of_one_device(layout, devices, G, documents):
    for name, found, expected in zip(
        ("result", "dq", "dk", "dv", "dsinks"),
        attended(layout, devices, G, documents),
        attended("dp", 1, G, documents),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("layout", "devices"), [("cp", 4), ("ring", 4)])
def test_so_they_are_with_capped_scores_and_sinks(layout, devices):
    for name, found, expected in zip(
        ("result", "dq", "dk", "dv", "dsinks"),
        attended(layout, devices, 2, True, cap=0.7, sinks=True),
        attended("dp", 1, 2, True, cap=0.7, sinks=True),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_attention_stays_within_a_document():
    """Each document alone gives what it gives beside another in one row."""
    random = np.random.default_rng(1)
    q, k, v = (random.normal(size=(1, T, 2, 8)).astype(np.float32) for _ in range(3))
    mesh, how = inside("dp", 1)
    with mesh, how:
        together = attention(q, k, v, np.repeat([[3, 1]], [5, T - 5], axis=1).astype(np.int32))
        alone = [attention(*(x[:, part] for x in (q, k, v))) for part in (slice(0, 5), slice(5, T))]
    np.testing.assert_allclose(together, np.concatenate(alone, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["cp", "ring"])
def test_memory_per_device_falls_as_one_over_context_at_32k_tokens(layout):
    c, T = Llama(vocab=64, layers=2, width=32, heads=2, kv_heads=1, head_dim=16, ff=64, positions=32_768), 32_768
    types = dict(tokens=jnp.int32, targets=jnp.int32, weights=jnp.float32)

    def held(devices: int) -> int:
        mesh, how = inside(layout, devices)
        with mesh, how:
            model = jax.eval_shape(c.init, jax.eval_shape(lambda: jax.random.key(0)))
            batch = {name: jax.ShapeDtypeStruct((1, 1, T), kind) for name, kind in types.items()}
            step = jax.jit(functools.partial(steps.gradients, loss=NextToken())).lower(model, batch).compile()
        return step.memory_analysis().temp_size_in_bytes

    whole = held(1)
    for devices in (2, 4, 8):
        assert held(devices) < 1.1 * whole / devices, devices
    if layout == "ring":  # of which the scores, by far the most, fall as the square
        assert held(8) < 2 * whole / 8**2
