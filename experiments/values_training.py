"""Experiment: the paper's Taylor value against other values of a group, in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import figures, pool
from experiments.contract import Finding, Row
from experiments.fallback_ablation import to_unsolved
from experiments.statistics import compare, final_accuracy, judged, mean_accuracy, summary, told
from experiments.tables import accuracy_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Other values, in training"
QUESTION = "Do other values than the paper's first-order one lead to better models?"

VALUES = ("value-nonzero", "value-variance", "value-signal", "value-fitted")
ARMS = ("uniform", "knapsack", *VALUES)
pieces, measure = pool.experiment(ARMS)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Each value against the paper's, all with the Bayes filter."""
    found = []
    for arm in VALUES:
        gain = compare(rows, arm, "knapsack", final_accuracy)
        way = compare(rows, arm, "knapsack", mean_accuracy)
        found.append(
            Finding(
                f"{pool.label(arm)}: better than the paper's value",
                "open question",
                told(rows, f"{gain.points()} points of held-out accuracy; mean over the run {way.points()}"),
                judged(gain, 1e-9),
            )
        )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """What the values are, what came of them, and how they differ most: in what prompts without a success get."""
    share = "; ".join(f"{pool.label(arm)}: {summary(rows, arm, to_unsolved).number()}" for arm in ARMS)
    return f"""The same posterior (Bayes filter), the same budget, another value of N rollouts at success rate p: the
chance of a non-zero gradient alone; the expected variance of the rewards; the share of a noiseless gradient that N
rollouts give; and the chance times a gain p^a (1 − p)^b that was fitted to measured gradients (the experiment
`gradient-value`). The paper's value is the chance times p (1 − p)².

{accuracy_table(rows, ARMS, "knapsack")}

Rollouts a visit to prompts without a success so far: {share}."""


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy against rollouts."""
    drawing, (ax,) = figures.panels(1)
    drawing.set_size_inches(7, 4)
    figures.accuracy(rows, ARMS, ax)
    return drawing
