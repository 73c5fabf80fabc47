"""Training runs that the experiments share: an arm is a policy with its settings, a run is an arm with a seed.

Rows on record and finished runs are used again, half-done runs are resumed. Every arm trains the shipped model on the
same prompts and differs from the shared settings only as its line says; the learning rate was chosen once, for uniform
allocation, on another seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from experiments.contract import Options, Row
from experiments.extract import extract
from knapsack_rl.training.compare import Run, execute
from knapsack_rl.training.settings import TrainSettings, settings_from

BEFORE: dict[str, Any] = {"advantage": "group-std", "feature_columns": "", "num_iterations": 1}
"""Settings of rows that do not name them, and of arms that do not: the defaults have changed since."""

FULL = TrainSettings(threads=1, prompts_per_step=64, rollouts_per_prompt=8, **BEFORE)
QUICK = TrainSettings(
    threads=1,
    steps=3,
    prompts_per_step=8,
    rollouts_per_prompt=4,
    max_rollouts=16,
    train_prompts=16,
    held_out_prompts=8,
    eval_every=1,
    eval_samples=1,
    save_every=0,
    **BEFORE,
)


class UnfinishedRunsError(RuntimeError):
    """Some training runs of an experiment did not finish; those that did are kept."""


@dataclass(frozen=True)
class Arm:
    """A policy of the comparisons.

    Attributes:
        label: its name in tables and plots.
        settings: its changes to the shared settings.
        rule: name of ``experiments.rules.RULES`` that decides the rollouts of a step, or of a rule of the lab; "" where
            the allocation does.
        multiple: rollouts per prompt over those of the shared settings.
        wider: times as many prompts in a step, each with as many times fewer rollouts on average.
        shorter: times fewer prompts in a step; the same rollouts then make as many times more steps.
    """

    label: str
    settings: Mapping[str, Any]
    multiple: int = 1
    rule: str = ""
    wider: int = 1
    shorter: int = 1

    def of(self, shared: TrainSettings, seed: int) -> TrainSettings:
        """Settings of one run."""
        prompts, rollouts = self.size(shared.prompts_per_step, shared.rollouts_per_prompt)
        bound = max(shared.max_rollouts, rollouts)
        sizes: dict[str, Any] = {"prompts_per_step": prompts, "rollouts_per_prompt": rollouts, "max_rollouts": bound}
        return replace(shared, seed=seed, **sizes, **self.settings)

    def size(self, prompts: int, rollouts: int) -> tuple[int, int]:
        """Prompts of a step and rollouts per prompt of this arm.

        Args:
            prompts: of a step, of the shared settings; divisible by ``shorter``.
            rollouts: per prompt, of the shared settings; with what the arm multiplies it, divisible by ``wider``.

        Raises:
            ValueError: one of them is not.
        """
        rollouts *= self.multiple
        for what, number, divisor in (
            ("prompts a step", prompts, self.shorter),
            ("rollouts per prompt", rollouts, self.wider),
        ):
            if number % divisor:
                raise ValueError(f"{number} {what} must be a multiple of {divisor} for {self.label!r}")
        return prompts // self.shorter * self.wider, rollouts // self.wider

    @property
    def module(self) -> tuple[str, ...]:
        """Module, and its first arguments, that train a run."""
        return ("experiments.train_rule", self.rule) if self.rule else Run.module


OVER_MEAN = {"advantage": "group-mean"}
MATCHED = {**OVER_MEAN, "value": "likelihood-0.5"}
BY_GRADE = {"feature_columns": "grade"}
EXPECTED = {"advantage": "posterior-mean"}
RECOMMENDED = {**EXPECTED, "value": "likelihood-0.5"}
TWICE = {"num_iterations": 2}
SLOWER = {"learning_rate": 4e-4}
"""On TRL, where arms do not choose their rate: that of the lab for uniform allocation with two updates, on addition."""

ARMS: dict[str, Arm] = {
    "uniform": Arm("uniform N", {"allocation": "uniform"}),
    "uniform-2n": Arm("uniform 2N", {"allocation": "uniform"}, 2),
    "uniform-3n": Arm("uniform 3N", {"allocation": "uniform"}, 3),
    "paper": Arm("paper", {"allocation": "paper"}),
    "paper-without-fallback": Arm(
        "paper without fallback", {"estimator": "window", "estimator_settings": "fallback=false"}
    ),
    "empirical-bayes": Arm("empirical Bayes", {"estimator": "empirical-bayes"}),
    "knapsack": Arm("Bayes filter", {}),
    "knapsack-min1": Arm("Bayes filter, minimum 1", {"min_rollouts": 1}),
    "knapsack-min0": Arm("Bayes filter, minimum 0", {"min_rollouts": 0}),
    "knapsack-per-prompt": Arm("Bayes filter, weighted per prompt", {"weighting": "prompt"}),
    "paper-per-prompt": Arm("paper, weighted per prompt", {"weighting": "prompt", "allocation": "paper"}),
    "oversample": Arm("oversample and drop (DAPO)", {}, rule="oversample"),
    "skip": Arm("skip and drop (GRESO)", {}, rule="skip"),
    "sequential": Arm("sample until balanced (Reinforce-Ada)", {}, rule="sequential"),
    "pilot-commit": Arm("commit after a pilot (Pilot-Commit)", {}, rule="pilot-commit"),
    "pilot-commit-2n": Arm("commit after a pilot (Pilot-Commit), 2N", {}, 2, rule="pilot-commit"),
    "c-grpo": Arm("stop by a conformal threshold (C-GRPO)", {}, rule="c-grpo"),
    "c-grpo-twice": Arm(  # in the lab alone
        "stop by a conformal threshold (C-GRPO), two updates", TWICE, rule="c-grpo"
    ),
    "knapsack-tokens": Arm("Bayes filter, budget in tokens", {"budget_unit": "tokens"}),
    "uniform-replay": Arm("uniform N, replay", {"allocation": "uniform", "replay": 8}),
    "knapsack-replay": Arm("Bayes filter, replay", {"replay": 8}),
    "paper-window4": Arm("paper, window 4", {"allocation": "paper", "estimator_settings": "window=4,minimum=4"}),
    "paper-window64": Arm("paper, window 64", {"allocation": "paper", "estimator_settings": "window=64"}),
    "bayes-discount05": Arm(
        "empirical Bayes, discount 0.5", {"estimator": "empirical-bayes", "estimator_settings": "discount=0.5"}
    ),
    "bayes-discount1": Arm(
        "empirical Bayes, discount 1", {"estimator": "empirical-bayes", "estimator_settings": "discount=1.0"}
    ),
    "known": Arm("success rates known", {}, rule="known"),  # in the lab alone
    "uniform-mean": Arm("uniform N, group mean", {"allocation": "uniform", **OVER_MEAN}),
    "matched": Arm("knapsack, 64 × 8, group mean, no columns", MATCHED),
    "recommended": Arm("knapsack, 64 × 8, group mean", {**MATCHED, **BY_GRADE}),
    "uniform-mean-wide": Arm("uniform, 128 × 4, group mean", {"allocation": "uniform", **OVER_MEAN}, wider=2),
    "recommended-wide": Arm("knapsack, 128 × 4, group mean", {**MATCHED, **BY_GRADE}, wider=2),
    "recommended-posterior": Arm("recommended, one update", {**RECOMMENDED, **BY_GRADE}, wider=2),
    "uniform-posterior": Arm("uniform N, posterior mean", {"allocation": "uniform", **EXPECTED, **BY_GRADE}),
    "uniform-posterior-wide": Arm(
        "uniform, 128 × 4, posterior mean", {"allocation": "uniform", **EXPECTED, **BY_GRADE}, wider=2
    ),
    "recommended-twice": Arm("recommended", {**RECOMMENDED, **BY_GRADE, **TWICE}, wider=2),
    "recommended-queue": Arm(  # in the lab alone
        "recommended, queue of prompts", {**RECOMMENDED, **BY_GRADE, **TWICE}, rule="queue", wider=2
    ),
    "recommended-plain-twice": Arm("recommended, no columns", {**RECOMMENDED, **TWICE}, wider=2),
    "uniform-half": Arm("uniform, 32 × 8", {"allocation": "uniform"}, shorter=2),  # in the lab alone
    "uniform-twice": Arm("uniform N, two updates", {"allocation": "uniform", **TWICE}),
    "uniform-posterior-wide-twice": Arm(
        "uniform, 128 × 4, posterior mean, two updates",
        {"allocation": "uniform", **EXPECTED, **BY_GRADE, **TWICE},
        wider=2,
    ),
    "recommended-trl": Arm("knapsack, 128 × 4, group mean, on TRL", {**MATCHED, "feature_columns": "digits"}, wider=2),
    "posterior-trl": Arm("recommended, one update, on TRL", {**RECOMMENDED, "feature_columns": "digits"}, wider=2),
    "posterior-trl-twice": Arm(
        "recommended, on TRL", {**RECOMMENDED, "feature_columns": "digits", **TWICE, **SLOWER}, wider=2
    ),
    "uniform-trl-twice": Arm("uniform N, two updates, on TRL", {"allocation": "uniform", **TWICE, **SLOWER}),
    "shared": Arm("Bayes filter, knowledge shared by grade", BY_GRADE),
    "known-matched": Arm("knapsack, 64 × 8, group mean, rates known", MATCHED, rule="known"),
    "value-nonzero": Arm("Bayes filter, value: chance of a gradient", {"value": "nonzero-gradient"}),
    "value-variance": Arm("Bayes filter, value: reward variance", {"value": "experiments.values:reward_variance"}),
    "value-signal": Arm("Bayes filter, value: signal to noise", {"value": "experiments.values:signal_to_noise"}),
    "value-fitted": Arm("Bayes filter, value: fitted to gradients", {"value": "experiments.values:fitted"}),
}
"""All arms by name, which also names the folders of their runs."""


def label(arm: str) -> str:
    """Name of an arm in tables and plots."""
    return ARMS[arm].label


def labels(arms: Iterable[str]) -> dict[str, str]:
    """Label of each arm to its name, as rows of a table."""
    return {label(arm): arm for arm in arms}


def root_of(options: Options) -> Path:
    """Folder of the runs: those of quick experiments lie apart."""
    return options.runs / "quick" if options.quick else options.runs


def plan(arms: Sequence[str], options: Options, task: str = "", **changes: Any) -> list[Run]:
    """The runs of these arms, seeds outermost, so that an interrupted experiment has whole seeds.

    Args:
        arms: names of ``ARMS``.
        options: how much to measure.
        task: first part of the folders' names, if the runs are on another task.
        **changes: shared settings that differ on that task.
    """
    shared = replace(QUICK if options.quick else FULL, **changes)
    folder = root_of(options)
    return [
        Run(ARMS[arm].of(shared, seed), folder / f"{task}{arm}-seed{seed}", ARMS[arm].module)
        for seed in options.seed_range
        for arm in arms
    ]


def measure(arms: Sequence[str], runs: Sequence[Run], options: Options, done: Callable[[str], None]) -> list[Row]:
    """Train what is neither on record nor finished, and return one row per run.

    See :func:`~experiments.extract.extract` for the contents of a row.

    Args:
        arms: those of :func:`plan`.
        runs: from :func:`plan`.
        options: how much to measure.
        done: called with a line of text for each run.

    Raises:
        UnfinishedRunsError: a run did not finish; what is finished is kept.
        ValueError: a folder holds a run with other settings.
    """
    train(runs, options, done)
    known = Record.read(options.record)
    return [
        known.row_of(run, arm) or extract(run, arm, _rule_of(run))
        for run, arm in zip(runs, [*arms] * len(options.seed_range), strict=True)
    ]


class Record:
    """Rows measured earlier, found by the settings of their runs.

    Args:
        rows: of any experiments; those that do not come from a training run are passed over.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        # Settings that were added since a row was written have their default in it.
        self._rows = [(settings, row) for row in rows if (settings := _settings_of(row)) is not None]

    @classmethod
    def read(cls, folder: Path | None) -> Record:
        """All rows in a folder's JSONL files; none without a folder."""
        files = sorted(folder.glob("*.jsonl")) if folder else []
        return cls(json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines())

    def row_of(self, run: Run, arm: str | None = None) -> Row | None:
        """The row of a run with the same settings and rule, of the arm if one is named; None if there is none."""
        for settings, row in self._rows:
            same = settings.trains_like(run.settings) and row.get("rule", "") == _rule_of(run)
            if same and arm in (None, row["arm"]):
                return row
        return None


def _rule_of(run: Run) -> str:
    return "" if run.module == Run.module else run.module[1]


def _settings_of(row: Row) -> TrainSettings | None:
    """Settings of a row; None for rows without any, of a quick run, or with settings that no longer exist."""
    known = {spec.name for spec in fields(TrainSettings)}
    if not {"arm", "settings"} <= set(row) or row.get("quick") or not set(row["settings"]) <= known:
        return None
    try:
        return settings_from(BEFORE | row["settings"], "a row")
    except ValueError:
        return None


def missing(runs: Sequence[Run], options: Options) -> list[Run]:
    """Runs that are neither on record nor finished."""
    known = Record.read(options.record)
    return [run for run in runs if not run.finished and not known.row_of(run)]


def train(runs: Sequence[Run], options: Options, done: Callable[[str], None]) -> None:
    """Train what is neither on record nor finished; quick runs in this process, the others side by side.

    Raises:
        UnfinishedRunsError: a run did not finish; what is finished is kept.
        ValueError: a folder holds a run with other settings.
    """
    if options.quick:
        # ``done`` reports progress; bars of single files would appear between its lines.
        from transformers.utils import logging

        logging.disable_progress_bar()
    waiting = missing(runs, options)
    for run in runs:
        if run not in waiting:
            done(f"{run.folder.name} was there")
    failed = execute(waiting, jobs=0 if options.quick else options.workers, progress=_Done(done))
    if failed:
        raise UnfinishedRunsError(
            f"{len(failed)} of {len(runs)} runs did not finish; start the experiment again to resume them, or see "
            f"{failed[0].folder / 'log.txt'}"
        )


class _Done:
    """Progress of a comparison as lines of an experiment."""

    def __init__(self, done: Callable[[str], None]) -> None:
        self._done = done

    def started(self, run: Run) -> None:
        """Nothing is done yet."""

    def advanced(self, running: Sequence[Run]) -> None:
        """Nothing is done yet."""

    def ended(self, run: Run, status: int) -> None:
        """Report how a run ended."""
        self._done(f"{run.folder.name} {'finished' if run.finished else f'stopped (exit status {status})'}")
