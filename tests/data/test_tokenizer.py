"""Tokenizers round-trip every byte and are the same every time."""

import os
import subprocess
import sys

import pytest

from llmjax.data import tokenizer as tokenizers
from llmjax.data.tokenizer import BPE, Bytes, TokenizerFile, end_of_text, vocabulary
from llmjax.errors import Refused

CODE = ["class A:\n    def run(self):\n        return self.value_1 + 12345\n\n\n" * 20, "import os\r\n\tx = 'ünï'\n"]
AWKWARD = [
    "",
    " ",
    "\n\n\n",
    "    def f(x):\r\n\t\treturn x  # tail  \n  ",
    "naïve 日本語 🙂👩‍👩‍👧 e\u0301 \u2028 \u00a0 \ufeff",
    "".join(map(chr, range(0x800))),
    "\U0010ffff\ue000\x00\x7f",
    "a <|endoftext|> b </s> c",
]


@pytest.mark.parametrize("config", [BPE(300), BPE(1000), Bytes()])
def test_every_text_round_trips(config):
    built = config.build(CODE)
    for text in AWKWARD + CODE:
        ids = built.encode(text, add_special_tokens=False).ids
        assert built.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("config", [BPE(300), Bytes()])
def test_a_document_cannot_forge_the_end_of_text(config):
    built = config.build(CODE)
    assert end_of_text(built) not in built.encode("a <|endoftext|> b").ids
    assert built.decode([end_of_text(built)], skip_special_tokens=False) == "<|endoftext|>"


def test_bytes_are_their_own_ids():
    built = Bytes().build()
    assert built.encode("ünï 🙂\n").ids == list("ünï 🙂\n".encode())
    assert (end_of_text(built), vocabulary(built)) == (256, 257)


def test_bpe_keeps_to_its_vocabulary_and_makes_indentation_cheap():
    built = BPE(500).build(CODE)
    assert 257 < vocabulary(built) <= 500
    assert len(built.encode("\n        return").ids) == 2
    assert vocabulary(BPE(100_000).build(["ab"])) == 258  # a small corpus has no more to give


def test_bpe_is_the_same_in_every_process_and_on_any_number_of_threads():
    script = (
        "import hashlib\nfrom llmjax.data import corpus\nfrom llmjax.data.tokenizer import BPE\n"
        "documents, _ = corpus.read(corpus.standard_library()[:60], skip_other_codings=True)\n"
        "print(hashlib.sha256(BPE(1024).build(d.text for d in documents).to_str().encode()).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "5")
    }
    assert len(hashes) == 1


def test_too_small_a_vocabulary_is_refused_with_code_2():
    with pytest.raises(Refused, match=r"data\.tokenizer\.vocab is 256") as refused:
        BPE(256).build(CODE)
    assert refused.value.code == 2


def test_a_tokenizer_file_gives_the_same_tokens_and_is_known_by_its_content(tmp_path):
    BPE(400).build(CODE).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "copy.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    config, copy = TokenizerFile(str(tmp_path / "tokenizer.json")), TokenizerFile(str(tmp_path / "copy.json"))
    assert config.build().encode(CODE[0]).ids == BPE(400).build(CODE).encode(CODE[0]).ids
    assert config.identity() == copy.identity()
    BPE(300).build(CODE).save(str(tmp_path / "copy.json"))
    assert config.identity() != copy.identity()


def test_a_tokenizer_file_may_not_cut_texts_short(tmp_path):
    built = Bytes().build()
    built.enable_truncation(4)
    built.enable_padding(length=8)
    built.save(str(tmp_path / "tokenizer.json"))
    assert TokenizerFile(str(tmp_path / "tokenizer.json")).build().encode("abcdef").ids == list(b"abcdef")


@pytest.mark.parametrize("name", ["</s>", "<eos>", "<|end_of_text|>"])
def test_usual_names_of_the_end_of_text_are_found(tmp_path, name):
    from tokenizers import Tokenizer, models

    built = Tokenizer(models.WordLevel({"a": 0, name: 1, "gap": 7}, unk_token="a"))
    built.save(str(tmp_path / "tokenizer.json"))
    loaded = TokenizerFile(str(tmp_path / "tokenizer.json")).build()
    assert end_of_text(loaded) == 1
    assert vocabulary(loaded) == 8


@pytest.mark.parametrize("content", [None, "not json", '{"version": "1.0"}', "no end"])
def test_a_bad_tokenizer_file_is_refused_with_code_65(tmp_path, content):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    if content == "no end":
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    elif content is not None:
        path.write_text(content)
    with pytest.raises(Refused) as refused:
        TokenizerFile(str(path)).build()
    assert refused.value.code == 65


def test_importing_the_data_modules_imports_neither_tokenizers_nor_grain():
    script = "import sys, llmjax.data.dataset, llmjax.data.batches; print({'tokenizers', 'grain'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"


def test_the_byte_alphabet_is_the_one_tokenizers_uses():
    from tokenizers import pre_tokenizers

    assert sorted(tokenizers._alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
