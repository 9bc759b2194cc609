"""Words that are encoded apart give the ids of the whole text, for every tokenizer that is taken for such a one."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmjax.data import words
from llmjax.data.tokenizer import BPE, Bytes, plain

TEXTS = [
    "def f(self, x_1):\n        return self.x_1 + 'it''s' if x else \"don't\"\n\n\n    # 12345 things,  two blanks\n"
    * 3,
    "It's we'll I'D they've; naïve café — über_all x² 漢字 tests.\r\n\tTabbed\u00a0hard \u2028line 1,000.5e-3\n" * 3,
]


def trained(pre, alphabet=tuple(pre_tokenizers.ByteLevel.alphabet())):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"]
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=sorted(alphabet), special_tokens=special,
                                   show_progress=False)
    )  # fmt: skip
    return plain(made)


def later():
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words._LATER), "isolated"), level])


TOKENIZERS = {
    "ours": BPE(500).build(TEXTS),
    "bytes": Bytes().build(),
    "gpt2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama3": trained(later()),
    "lacks bytes": trained(pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet=()),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(
        st.one_of(
            st.text(st.sampled_from("aZ09 '_\n\r\t.,(-é²漢\u00a0\u0301\u2028sStTlL"), max_size=40),
            st.text(max_size=30),
            st.lists(st.sampled_from(TEXTS[0].split(" ") + TEXTS[1].split(" ")), max_size=20).map(" ".join),
        ),
        max_size=4,
    )
)
def test_words_apart_give_the_ids_of_the_text(name, texts):
    tokenizer, known = TOKENIZERS[name], words.known(TOKENIZERS[name])
    assert words.apart(tokenizer)
    for _ in range(2):  # and once all is known
        got = words.encode(tokenizer, texts, known)
        assert [ids.tolist() for ids in got] == [
            e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]
        assert all(len(word) <= words._LONGEST for word in known.ids)


def test_a_text_is_cut_and_nothing_of_it_is_lost():
    for text in TEXTS:
        parts = words._WORDS.findall(text)
        assert "".join(parts) == text and len(parts) > 30


def test_numbers_that_a_vocabulary_leaves_out_do_no_harm():
    facts = json.loads(TOKENIZERS["ours"].to_str())
    vocab = facts["model"]["vocab"]
    vocab.update({token: number + 10_000 for token, number in vocab.items() if number > 300})
    apart = Tokenizer.from_str(json.dumps(facts))
    apart.encode_special_tokens = True
    assert words.apart(apart) and apart.get_vocab_size() < max(apart.get_vocab().values())
    got = words.encode(apart, TEXTS, words.known(apart))
    assert [ids.tolist() for ids in got] == [apart.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert max(ids.max() for ids in got) > 10_000


def test_words_are_not_told_apart_where_an_id_goes_over_their_end():
    sizes = np.array([1, 2])
    assert words._ids_of_each([" a", " b"], np.array([0, 0, 0, 0], np.uint32), sizes) != {}
    assert words._ids_of_each([" a", " b"], np.array([0, 1, 0], np.uint32), sizes) == {}  # as many bytes in all
    assert words._ids_of_each([" a", " b"], np.array([0, 0, 0], np.uint32), sizes) == {}


def test_other_tokenizers_encode_a_text_whole():
    other = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+ \w+|."), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    assert not words.apart(trained(other)) and not words.apart(trained(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    lower = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    lower.normalizer = normalizers.NFC()
    assert not words.apart(lower)
    special = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    special.encode_special_tokens = False
    assert not words.apart(special)
    added = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    added.add_tokens(["a b"])
    assert not words.apart(added)
