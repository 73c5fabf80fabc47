"""Tables that several experiments share."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.contract import Row
from experiments.pool import label
from experiments.statistics import (
    compare,
    final_accuracy,
    markdown_table,
    mean_accuracy,
    relative_cost,
    summary,
)


def accuracy_table(rows: Sequence[Row], arms: Sequence[str], baseline: str = "uniform") -> str:
    """Markdown: accuracy at the end and on the way, differences to a baseline, rollouts to its final accuracy."""
    header = (
        "policy",
        "rollouts generated",
        "held-out accuracy at the end",
        f"difference to {label(baseline)}, points",
        "mean over the run",
        "its difference, points",
        f"rollouts to the final accuracy of {label(baseline)}",
    )
    lines = []
    for arm in arms:
        mine = arm == baseline
        lines.append(
            (
                label(arm),
                f"{summary(rows, arm, lambda row: row['rollouts']).mean:,.0f}",
                summary(rows, arm, final_accuracy).percent(),
                "–" if mine else compare(rows, arm, baseline, final_accuracy).points(),
                summary(rows, arm, mean_accuracy).percent(),
                "–" if mine else compare(rows, arm, baseline, mean_accuracy).points(),
                "1 ×" if mine else relative_cost(rows, arm, baseline).times(),
            )
        )
    return markdown_table(header, lines)
