"""Every family continues a text with what it keeps of it as it does when it reads all of it again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loading import CASES, FIXTURES, loaded, on_mesh

from llmjax.evaluate.generate import Sampling, Texts
from llmjax.interop import folder
from llmjax.models import cache, nn

LENGTHS, NEW, WIDTH = (3, 17, 9), 16, 8  # so that prompts take up to three reads, and windows are left behind


@functools.cache
def prompts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 60, length).tolist() for length in LENGTHS]


def continued(case: str, layout: str = "dp", **axes: int) -> list[list[int]]:
    _, model = loaded(case, layout, **axes)
    mesh, how = on_mesh(layout, **axes)
    with jax.set_mesh(mesh), nn.compute(how):
        texts = Texts(model, len(LENGTHS), max(LENGTHS) + NEW, WIDTH)
        texts.read(prompts())
        return np.asarray(texts.write(Sampling(), NEW, ()))[: len(LENGTHS), :NEW].tolist()


@functools.cache
def here(case: str) -> list[list[int]]:
    return continued(case)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_the_likeliest_when_all_is_read_again(case):
    tokens_BT = np.zeros((len(LENGTHS), max(LENGTHS) + NEW), np.int32)
    for row, (prompt, new) in enumerate(zip(prompts(), here(case), strict=True)):
        tokens_BT[row, : len(prompt) + NEW] = prompt + new
    _, model = loaded(case)
    mesh, how = on_mesh()
    with jax.set_mesh(mesh), nn.compute(how):
        likeliest_BT = np.asarray(jnp.argmax(jax.jit(lambda model, tokens: model(tokens))(model, tokens_BT), -1))
    for row, (length, new) in enumerate(zip(LENGTHS, here(case), strict=True)):
        assert likeliest_BT[row, length - 1 : length - 1 + NEW].tolist() == new


def test_in_every_family_a_model_says_more_than_one_thing_over_and_over():
    """Else the comparison would prove little."""
    said = {}
    for case in CASES:
        family = type(folder.read(FIXTURES / case).model)
        said[family] = max(said.get(family, 0), max(len(set(new)) for new in here(case)))
    assert len(said) == 12 and min(said.values()) > 2, said


@pytest.mark.parametrize(
    ("case", "layout", "axes"),
    [
        ("llama_grouped", "dp", dict(data=8)),
        ("gemma3_short_turns", "fsdp_tp", dict(fsdp=4, tensor=2)),
        ("deepseek_v3", "fsdp_tp", dict(fsdp=4, tensor=2)),
        ("gpt_oss", "fsdp_tp_ep", dict(fsdp=2, tensor=2, expert=2)),
        ("gpt2", "pp_tp", dict(stage=2, data=2, tensor=2)),
        ("llama_tied_scaled", "fsdp_tp_ring", dict(fsdp=2, tensor=2, context=2)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_eight_devices_continue_as_one_does(case, layout, axes):
    assert continued(case, layout, **axes) == here(case)


def test_a_cache_holds_windows_and_latents_and_no_more():
    def sizes(case):
        found, model = loaded(case)
        mesh, how = on_mesh()
        with jax.set_mesh(mesh), nn.compute(how):
            kept = jax.eval_shape(lambda model: cache.empty(cache.parts(model), 1, 1000, WIDTH), model)
        return found.model, [[each.shape if each is not None else None for each in one] for (one,) in kept]

    c, [(keys, values)] = sizes("mistral_window")
    assert keys == values == (c.layers, 1, c.kv_heads, c.window + WIDTH - 1, c.head_dim)
    c, ((keys, values), *_) = sizes("deepseek_v3")
    assert (keys, values) == ((c.dense, 1, 1, 1000, c.latent + c.rotary), None)
