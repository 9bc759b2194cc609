"""SentencePiece models (.model) as tokenizers of the `tokenizers` library, which the rest of llmjax knows.

What is made of a model gives its ids, which is compared with the `sentencepiece` library on awkward texts; a model for
which it does not hold is refused. Two things differ: a word that can be cut in two ways that are equally likely to
seven digits, and, where a model normalises as NFKC does, combining marks that no letter takes up.
"""

import re
from typing import TYPE_CHECKING

from llmjax.errors import DATA, USAGE, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED, _BYTE = range(
    1, 7
)  # kinds of pieces, as sentencepiece_model.proto has them
_UNIGRAM, _BPE = 1, 2
_PROBES = (
    *("", " ", "a", "The quick brown fox; don't panic: 3.14159 + 2,718 = ?", "  two  blanks \t tab\nline\r\n\n  end  "),
    *(
        "def f(self, x_1):\n        return self.x_1 ** 2  # twelve\n",
        "naïve Ünïcode ﬁ １２ ① e\u0301 \u00a0 \u200b \ufeff",
    ),
    *("日本語のテキスト、한국어 и русский язык", "🙂👩\u200d👩\u200d👧 \U0010ffff \x00\x07", "aaaaaaa bbbbbb ababab"),
    "<s> a </s> <unk> <0x0A> ⁇ ▁ ▁▁ <",
)


def convert(content: bytes, name: str) -> "Tokenizer":
    """The tokenizer of a SentencePiece model.

    Raises:
      Refused: its library is not installed (code 2); it is no such model, or one that cannot be had exactly (code 65).
    """
    try:
        import sentencepiece
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2 as schema
    except ImportError:
        raise Refused(f"'{name}' needs sentencepiece: pip install 'llmjax[sentencepiece]'.", USAGE) from None
    model = schema.ModelProto()
    try:
        model.ParseFromString(content)
        own = sentencepiece.SentencePieceProcessor(model_proto=content)
    except (DecodeError, RuntimeError):
        raise Refused(f"'{name}' is not a SentencePiece model: give a .model file or a tokenizer.json.", DATA) from None
    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        raise Refused(f"'{name}' is neither a unigram nor a BPE model: convert it to a tokenizer.json.", DATA)
    made = _made(model)
    marks = [piece.piece for piece in model.pieces if piece.type == _OWN][:64]
    for text in (*_PROBES, *(f"a {mark}b{mark} {mark} c" for mark in marks)):
        if made.encode(text, add_special_tokens=False).ids != own.encode(text):
            raise Refused(
                f"'{name}' gives other ids for {text!r} once it is converted: convert it to a tokenizer.json by hand.",
                DATA,
            )
    return made


def _made(model) -> "Tokenizer":
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

    pieces, own = model.pieces, [piece.piece for piece in model.pieces if piece.type == _OWN]
    how = model.normalizer_spec
    made = Tokenizer(_unigram(model) if model.trainer_spec.model_type == _UNIGRAM else _bpe(model))
    steps = [normalizers.Precompiled(how.precompiled_charsmap)] if how.precompiled_charsmap else []
    if how.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if how.add_dummy_prefix and not own:
        steps.append(normalizers.Prepend(_SPACE))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    cuts = [] if any(_SPACE in p.piece[1:] for p in pieces) else [_words()]
    if model.trainer_spec.model_type == _UNIGRAM:  # a name in a text is no piece; merges come to none
        hidden = [p.piece for p in pieces if p.type in (_UNKNOWN, _CONTROL, _UNUSED, _BYTE) and len(p.piece) > 1]
        inside = "|".join(f"{re.escape(name[:-1])}(?={re.escape(name[-1])})" for name in hidden)
        cuts += [pre_tokenizers.Split(Regex(inside), "merged_with_previous")] if inside else []
    if cuts:
        made.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    made.decoder = _decoder(how.add_dummy_prefix)
    made.add_special_tokens([AddedToken(p.piece, normalized=False, special=True) for p in pieces
                             if p.type in (_UNKNOWN, _CONTROL)])  # fmt: skip
    made.add_tokens([AddedToken(name, normalized=True) for name in own])
    made.encode_special_tokens = True
    return made


def _words():
    """Cuts before every blank: no piece reaches over one."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(f"{_SPACE}?[^{_SPACE}]*"), "isolated")


def _unigram(model):
    from tokenizers import models

    vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
    spec = model.trainer_spec
    return models.Unigram(vocabulary, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)


def _bpe(model):
    from tokenizers import models

    vocabulary = {piece.piece: n for n, piece in enumerate(model.pieces)}
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type in (_NORMAL, _OWN, _UNUSED)}
    merges = []
    for piece in model.pieces:
        if piece.type == _NORMAL:
            parts = [(piece.piece[:at], piece.piece[at:]) for at in range(1, len(piece.piece))]
            found = [(a, b) for a, b in parts if a in normal and b in normal]
            merges += [(-piece.score, vocabulary[a], vocabulary[b], (a, b)) for a, b in found]
    spec = model.trainer_spec
    return models.BPE(
        vocabulary, [pair for *_, pair in sorted(merges)], unk_token=model.pieces[spec.unk_id].piece, fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )  # fmt: skip


def _decoder(prefix: bool):
    from tokenizers import decoders

    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
