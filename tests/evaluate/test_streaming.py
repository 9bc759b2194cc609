"""Text appears as it is made, whole characters at a time, and up to where it is to stop."""

import pytest
from tokenizers import Tokenizer, decoders, models

from llmjax.data.tokenizer import Bytes
from llmjax.evaluate.streaming import before, pieces, until


def test_characters_of_several_bytes_are_never_torn():
    tokenizer, text = Bytes().build(), "aé漢🙂b"
    shown = list(pieces(tokenizer.encode(text).ids, tokenizer.decode))
    assert shown == list(text)


@pytest.mark.parametrize("data", [b"a\xff\xfe\xfdb", b"\xe6\xbc", b"\xf0\x9f\x99x\xe6\xbc\xa2", b"\x80" * 9 + b"ok"])
def test_bytes_that_are_no_text_are_shown_as_when_all_are_decoded_at_once(data):
    tokenizer = Bytes().build()
    assert "".join(pieces(list(data), tokenizer.decode)) == tokenizer.decode(list(data))


def test_blanks_between_words_stay_where_a_decoder_drops_the_first():
    tokenizer = Tokenizer(models.BPE(vocab={"▁to": 0, "▁be": 1, "<0xE6>": 2, "<0xBC>": 3, "<0xA2>": 4}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert list(pieces([0, 1, 2, 3, 4, 1], tokenizer.decode)) == ["to", " be", "漢", " be"]


def test_a_text_ends_before_the_first_of_the_strings_wherever_tokens_cut_it():
    stop = ("\n\n", "STOP")
    assert "".join(until(["a\n", "b S", "T", "OP and", " on"], stop)) == "a\nb "
    assert "".join(until(["a\n", "\nb STOP"], stop)) == "a"
    assert "".join(until(["S", "T", "ART S"], stop)) == "START S"
    assert list(until(["ab", "S", "c"], stop)) == ["ab", "Sc"]
    assert list(until(iter("ab"), ())) == ["a", "b"]
    assert before("x STOP \n\n", stop) == "x " and before("x STO", stop) is None


def test_nothing_is_asked_for_once_a_text_has_stopped():
    def endless():
        while True:
            yield "x."

    assert list(until(endless(), (".",))) == ["x"]
