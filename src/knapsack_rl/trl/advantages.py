"""TRL's advantages for groups of any size, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from knapsack_rl.advantages import STD_EPSILON, advantages_of, group_advantages, per_prompt, prompt_weights
from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.groups import GroupOutcomes


def ragged_advantages(
    groups: GroupOutcomes,
    matrix: FloatArray,
    weights: FloatArray,
    *,
    scale: Any,
    aggregation: str,
    weighting: Any,
    advantage: Any = None,
    baseline: FloatArray | None = None,
) -> FloatArray:
    """Return TRL's advantages for groups of any size.

    Args:
        groups: the rollouts with their training reward: the weighted sum, NaN where no function gave a reward.
        matrix: (R, F) reward of each function, NaN where it gave none.
        weights: (F,) reward weights.
        scale: ``scale_rewards``: "group", "batch" or "none".
        aggregation: ``"sum_then_normalize"`` (GRPO), or ``"normalize_then_sum"`` (GDPO: each function normalised
            inside its group, then the sum over the batch).
        weighting: "auto", "rollout" or "prompt".
        advantage: None where ``scale`` decides; those over a mean need outcomes of 0 and 1 as rewards of the groups.
        baseline: (R,) for "posterior-mean".

    Returns:
        (R,) float64.

    Raises:
        ValueError: an option is unknown.
    """
    if aggregation == "sum_then_normalize":
        return advantages_of(groups, scale, weighting, advantage=advantage, baseline=baseline)
    if aggregation != "normalize_then_sum":
        raise ValueError(f"unknown multi_objective_aggregation {aggregation!r}")
    normalised = [group_advantages(groups.group_R, column, "group") for column in matrix.T]
    combined = np.where(groups.scored_R, np.asarray(normalised).T @ weights, np.nan)
    scored = combined[~np.isnan(combined)]
    if scored.size < 2:
        return np.zeros_like(combined)
    advantages = np.nan_to_num((combined - scored.mean()) / (scored.std(ddof=1) + STD_EPSILON))
    return advantages * prompt_weights(groups.group_R) if per_prompt(weighting, advantage) else advantages
