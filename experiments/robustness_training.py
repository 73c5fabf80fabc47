"""Experiment: how much of the estimator's settings does training feel?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments import figures, pool
from experiments.contract import Finding, Row
from experiments.statistics import compare, final_accuracy, judged, per_seed, told
from experiments.tables import accuracy_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Robustness to the estimate, in training"
QUESTION = "Does held-out accuracy depend on the window or the discount of the estimate?"

WINDOWS = {"paper-window4": 4, "paper": 16, "paper-window64": 64}
DISCOUNTS = {"bayes-discount05": 0.5, "empirical-bayes": 0.8, "bayes-discount1": 1.0}
ARMS = ("uniform", *WINDOWS, *DISCOUNTS, "knapsack")
pieces, measure = pool.experiment(ARMS)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Each setting against the default of its estimator."""
    found = []
    for family, default in ((WINDOWS, "paper"), (DISCOUNTS, "empirical-bayes")):
        for arm in family:
            if arm != default:
                loss = compare(rows, default, arm, final_accuracy)
                found.append(
                    Finding(
                        f"{pool.label(arm)} costs accuracy against {pool.label(default)}",
                        "-",
                        told(rows, f"{loss.points()} points of held-out accuracy"),
                        judged(loss, 1e-9),
                    )
                )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """Accuracies of all settings."""
    return f"""The paper's rule takes the mean of the newest rewards for the truth; its window is 16. Empirical Bayes
forgets by a factor per visit, 0.8 by default, and the Bayes filter learns how fast rates move. Everything else is
equal.

{accuracy_table(rows, ARMS)}"""


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy at the end against the setting, one dot per seed."""
    drawing, axes = figures.panels(2)
    families: tuple[Mapping[str, float], ...] = (WINDOWS, DISCOUNTS)
    for ax, family, name in zip(axes, families, ("window", "discount per visit"), strict=True):
        for arm, setting in family.items():
            values = [100 * value for value in per_seed(rows, arm, final_accuracy).values()]
            ax.plot([setting] * len(values), values, "o", color="#0072B2", alpha=0.6)
            ax.plot([setting], [sum(values) / len(values)], "_", color="#D55E00", markersize=22, markeredgewidth=2)
        ax.set(xlabel=name, ylabel="held-out accuracy at the end (%)")
        ax.grid(color="#dddddd", linewidth=0.6)
    axes[0].set_xscale("log", base=2)
    return drawing
