"""Experiment: the effective gradient ratio over training, against uniform allocation (the paper's Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import figures, pool
from experiments.contract import Finding, Row
from experiments.statistics import (
    compare,
    final_accuracy,
    judged,
    markdown_table,
    series_mean,
    summary,
    told,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Share of the work that carries a gradient"
QUESTION = "Does the knapsack raise the effective gradient ratio by 20 to 40 points over uniform allocation?"

ARMS = ("uniform", "uniform-2n", "paper", "knapsack")
CLAIMED_POINTS = 0.20
LAST = 0.2
"""Share of a run that is its end."""
pieces, measure = pool.experiment(ARMS)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """One line per policy for the ratio of rollouts, one for that of prompts, one for the waste of uniform."""
    found = []
    for arm in ("paper", "knapsack"):
        gain = compare(rows, arm, "uniform", series_mean("rollout_ratio"))
        found.append(
            Finding(
                f"{pool.label(arm)}: the effective gradient ratio rises by 20 to 40 points over uniform",
                "+20 to +40 points",
                told(rows, f"{gain.points()} points"),
                judged(gain, CLAIMED_POINTS),
            )
        )
        prompts = compare(rows, arm, "uniform", series_mean("prompt_ratio"))
        found.append(
            Finding(
                f"{pool.label(arm)}: more *prompts* carry a gradient than under uniform",
                "-",
                told(rows, f"{prompts.points()} points"),
                judged(prompts, 1e-9),
            )
        )
    correct, wrong = (summary(rows, "uniform", series_mean(name, LAST)) for name in ("all_correct", "all_wrong"))
    found.append(
        Finding(
            "Late in uniform training most groups are all correct or all wrong",
            "about 40 % and 20 %",
            told(rows, f"{correct.percent()} and {wrong.percent()}"),
            "holds" if correct.low + wrong.low > 0.5 else "undecided",
        )
    )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """Method, table, what speaks against the headline."""
    table = markdown_table(
        ("policy", "rollouts with a gradient", "prompts with a gradient", "all correct at the end",
         "all wrong at the end", "held-out accuracy at the end"),
        [
            (
                pool.label(arm),
                summary(rows, arm, series_mean("rollout_ratio")).percent(),
                summary(rows, arm, series_mean("prompt_ratio")).percent(),
                summary(rows, arm, series_mean("all_correct", LAST)).percent(),
                summary(rows, arm, series_mean("all_wrong", LAST)).percent(),
                summary(rows, arm, final_accuracy).percent(),
            )
            for arm in ARMS
        ],
    )  # fmt: skip
    paper = compare(rows, "paper", "uniform", series_mean("rollout_ratio"))
    ours = compare(rows, "knapsack", "uniform", series_mean("rollout_ratio"))
    accuracy = {arm: compare(rows, arm, "uniform", final_accuracy) for arm in ("paper", "knapsack")}
    return f"""The ratio counts rollouts in groups whose rewards differ, over all rollouts; its twin counts groups.
Moving budget alone can raise the first, not the second. Means over all steps, the end is the last {LAST:.0%} of them.

{table}

Over uniform allocation the ratio of rollouts moves by {paper.points()} points under the paper's rule and by
{ours.points()} points under the Bayes filter; held-out accuracy at the end by {accuracy["paper"].points()} and
{accuracy["knapsack"].points()} points. A larger ratio is no measure of what was learned."""


def figure(rows: Sequence[Row]) -> Figure:
    """Both ratios over the steps."""
    from knapsack_rl.report import plots

    drawing, (left, right) = figures.panels(2)
    plots.ratios_by_policy(figures.by_arm(rows, ARMS, "step", "rollout_ratio"), left, level="rollouts")
    plots.ratios_by_policy(figures.by_arm(rows, ARMS, "step", "prompt_ratio"), right, level="prompts")
    return drawing
