"""Ragged groups: advantages and statistics when every prompt has its own number of rollouts.

A *group* is the set of rollouts of one prompt. Groups may have any size and their rows may come in any order:
``group_of_rollout`` names the group of each row, so nothing here reshapes by a group size. Suffix ``_R`` is per
rollout, ``_G`` per group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray, as_float64
from knapsack_rl.ids import check_prompt_ids
from knapsack_rl.success import BoolArray, SuccessRule, successes_of, total_reward

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


def of_outcomes(groups: GroupOutcomes) -> GroupOutcomes:
    """Return the same groups with outcomes for rewards: 1 for a success, 0 for a failure, NaN for an unscored one."""
    outcome_R = np.where(groups.scored_R, groups.success_R, np.nan)
    return outcomes_by_position(groups.group_R, outcome_R, groups.totals.size)


def prompt_weights(group_R: IntArray) -> FloatArray:
    """Return (R,) factors R / (G N_i), under which every prompt weighs as much as under uniform allocation.

    Args:
        group_R: (R,) group index of each row; G counts the groups with rows.
    """
    sizes = np.bincount(group_R)
    return group_R.size / (max(int(np.count_nonzero(sizes)), 1) * sizes[group_R])


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
