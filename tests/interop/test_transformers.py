"""Every family gives the numbers of transformers, from transformers' own files.

The checkpoints in fixtures were made, with what transformers computes, by make_fixtures.py; these tests need neither it
nor torch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loading import CASES, FIXTURES, loaded, on_mesh

from llmjax.checkpoint.checkpoints import named
from llmjax.interop import folder
from llmjax.models import nn
from llmjax.models.attention import Yarn

LOGITS, GRADIENT = 1e-4, 1e-3  # largest differences beside the largest number


@functools.cache
def computed(case: str, attention: str = "reference"):
    """(logits, gradients by our names, our names of theirs) of the fixture's tokens."""
    found, model = loaded(case)
    tokens = jnp.asarray(np.load(FIXTURES / case / "expected.npz")["tokens"])

    def loss(model):
        logits = model(tokens)
        chance = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(chance, tokens[:, 1:, None], -1)), logits

    mesh, how = on_mesh()
    with jax.set_mesh(mesh), nn.compute(nn.Compute(layout=how.layout, attention=attention)):
        grads, logits = jax.jit(jax.grad(loss, has_aux=True))(model)
    return np.asarray(logits), {name: np.asarray(x) for name, x in named(grads).items()}, found


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    expected = np.load(FIXTURES / case / "expected.npz")["logits"]
    np.testing.assert_allclose(computed(case)[0], expected, rtol=0, atol=LOGITS * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_transformers(case):
    _, grads, found = computed(case)
    checked = 0
    for name, expected in np.load(FIXTURES / case / "expected.npz").items():
        theirs = name.removeprefix("grad.")
        parts = [w for w in found.family.weights(found.model) if theirs in names(w, grads)]
        for weight in parts if name.startswith("grad.") else ():
            ours = grads[weight.ours]
            index = next(i for i, n in weight.names(ours.shape) if n == theirs)
            other = weight.view(expected, ours.shape)
            worst = np.abs(ours[index] - other).max() / np.abs(expected).max()
            assert worst < GRADIENT, f"{weight.ours}: {worst}"
            checked += 1
    assert checked >= 4


def names(weight, grads):
    return {name for _, name in weight.names(grads[weight.ours].shape)}


def test_every_family_has_several_configs_here():
    models = [type(folder.read(FIXTURES / case).model) for case in CASES]
    assert all(models.count(family.model) >= 2 for family in folder.known()), models


@pytest.mark.parametrize("case", ["gemma2", "mistral_window", "deepseek_v3", "gpt_oss"])
def test_attention_in_blocks_gives_the_same(case):
    np.testing.assert_allclose(computed(case, "blocked")[0], computed(case)[0], rtol=1e-4, atol=1e-5)


def test_yarn_leaves_fast_pairs_and_stretches_slow_ones():
    frequency = 1e4 ** (-jnp.arange(0, 64, 2) / 64)
    scaled = Yarn(factor=8, original=4096)(frequency, 1e4)
    np.testing.assert_allclose(scaled[:6], frequency[:6])
    np.testing.assert_allclose(scaled[-4:], frequency[-4:] / 8, rtol=1e-6)
