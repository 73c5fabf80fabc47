"""Experiment: do solved prompts regress when they get few rollouts, one, or none?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import figures, pool
from experiments.contract import Finding, Row, Verdict
from experiments.extract import LOST, SOLVED
from experiments.statistics import Estimate, compare, final_accuracy, markdown_table, summary, told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Forgetting"
QUESTION = "Do solved prompts regress at min_rollouts 2, 1 and 0?"

ARMS = ("uniform", "knapsack", "knapsack-min1", "knapsack-min0")
TOLERATED = 0.02
"""A regression of solved prompts that would not matter: two points of their success rate."""
pieces, measure = pool.experiment(ARMS)


def change(row: Row) -> float | None:
    """Success rate at the end minus at the start of the prompts that were solved at the start."""
    exact = row["exact"]
    start, end = exact["solved_start_rate"], exact["solved_end_rate"]
    return None if start is None or end is None else end - start


def lost(row: Row) -> float | None:
    """Share of the prompts seen solved twice in a row whose rate at the end is below one half."""
    return row["exact"]["solved_once_lost"]


def no_worse(estimate: Estimate) -> Verdict:
    """Whether a change is surely above minus the tolerated regression."""
    if estimate.seeds < 2:
        return "undecided"
    if estimate.low >= -TOLERATED:
        return "holds"
    return "does not hold" if estimate.high < -TOLERATED else "undecided"


def findings(rows: Sequence[Row]) -> list[Finding]:
    """The change for each minimum, and the accuracy that skipping buys."""
    found = []
    for arm, minimum in (("knapsack", 2), ("knapsack-min1", 1), ("knapsack-min0", 0)):
        moved = summary(rows, arm, change)
        found.append(
            Finding(
                f"Solved prompts do not regress at min_rollouts {minimum}",
                "they do not (N_low = 2)" if minimum == 2 else "-",
                told(rows, f"{moved.points()} points of success rate"),
                no_worse(moved),
            )
        )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """Exact rates of solved prompts before and after."""
    table = markdown_table(
        ("policy", "change of the prompts solved at the start, points", "of them lost",
         "seen solved twice in a row, then lost", "held-out accuracy at the end", "difference to minimum 2, points"),
        [
            (
                pool.label(arm),
                summary(rows, arm, change).points(),
                summary(rows, arm, lambda row: row["exact"]["solved_lost"]).percent(),
                summary(rows, arm, lost).percent(),
                summary(rows, arm, final_accuracy).percent(),
                "–" if arm == "knapsack" else compare(rows, arm, "knapsack", final_accuracy).points(),
            )
            for arm in ARMS
        ],
    )  # fmt: skip
    return f"""Success rates are exact: the probability of the one right sequence of tokens, for all training
prompts, before and after the run. A prompt is solved from {SOLVED:.0%} on and lost below {LOST:.0%}. "Seen solved
twice" means two visits in a row with at least two rollouts, all right; an unlucky prompt of middling rate is among
them now and then. A group of one rollout has no gradient: minimum 1 pays for watching alone. A regression of up to
{100 * TOLERATED:.0f} points counts as none.

{table}"""


def figure(rows: Sequence[Row]) -> Figure:
    """What was lost, and accuracy."""
    drawing, (left, right) = figures.panels(2)
    figures.dots(rows, ARMS, lost, left, "seen solved twice in a row, lost at the end")
    figures.accuracy(rows, ARMS, right)
    return drawing
