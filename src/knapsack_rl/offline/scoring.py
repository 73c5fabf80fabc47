"""Figures of a simulated policy: gain captured, effective ratios, calibration, discovery."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knapsack_rl.offline.environments import Environment
from knapsack_rl.offline.simulate import PolicyMaker, Simulation, simulate
from knapsack_rl.runs.calibration import Calibration, calibrate
from knapsack_rl.runs.files import finite_or_none

FIRST_VISIT = 3
"""Visits before this one (counted from 0) are left out of most figures, because nothing is known yet."""

EARLY_VISITS = 1
"""A prompt without a success in this many first visits, the first of them uniform in all policies, is unsolved."""

PERCENT = ("gain_captured", "effective_rollouts", "effective_prompts", "predicted", "realised", "found_share")
HEADINGS = {
    "gain_captured": "gain captured",
    "effective_rollouts": "rollouts with a gradient",
    "effective_prompts": "prompts with a gradient",
    "predicted": "predicted",
    "realised": "realised",
    "brier": "Brier score",
    "found_share": "unsolved prompts found",
    "found": "found, number",
    "final_rate": "success rate at the end",
}


@dataclass(frozen=True, eq=False)
class Result:
    """One policy over several seeds.

    Attributes:
        environment: label of the environment.
        policy: label of the policy.
        by_seed: figures of each seed, see :func:`figures`.
        calibration: predictions of all seeds together.
    """

    environment: str
    policy: str
    by_seed: Mapping[int, Mapping[str, float]]
    calibration: Calibration

    def mean(self, figure: str) -> float:
        """Return the mean over the seeds, NaN where a seed has no value."""
        return float(np.mean([row[figure] for row in self.by_seed.values()]))

    def deviation(self, figure: str) -> float:
        """Return the standard deviation over the seeds (divisor n - 1), NaN for one seed."""
        values = [row[figure] for row in self.by_seed.values()]
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values: labels, mean and deviation of each figure, figures by seed, reliability curve."""
        names = next(iter(self.by_seed.values()))
        return {
            "environment": self.environment,
            "policy": self.policy,
            "mean": {name: finite_or_none(self.mean(name)) for name in names},
            "deviation": {name: finite_or_none(self.deviation(name)) for name in names},
            "by_seed": {
                seed: {name: finite_or_none(x) for name, x in row.items()} for seed, row in self.by_seed.items()
            },
            "reliability": {
                "predicted": self.calibration.predicted.tolist(),
                "realised": self.calibration.realised.tolist(),
                "groups": self.calibration.visits.tolist(),
            },
        }


def gain_captured(simulation: Simulation, first_visit: int = FIRST_VISIT) -> float:
    """Return (value of the policy - value of uniform) / (value with rates known - value of uniform).

    Value is the sum over visits of V(N, p) at the true rate. Uniform and known rates refer to the same steps with the
    same budget; where rates do not depend on the policy, they equal what these two policies earn when run alone.

    Args:
        simulation: one policy, one seed.
        first_visit: visits of a prompt before this one (from 0) are left out.

    Returns:
        0 for uniform, 1 for known rates; NaN where known rates gain nothing.
    """
    late = simulation.visit >= first_visit
    base = float(simulation.values_if_uniform[late].sum())
    most = float(simulation.values_if_known[late].sum())
    # The difference of equal sums is rounding.
    return (float(simulation.values[late].sum()) - base) / (most - base) if most - base > 1e-9 * most else math.nan


def discovery(simulation: Simulation, early: int = EARLY_VISITS) -> tuple[int, int]:
    """Return the number of prompts without a success in their first visits, and how many of them succeed later."""
    size = int(simulation.prompt.max()) + 1
    first = simulation.visit < early
    before = np.bincount(simulation.prompt[first], simulation.successes[first], minlength=size)
    after = np.bincount(simulation.prompt[~first], simulation.successes[~first], minlength=size)
    visited = np.bincount(simulation.prompt, minlength=size) > 0
    unsolved = visited & (before == 0)
    return int(unsolved.sum()), int((unsolved & (after > 0)).sum())


def figures(simulation: Simulation, first_visit: int = FIRST_VISIT, early: int = EARLY_VISITS) -> dict[str, float]:
    """Return the figures of one simulation; NaN where there is nothing to count.

    Keys:
        gain_captured: see :func:`gain_captured`.
        value: true value per step, over the same visits.
        rollouts: rollouts in all, every visit counted.
        effective_rollouts, effective_prompts: realised share of rollouts, and of groups, with a gradient.
        predicted, realised, brier: mean predicted and realised non-zero gradient where one was predicted, and mean
            squared error.
        unsolved, found, found_share: prompts without a success in their first visits, and those found later.
        final_rate: mean true success rate at the prompts' last visits.

    Args:
        simulation: one policy, one seed.
        first_visit: visits before this one (from 0) are left out, except where noted.
        early: visits without a success that make a prompt unsolved.
    """
    late = simulation.visit >= first_visit
    counts, effective = simulation.counts[late], simulation.effective[late]
    predicted = simulation.predicted[late]
    given = counts > 0
    known = np.isfinite(predicted) & given
    unsolved, found = discovery(simulation, early)
    last = np.zeros(int(simulation.prompt.max()) + 1, dtype=np.int64)
    last[simulation.prompt] = np.arange(simulation.prompt.size)  # the latest visit stays
    return {
        "gain_captured": gain_captured(simulation, first_visit),
        "value": _ratio(simulation.values[late].sum(), np.unique(simulation.step[late]).size),
        "rollouts": float(simulation.counts.sum()),
        "effective_rollouts": _ratio(counts[effective].sum(), counts.sum()),
        "effective_prompts": _ratio(effective.sum(), given.sum()),
        "predicted": _ratio(predicted[known].sum(), known.sum()),
        "realised": _ratio(effective[known].sum(), known.sum()),
        "brier": calibrate(predicted[given], effective[given]).brier,
        "unsolved": float(unsolved),
        "found": float(found),
        "found_share": _ratio(found, unsolved),
        "final_rate": float(simulation.rates[last[np.unique(simulation.prompt)]].mean()),
    }


def pooled_calibration(simulations: Iterable[Simulation], first_visit: int = 0) -> Calibration:
    """Return the calibration of the predictions of several simulations together, from a visit on."""
    predicted, effective = [], []
    for run in simulations:
        counted = (run.visit >= first_visit) & (run.counts > 0)
        predicted.append(run.predicted[counted])
        effective.append(run.effective[counted])
    return calibrate(np.concatenate(predicted), np.concatenate(effective))


def compare(
    environments: Mapping[str, Environment],
    policies: Mapping[str, PolicyMaker],
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    budget: int | Sequence[int] = 8,
    min_rollouts: int = 2,
    max_rollouts: int = 128,
    first_visit: int = FIRST_VISIT,
    done: Callable[[str], None] | None = None,
) -> list[Result]:
    """Run every policy in every environment over the same seeds.

    Args:
        environments: by label.
        policies: by label.
        seeds: episodes; equal seeds are equal episodes for all policies.
        budget: see :func:`knapsack_rl.offline.simulate.simulate`.
        min_rollouts: N_low of the optimum to compare with.
        max_rollouts: N_up of the optimum to compare with.
        first_visit: see :func:`figures`.
        done: called with a line of text after each simulation.

    Raises:
        ValueError: seeds is empty, or a seed repeats.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be distinct, and at least one is needed, got {list(seeds)}")
    results = []
    for where, environment in environments.items():
        for name, make in policies.items():
            runs = {}
            for seed in seeds:
                runs[seed] = simulate(
                    environment, make, seed, budget, min_rollouts=min_rollouts, max_rollouts=max_rollouts
                )
                if done is not None:
                    done(f"{where}: {name}, seed {seed}")
            by_seed = {seed: figures(run, first_visit) for seed, run in runs.items()}
            results.append(Result(where, name, by_seed, pooled_calibration(runs.values(), first_visit)))
    return results


def markdown_tables(results: Sequence[Result], headings: Mapping[str, str] = HEADINGS) -> str:
    """Return one Markdown table per environment: mean ± standard deviation over the seeds."""
    parts = []
    for where in dict.fromkeys(result.environment for result in results):
        rows = [result for result in results if result.environment == where]
        lines = [
            f"**{where}** ({len(rows[0].by_seed)} seeds)",
            "",
            f"| policy | {' | '.join(headings.values())} |",
            "| --- |" + " --- |" * len(headings),
        ]
        for result in rows:
            cells = [cell(name, result.mean(name), result.deviation(name)) for name in headings]
            lines.append(f"| {result.policy} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def cell(figure: str, mean: float, deviation: float = math.nan) -> str:
    """Return a figure as text with its deviation, "–" for NaN."""
    if math.isnan(mean):
        return "–"
    scale, digits, unit = (100, 1, " %") if figure in PERCENT else (1, 0, "") if figure == "found" else (1, 3, "")
    spread = "" if math.isnan(deviation) else f" ± {scale * deviation:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}{unit}".replace("-", "−")


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
