"""Compare runs: group them by policy and compute one row of figures per policy over its seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knapsack_rl.runs.curves import Curve, mean_curve, moving_average, rollouts_to_reach, t_interval, tail_mean
from knapsack_rl.runs.files import finite_or_none
from knapsack_rl.runs.log import RunLog

SMOOTHING = 3
"""Evaluations averaged before a curve is searched for a target accuracy."""
LAST_EVALUATIONS = 3
"""Evaluations whose mean is the accuracy at the end of a run."""

# Settings that may vary between seeds of one policy, because they do not affect learning.
_INCIDENTAL = {"seed", "threads", "report_to", "save_every", "eval_every"}


@dataclass(frozen=True)
class Policy:
    """The runs of one policy, one per seed.

    Attributes:
        label: Name of the policy, such as "uniform N=8".
        runs: Its runs by seed.
        uniform: Whether every prompt gets the same number of rollouts.
    """

    label: str
    runs: dict[int | str, RunLog]
    uniform: bool

    @property
    def compared(self) -> dict[int | str, RunLog]:
        """The finished runs by seed; all runs as long as none is finished.

        A mean over runs at different stages of training would be meaningless.
        """
        return {seed: run for seed, run in self.runs.items() if run.finished} or self.runs

    def per_seed(self, measure: Callable[[RunLog], float]) -> dict[int | str, float]:
        """Return a measure of each compared run; seeds without a finite value are left out."""
        values = {seed: measure(run) for seed, run in self.compared.items()}
        return {seed: value for seed, value in values.items() if math.isfinite(value)}


def policies(runs: Sequence[RunLog]) -> list[Policy]:
    """Group runs by policy: uniform ones first, by N, then the others in the given order.

    The label names the allocation and N. Where runs with the same name differ in a setting that affects learning
    (the estimator, the model, ...), the label includes that setting.

    Raises:
        ValueError: If two runs have the same label and the same seed.
    """
    named: dict[str, list[RunLog]] = {}
    for run in runs:
        name = f"{run.config.get('allocation', 'unknown')} N={run.config.get('rollouts_per_prompt', '?')}"
        name = name if run.config else run.name  # nothing says which logs without settings are of one policy
        named.setdefault(name, []).append(run)
    grouped: dict[str, Policy] = {}
    for name, members in named.items():
        keys = sorted({key for run in members for key in run.config} - _INCIDENTAL)
        varying = [key for key in keys if len({repr(run.config.get(key)) for run in members}) > 1]
        for run in members:
            extra = ", ".join(f"{key} {run.config.get(key)}" for key in varying)
            label = f"{name} ({extra})" if extra else name
            # Settings may hold lone surrogates, which font renderers reject.
            label = label.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            uniform = run.config.get("allocation") == "uniform"
            policy = grouped.setdefault(label, Policy(label=label, runs={}, uniform=uniform))
            seed = run.config.get("seed", "?")
            if seed in policy.runs:
                raise ValueError(
                    f"two runs of {label!r} have the seed {seed!r}: {policy.runs[seed].folder} and {run.folder}"
                )
            policy.runs[seed] = run
    return sorted(grouped.values(), key=lambda policy: _size(policy) if policy.uniform else math.inf)


def baseline_of(groups: Sequence[Policy]) -> Policy | None:
    """Return the uniform policy with the fewest rollouts per prompt, None without a uniform policy."""
    return min((policy for policy in groups if policy.uniform), key=_size, default=None)


def _size(policy: Policy) -> float:
    value = next(iter(policy.runs.values())).config.get("rollouts_per_prompt")
    return value if isinstance(value, int | float) else math.inf


def accuracy_at_end(accuracy: Sequence[float] | NDArray[np.float64]) -> float:
    """Return held-out accuracy at the end of a run: the mean of its last three evaluations, NaN without any.

    A single evaluation is noisy while the model still changes. The first evaluation, before training, counts only if
    it is the only one.
    """
    last = np.asarray(accuracy[1:] if len(accuracy) > 1 else accuracy, dtype=np.float64)[-LAST_EVALUATIONS:]
    return float(last.mean()) if last.size else math.nan


def final_accuracy(run: RunLog) -> float:
    """:func:`accuracy_at_end` of a run."""
    return accuracy_at_end(run.held_out[1])


def mean_accuracy(run: RunLog) -> float:
    """Return held-out accuracy averaged over the rollouts of the run (trapezoids), NaN without two evaluations.

    Unlike the accuracy at the end, this measures how good the model was during the whole run.
    """
    rollouts, accuracy = run.held_out
    known = np.isfinite(accuracy)
    if known.sum() < 2:
        return math.nan
    x, y = rollouts[known], accuracy[known]
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def accuracy_curve(policy: Policy, smoothing: int = 1, *, cost: str = "rollouts") -> Curve:
    """Return held-out accuracy against a cost, averaged over the compared seeds of a policy.

    Args:
        policy: The runs.
        smoothing: Evaluations in the centred moving average of each run, 1 for none.
        cost: "rollouts" generated, or "seconds" of training.
    """
    runs = policy.compared.values()
    held_out = [run.held_out if cost == "rollouts" else run.against_seconds("held_out/accuracy") for run in runs]
    return mean_curve((spent, moving_average(accuracy, smoothing)) for spent, accuracy in held_out)


def _costs_to_target(
    groups: Sequence[Policy], baseline: Policy | None, cost: str
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Return the baseline's accuracy at its end, and what each policy pays to reach it, absolutely and relatively.

    Args:
        groups: The policies.
        baseline: One of them, None if there is none.
        cost: As of :func:`accuracy_curve`.
    """
    curves = {policy.label: accuracy_curve(policy, SMOOTHING, cost=cost) for policy in groups}
    base = None if baseline is None else curves[baseline.label]
    target = math.nan if base is None or not base.mean.size else float(base.mean[-1])
    paid = {label: rollouts_to_reach(curve.x, curve.mean, target) for label, curve in curves.items()}
    by_baseline = math.nan if baseline is None else paid[baseline.label]
    return target, {label: (spent, spent / by_baseline if by_baseline else math.nan) for label, spent in paid.items()}


def comparison_table(runs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """Return one row of figures per policy.

    Means are over seeds, intervals are half-widths of 95 % t-intervals of the mean; a figure that cannot be
    computed (no evaluation yet, a single seed, no baseline) is None. The baseline is the uniform policy with
    the fewest rollouts per prompt. Unfinished runs are left out of a policy that has finished ones.

    Keys of a row:
        policy, baseline: Label, and whether this is the baseline.
        seeds, unfinished: Seeds of the runs, and how many of them have fewer steps than planned.
        rollouts: Rollouts generated per run.
        accuracy, accuracy_interval, accuracy_by_seed: Held-out accuracy at the end: :func:`accuracy_at_end`.
        difference, difference_interval, difference_pairs: Final accuracy minus that of the baseline's run
            with the same seed, both finished, and the number of such pairs.
        mean_accuracy, mean_accuracy_interval: Held-out accuracy averaged over the rollouts of the run.
        mean_difference, mean_difference_interval: The same minus the baseline's, computed like the difference.
        training_success: Mean success rate of the training prompts, equally weighted, over the last 20 % of the
            steps.
        effective_rollouts, effective_prompts: Share of rollouts and of groups with a gradient, over all steps.
        unsolved_share: Prompts whose last visit had no success.
        largest_allocation: Most rollouts that a prompt got in one step, over all seeds.
        target_accuracy: The baseline's accuracy at its end.
        rollouts_to_target, rollouts_ratio: Rollouts until the policy first reaches the target, and that
            number over the baseline's. Each run's curve is smoothed (centred moving average of three
            evaluations), curves are averaged over seeds, and the mean is interpolated linearly; the target is
            the end of the baseline's curve computed the same way. None if it is never reached.
        seconds, seconds_to_target, seconds_ratio: The same with seconds of training instead of rollouts; None if they
            are not logged. They include whatever else the machine did.

    Args:
        runs: Loaded runs, in any order.
    """
    groups = policies(runs)
    baseline = baseline_of(groups)
    target, rollouts = _costs_to_target(groups, baseline, "rollouts")
    _, seconds = _costs_to_target(groups, baseline, "seconds")
    rows: list[dict[str, Any]] = []
    for policy in groups:
        accuracy = policy.per_seed(final_accuracy)
        average = policy.per_seed(mean_accuracy)
        compared = baseline is not None and policy is not baseline
        pairs = _gaps(policy, baseline, final_accuracy) if compared and baseline else []
        mean_pairs = _gaps(policy, baseline, mean_accuracy) if compared and baseline else []
        members = list(policy.compared.values())
        started = [run for run in members if run.steps.size]
        rows.append(
            {
                "policy": policy.label,
                "baseline": policy is baseline,
                "seeds": list(policy.runs),
                "unfinished": sum(not run.finished for run in policy.runs.values()),
                "rollouts": float(np.mean([run.rollouts.sum() for run in members])),
                "accuracy": _mean(accuracy.values()),
                "accuracy_interval": t_interval(list(accuracy.values())),
                "accuracy_by_seed": accuracy,
                "difference": _mean(pairs),
                "difference_interval": t_interval(pairs),
                "difference_pairs": len(pairs),
                "mean_accuracy": _mean(average.values()),
                "mean_accuracy_interval": t_interval(list(average.values())),
                "mean_difference": _mean(mean_pairs),
                "mean_difference_interval": t_interval(mean_pairs),
                "training_success": _mean(policy.per_seed(lambda run: tail_mean(run.training_success)).values()),
                "effective_rollouts": _mean(
                    policy.per_seed(lambda run: _all_mean(run.effective_rollout_ratio)).values()
                ),
                "effective_prompts": _mean(policy.per_seed(lambda run: _all_mean(run.effective_prompt_ratio)).values()),
                "unsolved_share": _mean(policy.per_seed(lambda run: run.unsolved_share).values()),
                "largest_allocation": max((int(run.max_budget.max()) for run in started), default=None),
                "target_accuracy": finite_or_none(target),
                "rollouts_to_target": finite_or_none(rollouts[policy.label][0]),
                "rollouts_ratio": finite_or_none(rollouts[policy.label][1]),
                "seconds": _mean(policy.per_seed(lambda run: run.training_seconds).values()),
                "seconds_to_target": finite_or_none(seconds[policy.label][0]),
                "seconds_ratio": finite_or_none(seconds[policy.label][1]),
            }
        )
    return rows


def _gaps(policy: Policy, baseline: Policy, measure: Callable[[RunLog], float]) -> list[float]:
    """Return a measure minus the baseline's for each seed that both have finished."""
    mine, base = policy.per_seed(measure), baseline.per_seed(measure)
    return [
        mine[seed] - base[seed]
        for seed in mine
        if seed in base and policy.runs[seed].finished and baseline.runs[seed].finished
    ]


def _all_mean(values: NDArray[np.float64]) -> float:
    return float(np.mean(values)) if values.size else math.nan


def _mean(values: Any) -> float | None:
    array = np.array(list(values), dtype=np.float64)
    return float(array.mean()) if array.size else None
