"""Experiment: how many rollouts does uniform allocation need for the same accuracy?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import figures, pool
from experiments.contract import Finding, Row, Verdict
from experiments.statistics import (
    Estimate,
    compare,
    final_accuracy,
    markdown_table,
    mean_accuracy,
    relative_cost,
    summary,
    told,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Compute equivalence"
QUESTION = "Does uniform allocation need about twice the rollouts for the same held-out accuracy?"

ARMS = ("uniform", "uniform-2n", "uniform-3n", "paper", "knapsack")
CLAIMED_FACTOR = 2.0
pieces, measure = pool.experiment(ARMS)


def at_least(cost: Estimate, factor: float) -> Verdict:
    """Whether a relative cost is surely at least a factor; a lower bound can confirm and cannot refute."""
    if cost.seeds < 2:
        return "undecided"
    if cost.low >= factor:
        return "holds"
    if cost.low > 1:
        return "holds in part"
    return "does not hold" if cost.high < factor and not cost.bounds else "undecided"


def findings(rows: Sequence[Row]) -> list[Finding]:
    """The factor for the paper's rule, for the Bayes filter, and between the two."""
    found = []
    for arm in ("paper", "knapsack"):
        cost = relative_cost(rows, "uniform-2n", arm)
        found.append(
            Finding(
                f"For the final accuracy of {pool.label(arm)}, uniform 2N generates about twice the rollouts",
                "about 2 ×",
                told(rows, cost.times()),
                at_least(cost, CLAIMED_FACTOR),
            )
        )
        saved = relative_cost(rows, "uniform", arm)
        found.append(
            Finding(
                f"For the final accuracy of {pool.label(arm)}, uniform N generates more rollouts",
                "-",
                told(rows, saved.times()),
                at_least(saved, 1.0),
            )
        )
    ahead = relative_cost(rows, "paper", "knapsack")
    found.append(
        Finding(
            "For the final accuracy of the Bayes filter, the paper's rule generates more rollouts",
            "-",
            told(rows, ahead.times()),
            at_least(ahead, 1.0),
        )
    )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """How far each arm gets for what it generates."""
    table = markdown_table(
        ("policy", "rollouts generated", "held-out accuracy at the end", "difference to uniform N, points",
         "mean over the run", "difference, points", "rollouts to uniform N's final accuracy", "tokens to it"),
        [
            (
                pool.label(arm),
                f"{next(row['rollouts'] for row in rows if row['arm'] == arm):,}",
                summary(rows, arm, final_accuracy).percent(),
                "–" if arm == "uniform" else compare(rows, arm, "uniform", final_accuracy).points(),
                summary(rows, arm, mean_accuracy).percent(),
                "–" if arm == "uniform" else compare(rows, arm, "uniform", mean_accuracy).points(),
                relative_cost(rows, arm, "uniform").times(),
                relative_cost(rows, arm, "uniform", "tokens").times(),
            )
            for arm in ARMS
        ],
    )  # fmt: skip
    return f"""Each run's held-out curve is smoothed over three evaluations; the target is the end of the curve of
the run with the same seed; a factor is the ratio of what was generated until the target, as a geometric mean over
seeds. "At least" means that some runs never reached the target and count with all they generated.

{table}

2N and 3N run as many steps as N, with two and three times the rollouts in each: a step of more rollouts has a less
noisy gradient but teaches no more often, so part of what they generate buys little at this learning rate."""


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy against rollouts."""
    drawing, (ax,) = figures.panels(1)
    drawing.set_size_inches(7, 4)
    figures.accuracy(rows, ARMS, ax)
    return drawing
