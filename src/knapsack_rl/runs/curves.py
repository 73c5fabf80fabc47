"""Curves of training runs: smoothing, averages over seeds, rollouts to a target, and intervals of a mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> FloatArray:
    """Return part / whole, NaN where the whole is zero."""
    whole = np.broadcast_to(whole, part.shape)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def tail_mean(values: ArrayLike, share: float = 0.2) -> float:
    """Mean of the finite values among the last `share` of the entries (at least one), NaN if there are none."""
    array = np.asarray(values, dtype=np.float64)
    tail = array[array.size - math.ceil(share * array.size) :]
    return float(np.mean(tail[np.isfinite(tail)])) if np.isfinite(tail).any() else math.nan


def moving_average(values: ArrayLike, window: int) -> FloatArray:
    """Centred moving average along the first axis; the window is cut at the ends, NaN entries are left out.

    Args:
        values: Array of any number of dimensions.
        window: Odd number of entries to average.

    Raises:
        ValueError: If the window is even or below 1.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be an odd number of at least 1, got {window}")
    array = np.asarray(values, dtype=np.float64)
    half, size = window // 2, array.shape[0]
    parts = [array[max(0, i - half) : i + half + 1] for i in range(size)]
    known = np.stack([np.isfinite(part).sum(axis=0) for part in parts]) if parts else np.zeros(array.shape)
    totals = np.stack([np.nansum(part, axis=0) for part in parts]) if parts else np.zeros(array.shape)
    return ratio(totals, known)


def rollouts_to_reach(rollouts: ArrayLike, accuracy: ArrayLike, target: float) -> float:
    """Rollouts at which a curve first reaches a target, with linear interpolation between evaluations.

    The curve is not smoothed here. The first crossing of a noisy curve comes too early, so smooth it first:
    comparisons pass `moving_average(accuracy, 3)`, a centred mean of three evaluations (two at the ends),
    averaged over seeds.

    Args:
        rollouts: Rollouts generated before each evaluation, ascending.
        accuracy: Accuracy of each evaluation, NaN where unknown.
        target: Accuracy to reach.

    Returns:
        The rollouts, or NaN if the target is never reached.

    Raises:
        ValueError: If the shapes differ.
    """
    x, y = np.asarray(rollouts, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"rollouts and accuracy must have the same shape, got {x.shape} and {y.shape}")
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    reached = np.flatnonzero(y >= target)
    if not reached.size:
        return math.nan
    at = int(reached[0])
    if at == 0:
        return float(x[0])
    return float(x[at - 1] + (x[at] - x[at - 1]) * (target - y[at - 1]) / (y[at] - y[at - 1]))


@dataclass(frozen=True, eq=False)
class Curve:
    """The mean of several curves on a common grid, with the range they span.

    Attributes:
        x: Grid, ascending.
        mean: Mean of the curves.
        low: Lowest of the curves.
        high: Highest of the curves.
    """

    x: FloatArray
    mean: FloatArray
    low: FloatArray
    high: FloatArray


def mean_curve(curves: Iterable[tuple[ArrayLike, ArrayLike]]) -> Curve:
    """Average curves that may have been measured at different points.

    Each curve is interpolated linearly at all measured points inside the range that every curve covers. The mean
    therefore ends with the shortest curve: a mean over fewer curves would jump there. Curves without a finite
    point are left out.

    Args:
        curves: Pairs of x (ascending) and y.
    """
    points: list[tuple[FloatArray, FloatArray]] = []
    for x, y in curves:
        x_known, y_known = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        finite = np.isfinite(y_known)
        if finite.any():
            points.append((x_known[finite], y_known[finite]))
    if not points:
        empty = np.zeros(0)
        return Curve(empty, empty, empty, empty)
    grid = np.unique(np.concatenate([x for x, _ in points]))
    start, end = max(x[0] for x, _ in points), min(x[-1] for x, _ in points)
    grid = grid[(grid >= start) & (grid <= end)]
    values = np.stack([np.interp(grid, x, y) for x, y in points])
    return Curve(grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Half-width of the t-interval of a mean, None for fewer than two values."""
    if len(values) < 2:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return t_quantile(0.5 + confidence / 2, len(values) - 1) * error


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution with a whole number of degrees of freedom.

    The distribution function has a closed form in theta = atan(t / sqrt(degrees)) (Abramowitz and Stegun 26.7.3
    and 26.7.4), which is inverted by bisection, so drawing an interval needs no statistics package.

    Args:
        probability: Between 0.5 (included) and 1 (excluded).
        degrees: Degrees of freedom, at least 1.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"probability must be in [0.5, 1) and degrees at least 1, got {probability} and {degrees}")

    def central(theta: float) -> float:
        """Probability that the absolute value of t stays below sqrt(degrees) * tan(theta)."""
        odd = degrees % 2
        term = math.cos(theta) if odd else 1.0
        total = term if degrees > 1 else 0.0
        for k in range(2 + odd, degrees, 2):
            term *= math.cos(theta) ** 2 * (k - 1) / k
            total += term
        return (theta + math.sin(theta) * total) * 2 / math.pi if odd else math.sin(theta) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves an interval of 1.6 down to the resolution of a double
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)
