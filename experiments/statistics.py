"""Figures of the evidence page: means over seeds with 95 % t-intervals, paired by seed, and verdicts from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.contract import Row, Verdict
from knapsack_rl.report.comparison import SMOOTHING, accuracy_at_end
from knapsack_rl.runs.curves import moving_average, rollouts_to_reach, t_interval


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the seeds; NaN without any.
        low: lower end of the 95 % t-interval; NaN below two seeds.
        high: upper end.
        seeds: how many.
        bounds: seeds whose value is only a bound (the target was not reached).
    """

    mean: float
    low: float
    high: float
    seeds: int
    bounds: int = 0

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
        """As a plain number."""
        return self._text(lambda value: f"{value:.1f}")

    def _text(self, show: Callable[[float], str], unit: str = "") -> str:
        if not math.isfinite(self.mean):
            return "–"
        interval = f" [{show(self.low)}, {show(self.high)}]" if math.isfinite(self.low) else ""
        return show(self.mean) + unit + interval


def mean_of(values: Mapping[int, float]) -> Estimate:
    """Mean over seeds; values that are not finite are left out."""
    known = [value for value in values.values() if math.isfinite(value)]
    if not known:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean, half = float(np.mean(known)), t_interval(known)
    width = math.nan if half is None else half
    return Estimate(mean, mean - width, mean + width, len(known))


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


def compare(rows: Sequence[Row], arm: str, baseline: str, measure: Callable[[Row], float | None]) -> Estimate:
    """A measure of an arm minus that of a baseline, paired by seed."""
    return difference(per_seed(rows, arm, measure), per_seed(rows, baseline, measure))


def summary(rows: Sequence[Row], arm: str, measure: Callable[[Row], float | None]) -> Estimate:
    """Mean of a measure over the seeds of an arm."""
    return mean_of(per_seed(rows, arm, measure))


def final_accuracy(row: Row) -> float:
    """Held-out accuracy at the end of a run: the mean of its last three evaluations."""
    return accuracy_at_end(row["evaluations"]["accuracy"])


def mean_accuracy(row: Row) -> float:
    """Held-out accuracy averaged over the rollouts of the run (trapezoids)."""
    rollouts, accuracy = (np.asarray(row["evaluations"][name], dtype=np.float64) for name in ("rollouts", "accuracy"))
    return float(np.trapezoid(accuracy, rollouts) / (rollouts[-1] - rollouts[0]))


def series_mean(name: str, last: float = 1.0) -> Callable[[Row], float]:
    """Measure: mean of a series of a run over its last share of stretches."""

    def measure(row: Row) -> float:
        values = [value for value in row["series"][name] if value is not None]
        return float(np.mean(values[-max(1, round(last * len(values))) :])) if values else math.nan

    return measure


def reached(row: Row, target: float, unit: str = "rollouts") -> float:
    """What a run generated until its smoothed accuracy reached a target, NaN if it never did."""
    curve = row["evaluations"]
    return rollouts_to_reach(curve[unit], moving_average(curve["accuracy"], SMOOTHING), target)


def relative_cost(rows: Sequence[Row], arm: str, reference: str, unit: str = "rollouts") -> Estimate:
    """What an arm generates to reach the reference's final accuracy, over what the reference itself generates.

    By seed: the target is the end of the smoothed curve of the reference's run with the same seed. A run that never
    reaches it counts with all it generated, which bounds the ratio from below; ``bounds`` tells how many.

    Args:
        rows: runs of both arms.
        arm: the arm.
        reference: the arm whose accuracy is to be reached.
        unit: "rollouts" or "tokens".
    """
    references = {row["seed"]: row for row in rows if row["arm"] == reference}
    ratios, bounds = {}, 0
    for row in rows:
        if row["arm"] != arm or row["seed"] not in references:
            continue
        other = references[row["seed"]]
        target = float(moving_average(other["evaluations"]["accuracy"], SMOOTHING)[-1])
        spent, base = reached(row, target, unit), reached(other, target, unit)
        if math.isnan(spent):
            spent, bounds = float(row["evaluations"][unit][-1]), bounds + 1
        if base > 0:  # a target that is met before training says nothing
            ratios[row["seed"]] = spent / base
    return factor(ratios, bounds)


def judged(estimate: Estimate, threshold: float) -> Verdict:
    """Whether a claim "at least ``threshold`` (> 0)" holds: decided by the interval.

    It holds if the whole interval lies above the threshold; it does not if all of it lies below and includes zero or
    less; in part if the interval lies above zero and below or around the threshold; else it is undecided.
    """
    if estimate.seeds < 2 or not math.isfinite(estimate.low):
        return "undecided"
    if estimate.low >= threshold:
        return "holds"
    if estimate.low > 0:
        return "holds in part"
    return "does not hold" if estimate.high < threshold else "undecided"


def seeds_of(rows: Sequence[Row]) -> int:
    """Number of seeds in the rows."""
    return len({row["seed"] for row in rows})


def told(rows: Sequence[Row], estimate: str) -> str:
    """A figure with its number of seeds, for the table."""
    count = seeds_of(rows)
    return f"{estimate} ({count} {'seed' if count == 1 else 'seeds'})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])
