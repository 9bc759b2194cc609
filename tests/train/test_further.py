"""Predicting tokens behind the next one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax import mesh as meshes
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.mesh import AXES, Axes
from llmjax.models import nn
from llmjax.models.deepseek_v3 import DeepseekV3
from llmjax.optim.adamw import AdamW
from llmjax.run import Run
from llmjax.train.loss import NextToken
from llmjax.train.program import make
from llmjax.train.routed import RoutedNextToken, behind
from meshes import local

MODEL = DeepseekV3(
    vocab=32, layers=2, width=32, heads=2, kv_heads=2, head_dim=12, ff=32, positions=32, rotary=4, value_dim=8,
    query_latent=0, latent=16, dense_ff=48, experts=4, top_k=2, ahead=2,
)  # fmt: skip
LOSS = RoutedNextToken(balance=0.0, router_z=0.0, ahead=0.5)


def mesh():
    return meshes.device_mesh(Axes(**dict.fromkeys(AXES, 1)), jax.devices()[:1])


def rows(count: int, length: int = 16) -> dict[str, jax.Array]:
    """[B, T] of which each token is the one before plus a number that is the row's."""
    random = np.random.default_rng(count)
    tokens = (random.integers(0, 32, (count, 1)) + random.integers(1, 4, (count, 1)) * np.arange(length + 1)) % 32
    tokens = jnp.asarray(tokens, jnp.int32)
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=jnp.ones((count, length)))


def test_a_target_behind_the_end_of_a_row_or_of_a_document_counts_nothing():
    batch = dict(
        tokens=jnp.array([[5, 6, 7, 8, 9]]),
        targets=jnp.array([[6, 7, 8, 9, 10]]),
        weights=jnp.array([[1.0, 1, 0, 1, 1]]),
        segments=jnp.array([[1, 1, 1, 2, 2]]),
    )
    later = behind(batch, 1)
    assert later["tokens"].tolist() == [[6, 7, 8, 9, 5]] and later["targets"].tolist() == [[7, 8, 9, 10, 6]]
    assert later["weights"].tolist() == [[1, 0, 0, 1, 0]]  # the middle: left out itself, then in the other document
    assert later["segments"].tolist() == batch["segments"].tolist()


def test_the_loss_is_that_of_the_next_token_plus_a_share_of_the_mean_of_the_further_ones():
    with jax.set_mesh(mesh()):
        model, batch = MODEL.init(jax.random.key(0)), rows(4)
        total, sums = LOSS(model, batch)
        plain, _ = NextToken()(model, batch)
        further, x_BTD, tokens_BT = [], None, batch["tokens"]
        for k in (1, 2):  # anew, one further token after another, of rows cut to those that have it
            later = [behind(batch, i + 1)["tokens"] for i in range(k)]
            ends, x_BTD, _ = list(model.beyond(stream(model, tokens_BT), later, None))[-1]
            nats_BT = optax.softmax_cross_entropy_with_integer_labels(ends.head(x_BTD)[:, :-k], batch["targets"][:, k:])
            further.append(jnp.sum(nats_BT))
    assert total == pytest.approx(float(plain + 0.5 * sum(further) / 2), rel=1e-5)
    assert float(sums["ahead"]) == pytest.approx(float(sum(further)) / 2, rel=1e-5)
    assert float(sums["weight"]) == 64


def stream(model, tokens_BT):
    return nn.stream(model, tokens_BT, None)[0]


def test_what_a_position_predicts_further_on_depends_on_no_token_after_those_it_goes_on_from():
    with jax.set_mesh(mesh()):
        model, tokens_BT = MODEL.init(jax.random.key(0)), rows(1)["tokens"]

        def logits(tokens_BT):
            later = [jnp.roll(tokens_BT, -k, 1) for k in (1, 2)]
            return [ends.head(x) for ends, x, _ in model.beyond(stream(model, tokens_BT), later, None)]

        before, after = logits(tokens_BT), logits(tokens_BT.at[0, 9].add(1))
    for k, (one, other) in enumerate(zip(before, after, strict=True), 1):
        differs_T = np.any(np.asarray(one != other), (0, 2))
        assert not differs_T[: 9 - k].any() and differs_T[9 - k :].all()


def test_training_learns_further_tokens_and_the_model_that_is_used_is_the_same_without_them():
    run = Run(
        model=MODEL, data=Synthetic(vocab=32), optimizer=AdamW(lr=1e-2), loss=LOSS, mesh=local.cluster, batch=16,
        sequence=16, steps=60, accumulate=1,
    )  # fmt: skip
    program = make(
        run,
        mesh(),
        meshes.chip_of(run.mesh, jax.devices()),
    )
    with program.context():
        state, seen = program.init(jax.random.key(0)), []
        biases = np.asarray(state.model.ahead.router_bias_E[...])
        for step in range(60):
            batch = jax.tree.map(lambda x: x[None], rows(16 + 16 * (step % 7)))
            batch = jax.tree.map(lambda x: x[:, :16], batch)
            state, metrics = program.step(state, batch)
            seen.append(float(metrics["ahead"]) / 256)
        whole = jax.tree.map(lambda x: x, state.model)
        del whole.ahead
        batch = jax.tree.map(lambda x: x[None], rows(5))
        assert program.evaluate(state.model, batch)[0] == pytest.approx(float(program.evaluate(whole, batch)[0]))
    assert seen[0] > 3 and seen[-1] < 1, seen
    assert np.any(np.asarray(state.model.ahead.router_bias_E[...]) != biases)  # its router is kept even, too
    assert metrics["load_LE"].shape == (1 + 2, 4)


def test_the_weights_that_training_begins_with_are_those_of_a_model_that_predicts_the_next_token_alone():
    with jax.set_mesh(mesh()):
        fewer, more = (dataclasses.replace(MODEL, ahead=n).init(jax.random.key(0)) for n in (0, 2))
    del more.ahead
    for one, other in zip(jax.tree.leaves(fewer), jax.tree.leaves(more), strict=True):
        assert np.array_equal(one, other)


def test_what_cannot_be_is_refused_by_name():
    run = Run(
        model=MODEL, data=Synthetic(vocab=32), optimizer=AdamW(), loss=LOSS, mesh=local.cluster, batch=8, sequence=16
    )
    for more, says in [
        (dict(loss=NextToken()), "model.ahead is 2, but NextToken predicts the next token alone"),
        (dict(sequence=2), "a row has 2 tokens"),
    ]:
        with pytest.raises(Refused, match=says):
            make(dataclasses.replace(run, **more), mesh(), meshes.chip_of(run.mesh, jax.devices()))
    with pytest.raises(Refused, match=r"model\.ahead is -1"):
        dataclasses.replace(MODEL, ahead=-1)


def test_plans_and_mfu_count_every_matrix_of_the_layers_for_further_tokens():
    sizes, counted = MODEL.sizes(), MODEL.matrices()
    each = {module: sum(m.size(sizes) for m in matrices) for module, matrices in counted.items()}
    told = sum(n * (MODEL.layers if module in ("attention", "mlp") else 1) for module, n in each.items())
    with jax.set_mesh(mesh()):
        weights = jax.eval_shape(MODEL.init, jax.random.key(0))
    paths = jax.tree_util.tree_flatten_with_path(weights)[0]
    assert told == sum(leaf.size for path, leaf in paths if len(nn.dims_of(path)) > 1)
    more, fewer = (dataclasses.replace(MODEL, ahead=n).flops_per_token(16)[0] for n in (2, 1))
    # A token meets 2 of 4 experts and the shared one, 2 heads of 12 and 8 wide over half of 16 positions, and the head.
    layer = 32 * 2 * 12 + 32 * 20 + 16 * 2 * 16 + 2 * 8 * 32 + 32 * 4 + 3 * 32 * 32 * (2 + 1) + 64 * 32 + 32 * 32
    assert more - fewer == pytest.approx(6 * layer + 6 * 16 * 2 * (12 + 8) / 2)
