"""A loss in pieces is the loss of the whole, with its gradients, and holds the logits of one piece."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import like, named
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.layout import Pipeline
from llmjax.mesh import Axes
from llmjax.models import nn
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.models.mixtral import Mixtral
from llmjax.optim.sgd import SGD
from llmjax.plan.collectives import collectives
from llmjax.run import DiLoCo, Run
from llmjax.train import pieces, program
from llmjax.train import step as steps
from llmjax.train.loss import NextToken
from llmjax.train.routed import RoutedNextToken
from meshes import chips, cpu8

SHAPE = dict(vocab=64, layers=2, width=32, heads=4, head_dim=8, ff=64, positions=16)
FAMILIES = {
    "gpt2": GPT2(**SHAPE),
    "llama": Llama(kv_heads=2, **SHAPE),
    "llama tied": Llama(kv_heads=2, tied=True, **SHAPE),
    "mixtral": Mixtral(kv_heads=2, experts=4, capacity=2.0, **SHAPE),
}
LOSS = NextToken(z=1e-3)
ONE = dict.fromkeys(meshes.AXES, 1)


def mesh_of(**sizes: int):
    axes = Axes(**ONE | sizes)
    return meshes.device_mesh(axes, jax.devices()[: int(np.prod(axes.sizes()))])


def batch(length: int = 16) -> dict[str, np.ndarray]:
    """Two microbatches of 8 rows, with an uneven mask and several documents a row."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 64, (2, 8, length + 1)).astype(np.int32)
    weights = (random.random((2, 8, length)) < 0.6).astype(np.float32)
    documents = np.sort(random.integers(0, 3, (2, 8, length)), -1).astype(np.int32)
    return {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "weights": weights, "segments": documents}


@functools.cache
def weights(family: str):
    with jax.set_mesh(mesh_of()), nn.compute(nn.Compute()):
        return jax.tree.map(np.asarray, jax.jit(FAMILIES[family].init)(jax.random.key(0)))


def loss_of(family: str):
    return RoutedNextToken(z=LOSS.z) if family == "mixtral" else LOSS


def both(family: str, mesh, how: nn.Compute):
    """(loss and gradients of a step, evaluation) as NumPy; the gradients lie where the weights do."""
    loss = loss_of(family)
    with jax.set_mesh(mesh), nn.compute(how):
        model = like(jax.eval_shape(FAMILIES[family].init, jax.random.key(0)), mesh)
        model = jax.device_put(weights(family), jax.tree.map(lambda x: x.sharding, model))
        parts = jax.device_put(batch(), NamedSharding(mesh, jax.P(None, how.layout.inner["B"])))

        @jax.jit
        def call(model, parts):
            return steps.gradients(model, parts, loss), steps.eval_step(model, parts, loss=loss)

        (total, _, grads), evaluated = call(model, parts)
        assert jax.tree.all(jax.tree.map(lambda g, w: g.sharding.spec == w.sharding.spec, grads, model))
    return (
        float(total),
        {name: np.asarray(x) for name, x in named(grads).items()},
        np.array([evaluated[0], evaluated[1]["weight"]]),
    )


@functools.cache
def whole(family: str):
    return both(family, mesh_of(), nn.Compute())


@pytest.mark.parametrize(
    ("family", "layout", "sizes", "schedule"),
    [
        ("gpt2", "dp", {}, "gpipe"),
        ("llama", "dp", dict(data=8), "gpipe"),
        ("llama tied", "fsdp_tp", dict(data=2, fsdp=2, tensor=2), "gpipe"),
        ("gpt2", "fsdp_tp_sp", dict(fsdp=4, tensor=2), "gpipe"),
        ("llama", "fsdp_ring", dict(fsdp=4, context=2), "gpipe"),
        ("llama tied", "tp_sp_cp", dict(data=2, tensor=2, context=2), "gpipe"),
        ("mixtral", "fsdp_ep", dict(fsdp=4, expert=2), "gpipe"),
        ("gpt2", "cp_pp_vp", dict(stage=2, data=2, context=2), "circular"),
        ("llama tied", "fsdp_ring_pp", dict(stage=2, fsdp=2, context=2), "1f1b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_loss_gradients_and_evaluation_are_those_of_the_whole_on_any_mesh(family, layout, sizes, schedule, capfd):
    pipeline = Pipeline(schedule, microbatches=2, repeats=1)
    how = nn.Compute(layout=layouts.preset(layout), chunk=4, pipeline=pipeline)
    loss, grads, evaluated = both(family, mesh_of(**sizes), how)
    want, expected, expected_evaluated = whole(family)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(evaluated, expected_evaluated, rtol=1e-6)
    largest = max(np.abs(grad).max() for grad in expected.values())
    for name, grad in expected.items():
        scale = max(np.abs(grad).max(), 1e-3 * largest)
        np.testing.assert_allclose(grads[name], grad, rtol=0, atol=1e-5 * scale, err_msg=f"gradient of {name}")
    assert "rematerialization" not in capfd.readouterr().err


def run_of(**fields) -> Run:
    fields = dict(model=FAMILIES["llama"], layout=layouts.fsdp, batch=16, sequence=16, accumulate=1) | fields
    return Run(data=Synthetic(vocab=64), optimizer=SGD(lr=0.1), loss=LOSS, mesh=cpu8.cluster, dtype="float32", **fields)


def test_workers_of_local_sgd_take_their_own_losses_in_pieces():
    def trained(chunk: int):
        run = run_of(loss_chunk=chunk, axes=Axes(data=2, fsdp=4), local=DiLoCo(every=10))
        made = program.make(run, mesh_of(data=2, fsdp=4), chips.CPU)
        with made.context():
            rows = {name: x.reshape(1, 16, 16) for name, x in batch().items()}
            state = made.init(jax.random.key(0))
            _, metrics = made.step(state, jax.device_put(rows, made.batch_sharding()))
            return np.array(metrics["loss"]), np.array(metrics["grad_norm"])

    np.testing.assert_allclose(trained(4), trained(0), rtol=1e-6)


def gradient_of(model, how: nn.Compute, mesh, rows: int, length: int):
    """The gradient of a batch of one microbatch, lowered."""
    place = NamedSharding(mesh, jax.P(None, how.layout.inner["B"]))
    types = dict(tokens=jnp.int32, targets=jnp.int32, weights=jnp.float32)
    parts = {name: jax.ShapeDtypeStruct((1, rows, length), kind, sharding=place) for name, kind in types.items()}
    with jax.set_mesh(mesh), nn.compute(how):
        weights = like(jax.eval_shape(model.init, jax.random.key(0)), mesh)
        return jax.jit(functools.partial(steps.gradients, loss=LOSS)).lower(weights, parts)


def test_memory_falls_by_the_logits_of_all_pieces_but_one():
    model = Llama(vocab=8192, layers=1, width=32, heads=2, kv_heads=2, head_dim=16, ff=64, positions=128)
    taken = {
        chunk: gradient_of(model, nn.Compute(chunk=chunk), mesh_of(), 8, 128).compile().memory_analysis()
        for chunk in (0, 64, 16)
    }
    taken = {chunk: found.temp_size_in_bytes for chunk, found in taken.items()}
    logits = 4 * 8 * 128 * 8192
    assert taken[0] - taken[16] > 0.8 * 7 / 8 * logits, taken
    assert taken[64] - taken[16] > 0.8 * 3 / 8 * logits, taken


def test_nothing_of_the_size_of_all_logits_is_traced():
    model = Llama(vocab=1000, layers=1, width=32, heads=2, kv_heads=2, head_dim=16, ff=64, positions=128)
    whole, cut = (gradient_of(model, nn.Compute(chunk=chunk), mesh_of(), 8, 128).as_text() for chunk in (0, 16))
    assert "8x128x1000xf32" in whole and "8x16x1000xf32" not in whole
    assert "8x16x1000xf32" in cut and "8x128x1000xf32" not in cut


def test_the_head_is_gathered_once_and_its_gradient_summed_once_for_all_pieces():
    """Head and embedding are the weights with a dim of 704; fsdp cuts their D."""
    model = Llama(vocab=704, layers=1, width=64, heads=4, kv_heads=4, head_dim=16, ff=128, positions=64)
    mesh, how = mesh_of(fsdp=8), nn.Compute(layout=layouts.fsdp, chunk=8)
    found = collectives(gradient_of(model, how, mesh, 8, 64).compile(), mesh)
    of_ends = [(x.kind, x.count) for x in found for array in x.arrays if sorted(array.shape) == [64, 704]]
    assert sorted(of_ends) == [("all-gather", 1)] * 2 + [("all-reduce", 1)] * 2


def test_evaluation_computes_no_gradient():
    """Products of the traced evaluation, where a loop's stand once: the same in pieces and whole."""

    def products(chunk: int) -> int:
        with jax.set_mesh(mesh_of()), nn.compute(nn.Compute(chunk=chunk)):
            model = jax.eval_shape(FAMILIES["llama"].init, jax.random.key(0))
            parts = jax.tree.map(jnp.asarray, batch())
            return str(jax.make_jaxpr(functools.partial(steps.eval_step, loss=LOSS))(model, parts)).count("dot_general")

    assert products(4) == products(0) > 0


@pytest.mark.parametrize(
    ("length", "chunk", "parts", "count"),
    [(16, 0, 1, 1), (16, 16, 1, 1), (16, 99, 1, 1), (16, 5, 1, 4), (12, 5, 1, 3), (16, 1, 4, 4), (7, 3, 1, 7)],
)
def test_pieces_are_as_few_as_are_not_longer_than_asked_for(length, chunk, parts, count):
    assert pieces.number(length, chunk, parts) == count


def test_a_large_loss_is_taken_in_pieces_on_an_accelerator_where_none_is_asked_for():
    model = Llama(vocab=131_072, layers=1, width=32, heads=2, kv_heads=2, head_dim=16, ff=64, positions=2048)
    run = dataclasses.replace(run_of(model=model), batch=64, sequence=2048)
    eight = Axes(**ONE | dict(fsdp=8))
    assert program.chunk(run, eight, 1, chips.CPU) == 0
    found = program.chunk(run, eight, 1, chips.H100)
    assert found * 64 // 8 == program.PIECE
    assert program.chunk(dataclasses.replace(run, loss_chunk=100), eight, 1, chips.H100) == 100
    assert program.chunk(run, eight, 8, chips.H100) == 0 or found < 2048
    small = dataclasses.replace(run, model=dataclasses.replace(model, vocab=512))
    assert program.chunk(small, eight, 1, chips.H100) == 0


def test_a_loss_in_pieces_under_1f1b_on_cpus_is_refused():
    run = run_of(loss_chunk=4, layout=layouts.fsdp | layouts.pp, pipeline=Pipeline("1f1b"))
    with pytest.raises(Refused, match=r"loss_chunk is 4, but with pipeline.schedule 1f1b .*: set it to 0, or choose"):
        program.make(run, meshes.abstract_mesh(Axes(**ONE | dict(stage=2, fsdp=4))), chips.CPU)
