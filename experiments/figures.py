"""Parts of the plots that several experiments share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.contract import Row
from experiments.pool import label
from knapsack_rl.runs.curves import Curve, mean_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panels(columns: int, *, rows: int = 1) -> tuple[Figure, list[Any]]:
    """A figure with axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.5 * rows), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).ravel())


def by_arm(rows: Sequence[Row], arms: Sequence[str], x: str, y: str, part: str = "series") -> dict[str, Curve]:
    """Mean curve over the seeds of each arm, by label.

    Args:
        rows: of the runs.
        arms: which arms, in the order of the legend.
        x: name of the series on the axis.
        y: name of the series that is drawn.
        part: "series" or "evaluations".
    """
    return {
        label(arm): mean_curve(
            (np.array(row[part][x], dtype=np.float64), np.array(row[part][y], dtype=np.float64))
            for row in rows
            if row["arm"] == arm
        )
        for arm in arms
    }


def accuracy(rows: Sequence[Row], arms: Sequence[str], ax: Axes, unit: str = "rollouts") -> Axes:
    """Held-out accuracy against what was generated."""
    from knapsack_rl.report import plots

    plots.accuracy_by_policy(by_arm(rows, arms, unit, "accuracy", "evaluations"), ax)
    if unit != "rollouts":
        ax.set_xlabel(f"{unit} generated")
    return ax


def dots(
    rows: Sequence[Row], arms: Sequence[str], measure: Callable[[Row], float | None], ax: Axes, quantity: str
) -> Axes:
    """A share of each run, one dot per seed."""
    from experiments.statistics import per_seed
    from knapsack_rl.report import plots

    values = {label(arm): [v for v in per_seed(rows, arm, measure).values() if np.isfinite(v)] for arm in arms}
    return plots.final_values(values, ax, quantity=quantity)
