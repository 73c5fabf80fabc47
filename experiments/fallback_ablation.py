"""Experiment: the paper's rule with and without its fallback, against posteriors that need none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import figures, pool
from experiments.contract import Finding, Row
from experiments.statistics import compare, final_accuracy, judged, markdown_table, summary, told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "The fallback for unsolved prompts"
QUESTION = "Do unsolved prompts starve without the paper's fallback, and does a posterior do without one?"

ARMS = ("uniform", "paper", "paper-without-fallback", "empirical-bayes", "knapsack")
pieces, measure = pool.experiment(ARMS)


def to_unsolved(row: Row) -> float | None:
    """Rollouts per visit of a prompt that never succeeded so far."""
    return row["budget"]["per_unsolved_visit"]


def unsolved_left(row: Row) -> float | None:
    """Share of the prompts unsolved at the start that still are, by exact success rates."""
    return row["exact"]["unsolved_left"]


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Starvation, what it costs, and the posterior beside the fallback."""
    without = summary(rows, "paper-without-fallback", to_unsolved)
    gain = compare(rows, "paper", "paper-without-fallback", to_unsolved)
    left = compare(rows, "paper-without-fallback", "paper", unsolved_left)
    accuracy = compare(rows, "paper", "paper-without-fallback", final_accuracy)
    found = [
        Finding(
            "Without the fallback unsolved prompts starve",
            "they get N_low",
            told(rows, f"{without.number()} rollouts a visit; with it {gain.number()} more"),
            judged(gain, 1e-9),
        ),
        Finding(
            "Without the fallback more prompts stay unsolved",
            "-",
            told(rows, f"{left.points()} points of those unsolved at the start"),
            judged(left, 1e-9),
        ),
        Finding(
            "The fallback raises held-out accuracy",
            "-",
            told(rows, f"{accuracy.points()} points"),
            judged(accuracy, 1e-9),
        ),
    ]
    for arm in ("empirical-bayes", "knapsack"):
        better = compare(rows, arm, "paper", final_accuracy)
        found.append(
            Finding(
                f"{pool.label(arm)}, which needs no fallback, beats the paper's rule with it",
                "-",
                told(rows, f"{better.points()} points of held-out accuracy"),
                judged(better, 1e-9),
            )
        )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """What unsolved prompts got, and what became of them."""
    table = markdown_table(
        ("policy", "rollouts a visit to prompts without a success so far", "share of all rollouts",
         "of the prompts unsolved at the start, still unsolved", "held-out accuracy at the end"),
        [
            (
                pool.label(arm),
                summary(rows, arm, to_unsolved).number(),
                summary(rows, arm, lambda row: row["budget"]["to_unsolved"]).percent(),
                summary(rows, arm, unsolved_left).percent(),
                summary(rows, arm, final_accuracy).percent(),
            )
            for arm in ARMS
        ],
    )  # fmt: skip
    return f"""A prompt has no success so far if it was sampled before and never answered right; the uniform share
would be N rollouts. Unsolved at the start and the end is told by exact success rates below 1 in 64, which this task
allows to compute: one sequence of tokens is right.

{table}"""


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy, and what stayed unsolved."""
    drawing, (left, right) = figures.panels(2)
    figures.accuracy(rows, ARMS, left)
    figures.dots(rows, ARMS, unsolved_left, right, "unsolved at the start and at the end")
    return drawing
