"""Experiment: rules of the field at equal generated rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import figures, pool
from experiments.contract import Finding, Row
from experiments.statistics import (
    compare,
    final_accuracy,
    judged,
    mean_accuracy,
    series_mean,
    summary,
    told,
)
from experiments.tables import accuracy_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Rivals at equal generated rollouts"
QUESTION = "Does the knapsack beat oversampling, skipping and sampling in rounds when every generated rollout counts?"

RIVALS = ("oversample", "skip", "sequential")
ARMS = ("uniform", "paper", "knapsack", *RIVALS)
pieces, measure = pool.experiment(ARMS)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """The Bayes filter against each rival, at the end and on the way."""
    found = []
    for arm in RIVALS:
        gain = compare(rows, "knapsack", arm, final_accuracy)
        way = compare(rows, "knapsack", arm, mean_accuracy)
        found.append(
            Finding(
                f"At equal generated rollouts the Bayes filter ends above {pool.label(arm)}",
                "-",
                told(rows, f"{gain.points()} points of held-out accuracy; mean over the run {way.points()}"),
                judged(gain, 1e-9),
            )
        )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """What the rules are, their accuracies, and how many steps they got."""
    steps = {arm: summary(rows, arm, lambda row: row["steps"]).mean for arm in ARMS}
    flat = {arm: summary(rows, arm, series_mean("rollout_ratio")).percent() for arm in RIVALS}
    return f"""Three rules as policies of the same trainer, with its learning rate and loss. *Oversample and drop*:
batches of prompts are generated until as many groups as a batch has prompts hold both outcomes, at most ten batches a
step; only those groups are trained on (DAPO's dynamic sampling). *Skip and drop*: the same after skipping prompts by
their last visits without variance (GRESO). *Sample until balanced*: rounds of N rollouts, at most four, until a group
holds N/2 of either outcome, then N rows of it are trained on (Reinforce-Ada). A run ends with the step in which it has
generated as many rollouts as the others; what a rule throws away counts.

{accuracy_table(rows, ARMS)}

Steps within that budget: {", ".join(f"{pool.label(arm)} {steps[arm]:.0f}" for arm in ARMS)}. Of all generated
rollouts {", ".join(f"{share} ({pool.label(arm)})" for arm, share in flat.items())} lay in a group with a gradient. A
rule with larger steps takes fewer of them; the learning rate is that chosen for uniform allocation and was not
chosen anew for any rule."""


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy against rollouts."""
    drawing, (ax,) = figures.panels(1)
    drawing.set_size_inches(7, 4)
    figures.accuracy(rows, ARMS, ax)
    return drawing
