"""Encodes text by the words that were encoded before, exactly: text is mostly words that were there already.

Byte-level BPE merges within pieces that a pattern cuts. All the patterns known here end a piece between an ASCII
letter or digit and an ASCII blank or sign other than _, whatever stands around, and look no further than the blanks
behind a piece; so what lies between two such places can be encoded by itself, once. Any other tokenizer encodes each
text whole.
"""

import array
import itertools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmjax.data.tokenizer import PIECES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORDS = re.compile(r"[^A-Za-z0-9]*+(?:[A-Za-z0-9]++(?:[_\x80-\U0010ffff][^A-Za-z0-9]*+)?+)*+")
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


def encode(tokenizer: "Tokenizer", texts: Sequence[str], known: dict[str, bytes]) -> list[np.ndarray]:
    """The ids of each text, uint32; `known` keeps those of words from call to call, as bytes, which join quickly."""
    words = [_WORDS.findall(text) for text in texts]
    if len(known) > _MOST:
        known.clear()
    new = [word for word in dict.fromkeys(itertools.chain.from_iterable(words)) if word not in known]
    encoded = tokenizer.encode_batch_fast(new, add_special_tokens=False)
    long = [word for word in new if len(word) > _LONGEST]
    known.update((word, array.array("I", encoding.ids).tobytes()) for word, encoding in zip(new, encoded, strict=True))
    ids = [np.frombuffer(b"".join(map(known.__getitem__, parts)), np.uint32) for parts in words]
    for word in long:
        del known[word]
    return ids
