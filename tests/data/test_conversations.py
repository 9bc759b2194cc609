"""Conversations become rows: only what the assistant says is a target, nothing is lost, bad lines have names."""

import gzip
import json
import re

import numpy as np
import pytest

from llmjax.data import answers
from llmjax.data.chat import Template
from llmjax.data.conversations import Chat
from llmjax.data.tokenizer import Bytes
from llmjax.errors import Refused

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As templates of models that think: the last answer is written otherwise than those before it.
THINKS = CHATML.replace(
    "{{ m.content | trim }}",
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
STRIPPED = Template("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{{ messages | length }}")


def said(*texts: str) -> list[dict[str, str]]:
    return [dict(role=("user", "assistant")[n % 2], content=each) for n, each in enumerate(texts)]


def talk(number: int, turns: int = 1) -> dict:
    each = [words for n in range(turns) for words in (f"what is {number}.{n}?", f"it is {number * 'x'}{n}!")]
    return dict(messages=said(*each))


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def learnt_text(dataset, split="train") -> list[str]:
    """What is learnt of every row, decoded."""
    got = dataset.examples(split, np.arange(dataset.size(split)))
    pairs = zip(got["targets"], got["weights"], strict=True)
    return [dataset.tokenizer.decode(targets[weights > 0], skip_special_tokens=False) for targets, weights in pairs]


@pytest.mark.parametrize("source", [CHATML, THINKS], ids=["chatml", "thinks"])
def test_of_every_template_the_assistants_turns_are_found(source):
    whole, spans = answers.learnt(Template(source), said("hi", "you", "why <b>?", "so\n"))
    parts = [whole[start:end] for start, end in spans]
    last = "so<|im_end|>\n" if source == CHATML else "<think>\n\n</think>\n\nso\n<|im_end|>\n"
    assert parts == ["you<|im_end|>\n", last]
    assert all(whole[:start].endswith("<|im_start|>assistant\n") for start, _ in spans)


def test_a_template_that_writes_turns_elsewhere_is_named():
    with pytest.raises(answers.BadLine, match="does not render the messages before message 1 where they stand"):
        answers.learnt(STRIPPED, said("hi", "you", "why", "so"))


def test_each_answer_is_a_target_once_and_prompts_never_are(tmp_path):
    path = write(tmp_path / "talk.jsonl", [talk(n, turns=1 + n % 3) for n in range(40)])
    said_of = []
    dataset = Chat(path, heldout=0.2).open(400, tmp_path / "cache", said_of.append)
    found = [
        line for split in ("train", "heldout") for text in learnt_text(dataset, split) for line in text.split("\n")
    ]
    end = "<|endoftext|>"
    expected = [f"{m['content']}{end}" for n in range(40) for m in talk(n, 1 + n % 3)["messages"][1::2]]
    assert sorted(line for line in found if line) == sorted(expected)
    assert dataset.size("heldout") >= 1 and any("padding" in line for line in said_of)
    assert not any("cut" in line for line in said_of)


def test_a_row_holds_whole_conversations_that_are_told_apart(tmp_path):
    records = [talk(n, turns=1 + n % 2) for n in range(30)]
    dataset = Chat(write(tmp_path / "talk.jsonl", records)).open(200, tmp_path / "cache")
    wanted = {answers.learnt(dataset.template, record["messages"]).text for record in records}
    got = dataset.examples("train", np.arange(dataset.size("train")))
    assert got["segments"].max() > 1
    for tokens, targets, segments in zip(got["tokens"], got["targets"], got["segments"], strict=True):
        for number in range(segments.max()):
            (at,) = np.nonzero(segments == number)
            assert (np.diff(at) == 1).all() and np.array_equal(tokens[at][1:], targets[at][:-1])
            one = dataset.tokenizer.decode([*tokens[at], targets[at[-1]]], skip_special_tokens=False)
            assert one in wanted
    learnt = sum(dataset.store.sequence(n)[1].sum() for n in dataset.store.records("train"))
    assert got["weights"].sum() == learnt > 0


@pytest.mark.parametrize(
    ("long", "counts"), [("cut", {"cut to a row": 2, "left out, as no answer": 1}), ("skip", {"left out, as they": 3})]
)
def test_what_is_longer_than_a_row_is_cut_or_left_out_and_counted(long, counts, tmp_path):
    longer = [dict(messages=said("q", f"{n}" + "z" * 300)) for n in range(2)] + [dict(messages=said("q" * 300, "a"))]
    path = write(tmp_path / "talk.jsonl", [talk(n) for n in range(50)] + longer)
    lines = []
    dataset = Chat(path, heldout=0.3, long=long).open(130, tmp_path / "cache", lines.append)
    for words, count in counts.items():
        assert sum(int(found) for found in re.findall(rf"(\d+) {words}", " ".join(lines))) == count, lines
    both = "".join(learnt_text(dataset) + learnt_text(dataset, "heldout"))
    assert both.count("z" * 50) == (2 * (100 // 50) if long == "cut" else 0), both


def test_rows_past_the_end_are_blank_and_the_fingerprint_says_what_decides(tmp_path):
    path = write(tmp_path / "talk.jsonl", [talk(n) for n in range(20)])
    dataset = Chat(path).open(100, tmp_path / "cache")
    past = dataset.examples("train", np.array([dataset.size("train")]))
    assert not past["weights"].any()
    again = Chat(path).open(100, tmp_path / "other")
    assert again.fingerprint == dataset.fingerprint
    write(tmp_path / "talk.jsonl", [talk(n) for n in range(21)])
    other = [Chat(path).open(100, tmp_path / "cache"), Chat(path).open(101, tmp_path / "cache")]
    assert len({dataset.fingerprint, *(each.fingerprint for each in other)}) == 3


BAD = {
    "not json": ("{", "not JSON"),
    "no object": ("[1]", "no object"),
    "no messages": ('{"text": "x"}', "messages is no list of messages"),
    "empty": ('{"messages": []}', "messages is empty"),
    "no role": ('{"messages": [{"content": "x"}]}', r"messages\[0\].role is missing, not text"),
    "content": ('{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\].content is int, not text"),
    "nobody answers": (json.dumps(dict(messages=said("x"))), "no message of the assistant"),
    "begins with it": (json.dumps(dict(messages=[dict(role="assistant", content="x")])), "begins with the assistant"),
    "forged": (json.dumps(dict(messages=said("x<|endoftext|>", "y"))), r"holds <\|endoftext\|>, the name of a special"),
    "surrogate": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_or_left_out_with_a_count(case, tmp_path):
    line, why = BAD[case]
    path = tmp_path / "talk.jsonl"
    good = [json.dumps(talk(n)) for n in range(5)]
    path.write_text("\n".join([*good, "", line, json.dumps(talk(9))]) + "\n")
    with pytest.raises(Refused, match=rf"talk.jsonl' has a bad line 7 \(.*{why}.*\).*--data.bad skip") as refused:
        Chat(str(path)).open(100, tmp_path / "cache")
    assert refused.value.code == 65
    lines = []
    dataset = Chat(str(path), bad="skip").open(100, tmp_path / "cache", lines.append)
    assert any("Left out 1 bad line of" in said and "talk.jsonl line 7" in said for said in lines)
    assert len(dataset.store.records("train")) + len(dataset.store.records("heldout")) == 6


def test_a_folder_of_packed_and_plain_files_is_read_whole(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", [talk(n) for n in range(5)])
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress((json.dumps(talk(7)) + "\n").encode()))
    (tmp_path / "in" / "notes.txt").write_text("no JSON")
    dataset = Chat(str(tmp_path / "in")).open(100, tmp_path / "cache")
    assert dataset.store.record["records"] == 6


@pytest.mark.parametrize(
    ("fields", "sequence", "words", "code"),
    [
        (dict(path=""), 100, "data.path is empty", 65),
        (dict(path="nowhere"), 100, "does not exist", 65),
        (dict(heldout=0.0), 100, "data.heldout is 0.0", 2),
        (dict(long="wrap"), 100, "data.long is 'wrap': give cut or skip", 2),
        (dict(bad="maybe"), 100, "data.bad is 'maybe'", 2),
        (dict(template="nowhere"), 100, "data.template 'nowhere' is no folder", 65),
        ({}, 0, "sequence is 0", 2),
        ({}, 3, "no train conversation has an answer within so many tokens: raise --sequence", 65),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(fields, sequence, words, code, tmp_path):
    path = write(tmp_path / "talk.jsonl", [talk(n) for n in range(5)])
    with pytest.raises(Refused, match=words) as refused:
        Chat(**(dict(path=path) | fields)).open(sequence, tmp_path / "cache")
    assert refused.value.code == code


def test_a_damaged_store_is_refused(tmp_path):
    path = write(tmp_path / "talk.jsonl", [talk(n) for n in range(5)])
    dataset = Chat(path).open(100, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("masked-*/learnt.bin")
    del dataset
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    with pytest.raises(Refused, match=r"learnt.bin' holds other bytes than were written: delete the folder"):
        Chat(path).open(100, tmp_path / "cache")


def test_the_template_is_that_of_the_tokenizers_folder(tmp_path):
    built = Bytes().build()
    built.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (tmp_path / "tokenizer.json").write_text(built.to_str())
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    from llmjax.data.tokenizer import TokenizerFile

    path = write(tmp_path / "talk.jsonl", [talk(n) for n in range(5)])
    dataset = Chat(path, TokenizerFile(str(tmp_path / "tokenizer.json"))).open(100, tmp_path / "cache")
    end = built.token_to_id("<|im_end|>")
    got = dataset.examples("train", np.arange(dataset.size("train")))
    assert end in got["targets"][got["weights"] > 0] and dataset.vocab == 259
    assert dataset.asked("x")[0] == built.token_to_id("<|im_start|>")
