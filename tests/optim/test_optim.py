"""Every optimizer learns, gives the same numbers on any mesh, and keeps its state where the parameters are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.evaluate.parity import stream
from llmjax.models import nn
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.optim.adafactor import Adafactor
from llmjax.optim.adamw import AdamW
from llmjax.optim.lion import Lion
from llmjax.optim.muon import Muon
from llmjax.optim.mup import MuP
from llmjax.optim.schedule_free import ScheduleFreeAdamW
from llmjax.optim.schedules import Constant, Cosine
from llmjax.optim.sgd import SGD
from llmjax.optim.weights import matrices, rows_and_columns
from llmjax.train import step as steps
from llmjax.train.loss import NextToken

LLAMA = Llama(vocab=96, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=16)
GPT = GPT2(vocab=96, layers=2, width=32, heads=4, head_dim=8, ff=64, positions=16)
WARM = Cosine(warmup=4)
OPTIMIZERS = {
    "adamw": AdamW(lr=2e-2, schedule=WARM),
    "adamw in bfloat16": AdamW(lr=2e-2, schedule=WARM, moments="bfloat16"),
    "lion": Lion(lr=3e-3, schedule=WARM),
    "lion in bfloat16": Lion(lr=3e-3, schedule=WARM, moments="bfloat16"),
    "adafactor": Adafactor(lr=1e-1, schedule=WARM, weight_decay=0.01),
    "muon": Muon(lr=2e-2, others_lr=2e-2, schedule=WARM),
    "muon in bfloat16": Muon(lr=2e-2, others_lr=2e-2, schedule=WARM, moments="bfloat16"),
    "muon of neurons": Muon(lr=2e-2, others_lr=2e-2, schedule=WARM, b2_neurons=0.9),
    "mup": MuP(base=16, lr=2e-2, schedule=WARM),
    "schedule-free": ScheduleFreeAdamW(lr=4e-2, schedule=Constant(warmup=4)),
    "sgd": SGD(lr=0.3, schedule=WARM, nesterov=True),
}
BATCH, SEQUENCE, STEPS = 8, 16, 20


def context(layout: str, devices: int):
    layout = layouts.preset(layout)
    axes = meshes.fill(meshes.Axes(), devices, used=layout.axes(), rest=layout.rest(), tensor=2)
    mesh = meshes.device_mesh(axes, jax.devices()[:devices])
    return mesh, layout, nn.compute(nn.Compute(layout=layout))


@functools.cache
def gradients(layout: str, devices: int):
    """The gradient as a compiled function, and the weights to start from; the part that all optimizers share."""
    mesh, _, compute = context(layout, devices)
    with jax.set_mesh(mesh), compute:
        return jax.jit(functools.partial(steps.gradients, loss=NextToken())), jax.jit(LLAMA.init)(jax.random.key(0))


@functools.cache
def losses(optimizer: str, layout: str, devices: int) -> np.ndarray:
    mesh, cut, compute = context(layout, devices)
    sharding, tx = NamedSharding(mesh, jax.P(None, cut.inner["B"])), OPTIMIZERS[optimizer].build(STEPS)
    gradient, model = gradients(layout, devices)
    point = jax.jit(getattr(OPTIMIZERS[optimizer], "point", lambda model, state: model))

    @jax.jit
    def step(model, state, grads):
        updates, state = tx.update(grads, state, model)
        return optax.apply_updates(model, updates), state

    with jax.set_mesh(mesh), compute:
        state, found = jax.jit(tx.init)(model), []
        for i in range(STEPS):
            rows = stream(np.random.default_rng(i), BATCH, SEQUENCE + 1, 96)[None]
            batch = dict(
                tokens=rows[..., :-1], targets=rows[..., 1:], weights=np.ones((1, BATCH, SEQUENCE), np.float32)
            )
            loss, _, grads = gradient(point(model, state), jax.device_put(batch, sharding))
            model, state = step(model, state, grads)
            found.append(float(loss))
    return np.array(found)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_lowers_the_loss_by_a_fifth_in_twenty_steps(optimizer):
    found = losses(optimizer, "dp", 1)
    assert found[-1] < 0.8 * found[0], f"losses {np.round(found, 3)}"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_eight_devices_under_fsdp_tp_give_the_losses_of_one(optimizer, capfd):
    close = 1e-4 if "bfloat16" in optimizer else 1e-5  # a sum in another order may be rounded to the other neighbour
    np.testing.assert_allclose(losses(optimizer, "fsdp_tp", 8), losses(optimizer, "dp", 1), rtol=close)
    said = capfd.readouterr().err
    assert "rematerialization" not in said, f"the partitioner copies an array to every device:\n{said}"


@functools.cache
def abstract_model(layout: str):
    mesh, _, compute = context(layout, 8)
    with jax.set_mesh(mesh), compute:
        return jax.eval_shape(GPT.init, jax.random.key(0))


@pytest.mark.parametrize("layout", ("dp", "fsdp", "tp", "fsdp_tp", "fsdp_tp_sp"))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_and_steps_are_placed_as_the_parameters(optimizer, layout):
    mesh, _, compute = context(layout, 8)
    tx, model = OPTIMIZERS[optimizer].build(STEPS), abstract_model(layout)
    with jax.set_mesh(mesh), compute:
        state = jax.eval_shape(tx.init, model)
        updates, after = jax.eval_shape(tx.update, model, state, model)
    assert typed(updates) == typed(model)
    assert typed(after) == typed(state)  # so the buffers of a donated state are used again
    own, kept = dict(typed(model)), [(name, dims) for name, dims in typed(state) if dims]  # the rest counts steps
    assert {name for name, _ in kept} == set(own)
    for name, dims in kept:
        averaged = [(1, None)] if optimizer in ("adafactor", "muon of neurons") else []
        assert all(dim in [whole, *averaged] for dim, whole in zip(dims, own[name], strict=True)), name


def typed(tree) -> list:
    """(name, [(size, mesh axis) of each dim]) of every array."""
    specs = [
        (path, x.shape, x.sharding.spec if x.ndim else ()) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return [(jax.tree_util.keystr(path[-2:]), list(zip(shape, spec, strict=True))) for path, shape, spec in specs]


DECAYING = [cls(weight_decay=0.5) for cls in (AdamW, Lion, Adafactor, Muon)]


@pytest.mark.parametrize("optimizer", [*DECAYING, ScheduleFreeAdamW(weight_decay=0.5, schedule=Constant())])
def test_decay_takes_its_share_of_matrices_and_leaves_scales_and_biases_alone(optimizer):
    tx = optimizer.build(1)
    mesh, _, compute = context("dp", 1)
    with jax.set_mesh(mesh), compute:
        model = jax.eval_shape(lambda: (GPT.init(jax.random.key(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
        ones = jax.tree.map(lambda x: jnp.ones(x.shape), model)
        zeros = jax.tree.map(jnp.zeros_like, ones)
        updates, _ = jax.jit(tx.update)(zeros, jax.jit(tx.init)(ones), ones)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            update, 0 if "scale" in name or "bias" in name else -0.5 * optimizer.lr, rtol=1e-4, err_msg=name
        )


@pytest.mark.parametrize(
    ("name", "shape", "rows", "columns"),
    [
        ("embed_VD", (9, 4), (9,), (4,)),
        ("query_DHK", (2, 4, 3, 5), (4,), (3, 5)),
        ("out_HKD", (2, 3, 5, 4), (3, 5), (4,)),
        ("down_FD", (2, 6, 4), (6,), (4,)),
        ("up_EDF", (2, 7, 4, 6), (4,), (6,)),
        ("router_DE", (2, 4, 7), (4,), (7,)),
        ("query_bias_HK", (2, 3, 5), (), (3, 5)),
        ("attention_scale_D", (2, 4), (), (4,)),
        ("query_scale_K", (2, 5), (), (5,)),
        ("gain_D", (2, 4), (), (4,)),
        ("kernel", (8, 9), (8,), (9,)),
        ("kernel", (2, 8, 9), (8,), (9,)),
        ("bias", (9,), (), (9,)),
        ("scale", (2, 9), (), (9,)),
        ("w", (), (), ()),
    ],
)
def test_the_letters_of_a_name_say_rows_and_columns(name, shape, rows, columns):
    x = np.zeros(shape)
    [(path, _)] = jax.tree_util.tree_leaves_with_path({"blocks": {name: x}})
    found = tuple(tuple(shape[d] for d in side) for side in rows_and_columns(path, x))
    assert found == (rows, columns)
    assert matrices({name: x}) == {name: bool(rows)}


def walk(tx, params, grads):
    """The parameters, and the state, after a step for each of the gradients."""

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


def test_adafactor_on_a_stack_is_optax_adafactor_on_each_layers_matrices():
    random = np.random.default_rng(0)
    shapes = {"embed_VD": (9, 4), "query_DHK": (2, 4, 3, 5), "out_HKD": (2, 3, 5, 4), "mlp_scale_D": (2, 4)}
    flat = {"embed_VD": (1, 9, 4), "query_DHK": (2, 4, 15), "out_HKD": (2, 15, 4), "mlp_scale_D": (2, 4)}

    def draw():
        return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def layers(tree):
        return {name: list(np.reshape(x, flat[name])) for name, x in tree.items()}

    params, grads = draw(), [draw() for _ in range(4)]
    ours, state = walk(Adafactor(lr=0.1, schedule=Constant()).build(4), params, grads)
    theirs, _ = walk(optax.adafactor(0.1, min_dim_size_to_factor=1), layers(params), [layers(g) for g in grads])
    for name, stack in layers(ours).items():
        for layer, (x, expected) in enumerate(zip(stack, theirs[name], strict=True)):
            np.testing.assert_allclose(x, expected, rtol=1e-5, err_msg=f"layer {layer} of {name}")
    rows, columns = state[0].rows["query_DHK"], state[0].columns["query_DHK"]
    assert rows.size + columns.size == 2 * (4 + 15)


def test_adamw_lion_and_sgd_take_the_steps_of_their_formulas():
    random = np.random.default_rng(0)
    w, grads = random.normal(size=(3, 2)), random.normal(size=(3, 3, 2))

    def adamw(w, m=0, v=0):
        for t, g in enumerate(grads, 1):
            m, v = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g * g
            w = w - 0.1 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.7**t)) + 1e-3) + 0.5 * w)
        return w

    def lion(w, m=0):
        for g in grads:
            w, m = w - 0.1 * (np.sign(0.8 * m + 0.2 * g) + 0.5 * w), 0.7 * m + 0.3 * g
        return w

    def sgd(w, nesterov, m=0):
        for g in grads:
            m = g + 0.8 * m
            w = w - 0.1 * (g + 0.8 * m if nesterov else m)
        return w

    given = dict(lr=0.1, schedule=Constant())
    decayed = dict(b1=0.8, b2=0.7, weight_decay=0.5)
    for optimizer, expected in (
        (AdamW(**given, **decayed, epsilon=1e-3), adamw(w)),
        (Lion(**given, **decayed), lion(w)),
        (SGD(**given, momentum=0.8), sgd(w, False)),
        (SGD(**given, momentum=0.8, nesterov=True), sgd(w, True)),
    ):
        found, _ = walk(optimizer.build(3), {"kernel": np.float32(w)}, [{"kernel": np.float32(g)} for g in grads])
        np.testing.assert_allclose(found["kernel"], expected, rtol=1e-5, err_msg=str(optimizer))
    assert not [x for x in jax.tree.leaves(SGD(momentum=0).build(3).init(np.zeros((3, 2)))) if x.ndim]
