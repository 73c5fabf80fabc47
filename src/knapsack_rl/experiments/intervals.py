"""Intervals by resampling, and correlations: what a measurement is worth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.value import FloatArray, IntArray

RESAMPLES = 1000
SEED = 20250929


def bootstrap(
    units: int, statistic: Callable[[IntArray], float], *, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a statistic over units drawn again with replacement.

    Args:
        units: how many independent units there are (prompts, seeds), >= 1.
        statistic: of (units,) indices; what is not finite is left out.
        resamples: number of draws.
        level: of confidence.

    Returns:
        Lower and upper end; NaN where no draw gave a number. Equal arguments give equal ends.

    Source: Efron 1979.
    """
    rng = np.random.default_rng(SEED)
    drawn = np.array([statistic(rng.integers(0, units, units)) for _ in range(resamples)])
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def mean_interval(numbers: ArrayLike) -> tuple[float, float, float]:
    """(mean, lower, upper): the bootstrap interval of the mean over seeds or other units."""
    array = np.asarray(numbers, dtype=np.float64)
    return float(array.mean()), *bootstrap(array.size, lambda drawn: float(array[drawn].mean()))


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
