"""Means over seeds with 95 % t-intervals, paired differences, ratios of cost, and the verdicts they lead to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from experiments.contract import Row, Verdict
from knapsack_rl.report.comparison import SMOOTHING
from knapsack_rl.runs.curves import moving_average, rollouts_to_reach, t_interval

RESAMPLES, SEED = 1000, 20250929


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the seeds; NaN without any.
        low: lower end of the 95 % t-interval; NaN below two seeds.
        high: upper end.
        seeds: how many.
        bounds: seeds whose value is only a bound (the target was not reached).
        least: smallest value of a seed.
        most: largest value of a seed.
    """

    mean: float
    low: float
    high: float
    seeds: int
    bounds: int = 0
    least: float = math.nan
    most: float = math.nan

    def points(self) -> str:
        """As percentage points with sign: "+3.1 [+1.0, +5.2]"."""
        return self._text(lambda value: f"{100 * value:+.1f}")

    def percent(self) -> str:
        """As percent: "31.0 % [29.5, 32.5]"."""
        return self._text(lambda value: f"{100 * value:.1f}", " %")

    def times(self) -> str:
        """As a factor: "0.77 [0.60, 0.94] ×"."""
        if not math.isfinite(self.mean):
            return "–"
        return ("at least " if self.bounds else "") + self._text(lambda value: f"{value:.2f}") + " ×"

    def number(self) -> str:
        """As a plain number: "7.3 [7.0, 7.5]"."""
        return self._text(lambda value: f"{value:.1f}")

    def count(self) -> str:
        """The mean alone, as a whole number: "204,800"."""
        return "–" if math.isnan(self.mean) else f"{self.mean:,.0f}"

    def extremes(self) -> str:
        """Least and most of the seeds, as whole numbers: "84 to 105"."""
        return f"{self.least:.0f}" if self.least == self.most else f"{self.least:.0f} to {self.most:.0f}"

    def _text(self, show: Callable[[float], str], unit: str = "") -> str:
        if not math.isfinite(self.mean):
            return "–"
        interval = f" [{show(self.low)}, {show(self.high)}]" if math.isfinite(self.low) else ""
        return (show(self.mean) + unit + interval).replace("-", "−")


def mean_of(values: Mapping[int, float]) -> Estimate:
    """Mean over seeds; values that are not finite are left out."""
    known = [value for value in values.values() if math.isfinite(value)]
    if not known:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean, half = float(np.mean(known)), t_interval(known)
    width = math.nan if half is None else half
    return Estimate(mean, mean - width, mean + width, len(known), least=min(known), most=max(known))


def difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Mean of the differences of seeds that both have."""
    return mean_of({seed: value - baseline[seed] for seed, value in values.items() if seed in baseline})


def factor(ratios: Mapping[int, float], bounds: int = 0) -> Estimate:
    """Geometric mean of ratios, with the t-interval of their logarithms."""
    logs = mean_of({seed: math.log(value) for seed, value in ratios.items() if value > 0})
    return Estimate(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high), logs.seeds, bounds)


def per_seed(rows: Sequence[Row], arm: str, measure: Callable[[Row], float | None]) -> dict[int, float]:
    """A measure of each run of an arm by seed; None becomes NaN."""
    found = {row["seed"]: measure(row) for row in rows if row["arm"] == arm}
    return {seed: math.nan if value is None else float(value) for seed, value in found.items()}


def relative_cost(rows: Sequence[Row], arm: str, reference: str, unit: str = "rollouts") -> Estimate:
    """Cost of an arm to reach the reference's final accuracy, over the cost of the reference itself.

    By seed: the target is the end of the smoothed curve of the reference's run with the same seed. A run that never
    reaches it counts with all it generated, which bounds the ratio from below.

    Args:
        rows: runs of both arms.
        arm: the arm.
        reference: the arm whose accuracy is to be reached.
        unit: "rollouts", "tokens" or "seconds".

    Returns:
        The factor; its ``bounds`` counts the runs that never reach the target.
    """
    references = {row["seed"]: row for row in rows if row["arm"] == reference}
    ratios, bounds = {}, 0
    for row in rows:
        if row["arm"] != arm or row["seed"] not in references:
            continue
        other = references[row["seed"]]
        target = float(moving_average(other["evaluations"]["accuracy"], SMOOTHING)[-1])
        spent, base = _reached(row, target, unit), _reached(other, target, unit)
        if math.isnan(spent):
            spent, bounds = float(row["evaluations"][unit][-1]), bounds + 1
        if base > 0:  # a target that is met before training is uninformative
            ratios[row["seed"]] = spent / base
    return factor(ratios, bounds)


def _reached(row: Row, target: float, unit: str) -> float:
    """Rollouts or tokens until a run's smoothed accuracy reached a target, NaN if it never did."""
    curve = row["evaluations"]
    return rollouts_to_reach(curve[unit], moving_average(curve["accuracy"], SMOOTHING), target)


def at_least(estimate: Estimate, threshold: float = 0.0, neutral: float = 0.0) -> Verdict:
    """Whether a claim "at least ``threshold``" holds: decided by the interval.

    It holds if the whole interval lies above the threshold and above no effect, in part if it lies above no effect
    only, and does not if all of it lies below the threshold or at no effect. Bounds from below can confirm a claim and
    cannot refute it.

    Args:
        estimate: the measured effect.
        threshold: the claimed effect.
        neutral: no effect: 0 for differences, 1 for ratios.
    """
    if estimate.seeds < 2 or not math.isfinite(estimate.low):
        return "undecided"
    if estimate.low > neutral:
        return "holds" if estimate.low >= threshold else "holds in part"
    below = estimate.high < threshold or estimate.high <= neutral
    return "does not hold" if below and not estimate.bounds else "undecided"


def at_most(estimate: Estimate, aim: float, proven: float) -> Verdict:
    """Whether a ratio of costs is at most ``aim``, with an interval that surely lies below ``proven``.

    It holds in part if the whole interval lies below 1, and does not if all of it lies above ``proven``. Seeds that
    never reach the target bound the ratio from below: they can refute the claim and cannot confirm it.

    Args:
        estimate: the measured ratio.
        aim: the claimed one.
        proven: most that the interval may hold, between ``aim`` and 1.
    """
    if estimate.seeds < 2 or not math.isfinite(estimate.low):
        return "undecided"
    if estimate.low > proven:
        return "does not hold"
    if estimate.bounds:
        return "undecided"
    if estimate.mean <= aim and estimate.high < proven:
        return "holds"
    return "holds in part" if estimate.high < 1.0 else "undecided"


def not_below(estimate: Estimate, floor: float) -> Verdict:
    """Whether a change surely stays above a floor."""
    if estimate.seeds < 2:
        return "undecided"
    if estimate.low >= floor:
        return "holds"
    return "does not hold" if estimate.high < floor else "undecided"


def in_every_seed(estimate: Estimate, threshold: float) -> Verdict:
    """Whether each seed reaches a threshold."""
    return "holds" if estimate.least >= threshold else "does not hold"


def bootstrap_interval(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Bootstrap a mean: (mean, lower, upper), the 95 % percentile interval over units drawn with replacement.

    Args:
        numbers: (U,) one for each independent unit, such as a seed; U >= 1.

    Returns:
        Equal numbers, or a single one, give equal ends.

    Source: Efron 1979 (bootstrap).
    """
    mean = float(np.mean(numbers))
    if len(numbers) < 2:
        return mean, mean, mean
    rng = np.random.default_rng(SEED)
    found = stats.bootstrap((numbers,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng)
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)
