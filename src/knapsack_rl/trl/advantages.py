"""TRL's advantages for groups of any size, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.groups import STD_EPSILON, group_advantages, prompt_weights


def ragged_advantages(
    group_R: IntArray,
    matrix: FloatArray,
    total: FloatArray,
    weights: FloatArray,
    *,
    scale: Any,
    aggregation: str,
    weighting: Any,
) -> FloatArray:
    """TRL's advantages for groups of any size.

    Args:
        group_R: (R,) group of each rollout.
        matrix: (R, F) reward of each function, NaN where it gave none.
        total: (R,) weighted sum, NaN where no function gave a reward.
        weights: (F,) reward weights.
        scale: ``scale_rewards``: "group", "batch" or "none".
        aggregation: ``"sum_then_normalize"`` (GRPO), or ``"normalize_then_sum"`` (GDPO: each function normalised
            inside its group, then the sum over the batch).
        weighting: "rollout" or "prompt".

    Returns:
        (R,) float64.

    Raises:
        ValueError: an option is unknown.
    """
    if aggregation == "sum_then_normalize":
        return group_advantages(group_R, total, scale, weighting)
    if aggregation != "normalize_then_sum":
        raise ValueError(f"unknown multi_objective_aggregation {aggregation!r}")
    normalised = [group_advantages(group_R, column, "group") for column in matrix.T]
    combined = np.where(np.isnan(total), np.nan, np.asarray(normalised).T @ weights)
    scored = combined[~np.isnan(combined)]
    if scored.size < 2:
        return np.zeros_like(total)
    advantages = np.nan_to_num((combined - scored.mean()) / (scored.std(ddof=1) + STD_EPSILON))
    return advantages * prompt_weights(group_R) if weighting == "prompt" else advantages
