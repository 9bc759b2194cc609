"""How far a mean over sampled rows may be from the mean over all that the rows were drawn from."""

import math
from statistics import NormalDist

import numpy as np

FEWEST = 5  # clusters; fewer tell nothing of how they vary


def of_ratio(
    total_N: np.ndarray, weight_N: np.ndarray, cluster_N: np.ndarray, level: float = 0.95
) -> tuple[float, float] | None:
    """The interval of sum(total) / sum(weight) at this level; None with fewer than FEWEST clusters.

    Clusters are drawn independently, with all that is in them: the variance is that of the ratio's linearisation,
    summed per cluster (Cochran, Sampling Techniques, chapter 9A), and the quantile is Student's.
    """
    names, place_N = np.unique(cluster_N[weight_N > 0], return_inverse=True)
    count = len(names)
    if count < FEWEST:
        return None
    total_C, weight_C = (np.bincount(place_N, x_N[weight_N > 0], count) for x_N in (total_N, weight_N))
    mean = total_C.sum() / weight_C.sum()
    off_C = total_C - mean * weight_C
    error = math.sqrt(count / (count - 1) * np.sum(off_C**2)) / weight_C.sum()
    half = student(count - 1, level) * error
    return float(mean - half), float(mean + half)


def student(freedom: int, level: float) -> float:
    """Student's t that a share `level` of draws stays within, either side; to 1 % from 4 degrees of freedom on.

    The expansion around the normal quantile (Abramowitz and Stegun, 26.7.5).
    """
    z, n = NormalDist().inv_cdf(0.5 + level / 2), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, 1))
