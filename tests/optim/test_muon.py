"""Muon's steps are orthogonal, matrix by matrix, and devices share the work without repeating any of it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.errors import Refused
from llmjax.mesh import Axes
from llmjax.models import nn
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.models.mixtral import Mixtral
from llmjax.optim.adamw import AdamW
from llmjax.optim.muon import Muon, scale_by_neurons
from llmjax.optim.orthogonal import nearest_to_one, newton_schulz, orthogonal
from llmjax.optim.schedules import Constant
from llmjax.optim.weights import hidden
from llmjax.plan import hlo
from llmjax.plan.collectives import collectives, departures, report

V, L, D, H, G, K, F, E = 48, 4, 40, 8, 4, 16, 72, 8
SHAPES = dict(vocab=V, layers=L, width=D, heads=H, kv_heads=G, head_dim=K, ff=F, positions=32)
DENSE, SPARSE = Llama(**SHAPES), Mixtral(**SHAPES, experts=E, top_k=2)
PLAIN = dict(schedule=Constant(), weight_decay=0.0)


def exactly(x: np.ndarray) -> np.ndarray:
    """U V^T of one matrix U S V^T."""
    u, _, v = np.linalg.svd(x, full_matrices=False)
    return u @ v


def walk(tx, params, grads):
    """The parameters after a step for each of the gradients."""
    state = jax.jit(tx.init)(params)
    for grad in grads:
        updates, state = jax.jit(tx.update)(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("shape", ((32, 32), (24, 96), (64, 500)))
def test_four_iterations_bring_singular_values_near_one_and_leave_singular_vectors(shape, dtype):
    random = np.random.default_rng(0)
    u, v = np.linalg.qr(random.normal(size=(shape[0],) * 2))[0], np.linalg.qr(random.normal(size=shape[::-1]))[0]
    s = np.geomspace(1, 1 / 50, shape[0])
    found = np.float64(jax.jit(newton_schulz, static_argnums=1)(jnp.asarray(u * s @ v.T, dtype), 4))
    values = np.diag(u.T @ found @ v)
    assert values.min() > 0.6 and values.max() < 1.3, values
    rest = u.T @ found @ v - np.diag(values)
    assert np.abs(rest).max() < (1e-4 if dtype == jnp.float32 else 0.1)


@pytest.mark.parametrize("iterations", (1, 2, 3, 4, 5, 8))
def test_an_iteration_more_reaches_singular_values_a_quarter_as_large(iterations):
    """The largest is alone and 1, so that their fourth powers add up to 1."""
    s = np.concatenate([[1.0], np.geomspace(0.64 / 4**iterations, 0.2, 31)])
    found = np.diag(jax.jit(newton_schulz, static_argnums=1)(jnp.asarray(np.diag(s), jnp.float32), iterations))
    assert found.min() > 0.67 and found.max() < 1.33, found


def test_a_matrix_of_zeros_stays_one():
    assert not np.asarray(newton_schulz(jnp.zeros((8, 16)), 5)).any()


@pytest.mark.parametrize(("low", "high"), [(0.01, 1.0), (0.3, 1.7), (0.7, 1.3)])
def test_no_quintic_near_it_is_nearer_to_one(low, high):
    abc, error = nearest_to_one(low, high)
    s = np.linspace(low, high, 10_001)[:, None] ** [1, 3, 5]
    assert np.abs(s @ abc - 1).max() == pytest.approx(error, rel=1e-6)
    for change in np.random.default_rng(0).normal(size=(200, 3)) * 1e-3:
        assert np.abs(s @ (abc + change) - 1).max() > error


def test_it_goes_the_way_of_the_exact_factor_and_as_far_as_its_scale_says():
    random = np.random.default_rng(0)
    x = np.float32(random.normal(size=(32, 96)))
    for scale, size in (("rms", 0.2 * math.sqrt(96)), ("spectral", math.sqrt(3))):
        moved = -walk(Muon(lr=1.0, scale=scale, **PLAIN).build(1), {"kernel": 0 * x}, [{"kernel": x}])["kernel"]
        cosine = np.sum(moved * exactly(x)) / np.linalg.norm(moved) / np.linalg.norm(exactly(x))
        assert cosine > 0.97
        assert np.linalg.norm(moved) == pytest.approx(size * np.sqrt(32), rel=0.2)


def test_the_momentum_is_what_is_orthogonalised():
    random = np.random.default_rng(0)
    g = np.float32(random.normal(size=(2, 16, 24)))
    for nesterov, expected in ((True, g[1] + 0.9 * (g[1] + 0.9 * g[0])), (False, g[1] + 0.9 * g[0])):
        tx = Muon(lr=1.0, momentum=0.9, nesterov=nesterov, **PLAIN).build(2)
        state = tx.init({"kernel": g[0]})
        _, state = tx.update({"kernel": g[0]}, state, {"kernel": g[0]})
        step, _ = tx.update({"kernel": g[1]}, state, {"kernel": g[0]})
        [alone] = orthogonal([jnp.asarray(expected)], [(1, 1)], 4, "auto")
        np.testing.assert_allclose(step["kernel"], -0.2 * math.sqrt(24) * alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("b2_neurons", (0.0, 0.9))
def test_a_stack_moves_as_its_layers_one_by_one_with_heads_as_one_side(b2_neurons):
    random = np.random.default_rng(0)
    shapes = {"query_DHK": (3, 8, 2, 6), "out_HKD": (3, 2, 6, 8), "up_EDF": (3, 4, 8, 10), "down_EFD": (3, 4, 10, 8)}
    flat = {"query_DHK": (8, 12), "out_HKD": (12, 8), "up_EDF": (8, 10), "down_EFD": (10, 8)}
    tx = Muon(lr=0.1, schedule=Constant(), weight_decay=0.5, b2_neurons=b2_neurons).build(2)

    def draw():
        return {name: np.float32(random.normal(size=shape)) for name, shape in shapes.items()}

    def layers(tree):
        return {f"{n}{i}": {"kernel": x} for n, s in tree.items() for i, x in enumerate(np.reshape(s, (-1, *flat[n])))}

    params, grads = draw(), [draw() for _ in range(2)]
    together, alone = walk(tx, params, grads), walk(tx, layers(params), [layers(g) for g in grads])
    for name, x in layers(together).items():
        np.testing.assert_allclose(x["kernel"], alone[name]["kernel"], rtol=1e-4, atol=1e-5, err_msg=name)


def test_neurons_are_columns_and_move_by_their_step_over_the_root_of_its_average_square_as_far_together_as_before():
    random, decay = np.random.default_rng(0), 0.9
    shapes = {"query_DHK": (3, 8, 2, 6), "out_HKD": (3, 2, 6, 8)}
    rows = {"query_DHK": (1,), "out_HKD": (1, 2)}
    steps = [{name: np.float32(random.normal(size=shape)) for name, shape in shapes.items()} for _ in range(3)]
    tx = scale_by_neurons(decay)
    state = tx.init(steps[0])
    for step in steps:
        found, state = tx.update(step, state)
    for name, x in steps[-1].items():
        squares = [np.mean(step[name] ** 2, rows[name], keepdims=True) for step in steps]
        average = sum((1 - decay) * decay**i * square for i, square in enumerate(reversed(squares)))
        expected = x / np.sqrt(average)
        lengths = [np.linalg.norm(y.reshape(3, -1), axis=1).reshape(3, 1, 1, 1) for y in (x, expected)]
        np.testing.assert_allclose(found[name], expected * lengths[0] / lengths[1], rtol=1e-4)
        np.testing.assert_allclose(state.squares[name], average, rtol=1e-4)
    first, _ = tx.update(steps[0], tx.init(steps[0]))
    for name, x in first.items():
        far = np.linalg.norm(np.reshape(x, (3, 12, 8) if name == "out_HKD" else (3, 8, 12)), axis=1)
        np.testing.assert_allclose(far, np.broadcast_to(far[:, :1], far.shape), rtol=1e-3)


def test_a_neuron_that_never_moved_stays_and_keeps_the_others_finite():
    tx, drawn = scale_by_neurons(0.9), np.random.default_rng(0).normal(size=(8, 6))
    for moves in ([0, 1, 1, 0, 1, 1], [0] * 6):
        step = {"kernel": np.float32(drawn * moves)}
        found = tx.update(step, tx.init(step))[0]["kernel"]
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(np.any(found, 0), moves)


def test_without_neurons_there_is_no_state_of_them():
    params = {"kernel": jnp.ones((32, 64))}
    for b2_neurons, numbers in ((0.0, 32 * 64), (0.95, 32 * 64 + 64)):
        state = Muon(b2_neurons=b2_neurons).build(9).init(params)
        assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == numbers


@pytest.mark.parametrize("model", (DENSE, SPARSE, GPT2(**{k: v for k, v in SHAPES.items() if k != "kv_heads"})))
def test_embeddings_head_scales_and_biases_are_adamws(model):
    with jax.set_mesh(meshes.device_mesh(axes(), jax.devices()[:1])):
        abstract = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    ones = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), abstract)
    muon = Muon(lr=1e-2, others_lr=3e-3, schedule=Constant(), b1=0.8, b2=0.7, epsilon=1e-3)
    ours = walk(muon.build(1), ones, [ones])
    theirs = walk(AdamW(3e-3, Constant(), 0.8, 0.7, 1e-3).build(1), ones, [ones])
    mine = jax.tree.leaves(hidden(ones))
    for (path, x), other, inner in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), mine, strict=True
    ):
        name = jax.tree_util.keystr(path)
        ends = any(word in name for word in ("embed", "head", "position", "scale", "bias"))
        assert inner == (not ends), name
        assert np.allclose(x, other, rtol=1e-5, atol=1e-6) == ends, name


def axes(**sizes: int) -> Axes:
    return Axes(**dict.fromkeys(meshes.AXES, 1) | sizes)


def placed(layout: str, on: Axes, model, b2_neurons: float = 0.0):
    """Muon's update on this mesh, compiled; with the model that it takes and the mesh."""
    mesh = meshes.device_mesh(on, jax.devices()[: math.prod(on.sizes())])
    tx = Muon(lr=1e-2, b2_neurons=b2_neurons, **PLAIN).build(1)
    with jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layouts.preset(layout))):
        abstract = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
        state = jax.eval_shape(tx.init, abstract)
        return mesh, abstract, jax.jit(tx.init), jax.jit(tx.update).lower(abstract, state, abstract).compile()


@functools.cache
def moved(layout: str, on: Axes, model, b2_neurons: float = 0.0) -> tuple:
    """(the collectives of an update on this mesh, what it does with given gradients, one after other ones)"""
    mesh, abstract, init, update = placed(layout, on, model, b2_neurons)
    random = np.random.default_rng(0)

    def draw(x):
        return jax.device_put(np.float32(random.normal(size=x.shape)), jax.NamedSharding(mesh, x.sharding.spec))

    before, grads = (jax.tree.map(draw, abstract) for _ in range(2))
    with jax.set_mesh(mesh):
        _, state = update(before, init(before), before)
        updates, _ = update(grads, state, grads)
    return collectives(update, mesh), [np.asarray(x) for x in jax.tree.leaves(updates)]


# Numbers of the matrices of one shape, in all layers, with the layers filled up so that eight devices have as many.
ATTENTION = {(D, H * K): 2 * L, (D, G * K): 2 * L}  # query and out; key and value
MLP = {(D, F): 3 * L}
ROUTERS = {(E, D): L}
AA = "all-to-all"


def share(kinds: dict, ways: int) -> int:
    """Numbers that one of so many devices has of these matrices: whole ones of as many on each."""
    return sum(-(-count // ways) * rows * columns for (rows, columns), count in kinds.items())


CASES = {
    # All layers are on every device: no product is cut.
    "dp": (axes(data=8), DENSE, {}),
    # There and back.
    "fsdp": (axes(fsdp=8), DENSE, {(AA, ("fsdp",)): 2 * share(ATTENTION | MLP, 8)}),
    "fsdp in data": (axes(data=2, fsdp=4), DENSE, {(AA, ("fsdp",)): 2 * share(ATTENTION | MLP, 4)}),
    "tp": (axes(data=4, tensor=2), DENSE, {(AA, ("tensor",)): 2 * share(ATTENTION | MLP, 2)}),
    # One axis after the other.
    "fsdp_tp": (
        axes(fsdp=4, tensor=2),
        DENSE,
        {(AA, (axis,)): 2 * share(ATTENTION | MLP, 8) for axis in ("fsdp", "tensor")},
    ),
    # Stages keep their layers, and devices their experts.
    "pp": (axes(stage=2, data=4), DENSE, {}),
    "fsdp_pp": (
        axes(stage=2, fsdp=4),
        DENSE,
        {(AA, ("fsdp",)): 2 * share({kind: count // 2 for kind, count in (ATTENTION | MLP).items()}, 4)},
    ),
    "fsdp_ep": (
        axes(fsdp=4, expert=2),
        SPARSE,
        # Routers are cut over both.
        {
            (AA, ("fsdp",)): 2 * (share(ATTENTION | {(D, F): 3 * L * E // 2}, 4) + share(ROUTERS, 8)),
            (AA, ("expert",)): 2 * share(ROUTERS, 8),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_devices_exchange_their_shares_twice_and_get_the_numbers_of_one(case):
    on, model, numbers = CASES[case]
    found, updates = moved(case.split()[0], on, model)
    assert not departures(found, {key: 4 * count for key, count in numbers.items()}), report(found)
    _, alone = moved("dp", axes(), model)
    for x, expected in zip(updates, alone, strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_with_neurons_too_devices_get_the_numbers_of_one_and_add_up_no_more_than_a_number_of_each(case):
    on, model, numbers = CASES[case]
    found, updates = moved(case.split()[0], on, model, 0.9)
    exchanged = [x for x in found if x.kind == AA]
    assert not departures(exchanged, {key: 4 * count for key, count in numbers.items()}), report(found)
    neurons = L * max(D, F, H * K) * (E if model is SPARSE else 1)
    assert all(array.bytes <= 4 * neurons for x in found if x.kind != AA for array in x.arrays), report(found)
    _, alone = moved("dp", axes(), model, 0.9)
    for x, expected in zip(updates, alone, strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-6)


def test_no_device_multiplies_what_another_does():
    """In as many results of products as one device writes, of Gram matrices, their squares and steps."""

    def numbers(layout, on):
        module = hlo.parse(placed(layout, on, DENSE)[3].as_text())
        products = [ran for ran in hlo.walk(module) if ran.instruction.opcode == "dot"]
        return sum(ran.count * math.prod(ran.instruction.arrays()[0].shape) for ran in products)

    iterations, kinds = 4, ATTENTION | MLP
    for layout, on, ways in (("dp", axes(), 1), ("fsdp_tp", axes(fsdp=4, tensor=2), 8)):
        squares = sum(share({(rows, rows): count}, ways) for (rows, _), count in kinds.items())
        assert numbers(layout, on) == iterations * (2 * squares + share(kinds, ways))


REFUSED = [("iterations", 0), ("momentum", 1.0), ("b2_neurons", 1.0), ("others_lr", -1.0), ("lr", -1.0)]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_numbers_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(Refused, match=f"optimizer.{field} is {value}"):
        Muon(**{field: value}).build(10)
