"""Experiment: the loss weighed per rollout, as in the paper, against per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import figures, pool
from experiments.contract import Finding, Row
from experiments.statistics import compare, final_accuracy, judged, told
from experiments.tables import accuracy_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Weight per rollout or per prompt"
QUESTION = "Should a prompt weigh in proportion to its rollouts, or the same whatever it gets?"

PAIRS = {"knapsack": "knapsack-per-prompt", "paper": "paper-per-prompt"}
ARMS = ("uniform", *(arm for pair in PAIRS.items() for arm in pair))
pieces, measure = pool.experiment(ARMS)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Per rollout against per prompt, for either policy."""
    found = []
    for per_rollout, per_prompt in PAIRS.items():
        gain = compare(rows, per_rollout, per_prompt, final_accuracy)
        found.append(
            Finding(
                f"{pool.label(per_rollout)}: weighing per rollout is better than per prompt",
                "-",
                told(rows, f"{gain.points()} points of held-out accuracy"),
                judged(gain, 1e-9),
            )
        )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """Accuracies of both weightings."""
    return f"""With a mean over rollouts a prompt of 40 rollouts weighs 20 times one of 2: the allocation changes the
objective, not the noise alone. Weighed per prompt (advantage times B / (M N_i)) every prompt counts as under uniform
allocation, and more rollouts only make its gradient less noisy.

{accuracy_table(rows, ARMS)}"""


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy against rollouts."""
    drawing, (ax,) = figures.panels(1)
    drawing.set_size_inches(7, 4)
    figures.accuracy(rows, ARMS, ax)
    return drawing
