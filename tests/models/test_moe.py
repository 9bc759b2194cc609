"""Experts compute what a loop over tokens would, wherever they are; routers choose and count as their papers say."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.mesh import Axes
from llmjax.models import moe, nn, routers

B, T, D, F, E, J = 8, 16, 8, 12, 4, 2
ONE = ("dp", Axes(1, 1, 1, 1, 1, 1))


def place_on(layout: str, axes: Axes):
    layout = layouts.preset(layout)
    mesh = meshes.device_mesh(axes, jax.devices()[: math.prod(axes.sizes())])
    return layout, jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layout))


def numbers():
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    share_BTJ = random.random((B, T, J)).astype(np.float32)
    return draw(B, T, D), share_BTJ, draw(E, D, F) / 3, draw(E, D, F) / 3, draw(E, F, D) / 3


def chosen(crowded: bool) -> np.ndarray:
    """Random experts, or the first two for every token."""
    if crowded:
        return np.tile(np.arange(J, dtype=np.int32), (B, T, 1))
    return np.argsort(np.random.default_rng(1).random((B, T, E)), -1)[..., :J].astype(np.int32)


def keep(chosen_BTJ: np.ndarray, slots: int) -> np.ndarray:
    """Which choices find a slot, token after token."""
    kept = np.zeros(chosen_BTJ.shape, bool)
    for b in range(B):
        taken = [0] * E
        for t in range(T):
            for j in range(J):
                kept[b, t, j] = taken[chosen_BTJ[b, t, j]] < slots
                taken[chosen_BTJ[b, t, j]] += 1
    return kept


def by_loop(x, share, gate, up, down, chosen_BTJ, kept) -> np.ndarray:
    y = np.zeros(x.shape)
    for b, t, j in np.ndindex(*chosen_BTJ.shape):
        if kept[b, t, j]:
            e = chosen_BTJ[b, t, j]
            a, u = x[b, t].astype(np.float64) @ gate[e], x[b, t].astype(np.float64) @ up[e]
            y[b, t] += share[b, t, j] * (a / (1 + np.exp(-a)) * u) @ down[e]
    return y


def by_masks(chosen_BTJ, kept, x, share, gate, up, down):
    """Every expert computes every token; what was not chosen is multiplied by 0."""
    h = jax.nn.silu(jnp.einsum("BTD,EDF->BTEF", x, gate)) * jnp.einsum("BTD,EDF->BTEF", x, up)
    weight_BTE = jnp.sum(jax.nn.one_hot(chosen_BTJ, E) * (share * kept)[..., None], 2)
    return jnp.einsum("BTEF,EFD,BTE->BTD", h, down, weight_BTE)


def loss(call, *values):
    y_BTD = call(*values)
    return jnp.sum(jnp.sin(y_BTD)), y_BTD


@functools.cache
def expected(crowded: bool, slots: int | None):
    chosen_BTJ = chosen(crowded)
    kept = keep(chosen_BTJ, slots or T)
    with jax.set_mesh(meshes.device_mesh(ONE[1], jax.devices()[:1])):
        call = functools.partial(loss, functools.partial(by_masks, chosen_BTJ, kept))
        slopes, _ = jax.jit(jax.grad(call, range(5), has_aux=True))(*numbers())
    return by_loop(*numbers(), chosen_BTJ, kept), jax.tree.map(np.asarray, slopes)


@pytest.mark.parametrize("slots", [None, 5], ids=["dropless", "capacity"])
@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "crowded"])
@pytest.mark.parametrize(
    ("layout", "axes"),
    [ONE, ("fsdp_tp", Axes(1, 1, 4, 1, 1, 2)), ("ep_tp", Axes(1, 1, 1, 4, 1, 2)),
     ("fsdp_ep_cp", Axes(1, 1, 2, 2, 2, 1)), ("pp_fsdp_ep", Axes(1, 2, 2, 2, 1, 1))],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_experts_and_their_gradients_equal_a_loop_and_a_mask(layout, axes, crowded, slots, capfd):
    """Crowded experts take two rounds; inside a region manual over `stage` the backward pass is another."""
    chosen_BTJ, kept = chosen(crowded), keep(chosen(crowded), slots or T)
    layout, mesh, compute = place_on(layout, axes)
    token = layout.gathered("BT")
    weights = [layout.at_rest(dims) for dims in ("EDF", "EDF", "EFD")]

    def ours(chosen_BTJ, kept, x_BTD, share_BTJ, *weights):
        choice = routers.Choice(jnp.zeros((B, T, E)), share_BTJ, chosen_BTJ)
        kept = kept if slots else None
        return moe.experts(x_BTD, choice, kept, slots or T, tuple(map(nnx.Param, weights)))

    def slopes(chosen_BTJ, kept, *values):
        call = functools.partial(loss, functools.partial(ours, chosen_BTJ, kept))
        return jax.grad(call, range(5), has_aux=True)(*values)

    with mesh, compute:
        arrays = jax.device_put((chosen_BTJ, kept, *numbers()), (token,) * 4 + tuple(weights))
        if axes.stage > 1:
            inside = slopes
            slopes = jax.shard_map(
                lambda *a: jax.tree.map(lambda x: x[None], inside(*jax.lax.pcast(a, "stage", to="varying"))),
                in_specs=jax.P(), out_specs=jax.P("stage"), axis_names={"stage"},
            )  # fmt: skip
        found = jax.jit(slopes)(*arrays)
    found, y_BTD = jax.tree.map(lambda x: np.asarray(x)[-1] if axes.stage > 1 else np.asarray(x), found)
    expected_y, expected_slopes = expected(crowded, slots)
    np.testing.assert_allclose(y_BTD, expected_y, rtol=0, atol=1e-5 * np.abs(expected_y).max())
    for name, a, b in zip(("x", "share", "gate", "up", "down"), found, expected_slopes, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=f"gradient of {name}")
    said = capfd.readouterr().err
    assert "rematerialization" not in said, f"the partitioner copies an array to every device:\n{said}"


@pytest.mark.parametrize("slots", [None, 5], ids=["dropless", "capacity"])
def test_tokens_travel_by_all_to_all_and_no_device_gathers_experts(slots):
    layout, mesh, compute = place_on("ep", Axes(1, 1, 1, 8, 1, 1))
    x, share, *weights = (np.concatenate([a, a]) if len(a) == E else a for a in numbers())

    def call(x_BTD, share_BTJ, *weights):
        choice = routers.Choice(jnp.zeros((B, T, 2 * E)), share_BTJ, jnp.asarray(chosen(False)))
        kept = jnp.ones((B, T, J), bool) if slots else None
        choice, kept = jax.tree.map(lambda x: jax.reshard(x, layout.gathered("BT")), (choice, kept))
        return jnp.sum(moe.experts(x_BTD, choice, kept, slots or T, tuple(map(nnx.Param, weights))))

    with mesh, compute:
        arrays = jax.device_put((x, share, *weights), (layout.gathered("BT"),) * 2 + (layout.at_rest("EDF"),) * 3)
        text = jax.jit(jax.grad(call, (0, 2, 3, 4))).lower(*arrays).as_text()
    assert "all_to_all" in text and "all_gather" not in text


def test_the_softmax_router_weighs_the_largest_logits_by_a_softmax_over_them():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    score, share, picked = jax.jit(lambda x: routers.softmax(x, 2))(logits)
    for at in np.ndindex(2, 3):
        order = np.argsort(-logits[at])[:2]
        powers = np.exp(logits[at].astype(np.float64))
        np.testing.assert_array_equal(picked[at], order)
        np.testing.assert_allclose(share[at], powers[order] / powers[order].sum(), rtol=1e-6)
        np.testing.assert_allclose(score[at], powers / powers.sum(), rtol=1e-6)


def test_the_sigmoid_router_s_bias_chooses_and_does_not_weigh():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    bias = np.float32([0, 0.9, 0, -0.9, 0])
    _, mesh, compute = place_on(*ONE)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def slopes(logits, bias):
        choice = routers.sigmoid(logits, nnx.Param(bias), 2)
        return jnp.sum(choice.share_BTJ**2), choice

    with mesh, compute:
        (into_logits, into_bias), (score, share, picked) = slopes(logits, bias)
    assert np.all(np.asarray(into_bias) == 0) and np.any(np.asarray(into_logits) != 0)
    assert not np.array_equal(picked, np.argsort(-logits, -1)[..., :2]), "the bias changes nothing"
    for at in np.ndindex(2, 3):
        plain = 1 / (1 + np.exp(-logits[at].astype(np.float64)))
        order = np.argsort(-(plain + bias))[:2]
        np.testing.assert_array_equal(picked[at], order)
        np.testing.assert_allclose(share[at], plain[order] / plain[order].sum(), rtol=1e-6)
        np.testing.assert_allclose(score[at], plain / plain.sum(), rtol=1e-6)


def test_router_logits_are_exact_where_activations_are_not():
    x, router = (
        np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in enumerate(((1, 4, 64), (64, 4)))
    )
    _, mesh, _ = place_on(*ONE)
    with mesh, nn.compute(nn.Compute(operands="bfloat16", activations="bfloat16")):
        found = jax.jit(lambda x, w: routers.logits(x, nnx.Param(w)))(jnp.bfloat16(x), router)
    np.testing.assert_allclose(found, np.asarray(jnp.bfloat16(x), np.float64) @ router, rtol=1e-5, atol=1e-5)


def test_the_balance_loss_is_its_formula_and_1_per_token_when_even():
    random = np.random.default_rng(0)
    score = random.dirichlet(np.ones(E), (B, T)).astype(np.float32)
    load = np.asarray(routers.hits(jnp.asarray(chosen(False)), E), np.float32)
    formula = 0.0
    for b in range(B):
        f = [sum(load[b, t, e] for t in range(T)) / T for e in range(E)]
        p = [sum(float(score[b, t, e]) for t in range(T)) / T for e in range(E)]
        formula += T * E / J * sum(fe * pe for fe, pe in zip(f, p, strict=True))
    np.testing.assert_allclose(routers.balance(jnp.asarray(score), jnp.asarray(load)), formula, rtol=1e-5)

    in_turn = np.zeros((1, T, E), np.float32)
    for t in range(T):
        in_turn[0, t, [t % E, (t + 1) % E]] = 1
    np.testing.assert_allclose(routers.balance(jnp.asarray(score[:1]), jnp.asarray(in_turn)), T, rtol=1e-5)
    favoured = np.asarray(routers.hits(jnp.argsort(-jnp.asarray(score))[..., :1], E), np.float32)
    assert routers.balance(jnp.asarray(score), jnp.asarray(favoured)) > 1.01 * B * T


@pytest.mark.parametrize(("layout", "axes"), [ONE, ("ep_cp", Axes(1, 1, 1, 2, 4, 1)), ("ring", Axes(2, 1, 1, 1, 4, 1))])
@pytest.mark.parametrize("crowded", [False, True])
def test_an_expert_drops_exactly_the_later_positions_of_a_sequence(layout, axes, crowded):
    layout, mesh, compute = place_on(layout, axes)
    with mesh, compute:
        order = nn.order(T)
        held = jax.device_put(chosen(crowded)[:, order], layout.gathered("BT"))

        @jax.jit
        def counted(held_BTJ):
            keep_BTJ = routers.within(held_BTJ, E, 5)
            logits_BTE = jax.reshard(jnp.zeros((B, T, E)), layout.gathered("BT"))
            return keep_BTJ, routers.sums(logits_BTE, routers.Choice(logits_BTE, None, held_BTJ), keep_BTJ)

        kept, sums = counted(held)
    assert (list(order) != list(range(T))) == (layout.name == "ring")
    expected = keep(chosen(crowded), 5)
    np.testing.assert_array_equal(np.asarray(kept)[:, np.argsort(order)], expected)
    assert float(sums["dropped"]) == (~expected).sum() > 0
    np.testing.assert_array_equal(sums["load_E"], np.bincount(chosen(crowded).reshape(-1), minlength=E))


def test_slots_are_the_mean_load_times_the_capacity_rounded_up():
    assert routers.slots(1.0, 16, 2, 4) == 8
    assert routers.slots(1.1, 16, 2, 4) == 9
    assert routers.slots(100.0, 16, 2, 4) == 16  # a token goes to an expert once


def test_a_bias_rises_where_an_expert_got_less_than_the_mean():
    bias_LE, load_LE = np.float32([[0, 0, 1], [0, 0, 0]]), np.float32([[3, 6, 9], [1, 1, 4]])
    _, mesh, compute = place_on(*ONE)
    with mesh, compute:
        moved = routers.rebalanced(jnp.asarray(bias_LE), jnp.asarray(load_LE), 0.5)
    np.testing.assert_array_equal(moved, [[0.5, 0, 0.5], [0.5, 0.5, -0.5]])
