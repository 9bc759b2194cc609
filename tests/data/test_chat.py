"""Conversations become the text that a model's own template says."""

import json

import pytest

from llmjax.data import chat
from llmjax.data.tokenizer import Bytes
from llmjax.errors import Refused

TALK = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello")]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHOWN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"


def config(tmp_path, **fields):
    (tmp_path / chat.CONFIG).write_text(json.dumps(fields))


def test_a_template_is_found_in_each_of_the_places_that_hold_one(tmp_path):
    config(tmp_path, chat_template=CHATML)
    assert chat.render(chat.load(tmp_path), TALK, prompt=True) == SHOWN + "<|im_start|>assistant\n"
    config(tmp_path, chat_template=[dict(name="tools", template="no"), dict(name="default", template=CHATML)])
    assert chat.render(chat.load(tmp_path), TALK, prompt=False) == SHOWN
    (tmp_path / chat.OLDER).write_text(json.dumps(dict(chat_template="{{ messages | length }}")))
    assert chat.render(chat.load(tmp_path), TALK, prompt=False) == "2"
    (tmp_path / chat.ALONE).write_text("{{ messages[0].content }}")
    assert chat.render(chat.load(tmp_path), TALK, prompt=False) == "Hi"


def test_templates_have_the_tokens_and_functions_they_are_written_for(tmp_path):
    (tmp_path / chat.ALONE).write_text(
        "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}{% if tools %}no{% endif %}"
    )
    config(tmp_path, bos_token=dict(content="<s>", lstrip=False), eos_token=None)
    assert chat.render(chat.load(tmp_path), TALK, prompt=False) == '<s>Hi{"a": "<é>"}4'


def test_without_a_template_turns_end_by_the_end_of_text(tmp_path):
    Bytes().build().save(str(tmp_path / "tokenizer.json"))
    template = chat.load(tmp_path)
    assert not template.own
    text = chat.render(template, TALK[:1], prompt=True)
    assert text == "<|user|>\nHi<|endoftext|>\n<|assistant|>\n"
    longer = chat.render(template, TALK, prompt=False)
    assert longer == text + "Hello<|endoftext|>\n"  # what SFT learns is what chat asks for


def test_special_tokens_mean_themselves_in_a_rendered_text_alone(tmp_path):
    tokenizer = Bytes().build()
    assert chat.encode(tokenizer, "a<|endoftext|>") == [97, 256]
    assert len(tokenizer.encode("a<|endoftext|>").ids) == 14  # a document cannot forge one


def test_answers_end_where_the_model_s_files_say(tmp_path):
    tokenizer = Bytes().build()
    assert chat.ends(tmp_path, tokenizer) == (256,)
    (tmp_path / chat.GENERATION).write_text(json.dumps(dict(eos_token_id=[7, 9])))
    config(tmp_path, eos_token="b")
    assert chat.ends(tmp_path, tokenizer) == (7, 9, 98, 256)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for %}", "the chat template is not Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "does not take these messages .roles must alternate.: give"),
        ("{{ messages.append(1) }}", "does not take these messages .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "does not take these messages .*unsafe"),
        ("{{ messages[7].content.x }}", "does not take these messages"),
    ],
)
def test_a_template_that_does_not_work_or_reaches_out_is_refused(text, message):
    with pytest.raises(Refused, match=message):
        chat.render(chat.Template(text), TALK, prompt=True)


def test_files_that_are_not_what_they_say_are_refused(tmp_path):
    (tmp_path / chat.CONFIG).write_text("{")
    with pytest.raises(Refused, match=r"tokenizer_config\.json cannot be read"):
        chat.load(tmp_path)
    config(tmp_path, chat_template=3)
    with pytest.raises(Refused, match="is no text"):
        chat.load(tmp_path)
    (tmp_path / chat.ALONE).write_bytes(b"\xff\xfe")
    with pytest.raises(Refused, match=r"chat_template\.jinja cannot be read"):
        chat.load(tmp_path)
