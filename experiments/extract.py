"""A training run as one small JSON row, enough for the evidence page.

Per evaluation: rollouts and tokens generated before it, held-out accuracy. Per stretch of steps: gradient ratios, class
shares, largest allocation. Over the run: budgets, transitions, what became of prompts solved and unsolved at the start.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.contract import Row
from experiments.exact import success_rates
from knapsack_rl.runs.files import MODEL_FOLDER
from knapsack_rl.runs.log import FloatArray, RunLog, Visits
from knapsack_rl.tasks.registry import ONE_COMPLETION
from knapsack_rl.training.compare import Run
from knapsack_rl.training.settings import TrainSettings

STRETCHES = 40
"""Points to which the series of a run are averaged."""

CLASS_SERIES = ("all_correct", "easy", "medium", "hard", "all_wrong")
"""Series of the shares of ``DIFFICULTY_CLASSES``, in their order."""

SOLVED, LOST, UNSOLVED = 0.9, 0.5, 1 / 64
"""Exact success rates: at least the first a prompt is solved, below the second a solved one is lost, below the third a
prompt is unsolved."""


def extract(run: Run, arm: str, rule: str = "") -> Row:
    """Summarise a finished run in a row.

    Args:
        run: a finished run.
        arm: name of its policy.
        rule: that decided the rollouts of its steps, if it is not the allocation.

    Returns:
        JSON values; the keys are those of the parts below. ``exact`` is None for a task on which success rates can only
        be sampled.
    """
    log = RunLog.load(run.folder)
    return {
        "arm": arm,
        "rule": rule,
        "seed": run.settings.seed,
        "settings": dataclasses.asdict(run.settings),
        "rollouts_per_prompt": run.settings.rollouts_per_prompt,
        **summarise(log),
        "exact": _exact(run.settings, run, log) if run.settings.dataset in ONE_COMPLETION else None,
        "replay": {"mixed_in": float(log.metric("replay/mixed_in")[1].sum())},
    }


def summarise(log: RunLog) -> Row:
    """The part of a row that the log alone gives."""
    return {
        "steps": int(log.steps.size),
        "rollouts": int(log.rollouts.sum()),
        "evaluations": _evaluations(log),
        "series": _series(log),
        "budget": _budget(log),
        "classes": {"transitions": log.transitions.tolist(), "unsolved_share": _number(log.unsolved_share)},
    }


def _evaluations(log: RunLog) -> dict[str, list[float]]:
    """Step, rollouts and tokens generated before each evaluation, and accuracy of sampled and greedy answers."""
    rows = [row for row in log.metrics if "held_out/accuracy" in row]
    names = {
        "step": "step",
        "rollouts": "rollouts",
        "tokens": "tokens",
        "accuracy": "held_out/accuracy",
        "greedy": "held_out/greedy_accuracy",
    }
    return {short: [_number(row[name]) for row in rows] for short, name in names.items()}


def _series(log: RunLog) -> dict[str, list[float | None]]:
    """Means over stretches of steps; ``largest`` is the maximum of a stretch."""
    parts = np.array_split(np.arange(log.steps.size), min(STRETCHES, log.steps.size))

    def means(values: FloatArray | NDArray[Any]) -> list[float | None]:
        return [_number(float(np.nanmean(values[part])) if np.isfinite(values[part]).any() else None) for part in parts]

    return {
        "step": means(log.steps),
        "rollouts": means(log.cumulative_rollouts),
        "rollout_ratio": means(log.effective_rollout_ratio),
        "prompt_ratio": means(log.effective_prompt_ratio),
        "calibration_error": means(log.calibration_error),
        **{name: means(log.difficulty_shares[:, index]) for index, name in enumerate(CLASS_SERIES)},
        "training_success": means(log.training_success),
        "largest": [float(log.max_budget[part].max()) for part in parts],
    }


def _budget(log: RunLog) -> dict[str, Any]:
    """Visits by rollouts given, mean rollouts by estimated rate, and the budget of prompts without a success so far."""
    counts = log.visits.counts
    sizes, visits = np.unique(counts, return_counts=True)
    by_estimate = log.budget_by_estimate
    unsolved = never_solved(log.visits)
    return {
        "rollouts": sizes.tolist(),
        "visits": visits.tolist(),
        "by_estimate": {
            "estimate": [_number(value) for value in by_estimate.estimate],
            "mean": [_number(value) for value in by_estimate.mean],
            "low": [_number(value) for value in by_estimate.low],
            "high": [_number(value) for value in by_estimate.high],
            "visits": by_estimate.visits.tolist(),
        },
        "to_unsolved": _number(float(counts[unsolved].sum() / counts.sum())),
        "per_unsolved_visit": _number(float(counts[unsolved].mean()) if unsolved.any() else None),
    }


def never_solved(visits: Visits) -> NDArray[np.bool_]:
    """Mark the visits (V,) of prompts that were sampled before and never succeeded until then."""
    sampled: dict[int, int] = {}
    found = np.zeros(visits.prompt.size, dtype=np.bool_)
    for at, (prompt, scored, good) in enumerate(
        zip(visits.prompt.tolist(), visits.scored.tolist(), visits.successes.tolist(), strict=True)
    ):
        found[at] = sampled.get(prompt, -1) == 0
        if scored:
            sampled[prompt] = sampled.get(prompt, 0) + good
    return found


def solved_once(visits: Visits) -> set[int]:
    """Prompts of which two visits in a row had at least two rollouts, all of them right."""
    before: dict[int, bool] = {}
    found = set()
    for prompt, scored, good in zip(
        visits.prompt.tolist(), visits.scored.tolist(), visits.successes.tolist(), strict=True
    ):
        if scored:
            perfect = scored >= 2 and good == scored
            if perfect and before.get(prompt, False):
                found.add(prompt)
            before[prompt] = perfect
    return found


def _exact(settings: TrainSettings, run: Run, log: RunLog) -> dict[str, float | None]:
    ids, start = success_rates(settings, None)
    _, end = success_rates(settings, run.folder / MODEL_FOLDER)
    return before_and_after(ids, start, end, log)


def before_and_after(ids: Sequence[str], start: FloatArray, end: FloatArray, log: RunLog) -> dict[str, float | None]:
    """The training prompts by exact success rates before and after the run.

    Args:
        ids: (P,) of the prompts.
        start: (P,) rates before.
        end: (P,) rates after.
        log: of the run.
    """
    easy, hard = start >= SOLVED, start < UNSOLVED
    place: dict[str | int, int] = {name: position for position, name in enumerate(ids)}
    once = np.array(sorted(place[log.prompt_ids[prompt]] for prompt in solved_once(log.visits)), dtype=np.int64)
    return {
        "mean_start": _number(start.mean()),
        "mean_end": _number(end.mean()),
        "solved_start": int(easy.sum()),
        "solved_start_rate": _share(start[easy]),
        "solved_end_rate": _share(end[easy]),
        "solved_lost": _share(end[easy] < LOST),
        "solved_once": int(once.size),
        "solved_once_lost": _share(end[once] < LOST),
        "unsolved_start": int(hard.sum()),
        "unsolved_left": _share(end[hard] < UNSOLVED),
        "unsolved_end": _share(end < UNSOLVED),
    }


def _share(values: NDArray[Any]) -> float | None:
    return _number(float(values.mean())) if values.size else None


def _number(value: Any) -> Any:
    """A number of six digits, None if it is not finite: the files stay small and valid JSON."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{float(value):.6g}")
