"""Rows as the pool of training runs extracts them, made up: accuracies and ratios that tests choose."""

from __future__ import annotations

from typing import Any

import numpy as np


def run_row(
    arm: str,
    seed: int,
    *,
    accuracy: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.7),
    rollouts: int = 1000,
    tokens: int = 4000,
    ratio: float = 0.3,
    prompt_ratio: float = 0.3,
    largest: int = 16,
    unsolved_left: float = 0.5,
    solved_change: float = 0.0,
    per_unsolved_visit: float = 4.0,
) -> dict[str, Any]:
    """One run; the accuracies are those of evaluations at equal distances."""
    points = len(accuracy)
    steps = np.linspace(0, 40, points)
    series = {
        name: [value] * 4
        for name, value in {
            "rollout_ratio": ratio,
            "prompt_ratio": prompt_ratio,
            "calibration_error": -0.03,
            "all_correct": 0.4,
            "easy": 0.1,
            "medium": 0.2,
            "hard": 0.1,
            "all_wrong": 0.2,
            "training_success": 0.6,
            "largest": float(largest),
        }.items()
    }
    return {
        "arm": arm,
        "seed": seed,
        "steps": 40,
        "rollouts_per_prompt": 8,
        "rollouts": rollouts,
        "evaluations": {
            "step": steps.tolist(),
            "rollouts": (steps / 40 * rollouts).tolist(),
            "tokens": (steps / 40 * tokens).tolist(),
            "seconds": (steps / 40 * tokens / 100).tolist(),
            "accuracy": list(accuracy),
            "greedy": list(accuracy),
        },
        "series": {"step": [5.0, 15.0, 25.0, 35.0], "rollouts": [rollouts * k / 8 for k in (1, 3, 5, 7)], **series},
        "budget": {
            "rollouts": [2, largest],
            "visits": [30, 10],
            "by_estimate": {
                "estimate": [0.0, 0.35, 1.0, None],
                "mean": [3.0, 12.0, 2.0, 8.0],
                "low": [2.0, 8.0, 2.0, 8.0],
                "high": [4.0, 16.0, 2.0, 8.0],
                "visits": [10, 10, 10, 10],
            },
            "to_unsolved": 0.2,
            "per_unsolved_visit": per_unsolved_visit,
        },
        "classes": {"transitions": (np.eye(5, dtype=int) * 3).tolist(), "unsolved_share": 0.2},
        "exact": {
            "mean_start": 0.3,
            "mean_end": 0.7,
            "solved_start": 10,
            "solved_start_rate": 0.95,
            "solved_end_rate": 0.95 + solved_change,
            "solved_lost": 0.0,
            "solved_once": 12,
            "solved_once_lost": 0.01,
            "unsolved_start": 20,
            "unsolved_left": unsolved_left,
            "unsolved_end": 0.1,
        },
        "replay": {"mixed_in": 5.0},
    }
