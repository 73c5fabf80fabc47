"""The figures of one run as plain values, for programs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from knapsack_rl.groups import DIFFICULTY_CLASSES
from knapsack_rl.runs.curves import tail_mean
from knapsack_rl.runs.files import finite_or_none
from knapsack_rl.runs.log import RunLog


def run_summary(run: RunLog) -> dict[str, Any]:
    """Return the numbers on the page of a run; None where a figure is unknown, never NaN.

    Keys:
        folder, config, finished, steps, planned_steps, rollouts: The run.
        held_out: Rollouts and accuracy of each evaluation.
        effective_rollouts, effective_prompts: Means over the first and the last 20 % of the steps.
        all_correct, all_wrong, largest_allocation, unsolved_share: Over the end of the run.
        transitions: Prompts by class of the first (rows) and last visit (columns), in the order of `classes`.
        calibration: Predicted and realised share of groups with a gradient by bin, and the Brier scores.
        reasons: Reasons that the allocator reported, each with its number of steps.
        warnings: Warnings of the run.
        notes: Remarks on how the log was read.
    """
    rollouts, accuracy = run.held_out
    calibration = run.calibration()
    return {
        "folder": run.name,
        "config": dict(run.config),
        "finished": run.finished,
        "steps": int(run.steps.size),
        "planned_steps": run.planned_steps,
        "rollouts": int(run.rollouts.sum()),
        "held_out": {"rollouts": rollouts.tolist(), "accuracy": accuracy.tolist()},
        "effective_rollouts": _ends(run.effective_rollout_ratio),
        "effective_prompts": _ends(run.effective_prompt_ratio),
        "all_correct": finite_or_none(tail_mean(run.all_correct_share)),
        "all_wrong": finite_or_none(tail_mean(run.all_wrong_share)),
        "largest_allocation": int(run.max_budget.max()) if run.steps.size else None,
        "unsolved_share": finite_or_none(run.unsolved_share),
        "classes": list(DIFFICULTY_CLASSES),
        "transitions": run.transitions.tolist(),
        "calibration": {
            "predicted": calibration.predicted.tolist(),
            "realised": calibration.realised.tolist(),
            "visits": calibration.visits.tolist(),
            "brier": finite_or_none(calibration.brier),
            "brier_of_average": finite_or_none(calibration.brier_constant),
        },
        "reasons": dict(Counter(reason for reason in run.reasons if reason)),
        "warnings": [dict(warning) for warning in run.warnings],
        "notes": list(run.notes),
    }


def _ends(values: np.ndarray) -> dict[str, float | None]:
    return {"first": finite_or_none(tail_mean(values[::-1])), "last": finite_or_none(tail_mean(values))}
