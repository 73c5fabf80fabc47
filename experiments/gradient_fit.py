"""Measured gains as arrays, and a value function fitted to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.contract import Row
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.value import nonzero_gradient_probability
from knapsack_rl.offline.environments import BoolArray

GROUP_SIZES = (2, 4, 8, 16, 64)
"""N at which gradients are measured."""

TARGET = "own"
"""The gain to which the value function is fitted: that of the prompt's own success rate, as in the paper's derivation.

The gain of other prompts is what training is after, but it differs much between prompts of equal success rate.
"""

LARGEST_EXPONENT = 5.0


@dataclass(frozen=True, eq=False)
class Measured:
    """Prompts of all seeds and stages; G group sizes.

    Attributes:
        seed: (P,) seed.
        step: (P,) training steps of the model.
        rates: (P,) exact success rate.
        by_target: (P, G) mean over groups, for ``norm``, ``cosine``, ``own`` and ``population``.
        fitted_on: (P,) whether the prompt belongs to the half that value functions are fitted on.
    """

    seed: IntArray
    step: IntArray
    rates: FloatArray
    by_target: dict[str, FloatArray]
    fitted_on: BoolArray

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Measured:
        """From the rows of ``experiments.gradient_value``; every second prompt of a stage is in the fitting half."""
        chosen = [row for row in rows if row["part"] == "prompt"]
        seed, step = (np.array([row[name] for row in chosen]) for name in ("seed", "step"))
        place = np.zeros(len(chosen), dtype=np.int64)
        for one_seed, one_step in set(zip(seed.tolist(), step.tolist(), strict=True)):
            mine = (seed == one_seed) & (step == one_step)
            place[mine] = np.arange(mine.sum())
        targets = {name: np.array([row[name] for row in chosen]) for name in ("norm", "cosine", "own", "population")}
        return cls(seed, step, np.array([row["p"] for row in chosen]), targets, place % 2 == 0)

    @property
    def stages(self) -> list[IntArray]:
        """Indices of the prompts of each seed and step."""
        pairs = sorted(set(zip(self.seed.tolist(), self.step.tolist(), strict=True)))
        return [np.flatnonzero((self.seed == seed) & (self.step == step)) for seed, step in pairs]

    def relative(self, target: str) -> FloatArray:
        """(P, G) a target relative to its root mean square in the stage: within a batch only ratios matter."""
        found = self.by_target[target].copy()
        for mine in self.stages:
            found[mine] /= np.sqrt(np.mean(found[mine] ** 2))
        return found


def least_squares_share(predicted: FloatArray, measured: FloatArray) -> float:
    """1 - sum (y - c x)^2 / sum y^2 with the best c: the share of squared gains that values explain up to a factor."""
    x, y = predicted.ravel(), measured.ravel()
    explained = float(x @ y) ** 2 / float(x @ x) if x.any() else 0.0
    return explained / float(y @ y)


def explained(measured: Measured, predicted: FloatArray, target: str, chosen: BoolArray | None = None) -> float:
    """Share of squared gains that values explain, with a factor of its own in each stage; mean over stages.

    Args:
        measured: the gains.
        predicted: (P, G) values.
        target: which gain.
        chosen: (P,) the prompts that count; None for all.
    """
    gains = measured.by_target[target]
    shares = []
    for stage in measured.stages:
        mine = stage if chosen is None else stage[chosen[stage]]
        shares.append(least_squares_share(predicted[mine], gains[mine]))
    return float(np.mean(shares))


def fit(rows: Sequence[Row], target: str = TARGET) -> dict[str, Any]:
    """Fit V(N, p) = c (1 - p^N - (1-p)^N) p^a (1-p)^b to the measured gains of half the prompts.

    Least squares over exponents a, b in [0, 5] to two digits, with a factor c for each stage, because within a batch
    only ratios matter. The paper's value is a = 1, b = 2.

    Args:
        rows: of ``experiments.gradient_value``.
        target: which gain.

    Returns:
        ``success_exponent``, ``failure_exponent``, ``target``, ``prompts`` fitted on, and ``explained`` on the other
        half by the fitted value and by the paper's, see :func:`explained`.
    """
    measured = Measured.of(rows)
    half = measured.fitted_on
    mixed = nonzero_gradient_probability(np.array(GROUP_SIZES), measured.rates[:, None])

    def values(a: float, b: float) -> FloatArray:
        return mixed * (measured.rates**a * (1.0 - measured.rates) ** b)[:, None]

    best, width = (LARGEST_EXPONENT / 2, LARGEST_EXPONENT / 2), LARGEST_EXPONENT / 2
    for step in (0.25, 0.05, 0.01):
        centre: tuple[float, float] | None = None
        while centre != best:  # the optimum may lie along a valley that leaves the window
            centre = best
            around = [np.arange(middle - width, middle + width + step / 2, step).round(2) for middle in centre]
            inside = [axis[(axis >= 0.0) & (axis <= LARGEST_EXPONENT)].tolist() for axis in around]
            tried = [centre, *((a, b) for a in inside[0] for b in inside[1])]
            best = max(tried, key=lambda pair: explained(measured, values(*pair), target, half))
        width = 4 * step
    judged = {
        name: round(explained(measured, values(*pair), target, ~half), 4)
        for name, pair in (("fitted", best), ("knapsack", (1.0, 2.0)))
    }
    return {
        "success_exponent": best[0],
        "failure_exponent": best[1],
        "target": target,
        "prompts": int(half.sum()),
        "explained": judged,
    }


def write_fit(found: dict[str, Any], path: Path) -> None:
    """Write what :func:`fit` found as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
