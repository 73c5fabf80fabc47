"""What counts as a success: a threshold, a function, or by default what the rewards of the run show.

Allocation needs outcomes; training scripts have rewards: 0 and 1, -1 and 1, the share of tests passed, the sum of a
format reward and a correct answer. :class:`LearnedSuccess` finds the part of the reward and the *cutoff* in it that
tell prompts apart best: rewards above the cutoff are successes. A format that all answers have or lack alike says
nothing about which prompt deserves rollouts, however much of the reward it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray

BoolArray = NDArray[np.bool_]
SuccessRule = float | Callable[[FloatArray], ArrayLike]

LEARNED = "learned"
"""What a saved state says of a rule that is learned."""

NODES = np.array([1, 3, 5, 7]) / 8
"""Where in the range of a reward cutoffs are tried."""

OUTLIERS = 0.01
"""Share of groups whose lowest, and whose highest, reward does not widen the range."""

BETTER = 1.25
"""Factor by which another cutoff or another part of the reward must be better than the present one to replace it."""

PRIOR_SHARE, PRIOR_GROUPS = 0.05, 32
"""How well any cutoff is taken to tell prompts apart, and how many groups it takes to outweigh that."""

ROWS_KEPT = 4096
"""Recent rollouts from which the rule is learned."""


def describe_rule(rule: Mapping[str, Any]) -> str:
    """Return the text of a success rule, as :meth:`knapsack_rl.session.Session.success_rule` returns it."""
    if rule["above"] is None:
        return f"what the success function says of {rule['reward']}"
    inside = "" if rule.get("low") is None else f" (from {rule['low']:g} to {rule['high']:g})"
    return f"{rule['reward']} above {rule['above']:g}{inside}"


def check_success_rule(success: SuccessRule) -> None:
    """Refuse a success rule that could only fail later; a function is tried once.

    Raises:
        ValueError: it is neither a function nor a finite number, or the function fails on rewards of 0 and 1.
    """
    if callable(success):
        try:
            successes_of(np.array([0.0, 1.0]), success)
        except Exception as error:
            raise ValueError(f"the success function failed on the rewards [0, 1]: {error!r}") from error
        return
    if isinstance(success, (bool, str)) or not isinstance(success, (int, float)) or not np.isfinite(success):
        raise ValueError(f"the success rule must be a finite threshold or a function of the rewards, got {success!r}")


def successes_of(rewards: FloatArray, success: SuccessRule) -> BoolArray:
    """Return which rewards are successes: ``reward > threshold``, or the verdict of the user's function.

    Engines and their logs hold rewards in float32, where 0.4 is 0.4000000059604645. A reward that is the threshold in
    float32 is therefore not above it. NaN (unscored) is never a success.

    Raises:
        ValueError: the function returns another shape, or the threshold is not finite.
    """
    scored = ~np.isnan(rewards)
    if callable(success):
        verdict = np.asarray(success(rewards), dtype=bool)
        if verdict.shape != rewards.shape:
            raise ValueError(
                f"the success function returned shape {verdict.shape}, expected one verdict per reward {rewards.shape}"
            )
        return verdict & scored
    check_success_rule(success)
    with np.errstate(over="ignore"):
        single = float(np.float32(success))
    return scored & (rewards > (max(success, single) if np.isfinite(single) else success))


def total_reward(parts: FloatArray) -> FloatArray:
    """Return (R,) the sum of the parts of a reward, NaN where none of them scored the rollout.

    Args:
        parts: (R, F), NaN where a part did not score the rollout.
    """
    return np.where(np.isnan(parts).all(axis=1), np.nan, np.nansum(parts, axis=1))


@dataclass(frozen=True)
class Part:
    """One part of the reward.

    Attributes:
        low: lower end of its range inside groups; NaN before rewards differ.
        high: upper end.
        cutoff: a reward above it is a success.
        score: how well the cutoff tells prompts apart, see :func:`told_apart`.
    """

    low: float = np.nan
    high: float = np.nan
    cutoff: float = 0.0
    score: float = 0.0


class LearnedSuccess:
    """The rule learned from recent rewards, which may be sums of several parts.

    In every part the range is cut at some nodes, halfway between two levels that occur. Success is decided by the
    cutoff that tells apart best the prompts of high and low reward, and for a rollout that its part did not score by
    that of the next best part. Rewards of two levels have one cutoff. Until rewards differ, it is 0.

    Cutoff and part change only where another one is clearly better (``BETTER``), because estimates of success rates
    are about the present one.

    Attributes:
        parts: the parts of the reward.
        order: their positions, best first.
        differ_anyway: share of groups with equal outcomes, but two rollouts or more, whose rewards differ all the same;
            0 for rewards of two levels.
    """

    def __init__(self) -> None:
        self.parts: tuple[Part, ...] = (Part(),)
        self.order: tuple[int, ...] = (0,)
        self.differ_anyway = 0.0
        self._rows, self._group = np.empty((0, 1)), np.empty(0, np.int64)

    def successes(self, rows: FloatArray) -> BoolArray:
        """Return (R,) which rollouts are successes.

        Args:
            rows: (R, F) reward of each part, NaN where it did not score the rollout.
        """
        verdict = np.zeros(rows.shape[0], bool)
        for k in reversed(self.order):
            scored = ~np.isnan(rows[:, k])
            verdict[scored] = rows[scored, k] > self.parts[k].cutoff
        return verdict

    def learn(self, group_R: IntArray, rows: FloatArray) -> None:
        """Take in a batch, and change the rule where another one is clearly better.

        Args:
            group_R: (R,) group of each rollout.
            rows: (R, F) reward of each part, NaN where it did not score the rollout.
        """
        if rows.shape[1] != len(self.parts):
            self.parts, self.order = (Part(),) * rows.shape[1], tuple(range(rows.shape[1]))
            self._rows, self._group = np.empty((0, rows.shape[1])), np.empty(0, np.int64)
        if self._settled(rows):
            self._rows, self._group = self._rows[:0], self._group[:0]
            return
        sort = np.argsort(group_R, kind="stable")
        first = int(self._group[-1]) + 1 if self._group.size else 0
        self._rows = np.concatenate([self._rows, rows[sort]])[-ROWS_KEPT:]
        self._group = np.concatenate([self._group, first + group_R[sort]])[-ROWS_KEPT:]
        if not self._group.size:
            return
        starts = np.flatnonzero(np.diff(self._group, prepend=-1))
        whole = total_reward(self._rows)
        self.parts = tuple(
            _learned(part, column, whole, starts)
            for part, column in zip(self.parts, np.ascontiguousarray(self._rows.T), strict=True)
        )
        ahead = max(range(len(self.parts)), key=lambda k: self.parts[k].score * (BETTER if k == self.order[0] else 1.0))
        others = sorted(set(range(len(self.parts))) - {ahead}, key=lambda k: -self.parts[k].score)
        self.order = (ahead, *others)
        self.differ_anyway = self._share_that_differs(whole, starts)

    def _share_that_differs(self, whole: FloatArray, starts: IntArray) -> float:
        """Return the share of groups of two and more whose rewards differ, of those whose outcomes are equal."""
        scored, good = ~np.isnan(whole), self.successes(self._rows)
        n, s = np.add.reduceat(scored, starts, dtype=np.int64), np.add.reduceat(good, starts, dtype=np.int64)
        low, high = _extremes(whole, starts)
        differ = (low < high)[(n >= 2) & ((s == 0) | (s == n))]
        return float(differ.mean()) if differ.size else 0.0

    @property
    def deciding(self) -> Part:
        """The part that decides on success."""
        return self.parts[self.order[0]]

    def _settled(self, rows: FloatArray) -> bool:
        """Return whether these and all recent rewards are the two ends of one range: then nothing is left to learn."""
        if len(self.parts) > 1 or np.isnan(self.parts[0].low):
            return False
        ends = self.parts[0].low, self.parts[0].high
        return bool(np.isin(rows, ends).all() and np.isin(self._rows, ends).all())

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the rule and recent rewards."""
        return {
            "parts": np.array([[part.low, part.high, part.cutoff, part.score] for part in self.parts]),
            "order": np.array(self.order, np.int64),
            "differ_anyway": np.array([self.differ_anyway]),
            "rows": self._rows.copy(),
            "group": self._group.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what was learned.

        Raises:
            ValueError: a part of the state is missing or impossible.
        """
        parts, order, anyway, rows, group = (np.asarray(state.get(name, ())) for name in self.state_dict())
        size = parts.shape[0] if parts.ndim == 2 else 0
        if (
            parts.shape != (size, 4)
            or not np.isfinite(parts[:, 2:]).all()
            or np.isinf(parts).any()
            or sorted(order.ravel().tolist()) != list(range(size))
            or size == 0
            or anyway.shape != (1,)
            or not 0.0 <= anyway[0] <= 1.0
            or rows.shape != (group.size, size)
            or np.isinf(rows).any()
            or group.shape != (group.size,)
            or group.dtype != np.int64
            or group.size > ROWS_KEPT
            or (np.diff(group, prepend=0) < 0).any()
        ):
            raise ValueError("the saved success rule must hold parts with finite cutoffs, their order, recent rewards")
        self.parts = tuple(Part(*row) for row in parts.astype(np.float64).tolist())
        self.order = tuple(order.tolist())
        self.differ_anyway = float(anyway[0])
        self._rows, self._group = rows.astype(np.float64), group.copy()


def _learned(part: Part, column: FloatArray, whole: FloatArray, starts: IntArray) -> Part:
    """Return a part of the reward with its new range, and another cutoff if that is clearly better."""
    low, high = _range_inside(column, starts)
    if not low < high:
        return part
    levels = np.unique(np.clip(np.append(column[~np.isnan(column)], (low, high)), low, high))
    above = np.unique(np.searchsorted(levels, low + (high - low) * NODES))
    above = above[np.argsort(np.abs(0.5 * (levels[above - 1] + levels[above] - low - high)), kind="stable")]
    cutoffs = 0.5 * (levels[above - 1] + levels[above])  # of equally good ones the one closest to the middle
    same = (levels.searchsorted(part.cutoff, side="right") == above) & (part.score > 0.0)
    scores = np.array([told_apart(column > cutoff, whole, starts) for cutoff in cutoffs])
    best = int(np.argmax(scores * np.where(same, BETTER, 1.0)))
    return Part(low, high, part.cutoff if same[best] else float(cutoffs[best]), float(scores[best]))


def _range_inside(column: FloatArray, starts: IntArray) -> tuple[float, float]:
    """Return the range of a part in groups whose rewards differ, or over all groups if none does; NaN if none scored.

    The most extreme groups are left out, so that one absurd reward does not make all others equal.
    """
    low, high = _extremes(column, starts)
    chosen = low < high if (low < high).any() else low <= high
    if not chosen.any():
        return np.nan, np.nan
    return (
        float(np.quantile(low[chosen], OUTLIERS, method="lower")),
        float(np.quantile(high[chosen], 1.0 - OUTLIERS, method="higher")),
    )


def _extremes(rewards: FloatArray, starts: IntArray) -> tuple[FloatArray, FloatArray]:
    """Return the (G,) lowest and highest reward of each group, infinity and its negative where none was scored."""
    missing = np.isnan(rewards)
    low = np.minimum.reduceat(np.where(missing, np.inf, rewards), starts)
    return low, np.maximum.reduceat(np.where(missing, -np.inf, rewards), starts)


def told_apart(success: BoolArray, reward: FloatArray, starts: IntArray) -> float:
    """Return how far successes tell apart prompts of different reward: Cov(reward, success) / Std(success).

    The covariance is that between prompts. With sums over the n rollouts of a prompt,

        (sum r  sum s - sum r s) / (n (n-1))

    is an unbiased estimate of E[r] E[s], so noise inside groups adds nothing, and groups of any size may be averaged.
    The average is shrunk to ``PRIOR_SHARE`` of the covariance between rollouts, so that with few groups the successes
    count that make up most of the reward, and those that never vary are worth nothing.

    Args:
        success: (R,) ordered by group.
        reward: (R,) NaN for unscored rollouts.
        starts: (G,) first row of each group.

    Returns:
        A number >= 0, in units of the reward.

    Source: analysis of variance of a random effect; U-statistics (Hoeffding 1948).
    """
    scored = ~np.isnan(reward)
    r, s = np.where(scored, reward, 0.0), np.where(scored, success, 0.0)
    n, sum_r, sum_s, sum_rs = (np.add.reduceat(np.asarray(x, np.float64), starts) for x in (scored, r, s, r * s))
    n, sum_r, sum_s, sum_rs = (x[n >= 2] for x in (n, sum_r, sum_s, sum_rs))
    rate, reward_mean = (float(np.mean(x / n)) if n.size else 0.0 for x in (sum_s, sum_r))
    if not 0.0 < rate < 1.0:
        return 0.0
    of_rollouts = float(np.mean(sum_rs / n)) - rate * reward_mean
    between = float(np.mean((sum_r * sum_s - sum_rs) / (n * (n - 1)))) - rate * reward_mean
    shrunk = (n.size * max(between, 0.0) + PRIOR_GROUPS * PRIOR_SHARE * of_rollouts) / (n.size + PRIOR_GROUPS)
    return max(shrunk, 0.0) / (rate * (1.0 - rate)) ** 0.5
