"""Advantages of ragged groups: how far each rollout is above what was expected of its prompt.

Suffix ``_R`` is per rollout, ``_G`` per group, see :mod:`knapsack_rl.groups`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.groups import GroupOutcomes, group_outcomes, of_outcomes
from knapsack_rl.success import SuccessRule

Scale = Literal["group", "batch", "none"]
Weighting = Literal["auto", "rollout", "prompt"]
Advantage = Literal["group-std", "group-mean", "posterior-mean"]

ADVANTAGES: tuple[Advantage, ...] = ("group-std", "group-mean", "posterior-mean")
"""``"group-std"``: GRPO's, over the deviation of the group. ``"group-mean"``: over its mean, as in MaxRL.
``"posterior-mean"``: against what is expected of the prompt by its history and the rest of the group."""

OVER_MEAN: tuple[Advantage, ...] = ("group-mean", "posterior-mean")
"""Those over a mean: of outcomes of 0 and 1, and of the same weight for every prompt."""

WEIGHTINGS: tuple[Weighting, ...] = ("auto", "rollout", "prompt")

STD_EPSILON = 1e-4
"""Added to the standard deviation before dividing, as TRL's GRPO does."""

SMALLEST_MEAN = 0.05
"""Of ``"posterior-mean"``: no success weighs more than at this success rate, lest single ones decide a step."""

NEARLY = 0.1
"""Of ``"posterior-mean"``: a baseline so near 0 or 1 is taken for it.

Rows whose outcome is as good as certain then have no gradient and need not be trained on. As the baseline of a rollout
does not depend on its outcome, the gradient stays without bias, and its variance rises by a ninth at most.
"""


def group_advantages(
    group_of_rollout: ArrayLike,
    rewards: ArrayLike,
    scale: Scale = "group",
    weighting: Weighting = "auto",
    *,
    advantage: Advantage | None = None,
    success: SuccessRule | None = None,
    baseline: ArrayLike | None = None,
    epsilon: float = STD_EPSILON,
) -> FloatArray:
    """Return advantages of ragged groups: A = (reward - group mean) / (standard deviation + epsilon) as in GRPO.

    Groups are found by id, never by position or size. The standard deviation is the sample one (divisor n - 1), as
    in TRL and verl. A group of one rollout, a group whose rewards are equal within rounding, and an unscored (NaN)
    rollout have advantage exactly 0.

    ``advantage="group-mean"`` is A = (reward - mean) / mean, without epsilon, and at most n - 1. A mean is a sensible
    divisor of rewards >= 0 only, so others are refused unless ``success`` says what counts as a success: then outcomes
    take the place of rewards, 1 for a success and 0 for a failure. A group without a success has advantage 0.

    ``advantage="posterior-mean"`` is A = (outcome - b) / max(b, 0.05) with the expected outcome b of each rollout, see
    :meth:`knapsack_rl.allocator.KnapsackAllocator.expected_outcomes`; in the difference, b below 0.1 counts as 0 and
    above 0.9 as 1. Groups of equal outcomes, and of a single rollout, have a gradient where these are a surprise.

    Args:
        group_of_rollout: (R,) group id of each row, whole numbers or strings, in any order.
        rewards: (R,) finite, or NaN (None in a list) for an unscored rollout, which is left out of its group's mean and
            deviation. Tensors of any type are accepted, also those that require a gradient; differences within the
            rounding of the given type count as none.
        scale: divide by the deviation of the ``"group"``, of the whole ``"batch"``, or by nothing (``"none"``,
            Dr. GRPO).
        weighting: ``"rollout"`` leaves every rollout the same weight, so a prompt weighs in proportion to its number
            of rollouts N_i (the paper's choice). ``"prompt"`` multiplies by R / (G N_i), so every prompt weighs as
            much as under uniform allocation. ``"auto"`` is per prompt for advantages over a mean, because hard
            prompts, which get more rollouts, would count twice otherwise, and per rollout for all else.
        advantage: ``"group-std"``, the same as ``scale="group"``, ``"group-mean"`` or ``"posterior-mean"``; by default
            ``scale`` decides.
        success: for advantages over a mean: a reward above this threshold is a success, or a function of the rewards
            that returns booleans.
        baseline: for ``"posterior-mean"``: (R,) expected outcome of each rollout in [0, 1], which must not depend on
            the rollout itself.
        epsilon: added to the deviation, >= 0.

    Returns:
        (R,) float64 advantages.

    Raises:
        ValueError: shapes differ, a reward is infinite, an option is unknown or contradicts another, rewards below 0
            are to be divided by their mean, or those of ``"posterior-mean"`` are not in [0, 1].

    Source: GRPO (Shao et al. 2024); paper, section 2; weighting: the objective per prompt or per rollout; group mean:
    MaxRL, arXiv 2602.02710; posterior mean: a baseline by the history of a prompt as in SPO (arXiv 2509.13232), which
    leaves the rollout out and borrows from other prompts as in arXiv 2511.03710.
    """
    if success is None:
        groups = group_outcomes(group_of_rollout, rewards)
    elif advantage in OVER_MEAN:
        groups = of_outcomes(group_outcomes(group_of_rollout, rewards, success))
    else:
        wanted = " or ".join(map(repr, OVER_MEAN))
        raise ValueError(f"success is for advantage={wanted}, got advantage={advantage!r}; leave it out")
    return advantages_of(groups, scale, weighting, advantage=advantage, baseline=baseline, epsilon=epsilon)


def advantages_of(
    groups: GroupOutcomes,
    scale: Scale = "group",
    weighting: Weighting = "auto",
    *,
    advantage: Advantage | None = None,
    baseline: ArrayLike | None = None,
    epsilon: float = STD_EPSILON,
) -> FloatArray:
    """Return :func:`group_advantages` of rollouts that are already grouped.

    Raises:
        ValueError: an option is unknown or contradicts another, rewards below 0 are to be divided by their mean, or
            those of ``"posterior-mean"`` are not in [0, 1].
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be 'group', 'batch' or 'none', got {scale!r}")
    check_advantage(advantage, scale, "scale")
    if not 0.0 <= epsilon < np.inf:
        raise ValueError(f"epsilon must be a number >= 0, got {epsilon!r}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be 'auto', 'rollout' or 'prompt', got {weighting!r}")
    if (baseline is None) != (advantage != "posterior-mean"):
        raise ValueError(f"advantage='posterior-mean' and baseline go together, got advantage={advantage!r}")
    group_R, rewards_R = groups.group_R, groups.rewards_R
    weight = prompt_weights(group_R) if per_prompt(weighting, advantage) else 1.0
    if baseline is not None:
        return _against(baseline, rewards_R) * weight
    live = groups.effective[group_R] & groups.scored_R
    deviation = np.where(live, rewards_R - groups.mean_reward[group_R], 0.0)
    divisor: FloatArray | float = 1.0
    if advantage == "group-mean":
        if (rewards_R < 0.0).any():
            raise ValueError(
                f"advantage='group-mean' divides by the mean of rewards >= 0, got {np.nanmin(rewards_R)}; pass "
                "success=... to divide outcomes of 0 and 1"
            )
        divisor = groups.mean_reward[group_R]
    elif scale == "group":
        squares = np.bincount(group_R, weights=deviation**2, minlength=groups.totals.size)
        divisor = np.sqrt(squares / np.maximum(groups.totals - 1, 1))[group_R] + epsilon
    elif scale == "batch":
        scored = rewards_R[groups.scored_R]
        divisor = (float(scored.std(ddof=1)) if scored.size > 1 else 0.0) + epsilon
    # Only live rollouts are divided: elsewhere the divisor may be 0. The mean of unequal rewards >= 0 is above 0.
    return np.divide(deviation, divisor, out=np.zeros_like(deviation), where=live) * weight


def _against(baseline: ArrayLike, outcome_R: FloatArray) -> FloatArray:
    """Return the (R,) advantages of outcomes over what was expected, 0 for unscored ones."""
    mean_R = np.asarray(baseline, dtype=np.float64)
    if mean_R.shape != outcome_R.shape or not ((mean_R >= 0.0) & (mean_R <= 1.0)).all():
        raise ValueError(f"baseline must hold a number in [0, 1] for each of {outcome_R.size} rollouts, got {mean_R}")
    if ((outcome_R < 0.0) | (outcome_R > 1.0)).any():
        raise ValueError(
            "advantage='posterior-mean' is about outcomes in [0, 1], got rewards from "
            f"{np.nanmin(outcome_R)} to {np.nanmax(outcome_R)}; pass success=... for outcomes of 0 and 1"
        )
    certain_R = np.where(mean_R < NEARLY, 0.0, np.where(mean_R > 1.0 - NEARLY, 1.0, mean_R))
    return np.nan_to_num((outcome_R - certain_R) / np.maximum(mean_R, SMALLEST_MEAN))


def check_advantage(advantage: str | None, scale: str, name: str) -> None:
    """Refuse an unknown advantage, or one beside another scale than that of the group.

    Args:
        advantage: None where the scale decides.
        scale: "group", "batch" or "none".
        name: of the option that sets the scale.

    Raises:
        ValueError: the advantage is unknown, or contradicts the scale.
    """
    if advantage is not None and advantage not in ADVANTAGES:
        raise ValueError(
            f"advantage must be one of {', '.join(ADVANTAGES)}, or None to go by {name}, got {advantage!r}"
        )
    if advantage is not None and scale != "group":
        raise ValueError(f"advantage={advantage!r} contradicts {name}={scale!r}; leave one of them out")


def per_prompt(weighting: str, advantage: str | None) -> bool:
    """Return whether every prompt weighs the same; ``"auto"`` is so for advantages over a mean."""
    return weighting == "prompt" or (weighting == "auto" and advantage in OVER_MEAN)


def prompt_weights(group_R: IntArray) -> FloatArray:
    """Return (R,) factors R / (G N_i), under which every prompt weighs as much as under uniform allocation.

    Args:
        group_R: (R,) group index of each row; G counts the groups with rows.
    """
    sizes = np.bincount(group_R)
    return group_R.size / (max(int(np.count_nonzero(sizes)), 1) * sizes[group_R])
