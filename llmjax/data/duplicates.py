"""Finds the documents of a build that were there before, over all of its units in their order.

Memory: some 100 bytes per document, however long: 100 GB for a billion. The files take 129 bytes for each.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmjax.data import phrases, shards
from llmjax.data.quality import REASONS, SIGNED

_EXACT, _NEAR = REASONS.index("a duplicate"), REASONS.index("nearly a duplicate")


def settle(signed: Sequence[Path], verdicts: Sequence[Path], duplicates: str) -> None:
    """Writes the verdict on every document of each unit, uint8: that of `quality.judge`, or what it repeats."""
    units = [_mapped(path) for path in signed]
    verdict_N = np.concatenate([unit["verdict"] for unit in units])
    if duplicates != "keep":
        kept_K = np.flatnonzero(verdict_N == 0)
        letters_N2 = np.concatenate([unit["letters"] for unit in units])
        verdict_N[kept_K[again(letters_N2[kept_K])]] = _EXACT
        del letters_N2
    if duplicates == "near":
        kept_K = np.flatnonzero(verdict_N == 0)
        first_K = np.arange(len(kept_K))
        for band in range(phrases.BANDS):
            band_K = np.concatenate([unit["bands"][:, band] for unit in units])[kept_K]
            first_K = joined(first_K, band_K)
        verdict_N[kept_K[first_K != np.arange(len(kept_K))]] = _NEAR
    cuts = np.cumsum([len(unit) for unit in units])[:-1]
    for path, part in zip(verdicts, np.split(verdict_N, cuts), strict=True):
        shards.write(path, part.tobytes())


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, SIGNED, "r") if path.stat().st_size else np.zeros(0, SIGNED)


def again(letters_N2: np.ndarray) -> np.ndarray:
    """The numbers of the documents whose letters one before has."""
    order_N = np.lexsort(letters_N2.T)  # stable: of equal ones the first comes first
    same = (letters_N2[order_N[1:]] == letters_N2[order_N[:-1]]).all(axis=1)
    return order_N[1:][same]


def joined(first_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """The first of each document's group, int64 [N], once all that have one key are joined to those `first_N` joins."""
    from scipy.sparse import coo_array, csgraph

    order_N = np.argsort(key_N, kind="stable")
    new = np.ones(len(order_N), bool)
    new[1:] = key_N[order_N[1:]] != key_N[order_N[:-1]]
    begin = np.maximum.accumulate(np.where(new, np.arange(len(order_N)), 0))
    before_N = np.flatnonzero(first_N != np.arange(len(first_N)))
    here = np.concatenate([before_N, order_N[~new]])
    there = np.concatenate([first_N[before_N], order_N[begin[~new]]])
    shape = (len(first_N), len(first_N))
    _, label_N = csgraph.connected_components(coo_array((np.ones(len(here), bool), (here, there)), shape), False)
    _, first = np.unique(label_N, return_index=True)
    return first[label_N]
