"""Experiment: rare successes of unsolved prompts, kept and trained on again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments import figures, pool
from experiments.contract import Finding, Row
from experiments.fallback_ablation import unsolved_left
from experiments.statistics import compare, final_accuracy, judged, markdown_table, summary, told
from experiments.tables import accuracy_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Replay of rare successes"
QUESTION = "Does replaying rare successes of unsolved prompts leave fewer of them unsolved?"

PAIRS = {"knapsack": "knapsack-replay", "uniform": "uniform-replay"}
ARMS = ("uniform", "uniform-replay", "knapsack", "knapsack-replay")
pieces, measure = pool.experiment(ARMS)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Unsolved prompts and accuracy, with against without."""
    found = []
    for without, replay in PAIRS.items():
        fewer = compare(rows, without, replay, unsolved_left)
        gain = compare(rows, replay, without, final_accuracy)
        found.append(
            Finding(
                f"{pool.label(without)}: with replay fewer prompts stay unsolved",
                "proposed; 20 % stay extremely hard",
                told(rows, f"{fewer.points()} points fewer; held-out accuracy {gain.points()} points"),
                judged(fewer, 1e-9),
            )
        )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """How it works, what stayed unsolved, how often it was used."""
    table = markdown_table(
        ("policy", "of the prompts unsolved at the start, still unsolved", "unsolved at the end, of all",
         "no success at the last visit", "successes mixed in per run"),
        [
            (
                pool.label(arm),
                summary(rows, arm, unsolved_left).percent(),
                summary(rows, arm, lambda row: row["exact"]["unsolved_end"]).percent(),
                summary(rows, arm, lambda row: row["classes"]["unsolved_share"]).percent(),
                summary(rows, arm, lambda row: row["replay"]["mixed_in"]).number(),
            )
            for arm in ARMS
        ],
    )  # fmt: skip
    return f"""The newest success of a prompt whose success rate was estimated at 1/8 or less is kept with the
log-probabilities it was sampled with. At a later visit without a success it takes the place of one failure; TRL's
clipped loss weighs its tokens by the ratio to those log-probabilities, at most 1.28. After eight uses, or once the
prompt is no longer rare, it is dropped. Unsolved means an exact success rate below 1 in 64.

{table}

{accuracy_table(rows, ARMS)}"""


def figure(rows: Sequence[Row]) -> Figure:
    """What stayed unsolved, and accuracy."""
    drawing, (left, right) = figures.panels(2)
    figures.dots(rows, ARMS, unsolved_left, left, "unsolved at the start and at the end")
    figures.accuracy(rows, ARMS, right)
    return drawing
