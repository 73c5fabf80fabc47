"""Intervals by resampling, and correlations: what a measurement is worth."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray

RESAMPLES = 1000
SEED = 20250929


def mean_interval(numbers: ArrayLike, *, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, lower, upper): percentile interval of the mean over units drawn again with replacement.

    Args:
        numbers: (U,) one for each independent unit, such as a seed; U >= 1.
        level: of confidence.

    Returns:
        Equal numbers give equal ends.

    Source: Efron 1979 (bootstrap).
    """
    array = np.asarray(numbers, dtype=np.float64)
    drawn = np.random.default_rng(SEED).integers(0, array.size, (RESAMPLES, array.size))
    low, high = np.quantile(array[drawn].mean(axis=1), [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(array.mean()), float(low), float(high)


def pearson(x: FloatArray, y: FloatArray) -> float:
    """Correlation of two series, NaN where one of them is constant."""
    a, b = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0.0 else float("nan")


def ranks(numbers: FloatArray) -> FloatArray:
    """Ranks from 1, equal numbers sharing their mean rank."""
    _, which, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2.0)[which]


def spearman(x: FloatArray, y: FloatArray) -> float:
    """Correlation of ranks, NaN where a series is constant."""
    return pearson(ranks(x), ranks(y))
