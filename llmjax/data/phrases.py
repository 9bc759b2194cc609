"""Texts as words, phrases of words, and MinHash signatures, all as numbers: what duplicates and overlaps are found by.

A word is a run of letters, digits and _ in lower case, or one character of Chinese or Japanese. A phrase of n words is
64 bits made of the hashes of its words: two that differ are taken for one in 1 of 2^64 pairs.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from llmjax.data.dataset import mix

BANDS, ROWS = 14, 8  # two texts that share 7 phrases of 10 become candidates half of the time, of 6 in 10, 1 in 5
SHINGLE = 5  # words of a phrase by which texts are compared
_EAST = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_EAST}]|[^\W{_EAST}]+")
_MOST = 1 << 19  # words whose hashes are kept
_FACTOR = np.uint64(0xD1342543DE82EF95)
_AT_ONCE = 256  # phrases under all hash functions: what a core's cache holds


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def hashes(found: Sequence[str], known: dict[str, int]) -> np.ndarray:
    """A hash of each word, uint64; `known` keeps those of words from call to call."""
    if len(known) > _MOST:
        known.clear()
    for word in {word for word in found if word not in known}:
        known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
    return np.fromiter(map(known.__getitem__, found), np.uint64, len(found))


def phrases(hash_N: np.ndarray, length: int) -> np.ndarray:
    """The phrases of `length` words, uint64 [N - length + 1]."""
    count = max(0, len(hash_N) - length + 1)
    total = np.zeros(count, np.uint64)
    for n in range(length):
        total = total * _FACTOR + hash_N[n : n + count]
    return mix(total)


def no_minima() -> np.ndarray:
    """The signature of a text without phrases: uint32 [BANDS * ROWS]."""
    return np.full(BANDS * ROWS, 0xFFFFFFFF, np.uint32)


def minima(phrase_N: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The least of all phrases under each hash function, uint32 [BANDS * ROWS] (MinHash, Broder 1997).

    The share of equal numbers in two signatures is, but for chance, the share of the phrases that two texts have in
    common among all that either has.
    """
    number = np.arange(2 * BANDS * ROWS, dtype=np.uint64)
    factor, offset = np.split(mix(number), 2)
    factor = (factor | np.uint64(1))[:, None]
    for at in range(0, len(phrase_N), _AT_ONCE):
        hashed = (phrase_N[at : at + _AT_ONCE] * factor + offset[:, None]) >> np.uint64(32)
        before = np.minimum(before, hashed.min(axis=1).astype(np.uint32))
    return before


def bands(minima_M: np.ndarray) -> np.ndarray:
    """A number for each band of a signature: texts that share one are candidates; uint64 [BANDS]."""
    return phrases_of_rows(minima_M.reshape(BANDS, ROWS).astype(np.uint64))


def phrases_of_rows(value_NR: np.ndarray) -> np.ndarray:
    """One number for each row of numbers, uint64 [N]."""
    total = np.zeros(len(value_NR), np.uint64)
    for column in value_NR.T:
        total = mix(total * _FACTOR + column)
    return total
