"""Runs of uniform GRPO on the shipped task that were recorded beforehand, for the page of another run on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.report.comparison import SMOOTHING
from knapsack_rl.runs.curves import moving_average, rollouts_to_reach

FILE = Path(__file__).with_suffix(".json")
"""Written by ``python -m experiments recorded`` from the rows of the experiment that it names."""

SAME_TASK = ("model", "dataset", "train_prompts", "held_out_prompts", "prompt_template", "chat", "temperature")
"""Settings that a run must share to be on the same task."""


@dataclass(frozen=True, eq=False)
class RecordedRuns:
    """Held-out accuracy of the recorded runs.

    Attributes:
        name: of their policy.
        rollouts: (E,) generated before each evaluation.
        accuracy: (S, E) of each seed, 0 to 1.
    """

    name: str
    rollouts: IntArray
    accuracy: FloatArray

    @property
    def mean(self) -> FloatArray:
        """(E,) mean over the seeds."""
        return self.accuracy.mean(axis=0)

    @property
    def final(self) -> float:
        """Accuracy at the end, mean over the seeds, smoothed as all curves are that are searched for a target."""
        return float(moving_average(self.mean, SMOOTHING)[-1])

    def ratio(self, rollouts: ArrayLike, accuracy: ArrayLike) -> float:
        """Rollouts at which a curve reaches the final accuracy of these runs, over those that their mean takes.

        Args:
            rollouts: (E,) generated before each evaluation.
            accuracy: (E,) of it.

        Returns:
            The ratio, NaN if the curve does not reach it.
        """
        own, theirs = (
            rollouts_to_reach(x, moving_average(y, SMOOTHING), self.final)
            for x, y in ((rollouts, accuracy), (self.rollouts, self.mean))
        )
        return own / theirs


@cache
def read() -> tuple[Mapping[str, Any], tuple[RecordedRuns, ...]]:
    """Return the settings of ``SAME_TASK`` of the recorded runs, and the runs by policy, that of GRPO first."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    rollouts = np.array(found["rollouts"])
    return found["task"], tuple(RecordedRuns(name, rollouts, np.array(a)) for name, a in found["accuracy"].items())


def uniform_for(config: Mapping[str, Any]) -> tuple[RecordedRuns, ...]:
    """Return the recorded runs by policy if a run with these settings is on their task, else none."""
    task, recorded = read()
    return recorded if all(config.get(name) == value for name, value in task.items()) else ()
