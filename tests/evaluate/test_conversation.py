"""A conversation reads what is new of it, and answers as if it had read all."""

import dataclasses

import jax
import numpy as np
import pytest

from llmjax import mesh as meshes
from llmjax.evaluate.conversation import Conversation
from llmjax.evaluate.generate import Sampling, complete
from llmjax.models import nn
from llmjax.models.gemma3 import Gemma3
from llmjax.models.llama import Llama

TINY = dict(vocab=64, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64)
GREEDY = Sampling(tokens=6)


@pytest.fixture(autouse=True)
def one_device():
    mesh = meshes.device_mesh(meshes.Axes(1, 1, 1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh), nn.compute(nn.Compute()):
        yield


@pytest.mark.parametrize("c", [Llama(**TINY), Gemma3(**TINY, every=2, window=4)], ids=lambda c: type(c).__name__)
def test_turn_by_turn_answers_are_those_to_the_whole_text(c):
    model, random = jax.jit(c.init)(jax.random.key(0)), np.random.default_rng(0)
    talk, text = Conversation(model, 600), []

    def check(fresh: int):
        assert talk.read(text) == fresh
        answer = list(talk.answer(GREEDY, ()))
        (other := Conversation(model, 600)).read(text)  # whose programs are the same, and so compiled
        assert answer == list(other.answer(GREEDY, ()))
        text.extend(answer)

    for length in (300, 5, 1):
        text += random.integers(0, 64, length).tolist()
        check(length)
    del text[-40:]  # as where a template leaves out what was thought
    text.append(63)
    check(1)
    del text[100:]
    text.append(62)
    check(1 if type(c) is Llama else 101)  # windows have forgotten that long ago
    check(1)  # nothing new: the last token is read again


def test_an_answer_that_was_stopped_is_no_part_of_the_text_beyond_where_it_stopped():
    model, text = jax.jit(Llama(**TINY).init)(jax.random.key(0)), [1, 2, 3]
    talk = Conversation(model, 64)
    talk.read(text)
    for token in talk.answer(GREEDY, ()):
        text.append(token)
        if len(text) == 5:
            break
    assert talk.tokens == text
    text.append(9)
    assert talk.read(text) == 1
    assert [list(talk.answer(GREEDY, ()))] == complete(model, [text], GREEDY, positions=64)


def test_an_answer_ends_at_its_end_and_with_the_last_position():
    model = jax.jit(Llama(**TINY).init)(jax.random.key(0))
    talk = Conversation(model, 12)
    talk.read([1, 2, 3])
    whole = list(talk.answer(dataclasses.replace(GREEDY, tokens=100), ()))
    assert len(whole) == 9 and len(talk.tokens) == 12
    talk.read([1, 2, 3])
    assert list(talk.answer(GREEDY, (whole[2],))) == whole[: whole.index(whole[2])]
