"""Dry run: replay the reward log of a run under other allocations, before paying for any rollout.

The success rate of each prompt over time comes from its recorded counts, smoothed over neighbouring visits with a
Gaussian kernel. The recorded batches are replayed, and every policy sees only rewards drawn from these rates. This
assumes that the rates of the recorded run do not react to the allocation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, check_whole
from knapsack_rl.allocation.value import value
from knapsack_rl.offline.environments import Replay, Trace
from knapsack_rl.offline.reward_logs import RewardLog
from knapsack_rl.offline.scoring import figures, pooled_calibration
from knapsack_rl.offline.simulate import Allocated, PolicyMaker, Simulation, allocated, known_rates, simulate, uniform
from knapsack_rl.runs.calibration import Calibration
from knapsack_rl.runs.curves import rollouts_to_reach
from knapsack_rl.runs.files import finite_or_none
from knapsack_rl.session import Session
from knapsack_rl.settings import AllocationSettings, check_fields, option

BUDGETS = (0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
"""Shares of the recorded budget to try; rollouts at equal value are interpolated between them."""

SHOWN_BUDGETS = (1.0, 0.5)
KNAPSACK = "knapsack"
LIMIT = "success rates known"

ASSUMPTION = (
    "Success rates are the recorded ones, smoothed; they do not react to the allocation. In a real run a policy that "
    "teaches more also changes what there is to learn."
)


@dataclass(kw_only=True)
class Settings(AllocationSettings):
    """Settings of a dry run: those of the knapsack policy, and how to replay.

    Attributes:
        bandwidth: standard deviation of the smoothing kernel, in visits.
        seeds: number of replays of each policy, from seed 0 on.

    Raises:
        ValueError: a setting is out of range, the budget is in tokens, of which a reward log knows nothing, or a step
            has two rounds, which are not simulated.
    """

    bandwidth: float = option(2.5, "bandwidth of the smoothing, in visits")
    seeds: int = option(3, "replays of each policy")

    def __post_init__(self) -> None:
        check_fields(self, type(self))
        self.check_allocation()
        check_whole("seeds", self.seeds, minimum=1)
        if self.budget_unit != "rollouts":
            raise ValueError(f"a dry run has no lengths, so budget_unit must be 'rollouts', got {self.budget_unit!r}")
        if self.rounds != 1:
            raise ValueError(f"a dry run simulates steps of one round, so rounds must be 1, got {self.rounds}")

    def policies(self) -> dict[str, PolicyMaker]:
        """Return the policies to replay, by label."""
        bounds = (self.min_rollouts, self.max_rollouts)
        own = AllocationSettings.of(self)
        own.success_threshold = 0.0  # a simulated outcome is 0 or 1
        return {
            "uniform": uniform(),
            "paper": allocated("window", *bounds),
            KNAPSACK: lambda _: Allocated(Session(own)),
            LIMIT: known_rates(*bounds),
        }


@dataclass(frozen=True)
class Row:
    """One policy at one budget; means over the seeds.

    Attributes:
        policy: label.
        budget: share of the recorded rollouts.
        rollouts: rollouts spent.
        value: sum over all visits of V(N, p).
        value_deviation: standard deviation over the seeds, NaN for one seed.
        effective_rollouts: share of the rollouts in groups with a gradient.
        effective_prompts: share of the groups with a gradient.
    """

    policy: str
    budget: float
    rollouts: float
    value: float
    value_deviation: float
    effective_rollouts: float
    effective_prompts: float


@dataclass(frozen=True, eq=False)
class DryRun:
    """The result of a dry run.

    Attributes:
        log: the replayed log.
        settings: settings of the replay.
        recorded: the recorded run: its ratios, and the value of its counts at the smoothed rates.
        rows: every policy at every budget, budgets descending.
        equal_value: by policy, rollouts that buy the recorded value; NaN if the recorded budget does not buy it. A
            number at the smallest budget tried is an upper bound.
        rates: (V,) smoothed rate of each visit, in the order of the log.
        calibration: the knapsack's predictions at the recorded budget.
        notes: limits of the result.
    """

    log: RewardLog
    settings: Settings
    recorded: Row
    rows: Sequence[Row]
    equal_value: Mapping[str, float]
    rates: FloatArray
    calibration: Calibration
    notes: Sequence[str]

    def row(self, policy: str, budget: float) -> Row:
        """Return the row of a policy at a budget."""
        return next(row for row in self.rows if (row.policy, row.budget) == (policy, budget))

    def saved(self, policy: str) -> float:
        """Return the share of rollouts that a policy saves at equal value; NaN if it needs more than were spent."""
        return 1.0 - self.equal_value[policy] / self.recorded.rollouts

    def at_least(self, policy: str) -> bool:
        """Return whether even the smallest budget buys the recorded value, so that the saving is a lower bound."""
        return self.equal_value[policy] <= min(row.rollouts for row in self.rows if row.policy == policy)

    @property
    def shown(self) -> list[Row]:
        """The recorded run, then every policy at the same budget and at half of it."""
        return [self.recorded, *(row for budget in SHOWN_BUDGETS for row in self.rows if row.budget == budget)]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; None for an unknown number."""
        log = self.log
        return {
            "log": {
                "source": log.source,
                "steps": int(log.steps.size),
                "prompts": len(log.prompt_ids),
                "visits": int(log.prompt.size),
                "rollouts": int(log.totals.sum()),
                "unscored": log.unscored,
            },
            "settings": vars(self.settings),
            "assumption": ASSUMPTION,
            "notes": list(self.notes),
            "recorded": _json(self.recorded),
            "policies": [_json(row) for row in self.rows],
            "equal_value": {
                policy: {
                    "rollouts": finite_or_none(rollouts),
                    "saved": finite_or_none(self.saved(policy)),
                    "at_least": self.at_least(policy),
                }
                for policy, rollouts in self.equal_value.items()
            },
            "brier_score": finite_or_none(self.calibration.brier),
        }


def simulations(settings: Settings) -> int:
    """Return the largest number of simulations of a dry run."""
    return len(settings.policies()) * len(BUDGETS) * settings.seeds


def dry_run(log: RewardLog, settings: Settings | None = None, done: Callable[[str], None] | None = None) -> DryRun:
    """Replay a log under each policy and budget.

    Args:
        log: the recorded rewards.
        settings: settings of the replay; None for the defaults.
        done: called with a line of text after each simulation.

    Raises:
        ValueError: the log carries no information (one prompt, no prompt visited twice, groups of one), or a setting
            is out of range.
    """
    settings = settings or Settings()
    _check_enough(log)
    trace = Trace.from_visits(log.prompt, log.successes, log.totals)
    batches = np.split(log.prompt, np.flatnonzero(np.diff(log.step)) + 1)
    environment = Replay(trace, settings.bandwidth, batches)
    rates = np.empty(log.prompt.size)
    rates[np.argsort(log.prompt, kind="stable")] = environment.smoothed
    spent = np.bincount(log.step, log.totals)

    recorded = Row(
        policy="as it was",
        budget=1.0,
        rollouts=float(log.totals.sum()),
        value=float(value(log.totals, rates).sum()),
        value_deviation=math.nan,
        effective_rollouts=float(log.totals[log.effective].sum() / log.totals.sum()),
        effective_prompts=float(log.effective.mean()),
    )
    budgets = [share for share in BUDGETS if share in SHOWN_BUDGETS or share * log.totals.mean() >= 2]
    rows: dict[str, list[Row]] = {}
    for name, make in settings.policies().items():
        rows[name] = []
        for share in budgets:
            runs = []
            for seed in range(settings.seeds):
                runs.append(
                    simulate(
                        environment,
                        make,
                        seed,
                        [round(share * rollouts) for rollouts in spent],
                        min_rollouts=settings.min_rollouts,
                        max_rollouts=settings.max_rollouts,
                    )
                )
                if done is not None:
                    done(f"{name} at {share:.0%} of the budget, seed {seed}")
            rows[name].append(_row(name, share, runs))
            if name == KNAPSACK and share == 1.0:
                calibration = pooled_calibration(runs)
    # Allow for rounding: a policy that repeats the recorded run must reach the recorded value.
    target = recorded.value * (1 - 1e-9)
    return DryRun(
        log=log,
        settings=settings,
        recorded=recorded,
        rows=[row for at_share in reversed(list(zip(*rows.values(), strict=True))) for row in at_share],
        equal_value={
            name: rollouts_to_reach([row.rollouts for row in curve], [row.value for row in curve], target)
            for name, curve in rows.items()
        },
        rates=rates,
        calibration=calibration,
        notes=[*log.notes, *_remarks(log)],
    )


def _row(policy: str, budget: float, runs: Sequence[Simulation]) -> Row:
    """Return the row of a policy at a budget from its simulations, one per seed."""
    values = np.array([run.values.sum() for run in runs])
    each = [figures(run, first_visit=0) for run in runs]
    mean = {name: float(np.mean([row[name] for row in each])) for name in each[0]}
    return Row(
        policy=policy,
        budget=budget,
        rollouts=mean["rollouts"],
        value=float(values.mean()),
        value_deviation=float(values.std(ddof=1)) if values.size > 1 else math.nan,
        effective_rollouts=mean["effective_rollouts"],
        effective_prompts=mean["effective_prompts"],
    )


def _check_enough(log: RewardLog) -> None:
    prompts, visits = len(log.prompt_ids), log.prompt.size
    found = f"{log.source} holds {prompts} prompts, {log.steps.size} steps and {visits} groups"
    if prompts < 2:
        raise ValueError(f"{found}. Allocation needs at least two prompts")
    if np.bincount(log.prompt).max() < 2:
        raise ValueError(
            f"{found}, and no prompt is visited twice. Allocation learns from earlier visits, so this log cannot show "
            "its effect. If prompt ids change in every step, name a column that stays the same"
        )
    if log.totals.max() < 2:
        raise ValueError(f"{found}, each of one rollout. A group of one has no gradient; check the prompt column")


def _remarks(log: RewardLog) -> list[str]:
    """Return the limits of the result."""
    visits = np.bincount(log.prompt)
    once = int((visits == 1).sum())
    remarks = []
    if once:
        remarks.append(
            f"{once} of {visits.size} prompts were visited once: their rate is that of the single group, and no "
            "policy could have known anything about them"
        )
    if np.median(visits) < 4:
        remarks.append(
            f"the median prompt has {np.median(visits):g} visits: rates from so few are noisy, and noise looks like "
            "room for improvement; take the result as a hint"
        )
    if log.totals.min() < log.totals.max():
        remarks.append(f"groups hold {log.totals.min()} to {log.totals.max()} rollouts; the total of each step is kept")
    if log.unscored:
        remarks.append(f"{log.unscored} rollouts without a reward were left out")
    mixed = (log.successes > 0) & (log.successes < log.totals)
    if log.graded and (log.effective != mixed).any():
        remarks.append(
            f"rewards are graded: {int((log.effective & ~mixed).sum())} groups differ in reward without holding both a "
            "success and a failure. The recorded run counts them as effective, the replay does not"
        )
    return remarks


def _json(row: Row) -> dict[str, Any]:
    return {name: finite_or_none(entry) if isinstance(entry, float) else entry for name, entry in vars(row).items()}
