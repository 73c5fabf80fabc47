"""Experiment: a real language model, SmolLM2-135M-Instruct, with the knapsack and with uniform allocation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import figures, pool
from experiments.budgets import largest
from experiments.contract import Finding, Options, Row
from experiments.statistics import (
    compare,
    final_accuracy,
    judged,
    markdown_table,
    mean_accuracy,
    per_seed,
    series_mean,
    summary,
    told,
)
from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.groups import DIFFICULTY_CLASSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "A real model"
QUESTION = "Does the knapsack help a pre-trained language model of 135 million parameters within some dozens of steps?"

TASK = "smollm2"
"""Model and data set of its own: these runs are not those of other experiments."""
ARMS = ("uniform", "knapsack")
SEEDS = 2
SETTINGS: dict[str, Any] = {
    "model": "smollm2-135m",
    "dataset": "sums",
    "precision": "bfloat16",
    "prompts_per_step": 16,
    "max_rollouts": 64,
    "train_prompts": 96,
    "held_out_prompts": 64,
    "eval_every": 12,
    "eval_samples": 2,
    "save_every": 12,
    "steps": 36,
    "learning_rate": 1e-5,
}
"""Six visits to each prompt; the learning rate is the one that the documentation recommends, tried on nothing."""


def pieces(options: Options) -> int:
    """One piece per run."""
    return pool.pieces(ARMS, pool.with_at_most(SEEDS, options))


def measure(options: Options, done: Callable[[str], None]) -> list[Row]:
    """Train both arms; the quick version trains the small model that ships on its own task."""
    changes = {} if options.quick else SETTINGS
    return pool.measure(ARMS, pool.with_at_most(SEEDS, options), done, f"{TASK}-", **changes)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Ratios and accuracy against uniform allocation."""
    rollouts = compare(rows, "knapsack", "uniform", series_mean("rollout_ratio"))
    prompts = compare(rows, "knapsack", "uniform", series_mean("prompt_ratio"))
    accuracy = compare(rows, "knapsack", "uniform", final_accuracy)
    way = compare(rows, "knapsack", "uniform", mean_accuracy)
    return [
        Finding(
            "On a real model, more rollouts carry a gradient than under uniform",
            "+20 to +40 points",
            told(rows, f"{rollouts.points()} points"),
            judged(rollouts, 0.2),
        ),
        Finding(
            "On a real model, more *prompts* carry a gradient than under uniform",
            "-",
            told(rows, f"{prompts.points()} points"),
            judged(prompts, 1e-9),
        ),
        Finding(
            "On a real model, held-out accuracy is higher at equal rollouts",
            "+2 to +4 points on average",
            told(rows, f"{accuracy.points()} points at the end; mean over the run {way.points()}"),
            judged(accuracy, 1e-9),
        ),
    ]


def spectrum(rows: Sequence[Row], arm: str, *, end: bool) -> FloatArray:
    """(5,) share of prompts in each difficulty class at their first visit, or at their last; mean over seeds."""
    shares = []
    for row in rows:
        if row["arm"] == arm:
            moved = np.asarray(row["classes"]["transitions"], dtype=np.float64)
            shares.append(moved.sum(axis=0 if end else 1) / moved.sum())
    return np.mean(shares, axis=0)


def paragraph(rows: Sequence[Row]) -> str:
    """The run, the spectrum of success rates, the comparison."""
    header = ("", *(name.replace("_", " ") for name in DIFFICULTY_CLASSES))
    parts = [("first visit, both policies", "uniform", False)]
    parts += [(f"last visit, {pool.label(arm)}", arm, True) for arm in ARMS]
    classes = markdown_table(
        header, [(name, *(f"{share:.0%}" for share in spectrum(rows, arm, end=end))) for name, arm, end in parts]
    )
    table = markdown_table(
        ("policy", "held-out accuracy before", "at the end", "mean over the run", "rollouts with a gradient",
         "prompts with a gradient", "largest allocation"),
        [
            (
                pool.label(arm),
                summary(rows, arm, lambda row: row["evaluations"]["accuracy"][0]).percent(),
                summary(rows, arm, final_accuracy).percent(),
                summary(rows, arm, mean_accuracy).percent(),
                summary(rows, arm, series_mean("rollout_ratio")).percent(),
                summary(rows, arm, series_mean("prompt_ratio")).percent(),
                f"{max(per_seed(rows, arm, largest).values()):.0f}",
            )
            for arm in ARMS
        ],
    )  # fmt: skip
    visits = SETTINGS["steps"] * SETTINGS["prompts_per_step"] / SETTINGS["train_prompts"]
    return f"""SmolLM2-135M-Instruct on sums, differences and products of one- and two-digit numbers, shown three solved
ones (data set `sums`), on a CPU in bfloat16: {SETTINGS["steps"]} steps of {SETTINGS["prompts_per_step"]} prompts, N =
{pool.FULL.rollouts_per_prompt}, {SETTINGS["train_prompts"]} training and {SETTINGS["held_out_prompts"]} held-out
prompts, so that each prompt is visited {visits:.0f} times and the allocation can tell prompts apart from the second
visit on. Where the prompts stand by the successes among their
rollouts:

{classes}

{table}

It says that everything works on a real model and what the spectrum looks like there; for a difference in accuracy it
is small and short, as the width of the intervals tells. The same command with more steps and prompts is what an
accelerator would be for."""


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy against rollouts, and the share of rollouts with a gradient over the steps."""
    from knapsack_rl.report import plots

    drawing, (left, right) = figures.panels(2)
    figures.accuracy(rows, ARMS, left)
    plots.ratios_by_policy(figures.by_arm(rows, ARMS, "step", "rollout_ratio"), right, level="rollouts")
    return drawing
