"""Ragged groups: outcomes and statistics when every prompt has its own number of rollouts.

A *group* is the set of rollouts of one prompt. Groups may have any size and their rows may come in any order:
``group_of_rollout`` names the group of each row, so nothing here reshapes by a group size. Suffix ``_R`` is per
rollout, ``_G`` per group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray, as_float64
from knapsack_rl.ids import check_prompt_ids
from knapsack_rl.success import BoolArray, SuccessRule, successes_of, total_reward

RELATIVE_SPREAD = 1e-6
"""Rewards of a group count as equal within this share of their magnitude.

Sums of floating-point rewards differ in their last digits; dividing by such a spread would turn rounding into
advantages of thousands. Rewards in a type of fewer digits (float16, bfloat16) get the tolerance of that type.
"""

ABSOLUTE_SPREAD = 1e-12
"""Rewards within this distance count as equal too: the residue of sums that should be zero."""

DIFFICULTY_CLASSES = ("extremely easy", "easy", "medium", "hard", "extremely hard")


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of a batch of ragged groups. Ratios are in [0, 1] and NaN where nothing was scored.

    Attributes:
        rollouts: rows with a reward (NaN rewards are left out everywhere below).
        prompts: groups with at least one reward.
        effective_gradient_ratio: rollouts in groups with non-zero reward variance / rollouts (the headline).
        effective_prompt_ratio: groups with non-zero reward variance / groups. Report it beside the first: moving
            budget can raise the first alone.
        covered_by_success: groups with at least one success / groups.
        covered_by_failure: groups with at least one failure / groups.
        all_correct: groups with successes only / groups.
        all_wrong: groups with failures only / groups.
        class_shares: share of groups per difficulty class, in the order of ``DIFFICULTY_CLASSES``.
        smallest_group: rollouts of the smallest group.
        largest_group: rollouts of the largest group.

    Source: paper, section 4 (effective gradient ratio) and its difficulty classes.
    """

    rollouts: int
    prompts: int
    effective_gradient_ratio: float
    effective_prompt_ratio: float
    covered_by_success: float
    covered_by_failure: float
    all_correct: float
    all_wrong: float
    class_shares: tuple[float, ...]
    smallest_group: int
    largest_group: int

    def as_dict(self) -> dict[str, float]:
        """Return flat numbers for a logger; classes become ``class/extremely_easy`` and so on."""
        flat = {name: float(number) for name, number in vars(self).items() if name != "class_shares"}
        for name, share in zip(DIFFICULTY_CLASSES, self.class_shares, strict=True):
            flat[f"class/{name.replace(' ', '_')}"] = share
        return flat


@dataclass(frozen=True, eq=False)
class GroupOutcomes:
    """One batch of rollouts, grouped once; all later code reads the rewards from here.

    Attributes:
        group_R: (R,) group index 0..G-1 of each row.
        rewards_R: (R,) reward of each row, NaN for an unscored one.
        success_R: (R,) whether the row is a success; false for an unscored one.
        totals: (G,) rows with a reward.
        successes: (G,) successful rows.
        effective: (G,) whether the rewards of the group differ.
        mean_reward: (G,) mean reward, NaN where no row has one.
    """

    group_R: IntArray  # noqa: N815 - the suffix names the shape
    rewards_R: FloatArray  # noqa: N815
    success_R: BoolArray  # noqa: N815
    totals: IntArray
    successes: IntArray
    effective: BoolArray
    mean_reward: FloatArray

    @property
    def scored_R(self) -> BoolArray:  # noqa: N802 - the suffix names the shape
        """(R,) whether the row has a reward."""
        return ~np.isnan(self.rewards_R)

    @property
    def first_row(self) -> IntArray:
        """(G,) index of the first row of each group, -1 for a group without rows."""
        first = np.full(self.totals.size, -1, dtype=np.int64)
        first[self.group_R[::-1]] = np.arange(self.group_R.size)[::-1]  # of equal indices the last one is kept
        return first

    @property
    def expected_alone(self) -> FloatArray:
        """(G, 2) probability that a rollout succeeds by the rest of its group alone, from a flat prior.

        The rest is all but one failure in the first column, and all but one success in the second.
        """
        failures = self.totals - self.successes
        successes_left = np.maximum(self.successes[:, None] - [0, 1], 0)
        failures_left = np.maximum(failures[:, None] - [1, 0], 0)
        return (successes_left + 1.0) / (successes_left + failures_left + 2.0)

    def by_outcome(self, numbers: FloatArray) -> FloatArray:
        """Return (R,) the number of each rollout.

        Args:
            numbers: (G, 2) of a failure of each group, and of a success.
        """
        return numbers[self.group_R, self.success_R.astype(np.intp)]


def _as_codes(group_of_rollout: ArrayLike) -> NDArray[Any]:
    """Return whole numbers as they are and other ids numbered: numpy would turn a mixed list into strings."""
    if isinstance(group_of_rollout, np.ndarray) and group_of_rollout.dtype.kind in "iu":
        return group_of_rollout
    array = np.asarray(group_of_rollout, dtype=object)
    if array.ndim != 1:
        raise ValueError(f"group_of_rollout must be one-dimensional, got shape {array.shape}")
    number: dict[Any, int] = {}
    return np.array(
        [number.setdefault(group, len(number)) for group in check_prompt_ids(array, "group_of_rollout")], dtype=np.int64
    )


def _check_rewards(rewards: ArrayLike, rows: int) -> tuple[FloatArray, float]:
    """Return rewards, or sums of their parts, as (R,) float64, and the resolution of the type that they come in."""
    try:
        rewards_R, resolution = as_float64(rewards)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"rewards must be numbers, one per rollout (NaN or None for an unscored rollout): {error}"
        ) from error
    if np.isinf(rewards_R).any():
        at = tuple(int(place) for place in np.argwhere(np.isinf(rewards_R))[0])
        raise ValueError(
            f"rewards[{', '.join(map(str, at))}] is {rewards_R[at]}; rewards must be finite, or NaN for an unscored "
            "rollout"
        )
    if rewards_R.ndim == 2:
        rewards_R = total_reward(rewards_R)
    if rewards_R.shape != (rows,):
        raise ValueError(
            f"group_of_rollout and rewards must be one-dimensional and equally long, "
            f"got shapes {(rows,)} and {rewards_R.shape}"
        )
    return rewards_R, resolution


def _ranked(group_of_rollout: ArrayLike) -> tuple[IntArray, int]:
    """Return the group index of each row by first appearance, and the number of groups."""
    codes = _as_codes(group_of_rollout)
    if codes.ndim != 1:
        raise ValueError(f"group_of_rollout must be one-dimensional, got shape {codes.shape}")
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first, kind="stable")] = np.arange(first.size)
    return rank[inverse].astype(np.int64), first.size


def group_outcomes(group_of_rollout: ArrayLike, rewards: ArrayLike, success: SuccessRule = 0.0) -> GroupOutcomes:
    """Sum up each group of a ragged batch; groups are numbered by first appearance.

    NaN rewards (unscored rollouts) are left out.

    Args:
        group_of_rollout: (R,) group id of each row, whole numbers or strings, in any order.
        rewards: (R,) reward of each row; finite, or NaN.
        success: a reward above this threshold is a success, or a function of the rewards that returns booleans.

    Raises:
        ValueError: shapes differ, ids are floats, or a reward is infinite.
    """
    group_R, groups = _ranked(group_of_rollout)
    return outcomes_by_position(group_R, rewards, groups, success)


def outcomes_by_position(
    group_R: IntArray, rewards: ArrayLike, groups: int, success: SuccessRule = 0.0
) -> GroupOutcomes:
    """Sum up each group, like :func:`group_outcomes`, where rows name positions of groups; a group may be empty.

    Args:
        group_R: (R,) int64 positions in [0, groups).
        rewards: (R,) reward of each row, finite or NaN; or (R, F) parts that add up to it.
        groups: number of groups.
        success: a reward above this threshold is a success, or a function of the rewards that returns booleans; the
            function is called once.

    Raises:
        ValueError: shapes differ or a reward is infinite.
    """
    rewards_R, resolution = _check_rewards(rewards, group_R.size)
    scored = ~np.isnan(rewards_R)
    good = successes_of(rewards_R, success)
    scored_group_R, scored_rewards_R = group_R[scored], rewards_R[scored]
    low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(low, scored_group_R, scored_rewards_R)
    np.maximum.at(high, scored_group_R, scored_rewards_R)
    totals = np.bincount(scored_group_R, minlength=groups)
    sums = np.bincount(scored_group_R, weights=scored_rewards_R, minlength=groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.where(totals > 0, high - low, 0.0)
        magnitude = np.where(totals > 0, np.maximum(np.abs(low), np.abs(high)), 0.0)
        mean = sums / totals
    return GroupOutcomes(
        group_R=group_R,
        rewards_R=rewards_R,
        success_R=good,
        totals=totals.astype(np.int64),
        successes=np.bincount(group_R[good], minlength=groups).astype(np.int64),
        effective=spread > _rounding(magnitude, resolution),
        mean_reward=mean,
    )


def _rounding(magnitude: FloatArray, resolution: float) -> FloatArray:
    """Return the (G,) spread of rewards that may be rounding: two units of the last place of their type at least.

    A sum that should be zero leaves a residue in proportion to its terms. These are taken to be as large as the largest
    reward of the batch, but no larger than 1, or one outlier would hide the differences of all other groups.

    Args:
        magnitude: (G,) largest magnitude in each group.
        resolution: of the type in which the rewards come, see :func:`~knapsack_rl.allocation.checks.as_float64`.
    """
    residue = max(ABSOLUTE_SPREAD, 2.0 * resolution * min(float(magnitude.max(initial=0.0)), 1.0))
    return np.maximum(max(RELATIVE_SPREAD, 2.0 * resolution) * magnitude, residue)


def of_outcomes(groups: GroupOutcomes) -> GroupOutcomes:
    """Return the same groups with outcomes for rewards: 1 for a success, 0 for a failure, NaN for an unscored one."""
    outcome_R = np.where(groups.scored_R, groups.success_R, np.nan)
    return outcomes_by_position(groups.group_R, outcome_R, groups.totals.size)


def group_statistics(group_of_rollout: ArrayLike, rewards: ArrayLike, success: SuccessRule = 0.0) -> GroupStatistics:
    """Return effective ratios, coverage and difficulty classes of a ragged batch.

    Args:
        group_of_rollout: (R,) group id of each row, whole numbers or strings, in any order.
        rewards: (R,) finite, or NaN for an unscored rollout.
        success: a reward above this threshold is a success, or a function of the rewards that returns booleans.

    Raises:
        ValueError: shapes differ, ids are floats, or a reward is infinite.

    Source: paper, section 4.
    """
    return summarise(group_outcomes(group_of_rollout, rewards, success))


def summarise(groups: GroupOutcomes) -> GroupStatistics:
    """Return :func:`group_statistics` of groups that are already summed up."""
    seen = groups.totals > 0
    totals, successes, effective = groups.totals[seen], groups.successes[seen], groups.effective[seen]
    rollouts, prompts = int(totals.sum()), int(totals.size)

    def share(mask: NDArray[np.bool_]) -> float:
        return float(mask.mean()) if prompts else float("nan")

    classes = difficulty_class(successes, totals)
    return GroupStatistics(
        rollouts=rollouts,
        prompts=prompts,
        effective_gradient_ratio=float(totals[effective].sum() / rollouts) if rollouts else float("nan"),
        effective_prompt_ratio=share(effective),
        covered_by_success=share(successes > 0),
        covered_by_failure=share(successes < totals),
        all_correct=share(successes == totals),
        all_wrong=share(successes == 0),
        class_shares=tuple(share(classes == k) for k in range(len(DIFFICULTY_CLASSES))),
        smallest_group=int(totals.min()) if prompts else 0,
        largest_group=int(totals.max()) if prompts else 0,
    )


def difficulty_class(successes: ArrayLike, totals: ArrayLike) -> IntArray:
    """Return the index into ``DIFFICULTY_CLASSES`` of the observed rate, -1 where nothing was observed.

    Extremely easy is a rate of 1, easy [0.8, 1), medium (0.2, 0.8), hard (0, 0.2], extremely hard 0.

    Args:
        successes: whole numbers, 0 <= successes <= totals.
        totals: whole numbers >= 0, same shape.

    Raises:
        ValueError: more successes than rollouts, or a negative number.

    Source: paper, section 5 (difficulty classes).
    """
    good, total = np.asarray(successes, dtype=np.int64), np.asarray(totals, dtype=np.int64)
    if good.shape != total.shape or ((good < 0) | (good > total)).any():
        raise ValueError("successes must lie between 0 and totals, entry by entry")
    # Compared as 5 * good against totals: no division, so the borders at 0.2 and 0.8 are exact.
    conditions = [total == 0, good == total, good == 0, 5 * good >= 4 * total, 5 * good <= total]
    return np.select(conditions, [-1, 0, 4, 1, 3], default=2).astype(np.int64)


def transition_matrix(first: ArrayLike, last: ArrayLike) -> IntArray:
    """Count prompts by (first class, last class); rows are the first, both in ``DIFFICULTY_CLASSES`` order.

    Args:
        first: (M,) class indices; prompts with -1 (never observed) are left out.
        last: (M,) class indices of the same prompts.

    Returns:
        (5, 5) int64 counts.

    Raises:
        ValueError: shapes differ or a class index is unknown.
    """
    size = len(DIFFICULTY_CLASSES)
    start, end = np.asarray(first, dtype=np.int64), np.asarray(last, dtype=np.int64)
    if start.shape != end.shape:
        raise ValueError(f"first and last must have the same shape, got {start.shape} and {end.shape}")
    if ((start < -1) | (start >= size) | (end < -1) | (end >= size)).any():
        raise ValueError(f"class indices must lie between -1 and {size - 1}")
    known = (start >= 0) & (end >= 0)
    return np.bincount(start[known] * size + end[known], minlength=size * size).reshape(size, size).astype(np.int64)
