"""Quantities of a training run by name, and the grammar of named figures made of them.

A figure of training runs is named by arms and a measure:

- ``knapsack, rollouts``: mean over the seeds of an arm;
- ``knapsack - uniform, accuracy at the end``: mean difference of two arms, paired by seed;
- ``uniform-2n / knapsack, rollouts``: what the first arm generates to reach the final accuracy of the second, over what
  the second generates for it; also with ``tokens``, and with ``seconds`` where rows have them.

Arms are the names of ``experiments.pool.ARMS``, measures those of ``MEASURES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from experiments.contract import Row
from experiments.statistics import Estimate, difference, mean_of, per_seed, relative_cost
from knapsack_rl.groups import DIFFICULTY_CLASSES
from knapsack_rl.report.comparison import SMOOTHING, accuracy_at_end
from knapsack_rl.runs.curves import moving_average

LAST = 0.2
"""Share of a run that counts as its end."""

ESTIMATE_CLASSES = {
    "unseen": (math.nan, math.nan),
    "up to 0.05": (-1.0, 0.05),
    "0.05 to 0.2": (0.05, 0.2),
    "0.2 to 0.5": (0.2, 0.5),
    "0.5 to 0.8": (0.5, 0.8),
    "0.8 to 0.95": (0.8, 0.95),
    "above 0.95": (0.95, 1.0),
}
"""Name of a class to the estimates in it: above the first, up to the second."""


@dataclass(frozen=True)
class Measure:
    """A quantity of one run.

    Attributes:
        of: maps a row to the quantity, None where it is not defined.
        show: formats its mean.
        show_difference: formats a difference of it.
    """

    of: Callable[[Row], float | None]
    show: Callable[[Estimate], str]
    show_difference: Callable[[Estimate], str]


def final_accuracy(row: Row) -> float:
    """Held-out accuracy at the end of a run: the mean of its last three evaluations."""
    return accuracy_at_end(row["evaluations"]["accuracy"])


def mean_accuracy(row: Row) -> float:
    """Held-out accuracy averaged over the rollouts of the run (trapezoids)."""
    rollouts, accuracy = (np.asarray(row["evaluations"][name], dtype=np.float64) for name in ("rollouts", "accuracy"))
    return float(np.trapezoid(accuracy, rollouts) / (rollouts[-1] - rollouts[0]))


def best_rate(rows: Sequence[Row]) -> float:
    """The learning rate of the run with the highest :func:`mean_accuracy`."""
    return float(max(rows, key=mean_accuracy)["settings"]["learning_rate"])


def accuracy_at_equal_tokens(row: Row) -> float:
    """Smoothed held-out accuracy where the shortest run of the same seed ends, see :func:`with_shortest`."""
    curve = row["evaluations"]
    return float(np.interp(row["shortest"], curve["tokens"], moving_average(curve["accuracy"], SMOOTHING)))


def with_shortest(rows: Sequence[Row]) -> list[Row]:
    """The rows with ``shortest``, the fewest tokens that a run of the same seed generated."""
    tokens: dict[int, float] = {}
    for row in rows:
        tokens[row["seed"]] = min(tokens.get(row["seed"], math.inf), row["evaluations"]["tokens"][-1])
    return [row | {"shortest": tokens[row["seed"]]} for row in rows]


def series_mean(row: Row, *names: str, last: float = 1.0) -> float:
    """Sum of series of a run, averaged over its last share of stretches."""
    total = 0.0
    for name in names:
        values = [value for value in row["series"][name] if value is not None]
        total += float(np.mean(values[-max(1, round(last * len(values))) :])) if values else math.nan
    return total


def calibration_errors(row: Row) -> list[float] | None:
    """By how much the predicted share of groups with a gradient misses the realised one, in stretches of a run."""
    values = [abs(value) for value in row["series"].get("calibration_error", ()) if value is not None]
    return values or None


def rollouts_at(row: Row, low: float, high: float) -> float:
    """Mean rollouts of visits whose estimate, averaged in its bin, lies in a class; NaN bounds for unseen prompts."""
    parts = row["budget"]["by_estimate"]
    estimate = np.array(parts["estimate"], dtype=np.float64)
    inside = np.isnan(estimate) if math.isnan(low) else (estimate > low) & (estimate <= high)
    visits = np.array(parts["visits"])[inside]
    return float(np.array(parts["mean"])[inside] @ visits / visits.sum()) if visits.sum() else math.nan


def share_of_class(row: Row, place: int, *, end: bool) -> float:
    """Share of the prompts in a difficulty class at their first or last visit."""
    moved = np.asarray(row["classes"]["transitions"], dtype=np.float64)
    return float(moved.sum(axis=0 if end else 1)[place] / moved.sum())


def stayed_or_moved(row: Row, start: int, end: int) -> float:
    """Of the prompts in a difficulty class at their first visit, the share in another at their last."""
    moved = np.asarray(row["classes"]["transitions"], dtype=np.float64)
    return float(moved[start, end] / moved[start].sum()) if moved[start].any() else math.nan


def solved_change(row: Row) -> float | None:
    """Success rate at the end minus at the start of the prompts that were solved at the start."""
    start, end = row["exact"]["solved_start_rate"], row["exact"]["solved_end_rate"]
    return None if start is None or end is None else end - start


def _share(of: Callable[[Row], float | None]) -> Measure:
    return Measure(of, Estimate.percent, Estimate.points)


def _count(of: Callable[[Row], float | None]) -> Measure:
    return Measure(of, Estimate.count, Estimate.number)


def _number(of: Callable[[Row], float | None]) -> Measure:
    return Measure(of, Estimate.number, Estimate.number)


def _exact(name: str) -> Measure:
    return _share(lambda row: row["exact"][name])


_HARDEST = DIFFICULTY_CLASSES.index("extremely hard")
_EASIEST = DIFFICULTY_CLASSES.index("extremely easy")

MEASURES: dict[str, Measure] = {
    "accuracy at the end": _share(final_accuracy),
    "accuracy before": _share(lambda row: row["evaluations"]["accuracy"][0]),
    "mean over the run": _share(mean_accuracy),
    "accuracy at equal tokens": _share(accuracy_at_equal_tokens),
    "rollouts": _count(lambda row: row["rollouts"]),
    "tokens": _count(lambda row: row["evaluations"]["tokens"][-1]),
    "steps": _count(lambda row: row["steps"]),
    "seconds": _count(lambda row: row["evaluations"]["seconds"][-1] if "seconds" in row["evaluations"] else None),
    "rollouts with a gradient": _share(lambda row: series_mean(row, "rollout_ratio")),
    "prompts with a gradient": _share(lambda row: series_mean(row, "prompt_ratio")),
    "calibration error": _share(lambda row: np.mean(found).item() if (found := calibration_errors(row)) else None),
    "largest calibration error": _share(lambda row: max(found) if (found := calibration_errors(row)) else None),
    "training success at the end": _share(lambda row: series_mean(row, "training_success", last=LAST)),
    "all correct at the end": _share(lambda row: series_mean(row, "all_correct", last=LAST)),
    "all wrong at the end": _share(lambda row: series_mean(row, "all_wrong", last=LAST)),
    "all correct or all wrong at the end": _share(lambda row: series_mean(row, "all_correct", "all_wrong", last=LAST)),
    "largest allocation": Measure(lambda row: max(row["budget"]["rollouts"]), Estimate.extremes, Estimate.number),
    "rollouts a visit to unsolved prompts": _number(lambda row: row["budget"]["per_unsolved_visit"]),
    "share of rollouts to unsolved prompts": _share(lambda row: row["budget"]["to_unsolved"]),
    "still unsolved": _exact("unsolved_left"),
    "unsolved at the end": _exact("unsolved_end"),
    "no success at the last visit": _share(lambda row: row["classes"]["unsolved_share"]),
    "change of solved prompts": Measure(solved_change, Estimate.points, Estimate.points),
    "solved prompts lost": _exact("solved_lost"),
    "seen solved twice, then lost": _exact("solved_once_lost"),
    "successes replayed": _number(lambda row: row["replay"]["mixed_in"]),
    "hardest stayed": _share(lambda row: stayed_or_moved(row, _HARDEST, _HARDEST)),
    "hardest became easiest": _share(lambda row: stayed_or_moved(row, _HARDEST, _EASIEST)),
    **{
        f"rollouts at estimate {name}": _number(partial(rollouts_at, low=low, high=high))
        for name, (low, high) in ESTIMATE_CLASSES.items()
    },
    **{
        f"{visit} visit {name}": _share(partial(share_of_class, place=place, end=visit == "last"))
        for visit in ("first", "last")
        for place, name in enumerate(DIFFICULTY_CLASSES)
    },
}
"""Name of a measure to its definition."""


def arms_of(name: str) -> tuple[str, ...]:
    """The one or two arms that a figure names."""
    left, _, right, _ = _parts(name)
    return (left, right) if right else (left,)


def _parts(name: str) -> tuple[str, str, str, str]:
    """Arm, mark and other arm, the last two "" for a figure of one arm, and the measure."""
    arms, _, measure = name.partition(", ")
    for mark in (" - ", " / "):
        left, found, right = arms.partition(mark)
        if found:
            return left, mark, right, measure
    return arms, "", "", measure


def estimate(rows: Sequence[Row], name: str) -> tuple[Estimate, str]:
    """A named figure.

    Args:
        rows: of :func:`with_shortest`.
        name: see the module.

    Returns:
        The figure and its text.

    Raises:
        ValueError: an arm or a measure is unknown, or the rows hold no run of an arm.
    """
    left, mark, right, measure = _parts(name)
    for arm in arms_of(name):
        if arm not in {row["arm"] for row in rows}:
            known = sorted({row["arm"] for row in rows})
            raise ValueError(f"figure {name!r} needs runs of the arm {arm!r}; the rows hold {', '.join(known)}")
    if right and mark == " / ":
        if measure not in ("rollouts", "tokens", "seconds"):
            raise ValueError(f"figure {name!r}: a ratio is one of rollouts, tokens or seconds, got {measure!r}")
        cost = relative_cost(rows, left, right, measure)
        return cost, cost.times()
    if measure not in MEASURES:
        raise ValueError(f"figure {name!r}: the measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    chosen = MEASURES[measure]
    values = per_seed(rows, left, chosen.of)
    if not right:
        return (mean := mean_of(values)), chosen.show(mean)
    gain = difference(values, per_seed(rows, right, chosen.of))
    return gain, chosen.show_difference(gain)
