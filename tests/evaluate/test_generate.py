"""Completions are what the model's probabilities say, on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.errors import Refused
from llmjax.evaluate import generate
from llmjax.evaluate.generate import Sampling, choose, complete, ready
from llmjax.evaluate.streaming import before
from llmjax.models import nn
from llmjax.models.llama import Llama

TINY = Llama(vocab=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=48)
DRAWN = Sampling(tokens=6, temperature=1.0, top_k=8, top_p=0.9, seed=2)
PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8]]


@functools.cache
def completed(
    how: Sampling, devices: int = 1, layout: str = "dp", end: generate.Ends = None, attention: str = "reference"
) -> list[list[int]]:
    layout = layouts.preset(layout)
    axes = meshes.fill(meshes.Axes(), devices, used=layout.axes(), rest=layout.rest(), tensor=2)
    mesh = meshes.device_mesh(axes, jax.devices()[:devices])
    with jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layout, attention=attention)):
        model = jax.jit(TINY.init)(jax.random.key(0))
        return complete(model, PROMPTS, how, positions=TINY.positions, end=end)


def test_greedy_takes_the_likeliest_token_after_every_prefix():
    with jax.set_mesh(meshes.device_mesh(meshes.Axes(1, 1, 1, 1, 1, 1), jax.devices()[:1])), nn.compute(nn.Compute()):
        model = jax.jit(TINY.init)(jax.random.key(0))
        logits = jax.jit(lambda tokens_BT: model(tokens_BT))
        for prompt, new in zip(PROMPTS, completed(Sampling(tokens=6)), strict=True):
            tokens = list(prompt)
            for token in new:
                padded_BT = np.zeros((1, TINY.positions), np.int32)
                padded_BT[0, : len(tokens)] = tokens
                assert token == int(jnp.argmax(logits(padded_BT)[0, len(tokens) - 1]))
                tokens.append(token)


@pytest.mark.parametrize("layout", ["fsdp_tp", "fsdp_tp_sp", "ring", "fsdp_cp"])
def test_eight_devices_complete_as_one_does(layout):
    assert completed(DRAWN, 8, layout) == completed(DRAWN)


@pytest.mark.parametrize("attention", ["blocked", "splash", "cudnn"])
def test_a_model_that_was_trained_with_any_attention_completes_here(attention):
    assert completed(DRAWN, attention=attention) == completed(DRAWN)


def test_a_seed_gives_the_same_text_again_and_another_seed_another():
    again = completed.__wrapped__(DRAWN)
    assert again == completed(DRAWN) != completed(dataclasses.replace(DRAWN, seed=3))


def test_a_completion_ends_before_the_end_of_text():
    whole = completed(Sampling(tokens=6))
    end = whole[0][3]
    assert completed(Sampling(tokens=6), end=end)[0] == whole[0][: whole[0].index(end)]


def draws(how: Sampling) -> np.ndarray:
    """4,000 tokens drawn from the probabilities 0.5, 0.3, 0.15, 0.05."""
    logits_BV = jnp.log(jnp.tile(jnp.array([[0.15, 0.5, 0.05, 0.3]]), (4000, 1)))
    return np.bincount(np.asarray(choose(logits_BV, jax.random.key(how.seed), how)), minlength=4) / 4000


def test_sampling_follows_the_probabilities():
    np.testing.assert_allclose(draws(Sampling(temperature=1.0)), [0.15, 0.5, 0.05, 0.3], atol=0.03)
    cold = np.array([0.15, 0.5, 0.05, 0.3]) ** 2
    np.testing.assert_allclose(draws(Sampling(temperature=0.5)), cold / cold.sum(), atol=0.03)


def test_top_k_and_top_p_leave_out_the_unlikely():
    np.testing.assert_allclose(draws(Sampling(temperature=1.0, top_k=2)), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(draws(Sampling(temperature=1.0, top_p=0.79)), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(draws(Sampling(temperature=1.0, top_p=0.01)), [0, 1, 0, 0])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Sampling(tokens=0), "tokens is 0: give at least 1"),
        (Sampling(temperature=-1.0), r"temperature is -1\.0: give 0"),
        (Sampling(top_k=-1), "top-k is -1: give a positive"),
        (Sampling(top_p=0.0), r"top-p is 0\.0: give a number above 0"),
        (Sampling(tokens=41), "8 tokens and 41 more .* has 48 positions: shorten the prompt or lower --tokens"),
    ],
)
def test_sampling_that_cannot_be_is_refused_with_the_remedy(how, message):
    with pytest.raises(Refused, match=message):
        complete(None, PROMPTS, how, positions=48)


def test_completions_end_at_any_of_several_tokens_and_through_a_string():
    whole = completed(Sampling(tokens=6))
    ends = whole[0][3], whole[1][2]
    found = completed(Sampling(tokens=6), end=ends)
    assert found == [t[: next((i for i, x in enumerate(t) if x in ends), 6)] for t in whole]
    decode = lambda tokens: " ".join(map(str, tokens)) + " "  # noqa: E731
    with jax.set_mesh(meshes.device_mesh(meshes.Axes(1, 1, 1, 1, 1, 1), jax.devices()[:1])), nn.compute(nn.Compute()):
        model = ready(jax.jit(TINY.init)(jax.random.key(0)))
        stop = (f"{whole[0][1]} {whole[0][2]} ",)
        found = complete(model, PROMPTS, Sampling(tokens=6), positions=48, stop=stop, decode=decode)
    at = [before(decode(t), stop) for t in whole]
    assert at[0] is not None and before(decode(found[0]), stop) == at[0] and decode(found[0]).endswith(stop[0])
    assert all(new == old for new, old, cut in zip(found, whole, at, strict=True) if cut is None)


def test_lengths_and_counts_are_data_and_compile_nothing_anew():
    with jax.set_mesh(meshes.device_mesh(meshes.Axes(1, 1, 1, 1, 1, 1), jax.devices()[:1])), nn.compute(nn.Compute()):
        model = ready(jax.jit(TINY.init)(jax.random.key(0)))
        for tokens, prompt in ((5, [1]), (40, [1, 2, 3]), (1, [4] * 40), (33, [9] * 13)):
            how = Sampling(tokens=tokens, seed=tokens)
            assert len(complete(model, [prompt], how, positions=48)[0]) == tokens
            sizes = [call._cache_size() for call in (generate._begin, generate._read, generate._write)]
            first = sizes if tokens == 5 else first  # noqa: F821
            assert sizes == first
