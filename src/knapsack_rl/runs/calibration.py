"""Predicted against realised non-zero gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Calibration:
    """Predicted against realised non-zero gradients, in bins of equal width over [0, 1] that have visits.

    Attributes:
        predicted: Mean prediction of the bin.
        realised: Share of groups in the bin that carried a gradient.
        visits: Groups in the bin.
        brier: Mean squared error of all predictions (0 is perfect); NaN if there are none.
        brier_constant: The same error of a constant prediction, the overall share.
    """

    predicted: FloatArray
    realised: FloatArray
    visits: IntArray
    brier: float
    brier_constant: float


def calibrate(predicted: ArrayLike, effective: ArrayLike, bins: int = 10) -> Calibration:
    """Compare predictions with outcomes.

    Args:
        predicted: (V,) predicted probability of a non-zero gradient; NaN entries are left out.
        effective: (V,) whether the group carried a gradient.
        bins: Number of bins of equal width over [0, 1].
    """
    chance, outcome = np.asarray(predicted, dtype=np.float64), np.asarray(effective, dtype=np.float64)
    known = np.isfinite(chance)
    chance, outcome = chance[known], outcome[known]
    place = np.clip((chance * bins).astype(np.int64), 0, bins - 1)
    visits = np.bincount(place, minlength=bins)
    filled = visits > 0
    return Calibration(
        predicted=np.bincount(place, chance, minlength=bins)[filled] / visits[filled],
        realised=np.bincount(place, outcome, minlength=bins)[filled] / visits[filled],
        visits=visits[filled],
        brier=float(np.mean((chance - outcome) ** 2)) if chance.size else math.nan,
        brier_constant=float(outcome.var()) if chance.size else math.nan,
    )
