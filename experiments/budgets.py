"""Experiment: what the budgets look like, and where the prompts move."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments import figures, pool
from experiments.contract import Finding, Row
from experiments.extract import CLASS_SERIES
from experiments.statistics import markdown_table, per_seed, summary, told
from knapsack_rl.allocation.checks import IntArray
from knapsack_rl.groups import DIFFICULTY_CLASSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Budgets"
QUESTION = "How is the budget spread: the largest allocation, rollouts by difficulty, and where do prompts move?"

ARMS = ("uniform", "paper", "knapsack")
ALLOCATED = ("paper", "knapsack")
CLAIMED_LARGEST = 93
CLASSES = {
    "unseen": (math.nan, math.nan),
    "up to 0.05": (0.0, 0.05),
    "0.05 to 0.2": (0.05, 0.2),
    "0.2 to 0.5": (0.2, 0.5),
    "0.5 to 0.8": (0.5, 0.8),
    "0.8 to 0.95": (0.8, 0.95),
    "above 0.95": (0.95, 1.0),
}
"""Name of a class to the estimates in it: above the first, up to the second; the lowest holds 0 too."""
pieces, measure = pool.experiment(ARMS)


def largest(row: Row) -> float:
    """Most rollouts that a prompt got in one step."""
    return float(max(row["budget"]["rollouts"]))


def budget_of_class(low: float, high: float) -> Callable[[Row], float]:
    """Measure: mean rollouts of visits whose estimate, averaged in its bin, lies in a class."""

    def mean(row: Row) -> float:
        parts = row["budget"]["by_estimate"]
        estimate = np.array(parts["estimate"], dtype=np.float64)
        inside = np.isnan(estimate) if math.isnan(low) else (estimate > low) & (estimate <= high)
        if low == 0.0:
            inside |= estimate == 0.0
        visits = np.array(parts["visits"])[inside]
        return float(np.array(parts["mean"])[inside] @ visits / visits.sum()) if visits.sum() else math.nan

    return mean


def transitions(rows: Sequence[Row], arm: str) -> IntArray:
    """(5, 5) prompts by class of their first and last visit, summed over seeds."""
    return np.sum([row["classes"]["transitions"] for row in rows if row["arm"] == arm], axis=0, dtype=np.int64)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """The largest allocation of each policy, and what became of hopeless prompts."""
    found = []
    for arm in ALLOCATED:
        most = per_seed(rows, arm, largest).values()
        found.append(
            Finding(
                f"{pool.label(arm)}: single prompts get up to {CLAIMED_LARGEST} rollouts",
                f"{CLAIMED_LARGEST}",
                told(rows, f"largest allocation {max(most):.0f}, the least of the seeds {min(most):.0f}"),
                "holds" if min(most) >= CLAIMED_LARGEST else "does not hold",
            )
        )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """Rollouts by estimated rate, and transitions."""
    budgets = markdown_table(
        ("estimated success rate", *(f"rollouts, {pool.label(arm)}" for arm in ALLOCATED)),
        [
            (name, *(summary(rows, arm, budget_of_class(*bounds)).number() for arm in ALLOCATED))
            for name, bounds in CLASSES.items()
        ],
    )
    parts = []
    for arm in ARMS:
        counts = transitions(rows, arm)
        moved = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        hard = DIFFICULTY_CLASSES.index("extremely hard")
        parts.append(
            f"{pool.label(arm)}: of the prompts without a success at their first visit {moved[hard, hard]:.0%} had "
            f"none at their last, and {moved[hard, 0]:.0%} had successes only"
        )
    return f"""Mean rollouts of a visit by the success rate that was estimated before it (N = 8 on average):

{budgets}

{"; ".join(parts)}. A class is that of the rollouts of one visit, so a visit of few rollouts is called extremely easy
or hard more often than one of many."""


def figure(rows: Sequence[Row]) -> Figure:
    """Histogram of the budgets, classes over time and transitions, of both policies."""
    from knapsack_rl.report import plots

    drawing, axes = figures.panels(2, rows=3)
    for ax, arm in zip(axes, ALLOCATED, strict=False):
        mine = [row["budget"] for row in rows if row["arm"] == arm]
        plots.budget_histogram(np.concatenate([np.repeat(part["rollouts"], part["visits"]) for part in mine]), ax)
        ax.set_title(f"Budgets: {pool.label(arm)}", loc="left", fontweight="bold", fontsize="medium")
    for ax, arm in zip(axes[2:4], ALLOCATED, strict=True):
        mine = [row["series"] for row in rows if row["arm"] == arm]
        shares = [np.mean([series[name] for series in mine], axis=0) for name in CLASS_SERIES]
        plots.difficulty_over_time(mine[0]["step"], np.stack(shares, axis=1), ax)
        ax.set_title(f"Difficulty: {pool.label(arm)}", loc="left", fontweight="bold", fontsize="medium")
    for ax, arm in zip(axes[4:], ALLOCATED, strict=True):
        plots.transitions(transitions(rows, arm), ax)
        ax.set_title(f"First to last visit: {pool.label(arm)}", loc="left", fontweight="bold", fontsize="medium")
    return drawing
