"""A run folder as arrays: allocations, their outcomes, and the measures of the method.

`RunLog.load` reads the three files that training writes (`config.yaml`, `metrics.jsonl`,
`allocations.jsonl`). A *visit* is one prompt in one step; arrays over all visits have length V, arrays over
recorded steps have length T. No training library is needed, so a log can be studied anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.groups import DIFFICULTY_CLASSES, transition_matrix
from knapsack_rl.runs.allocations import Visits, read_visits
from knapsack_rl.runs.calibration import Calibration, calibrate
from knapsack_rl.runs.curves import ratio
from knapsack_rl.runs.files import (
    ALLOCATION_LOG,
    CONFIG_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    SAMPLES_FILE,
    WARNINGS_FILE,
    by_step,
    finite_number,
    read_config,
    read_rows,
    stored,
)
from knapsack_rl.runs.samples import read_samples
from knapsack_rl.success import describe_rule

WARNING_TEXTS = ("kind", "seen", "cause", "remedy")


@dataclass(frozen=True, eq=False)
class BudgetByEstimate:
    """Rollouts per visit, grouped by the success rate estimated before it.

    Estimates of exactly 0 and exactly 1 form separate groups, because allocation rules treat unsolved and
    solved prompts differently; in between lie ten bins of width 0.1. Unseen prompts come last with a NaN
    estimate. Only groups with visits are listed.

    Attributes:
        estimate: Mean estimate of the group.
        mean: Mean rollouts.
        low: 10 % quantile of the rollouts.
        high: 90 % quantile of the rollouts.
        visits: Number of visits.
    """

    estimate: FloatArray
    mean: FloatArray
    low: FloatArray
    high: FloatArray
    visits: IntArray


@dataclass(frozen=True, eq=False)
class RunLog:
    """The log of one training run and the measures derived from it.

    Attributes:
        folder: The run folder.
        config: The run's settings.
        prompt_ids: Distinct prompts in the order of their first visit.
        steps: Recorded training steps, ascending (T).
        reasons: What the allocator reported about each step, empty if nothing (T).
        seconds: Time that each allocation took (T), NaN if not logged.
        visits: The per-visit arrays.
        metrics: Logged metrics, one mapping per step, ascending, nulls left out.
        warnings: Warnings of the run in order, each with `step`, `kind`, `seen`, `cause` and `remedy`.
        samples: Sample completions by prompt id, as kept by `SampleStore`.
        file: The log, where it is another than the allocation log of the folder.
        success_rules: What counted as a success: the first rule and those it changed to, with their first step.
        notes: Remarks on how the log was read.
    """

    folder: Path
    config: Mapping[str, Any]
    prompt_ids: tuple[str | int, ...]
    steps: IntArray
    reasons: tuple[str, ...]
    seconds: FloatArray
    visits: Visits
    metrics: tuple[Mapping[str, Any], ...]
    warnings: tuple[Mapping[str, Any], ...] = ()
    samples: Mapping[str | int, Mapping[str, Any]] = field(default_factory=dict)
    file: Path | None = None
    success_rules: tuple[tuple[int, str], ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: str | Path) -> RunLog:
        """Read a run folder; the log files may be missing or end in a torn line.

        If a step was logged more than once (after a resume), the last entry counts.

        Args:
            folder: A folder that holds `config.yaml` or an allocation log, or the allocation log itself.

        Raises:
            FileNotFoundError: If the folder has neither.
            ValueError: If a file's content does not follow the schema.
        """
        folder = Path(folder)
        if folder.is_file():
            if (
                folder.name.removesuffix(".gz") != ALLOCATION_LOG
            ):  # nothing says that its neighbours are of the same run
                return cls.of_visits(*read_visits(folder), folder=folder.parent, file=folder)
            folder = folder.parent
        # A run of verl, or of a script on TRL, has no configuration in our format.
        bare = stored(folder / ALLOCATION_LOG).is_file() and not (folder / CONFIG_FILE).is_file()
        config = {} if bare else read_config(folder / CONFIG_FILE)
        metrics = by_step(read_rows(folder / METRICS_FILE))
        return cls.of_visits(
            *read_visits(folder / ALLOCATION_LOG),
            folder=folder,
            config=config,
            metrics=tuple({key: value for key, value in row.items() if value is not None} for row in metrics),
            warnings=tuple(
                {key: str(row.get(key, "")) for key in WARNING_TEXTS} | {"step": row["step"]}
                for row in read_rows(folder / WARNINGS_FILE)
            ),
            samples={row["prompt_id"]: row for row in read_samples(folder / SAMPLES_FILE)},
        )

    @classmethod
    def of_visits(
        cls,
        rows: Sequence[Mapping[str, Any]],
        prompt_ids: tuple[str | int, ...],
        visits: Visits,
        *,
        folder: Path,
        config: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> RunLog:
        """Return the log of a run.

        Args:
            rows: One per step, ascending, with `step` and, where known, `reason` and `seconds`.
            prompt_ids: Distinct prompts in the order of their first visit.
            visits: The per-visit arrays.
            folder: Where the run's files are.
            config: The run's settings; None if they are unknown.
            others: Any other attributes.
        """
        return cls(
            folder=folder,
            config=config or {},
            prompt_ids=prompt_ids,
            steps=np.array([row["step"] for row in rows], dtype=np.int64),
            reasons=tuple(str(row.get("reason") or "") for row in rows),
            seconds=np.array([row.get("seconds") for row in rows], dtype=np.float64),
            visits=visits,
            success_rules=_success_rules(rows),
            **({"metrics": (), "notes": visits.notes} | others),
        )

    # Success

    @property
    def success_share(self) -> float:
        """Share of successes among all scored rollouts, NaN if none was scored."""
        scored = self.visits.scored.sum()
        return float(self.visits.successes.sum() / scored) if scored else math.nan

    # Names

    @property
    def name(self) -> str:
        """Name of the run: that of its folder, or of its log if that is a file of another name."""
        return self.folder.resolve().name if self.file is None else self.file.name.split(".")[0]

    @property
    def page(self) -> Path:
        """The page of the run, unless another is asked for."""
        return self.folder / ("report.html" if self.file is None else f"{self.name}-report.html")

    # State of the run

    @property
    def planned_steps(self) -> int | None:
        """Steps set in the configuration, None if it does not say."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def finished(self) -> bool:
        """Whether all planned steps are recorded (at least one if no plan is known), or the model was saved.

        A rule that generates in rounds ends at a number of rollouts, possibly before its last step.
        """
        recorded = self.steps.size > 0 and self.steps.size >= (self.planned_steps or 0)
        return recorded or (self.folder / MODEL_FOLDER).is_dir()

    def by_prompt(self, values: ArrayLike) -> FloatArray:
        """Sum a per-visit array over the visits of each prompt, in the order of `prompt_ids`."""
        weights = np.asarray(values, dtype=np.float64)
        return np.bincount(self.visits.prompt, weights=weights, minlength=len(self.prompt_ids)).astype(np.float64)

    # Per step

    def _sum(self, values: ArrayLike) -> FloatArray:
        """Sum a per-visit array over each step."""
        weights = np.asarray(values, dtype=np.float64)
        return np.bincount(self.visits.step, weights=weights, minlength=self.steps.size).astype(np.float64)

    @cached_property
    def rollouts(self) -> IntArray:
        """Rollouts generated in each step."""
        return self._sum(self.visits.counts).astype(np.int64)

    @cached_property
    def cumulative_rollouts(self) -> IntArray:
        """Rollouts generated up to and including each step."""
        return np.cumsum(self.rollouts)

    @cached_property
    def effective_rollout_ratio(self) -> FloatArray:
        """Rollouts in groups with a gradient over all rollouts (the effective gradient ratio)."""
        return ratio(self._sum(self.visits.counts * self.visits.effective), self.rollouts)

    @cached_property
    def effective_prompt_ratio(self) -> FloatArray:
        """Groups with a gradient over all groups."""
        return ratio(self._sum(self.visits.effective), self._sum(self.visits.counts > 0))

    @cached_property
    def calibration_error(self) -> FloatArray:
        """Predicted share of groups with a gradient less the realised one, over the groups with a prediction."""
        visits = self.visits
        given = (visits.counts > 0) & np.isfinite(visits.predicted)
        excess = np.where(given, visits.predicted - visits.effective, 0.0)
        return ratio(self._sum(excess), self._sum(given))

    @cached_property
    def training_success(self) -> FloatArray:
        """Mean share of successes over the scored prompts of each step; every prompt has the same weight."""
        visits = self.visits
        rates = ratio(visits.successes, visits.scored)
        return ratio(self._sum(np.nan_to_num(rates)), self._sum(visits.scored > 0))

    @cached_property
    def difficulty_shares(self) -> FloatArray:
        """Share of each difficulty class among the scored groups of each step, shape (T, 5)."""
        shares = [self._sum(self.visits.difficulty == index) for index in range(len(DIFFICULTY_CLASSES))]
        return ratio(np.stack(shares, axis=1), self._sum(self.visits.scored > 0)[:, None])

    @cached_property
    def all_correct_share(self) -> FloatArray:
        """Share of scored groups without a failure."""
        return self.difficulty_shares[:, DIFFICULTY_CLASSES.index("extremely easy")]

    @cached_property
    def all_wrong_share(self) -> FloatArray:
        """Share of scored groups without a success."""
        return self.difficulty_shares[:, DIFFICULTY_CLASSES.index("extremely hard")]

    @cached_property
    def min_budget(self) -> IntArray:
        """Fewest rollouts given to a prompt of the step (0 for a step without prompts)."""
        most = np.iinfo(np.int64).max
        lowest = np.full(self.steps.size, most)
        np.minimum.at(lowest, self.visits.step, self.visits.counts)
        return np.where(lowest == most, 0, lowest)

    @cached_property
    def max_budget(self) -> IntArray:
        """Most rollouts given to a prompt of the step (0 for a step without prompts)."""
        highest = np.zeros(self.steps.size, dtype=np.int64)
        np.maximum.at(highest, self.visits.step, self.visits.counts)
        return highest

    # Logged metrics

    def metric(self, name: str) -> tuple[IntArray, FloatArray]:
        """Steps and values of a logged metric where it is a finite number."""
        steps, values = self._logged("step", name)
        return steps.astype(np.int64), values

    @property
    def training_seconds(self) -> float:
        """Seconds of all training steps, NaN if they are not logged."""
        seconds = self.metric("training_seconds")[1]
        return float(seconds[-1]) if seconds.size else math.nan

    @cached_property
    def held_out(self) -> tuple[IntArray, FloatArray]:
        """The held-out curve: rollouts generated before each evaluation, and its mean success."""
        return self.against_rollouts("held_out/accuracy")

    def against_rollouts(self, name: str) -> tuple[IntArray, FloatArray]:
        """Rollouts generated so far and values of a logged metric where both are finite numbers."""
        rollouts, values = self._logged("rollouts", name)
        return rollouts.astype(np.int64), values

    def against_seconds(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Seconds of training so far and values of a logged metric where both are finite numbers."""
        return self._logged("training_seconds", name)

    def _logged(self, position: str, name: str) -> tuple[FloatArray, FloatArray]:
        pairs = [(finite_number(row.get(position)), finite_number(row.get(name))) for row in self.metrics]
        known = [(at, value) for at, value in pairs if at is not None and value is not None]
        return np.array([at for at, _ in known], dtype=np.float64), np.array([value for _, value in known])

    # Over the whole run

    @cached_property
    def first_and_last(self) -> tuple[IntArray, IntArray]:
        """Visit indices of each seen prompt's first and last scored visit, in the order of prompts."""
        scored = np.flatnonzero(self.visits.scored > 0)
        prompts = self.visits.prompt[scored]
        _, first = np.unique(prompts, return_index=True)
        _, last = np.unique(prompts[::-1], return_index=True)
        return scored[first], scored[prompts.size - 1 - last]

    @cached_property
    def transitions(self) -> IntArray:
        """Prompts by class of their first (row) and last (column) scored visit, shape (5, 5).

        Prompts with a single scored visit are left out, because they could not have moved yet.
        """
        first, last = self.first_and_last
        again = first != last
        return transition_matrix(self.visits.difficulty[first[again]], self.visits.difficulty[last[again]])

    @cached_property
    def unsolved_share(self) -> float:
        """Share of scored prompts whose last scored visit had no success, NaN if none was scored."""
        _, last = self.first_and_last
        return float(np.mean(self.visits.successes[last] == 0)) if last.size else math.nan

    @cached_property
    def budget_by_estimate(self) -> BudgetByEstimate:
        """Rollouts per visit grouped by the estimated success rate."""
        estimate, counts = self.visits.estimate, self.visits.counts
        inner = 1 + np.clip(np.floor(np.nan_to_num(estimate) * 10), 0, 9)
        group = np.select([np.isnan(estimate), estimate <= 0, estimate >= 1], [12.0, 0.0, 11.0], default=inner)
        members = [group == value for value in np.unique(group)]
        return BudgetByEstimate(
            estimate=np.array([estimate[chosen].mean() for chosen in members]),
            mean=np.array([counts[chosen].mean() for chosen in members]),
            low=np.array([np.quantile(counts[chosen], 0.1) for chosen in members]),
            high=np.array([np.quantile(counts[chosen], 0.9) for chosen in members]),
            visits=np.array([chosen.sum() for chosen in members], dtype=np.int64),
        )

    def calibration(self, bins: int = 10) -> Calibration:
        """Compare predicted with realised non-zero gradients.

        Args:
            bins: Number of bins of equal width over [0, 1].
        """
        given = self.visits.counts > 0
        return calibrate(self.visits.predicted[given], self.visits.effective[given], bins)


def _success_rules(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, str], ...]:
    """Return what counted as a success in the rows of a log that say it, at its first step and wherever it changed."""
    found: list[tuple[int, str]] = []
    last = None
    for row in rows:
        rule = row.get("success")
        if not isinstance(rule, Mapping):
            continue
        numbers = {name: finite_number(rule.get(name)) for name in ("above", "low", "high")}
        if (rule.get("reward"), numbers["above"]) != last:
            last = rule.get("reward"), numbers["above"]
            found.append((int(row["step"]), describe_rule({"reward": rule.get("reward"), **numbers})))
    return tuple(found)
