"""Likelihoods and continuations are those of the model's logits, on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judging import RUN, judging

from llmjax.errors import Refused
from llmjax.evaluate import likelihood
from llmjax.evaluate.generate import Sampling
from llmjax.evaluate.likelihood import Stopped, attention, batches, cut, filled, windows

TEXTS = [
    ("a quick brown", " fox"),
    ("the lazy ", "dog"),
    ("", "alone"),
    ("  ", "blanks"),
    ("x", "y"),
    ("a context that is longer than the model sees, by far, so its end is taken: ", "so"),
    ("short", ""),
    ("ä€", "ö"),
    *((f"number {n} is", f" {n * n}") for n in range(12)),
]


@functools.cache
def found(layout: str = "dp", devices: int = 1) -> list[tuple[float, bool]]:
    with judging(layout, devices) as judge:
        return judge.log_likelihoods(TEXTS)


@functools.cache
def logits_of(tokens: tuple[int, ...]) -> np.ndarray:
    """ln P of every next token, float64 [T, V], from the model alone."""
    with judging() as judge:
        padded = np.zeros((1, RUN.sequence), np.int32)
        padded[0, : len(tokens)] = tokens
        logits_TV = np.asarray(_logits(judge.model, jnp.asarray(padded))[0], np.float64)
    logits_TV -= logits_TV.max(1, keepdims=True)
    return (logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True)))[: len(tokens)]


@jax.jit
def _logits(model, tokens_BT):
    return model(tokens_BT)


def directly(given: list[int], asked: list[int]) -> tuple[float, bool]:
    """What the logits say of a pair of bytes."""
    whole = [*given, *asked][-(RUN.sequence + 1) :]
    if not asked:
        return 0.0, True
    chance_TV = logits_of(tuple(whole[:-1]))[-len(asked) :]
    picked = chance_TV[np.arange(len(asked)), asked]
    return float(picked.sum()), bool(np.all(chance_TV.argmax(1) == asked))


END = 256


def test_likelihoods_are_those_of_the_logits():
    for (context, continuation), (value, greedy) in zip(TEXTS, found(), strict=True):
        given = list(context.rstrip().encode()) or [END]
        expected = directly(given, list((context + continuation).encode())[len(context.rstrip().encode()) :])
        assert (value, greedy) == (pytest.approx(expected[0], rel=1e-5, abs=1e-5), expected[1])


@pytest.mark.parametrize("layout", ["dp", "fsdp_tp", "fsdp_tp_sp", "ring", "pp"])
def test_eight_devices_judge_as_one_does(layout):
    ours, alone = found(layout, 8), found()
    np.testing.assert_allclose([value for value, _ in ours], [value for value, _ in alone], rtol=2e-5, atol=2e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in alone]


def test_what_the_model_would_write_is_greedy_and_another_answer_is_not():
    with judging() as judge:
        prompt = judge.tokenizer.encode("a quick brown").ids
        best = int(logits_of(tuple(prompt))[-1].argmax())
        other = (best + 1) % 256
        nats_N, missed_N = likelihood.scored(judge, [(prompt, [best]), (prompt, [other])])
    assert missed_N.tolist() == [0, 1]
    assert nats_N[0] < nats_N[1]


def test_rolling_counts_every_token_once_whatever_the_length():
    texts = ["", "short", "a quick brown fox jumps over the lazy dog. " * 4]
    with judging() as judge:
        values = judge.rolling(texts)
    for text, value in zip(texts, values, strict=True):
        pairs = windows([END, *text.encode()], RUN.sequence)
        assert value == pytest.approx(sum(directly(*pair)[0] for pair in pairs), rel=1e-5)
    assert values[0] == 0


def test_windows_ask_about_every_token_but_the_first_once_and_are_full():
    for length in range(1, 40):
        tokens = list(range(length))
        pairs = windows(tokens, 8)
        assert [token for _, asked in pairs for token in asked] == tokens[1:]
        for given, asked in pairs:
            assert given[-1] == asked[0] - 1 and len(given) + len(asked) <= 9
        assert all(len(given) + len(asked) == 9 for given, asked in pairs) or length < 9


def test_rows_go_longest_first_into_few_widths():
    lengths = [3, 60, 31, 33, 5, 64, 2, 40, 12]
    groups = list(batches(lengths, 4))
    assert [lengths[n] for group in groups for n in group] == sorted(lengths, reverse=True)
    with judging():
        assert likelihood.widths(64) == [32, 64]
        assert likelihood.widths(48) == [48]
        assert likelihood.widths(1000) == [250, 500, 1000]
    with judging("ring", 8):  # context 2, so two times two pieces
        assert likelihood.widths(1000) == [500, 1000]


def test_narrow_rows_take_attention_that_takes_any_width():
    with judging() as judge:
        assert judge.program.compute.attention == "reference"
        assert (attention(64, 4096), attention(2048, 4096)) == ("reference", "blocked")


def test_only_the_answer_counts():
    batch = filled([([1, 2, 3], [4, 5]), ([7], [8])], 3, 6)
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 0, 0], [7, 0, 0, 0, 0, 0], [0] * 6]
    assert batch["targets"].tolist() == [[2, 3, 4, 5, 0, 0], [8, 0, 0, 0, 0, 0], [0] * 6]
    assert batch["weights"].tolist() == [[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6]


def test_an_answer_longer_than_the_model_is_refused():
    with judging() as judge, pytest.raises(Refused, match="65 tokens, more than the 64 positions"):
        judge.log_likelihoods([("a", "b" * 65)])


@pytest.mark.parametrize(("layout", "devices"), [("dp", 1), ("fsdp_tp", 8)])
def test_continuations_are_greedy_and_end_before_a_stop_word(layout, devices):
    texts = ["a quick brown", "", "x" * 200]
    with judging(layout, devices) as judge:
        written = judge.continuations(texts, Sampling(tokens=4), ())
        for text, new in zip(texts, written, strict=True):
            tokens = (list(text.encode()) or [END])[-60:]
            for _ in range(4):
                tokens.append(int(logits_of(tuple(tokens))[-1].argmax()))
            assert new == judge.tokenizer.decode(tokens[-4:])
        word = next(new[-1] for new in written if new)
        stopped = judge.continuations(texts, Sampling(tokens=4), ("never there", word))
    assert stopped == [new.split(word)[0] for new in written]


def test_a_text_is_cut_before_the_first_stop_word():
    assert cut("one two three", ("three", "two", "")) == "one "
    assert cut("one", ()) == "one"


def test_whoever_is_to_stop_does_so_before_the_next_batch():
    asked = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) == 2

    with judging(stop=stop) as judge, pytest.raises(Stopped):
        judge.log_likelihoods(TEXTS)
    assert len(asked) == 2
