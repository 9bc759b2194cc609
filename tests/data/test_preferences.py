"""Pairs of answers become rows: both after their prompt, each answer alone a target, bad lines named."""

import json

import numpy as np
import pytest

from llmjax.data.preferences import Preferences
from llmjax.errors import Refused


def asked(text: str) -> list[dict[str, str]]:
    return [dict(role="user", content=text)]


def pair(n: int) -> dict:
    return dict(prompt=asked(f"what is {n}?"), chosen=f"it is {n}", rejected="no idea")


def opened(tmp_path, records, sequence=100, say=lambda _: None, **fields):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in records))
    return Preferences(str(path), **fields).open(sequence, tmp_path / "cache", say)


def answers(dataset, split="train") -> set[tuple[str, str]]:
    got = dataset.examples(split, np.arange(dataset.size(split)))
    decode = lambda row: dataset.tokenizer.decode(row, skip_special_tokens=False)  # noqa: E731
    return {
        tuple(decode(targets[side][weights[side] > 0]) for side in range(2))
        for targets, weights in zip(got["targets"], got["weights"], strict=True)
    }


def test_each_answer_follows_its_prompt_and_alone_is_a_target(tmp_path):
    dataset = opened(tmp_path, [pair(n) for n in range(40)], heldout=0.2)
    both = answers(dataset) | answers(dataset, "heldout")
    assert both == {(f"it is {n}<|endoftext|>\n", "no idea<|endoftext|>\n") for n in range(40)}
    got = dataset.examples("train", np.arange(dataset.size("train") + 1))
    assert got["tokens"].shape == (dataset.size("train") + 1, 2, 100) and not got["weights"][-1].any()
    prompts = got["weights"][:-1].argmax(2)  # where the first target of an answer is
    for tokens, begin in zip(got["tokens"][:-1], prompts, strict=True):
        assert np.array_equal(*(row[: at + 1] for row, at in zip(tokens, begin, strict=True)))


def test_a_prompt_that_is_a_text_is_taken_as_it_is(tmp_path):
    dataset = opened(tmp_path, [dict(prompt=f"2 + {n} =", chosen=f" {n + 2}", rejected=" 0") for n in range(20)])
    assert answers(dataset) <= {(f" {n + 2}<|endoftext|>", " 0<|endoftext|>") for n in range(20)}
    row = dataset.examples("train", np.array([0]))["tokens"][0, 0]
    assert dataset.tokenizer.decode(row).startswith("2 + ")


def test_answers_may_be_messages_and_those_of_the_prompt_are_not_learnt(tmp_path):
    before = [*asked("hi"), dict(role="assistant", content="hello"), *asked("why?")]
    records = [dict(pair(n), prompt=before, chosen=[dict(role="assistant", content=f"so {n}")]) for n in range(9)]
    assert all(chosen.startswith("so ") for chosen, _ in answers(opened(tmp_path, records)))


def test_pairs_longer_than_a_row_are_left_out_and_counted(tmp_path):
    lines = []
    records = [pair(n) for n in range(20)] + [dict(pair(n), rejected="x" * 200) for n in range(3)]
    dataset = opened(tmp_path, records, say=lines.append, heldout=0.01)
    assert "3 left out, as they are longer than 100 tokens" in lines[0]
    assert sum(dataset.size(split) for split in ("train", "heldout")) == 20


BAD = {
    "no prompt": (dict(chosen="a", rejected="b"), "prompt is no list of messages"),
    "no answer": (dict(prompt=asked("a"), chosen="b"), "rejected is no list of messages"),
    "text and messages": (dict(prompt="a", chosen=asked("b"), rejected="c"), "chosen is list, not text"),
    "the same": (dict(prompt="a", chosen="b", rejected="b"), "chosen and rejected are the same"),
    "forged": (dict(prompt="a<|endoftext|>", chosen="b", rejected="c"), "the name of a special token"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_or_left_out_with_a_count(case, tmp_path):
    line, why = BAD[case]
    records = [*(pair(n) for n in range(5)), line]
    with pytest.raises(Refused, match=rf"pairs.jsonl' has a bad line 6 \(.*{why}.*--data.bad skip"):
        opened(tmp_path, records)
    lines = []
    opened(tmp_path, records, say=lines.append, bad="skip")
    assert "Left out 1 bad line of" in lines[0]


def test_rows_that_no_pair_fits_are_refused(tmp_path):
    with pytest.raises(Refused, match="sequence is 5, and no train pair is as short: raise --sequence"):
        opened(tmp_path, [pair(n) for n in range(5)], sequence=5)
