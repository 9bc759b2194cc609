"""Encodes text by the words that were encoded before, exactly: text is mostly words that were there already.

Byte-level BPE merges within pieces that a pattern cuts. All the patterns known here end a piece between an ASCII
letter or digit and an ASCII blank or sign other than _, whatever stands around, and look no further than the blanks
behind a piece; so what lies between two such places can be encoded by itself, once. Any other tokenizer encodes each
text whole.
"""

import itertools
import json
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llmjax.data.tokenizer import PIECES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORDS = re.compile(r"[^A-Za-z0-9]*+(?:[A-Za-z0-9]++(?:[_\x80-\U0010ffff][^A-Za-z0-9]*+)?+)*+")
_ENDS = frozenset(string.ascii_letters + string.digits)
_BEGINS = frozenset(map(chr, range(128))) - _ENDS - {"_"}
_TOGETHER = 500  # words that are encoded as one text
_LONGEST = 64  # characters of what is kept: longer ones hardly come again
_MOST = 1 << 19  # kept, in 150 MB at most; then all is forgotten
_LATER = (  # of GPT-4 and Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_KNOWN = (PIECES, _LATER)


def apart(tokenizer: "Tokenizer") -> bool:
    """Whether this tokenizer encodes words by themselves as it does within a text."""
    facts = json.loads(tokenizer.to_str())
    model, plain = facts["model"], dict(add_prefix_space=False)
    if facts["normalizer"] or model["type"] != "BPE" or any(not token["special"] for token in facts["added_tokens"]):
        return False
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    if not tokenizer.encode_special_tokens:  # the name of a special token would be cut
        return False
    match facts["pre_tokenizer"]:
        case {"type": "ByteLevel", "use_regex": True, **rest}:
            return plain.items() <= rest.items()
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, **rest},
            ],
        }:
            return pattern in _KNOWN and plain.items() <= rest.items()
    return False


class Known(NamedTuple):
    """What a tokenizer has made of words so far."""

    ids: dict[str, bytes]
    "Of each word its ids, uint32, as bytes, which join quickly."
    sizes: np.ndarray
    "Of each id how many bytes of text it stands for."


def known(tokenizer: "Tokenizer") -> Known:
    """Nothing yet, of a tokenizer that encodes words apart."""
    vocab = tokenizer.get_vocab()
    sizes = np.zeros(max(vocab.values()) + 1, np.int64)  # numbers may be left out
    for token, number in vocab.items():
        sizes[number] = len(token)  # byte-level tokens are written with one character for a byte
    return Known({}, sizes)


def encode(tokenizer: "Tokenizer", texts: Sequence[str], before: Known) -> list[np.ndarray]:
    """The ids of each text, uint32; `before` keeps those of words from call to call."""
    words, ids = [_WORDS.findall(text) for text in texts], before.ids
    if len(ids) > _MOST:
        ids.clear()
    new = [word for word in dict.fromkeys(itertools.chain.from_iterable(words)) if word not in ids]
    inner = [word for word in new if word and word[0] in _BEGINS and word[-1] in _ENDS]
    groups = [inner[at : at + _TOGETHER] for at in range(0, len(inner), _TOGETHER)]
    for group, encoding in zip(
        groups, tokenizer.encode_batch_fast(["".join(group) for group in groups], add_special_tokens=False), strict=True
    ):
        ids.update(_ids_of_each(group, np.array(encoding.ids, np.uint32), before.sizes))
    rest = [word for word in new if word not in ids]
    for word, encoding in zip(rest, tokenizer.encode_batch_fast(rest, add_special_tokens=False), strict=True):
        ids[word] = np.array(encoding.ids, np.uint32).tobytes()
    found = [np.frombuffer(b"".join(map(ids.__getitem__, parts)), np.uint32) for parts in words]
    for word in new:
        if len(word) > _LONGEST:
            del ids[word]
    return found


def _ids_of_each(group: list[str], ids_N: np.ndarray, sizes: np.ndarray) -> dict[str, bytes]:
    """The ids of each word out of those of all, one after another; none unless an id ends where each word does.

    None does where the tokenizer leaves bytes out that it has no id for.
    """
    end_N, end_W = np.cumsum(sizes[ids_N]), np.cumsum([len(word.encode()) for word in group])
    if not np.isin(end_W, end_N).all():
        return {}
    whole, cuts = ids_N.tobytes(), (4 * (np.searchsorted(end_N, end_W) + 1)).tolist()
    return {word: whole[start:end] for word, start, end in zip(group, [0, *cuts], cuts, strict=False)}
