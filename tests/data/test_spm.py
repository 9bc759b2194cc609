"""A SentencePiece model gives the ids of its own library, a store keeps it, and another tokenizer is refused."""

import random
import sys
import unicodedata

import numpy as np
import pytest

from llmjax.data import corpus, shards, spm
from llmjax.data.build import Build, build
from llmjax.data.stored import Store
from llmjax.data.tokenizer import TokenizerFile, end_of_text, vocabulary
from llmjax.errors import Refused

sentencepiece = pytest.importorskip("sentencepiece")

KINDS = {
    "unigram": dict(model_type="unigram"),
    "bpe": dict(model_type="bpe"),
    "llama": dict(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", split_digits=True,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
    ),
    "gemma": dict(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, user_defined_symbols=["<sep>", "[@]"],
    ),
    "t5": dict(model_type="unigram", byte_fallback=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    documents, _ = corpus.read(corpus.standard_library()[:40], skip_other_codings=True)
    return [document.text[:20_000] for document in documents]


@pytest.fixture(scope="module")
def models(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("spm")
    (root / "corpus.txt").write_text("\n".join(texts))
    for name, options in KINDS.items():
        sentencepiece.SentencePieceTrainer.train(
            input=str(root / "corpus.txt"), model_prefix=str(root / name), vocab_size=600, minloglevel=2,
            num_threads=1, **options,
        )  # fmt: skip
    return root


@pytest.mark.parametrize("name", KINDS)
def test_a_converted_model_gives_the_ids_of_its_library(models, texts, name):
    made = TokenizerFile(str(models / f"{name}.model")).build()
    own = sentencepiece.SentencePieceProcessor(model_file=str(models / f"{name}.model"))
    assert vocabulary(made) == own.vocab_size() == 600 and end_of_text(made) == own.eos_id()
    rng, differ = random.Random(0), 0
    signs = [chr(rng.choice([rng.randint(32, 126), rng.randint(0, 0x2FFF), rng.randint(0x1F300, 0x1F6FF)]))
             for _ in range(600)]  # fmt: skip
    if name in ("unigram", "bpe", "t5"):  # these normalise, as `tokenizers` does but for marks that no letter takes up
        signs = [sign for sign in signs if not unicodedata.category(sign).startswith("M")]
    given = texts + ["".join(rng.choices(signs + [" "] * 40, k=rng.randint(0, 60))) for _ in range(1500)]
    given += [f"{mark} {mark}a{mark}" for mark in ("<sep>", "[@]", "</s>", "<unk>", "<s>", "<0x41>", "▁")]
    for text in given:
        ids = own.encode(text)
        got = made.encode(text, add_special_tokens=False).ids
        differ += got != ids
        assert end_of_text(made) not in got
    assert differ <= (3 if name in ("unigram", "t5") else 0)  # ways to cut a word that are equally likely


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_models_that_keep_every_byte_round_trip(models, texts, name):
    made = TokenizerFile(str(models / f"{name}.model")).build()
    for text in [*texts, "  two  blanks\n\n\t🙂 \x07"]:
        assert made.decode(made.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_a_store_is_built_with_it_and_refuses_another(models, texts, tmp_path):
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_text(text)
    source = tuple(str(tmp_path / f"{n}.txt") for n in range(len(texts)))
    stores = {}
    for name in ("llama", "bpe"):
        tokenizer = str(models / f"{name}.model")
        stores[name] = build(Build(source, tokenizer=tokenizer, heldout=0.2), tmp_path / name, 1, lambda _: None)
    assert stores["llama"].record["fingerprint"] != stores["bpe"].record["fingerprint"]
    own = sentencepiece.SentencePieceProcessor(model_file=str(models / "llama.model"))
    whole = shards.take(stores["llama"], "train", 0, int(stores["llama"].first["train"][-1]))
    first = np.split(whole, np.flatnonzero(whole == own.eos_id()))[1]
    assert first[1:].tolist() in [own.encode(text) for text in texts]
    Store(str(tmp_path / "llama"), tokenizer=str(models / "llama.model")).open(64, tmp_path)
    with pytest.raises(Refused, match=r"data\.tokenizer '.*bpe\.model' is not the tokenizer") as refused:
        Store(str(tmp_path / "llama"), tokenizer=str(models / "bpe.model")).open(64, tmp_path)
    assert refused.value.code == 65


def test_what_is_no_model_or_cannot_be_had_exactly_is_refused(models, tmp_path):
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(Refused, match=r"x\.model' is not a SentencePiece model") as refused:
        TokenizerFile(str(tmp_path / "x.model")).build()
    assert refused.value.code == 65
    from sentencepiece import sentencepiece_model_pb2 as schema

    model = schema.ModelProto()
    model.ParseFromString((models / "llama.model").read_bytes())
    model.trainer_spec.model_type = 3
    with pytest.raises(Refused, match="neither a unigram nor a BPE"):
        spm.convert(model.SerializeToString(), "word.model")


def test_a_conversion_that_gives_other_ids_is_refused(models, monkeypatch):
    monkeypatch.setattr(spm, "_bpe", lambda model, right=spm._bpe: _without_merges(right(model)))
    with pytest.raises(Refused, match="gives other ids for") as refused:
        spm.convert((models / "bpe.model").read_bytes(), "bpe.model")
    assert refused.value.code == 65


def _without_merges(_):
    from tokenizers import models

    return models.BPE({"<unk>": 0, "</s>": 2}, [], unk_token="<unk>")


def test_a_library_that_is_not_there_is_named(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(Refused, match=r"llmjax\[sentencepiece\]") as refused:
        TokenizerFile(str(models / "bpe.model")).build()
    assert refused.value.code == 2
