"""Whether a text repeats itself too much, by the limits of Gopher (Rae et al., arXiv:2112.11446, table A1)."""

import itertools

import numpy as np

from llmjax.data import phrases

# Shares of lines or paragraphs that are there again, and of the characters in them.
_AGAIN = (("lines", "\n", 0.3, 0.2), ("paragraphs", "\n\n", 0.3, 0.2))
_TOP = {2: 0.2, 3: 0.18, 4: 0.16}  # of the characters, in the most frequent phrase of so many words
_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # in phrases that are there more than once
REASONS = (
    *(f"repeats {what}" for what, *_ in _AGAIN),
    *(f"repeats one phrase of {n} words" for n in _TOP),
    *(f"repeats phrases of {n} words" for n in _REPEATED),
)


def reason(text: str, known: dict[str, int]) -> str:
    """The first of REASONS that holds for a text, or nothing. `known` is as in `phrases.hashes`."""
    for what, cut, most, most_characters in _AGAIN:
        parts = [part for part in text.split(cut) if part.strip()]
        again = len(parts) - len(set(parts))
        if again > most * len(parts):
            return f"repeats {what}"
        characters = sum(map(len, parts))
        if again and characters - sum(map(len, set(parts))) > most_characters * characters:
            return f"repeats {what}"
    found = phrases.words(text)
    length_N = np.fromiter(map(len, found), np.int64, len(found))
    hash_N, total = phrases.hashes(found, known), int(length_N.sum())
    begin = np.concatenate([[0], np.cumsum(length_N)])
    for n, most in itertools.chain(_TOP.items(), _REPEATED.items()):
        if len(found) <= n:
            break
        unique, first, inverse, count = np.unique(
            phrases.phrases(hash_N, n), return_index=True, return_inverse=True, return_counts=True
        )
        if len(unique) == len(found) - n + 1:  # then no longer one is there again either
            break
        if n in _TOP:
            size = begin[first + n] - begin[first]
            top = int(np.where(count > 1, count * size, 0)[count == count.max()].max())
            if top > most * total:
                return f"repeats one phrase of {n} words"
        elif _covered(count[inverse] > 1, n, length_N) > most * total:
            return f"repeats phrases of {n} words"
    return ""


def _covered(again_P: np.ndarray, n: int, length_N: np.ndarray) -> int:
    """Characters of the words that are in a phrase marked in `again_P`."""
    edge = np.zeros(len(length_N) + 1, np.int64)
    edge[:-n] += again_P
    edge[n:] -= again_P
    return int(length_N[np.cumsum(edge[:-1]) > 0].sum())
