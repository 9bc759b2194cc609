"""Intervals hold what they promise, for rows that belong together too."""

import numpy as np
import pytest

from llmjax.evaluate import interval


@pytest.mark.parametrize(
    ("freedom", "level", "known"),
    [
        (4, 0.95, 2.7764),
        (9, 0.95, 2.2622),
        (29, 0.95, 2.0452),
        (9, 0.99, 3.2498),
        (29, 0.9, 1.6991),
        (9999, 0.95, 1.96),
    ],
)
def test_students_quantile_is_the_tables(freedom, level, known):
    assert interval.student(freedom, level) == pytest.approx(known, rel=0.01)


def covered(*, by_document: bool, documents: int = 60, trials: int = 2000) -> float:
    """How often the interval of a mean over rows holds the true mean 2, where a document's rows are alike."""
    random, inside = np.random.default_rng(3), 0
    for _ in range(trials):
        sizes = random.integers(1, 12, documents)
        own = random.normal(2, 0.5, documents)
        cluster_N = np.repeat(np.arange(documents), sizes)
        weight_N = random.integers(50, 65, len(cluster_N)).astype(float)
        total_N = (np.repeat(own, sizes) + random.normal(0, 0.2, len(cluster_N))) * weight_N
        low, high = interval.of_ratio(total_N, weight_N, cluster_N if by_document else np.arange(len(cluster_N)))
        inside += low <= 2 <= high
    return inside / trials


def test_an_interval_over_documents_holds_the_mean_19_times_of_20():
    assert 0.93 <= covered(by_document=True) <= 0.97


def test_rows_taken_one_by_one_would_claim_too_much():
    assert covered(by_document=False) < 0.75


def test_an_interval_lies_around_the_ratio_and_rows_without_targets_do_not_count():
    total_N, weight_N = np.array([3.0, 5, 2, 7, 1, 4, 9]), np.array([2.0, 4, 2, 4, 1, 2, 0])
    low, high = interval.of_ratio(total_N, weight_N, np.arange(7))
    assert (low + high) / 2 == pytest.approx(22 / 15)
    total_N[6] = 0
    assert interval.of_ratio(total_N, weight_N, np.arange(7)) == (low, high)


def test_few_documents_give_no_interval():
    assert interval.of_ratio(np.ones(8), np.ones(8), np.arange(8) // 2) is None
