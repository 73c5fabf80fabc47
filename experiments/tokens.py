"""Experiment: a budget in tokens against one in rollouts, where answers vary in length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import figures, pool
from experiments.contract import Finding, Options, Row
from experiments.statistics import (
    difference,
    final_accuracy,
    judged,
    markdown_table,
    mean_of,
    relative_cost,
    summary,
    told,
)
from knapsack_rl.report.comparison import SMOOTHING
from knapsack_rl.runs.curves import moving_average

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Budgets in tokens"
QUESTION = "Is a budget in tokens better than one in rollouts at equal tokens, where answers vary in length?"

TASK = "running-sums"
"""Data set of its own: these runs are not those of other experiments."""
ARMS = ("uniform", "knapsack", "knapsack-tokens")
SEEDS = 3
STEPS = 300
BASE_RATE = 0.2
"""Mean success rate on the training prompts at which pre-training of the base model stops."""


def pieces(options: Options) -> int:
    """One piece per run, and one for the base model."""
    return pool.pieces(ARMS, pool.with_at_most(SEEDS, options)) + 1


def measure(options: Options, done: Callable[[str], None]) -> list[Row]:
    """Make the base model if a run needs it and it is not there, and train the arms."""
    folder, fewer = pool.root_of(options) / f"{TASK}-base", pool.with_at_most(SEEDS, options)
    changes: dict[str, Any] = {"dataset": TASK, "model": str(folder)} | ({} if options.quick else {"steps": STEPS})
    if pool.missing(pool.plan(ARMS, fewer, f"{TASK}-", **changes), options):
        make_base_model(folder, quick=options.quick)
    done("base model")
    return pool.measure(ARMS, fewer, done, f"{TASK}-", **changes)


def make_base_model(folder: Path, *, quick: bool) -> None:
    """Pre-train a base model for the task with seed 0, if it is not there.

    Raises:
        RuntimeError: pre-training did not reach the target.
    """
    import torch

    from knapsack_rl.tasks import running_sums
    from knapsack_rl.tasks.pretraining import Schedule, Target, build_model, build_tokenizer, train_until

    if (folder / "tokenizer_config.json").is_file():  # written last
        return
    torch.manual_seed(0)
    width, layers, lowest = (16, 1, 0.0) if quick else (96, 2, BASE_RATE)
    model = build_model(width, layers, running_sums.MAX_POSITIONS, running_sums.MAX_COMPLETION_TOKENS)
    target = Target(unsolved=(0.0, 1.0), solved=0.0, mean=(lowest, 1.0))
    sums = running_sums.make_running_sums()
    lines: list[str] = []
    made = train_until(target, model, Schedule(max_steps=8000, eval_every=25), sums.pretrain, sums.train, lines.append)
    if made is None:
        raise RuntimeError(f"pre-training did not reach a mean success rate of {lowest}; it ended with {lines[-1]}")
    made[0].save_pretrained(folder)
    build_tokenizer(running_sums.MAX_POSITIONS).save_pretrained(folder)


def accuracy_at(row: Row, tokens: float) -> float:
    """Smoothed held-out accuracy of a run when it had generated so many tokens."""
    curve = row["evaluations"]
    return float(np.interp(tokens, curve["tokens"], moving_average(curve["accuracy"], SMOOTHING)))


def at_equal_tokens(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Accuracy by arm and seed at the tokens of that seed's shortest run."""
    seeds = sorted({row["seed"] for row in rows})
    ends = {seed: min(row["evaluations"]["tokens"][-1] for row in rows if row["seed"] == seed) for seed in seeds}
    return {
        arm: {row["seed"]: accuracy_at(row, ends[row["seed"]]) for row in rows if row["arm"] == arm} for arm in ARMS
    }


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Tokens against rollouts."""
    accuracy = at_equal_tokens(rows)
    gain = difference(accuracy["knapsack-tokens"], accuracy["knapsack"])
    return [
        Finding(
            "At equal tokens a budget in tokens gives a better model than one in rollouts",
            "open question",
            told(rows, f"{gain.points()} points of held-out accuracy"),
            judged(gain, 1e-9),
        )
    ]


def paragraph(rows: Sequence[Row]) -> str:
    """The task, how tokens are made equal, and what came of it."""
    accuracy = at_equal_tokens(rows)
    table = markdown_table(
        ("policy", "tokens generated", "rollouts generated", "accuracy at equal tokens",
         "difference to uniform N, points", "accuracy at its own end", "tokens to uniform N's final accuracy"),
        [
            (
                pool.label(arm),
                f"{summary(rows, arm, lambda row: row['evaluations']['tokens'][-1]).mean:,.0f}",
                f"{summary(rows, arm, lambda row: row['rollouts']).mean:,.0f}",
                mean_of(accuracy[arm]).percent(),
                "–" if arm == "uniform" else difference(accuracy[arm], accuracy["uniform"]).points(),
                summary(rows, arm, final_accuracy).percent(),
                relative_cost(rows, arm, "uniform", "tokens").times(),
            )
            for arm in ARMS
        ],
    )  # fmt: skip
    return f"""Sums of two to seven digits with every running total written out, so that answers have 2 to 18
tokens, and a base model of the same size, pre-trained on other sums until its mean success rate is {BASE_RATE:g}. A
step has 64 prompts; its budget is N = 8 rollouts per prompt, or as many tokens as those are expected to take, so
that the number of rollouts varies. {STEPS} steps. What a policy really generates differs a little from what was
expected: accuracies are read off each seed's curves (smoothed over three evaluations) where the shortest of its runs
ends.

{table}"""


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy against tokens."""
    drawing, (ax,) = figures.panels(1)
    drawing.set_size_inches(7, 4)
    figures.accuracy(rows, ARMS, ax, "tokens")
    return drawing
