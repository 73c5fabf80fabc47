"""Numbers about one step, for a logger: how its budget was spread, predictions and outcomes.

Source: paper, section 4, and this project's documentation of metrics.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.belief import Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.policies import Allocation
from knapsack_rl.estimation.tracker import Records
from knapsack_rl.groups import GroupOutcomes, summarise
from knapsack_rl.ids import PromptId

CORE = (
    *("effective_gradient_ratio", "effective_prompt_ratio", "all_correct", "all_wrong"),
    *("outcome_per_prompt", "reward_per_prompt", "estimated_success_rate"),
    *("predicted_nonzero_gradient", "realised_nonzero_gradient"),
    *("budget_min", "budget_max", "allocation_seconds"),
)
"""Metrics that an engine logs at each step that generates."""
LOST_CAUSES = ("stale", "failed", "resumed")
"""Why a group is not trained on: its policy was too old, its rollouts failed, or a resumed run generates it again."""
LOST_GROUPS = (
    *("lost_groups", "lost_groups_share", *(f"lost_groups/{cause}" for cause in LOST_CAUSES)),
    *("lost_groups_success_rate", "lost_groups_length", "arrived_groups_success_rate", "arrived_groups_length"),
)
"""Metrics of :class:`LostGroups`, logged at each step of a run that has lost a group."""
OCCASIONAL = {
    **{name: name for name in ("allocation_failures", "degraded_batches", "unscored_rollouts", "process_imbalance")},
    **{"solved_before": "solved_before", "lost": "solved_before"},
}
"""Further ones that it logs where a number, by default their own, is above 0; so are the failures of each kind."""
PARTS = ("allocation", "generation", "scoring", "update")
"""Parts of a step of which the trainer logs the seconds, as ``PART_seconds``."""
LOGGED = ("core", "all")
"""Selections of metrics that an engine may log."""

BUDGET_BINS = (0, 1, 2, 3, 5, 9, 17, 33, 65)
"""Left edges of the budget histogram's bins; the last is open."""

DIFFICULTIES = ("hard", "medium", "easy", "unseen")
DIFFICULTY_EDGES = (0.2, np.nextafter(0.8, 1.0), np.inf)
"""Success rates below 0.2 are hard, above 0.8 easy."""


@dataclass
class StepMetrics:
    """Numbers of the newest step, and predictions for the prompts whose outcomes are not in yet.

    Attributes:
        allocation: the newest one; :meth:`as_dict` describes it.
        estimated: whether it was based on estimates.
        details: other numbers about it.
        outcomes: about the newest batch that was observed.
        predicted: probability of a non-zero gradient, by prompt; NaN where nothing was predicted.
        differ_anyway: chance that the rewards of a group differ though its outcomes are equal; graded ones may.
    """

    allocation: Allocation | None = None
    estimated: bool = False
    details: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, float] = field(default_factory=dict)
    predicted: dict[PromptId, float] = field(default_factory=dict)
    differ_anyway: float = 0.0

    def expect(self, ids: list[PromptId], allocation: Allocation, belief: Belief) -> Allocation:
        """Add the predictions of a belief to an allocation, and keep it."""
        mixed = belief.nonzero_gradient(allocation.counts)
        found = self.as_rewards(replace(allocation, success_rates=belief.mean, nonzero_gradient=mixed))
        self.allocation, self.estimated, self.details = found, True, {}
        return self.predict(ids, found)

    def as_rewards(self, allocation: Allocation, before: IntArray | int = 0) -> Allocation:
        """Return an allocation whose predictions of mixed outcomes have become predictions of rewards that differ.

        Args:
            allocation: a number of rollouts and a prediction for each group.
            before: (M,) rollouts that the groups already have.
        """
        mixed = np.asarray(allocation.nonzero_gradient)
        chance = np.where(allocation.counts + before >= 2, mixed + (1.0 - mixed) * self.differ_anyway, mixed)
        return replace(allocation, nonzero_gradient=chance)

    def expect_nothing(self, ids: list[PromptId], allocation: Allocation) -> Allocation:
        """Keep an allocation made without a belief."""
        self.allocation, self.estimated, self.details = allocation, False, {}
        return self.predict(ids, allocation)

    def predict(self, ids: list[PromptId], allocation: Allocation) -> Allocation:
        """Keep the predictions of an allocation until :meth:`compare`."""
        assert allocation.nonzero_gradient is not None
        self.predicted.update(zip(ids, allocation.nonzero_gradient.tolist(), strict=True))
        return allocation

    def compare(self, ids: list[PromptId], groups: GroupOutcomes, lost: dict[str, float]) -> None:
        """Compare outcomes with predictions, and keep the numbers of the batch.

        Args:
            ids: (G,) prompts of the groups.
            groups: their outcomes.
            lost: returned by :func:`lost_metrics`.
        """
        found = summarise(groups).as_dict()
        seen = groups.totals > 0
        found["outcome_per_prompt"] = float(groups.mean_reward[seen].mean()) if seen.any() else float("nan")
        predicted = np.array([self.predicted.pop(prompt_id, np.nan) for prompt_id in ids])
        known = seen & ~np.isnan(predicted)
        if known.any():
            realised = groups.effective[known]
            found["predicted_nonzero_gradient"] = float(predicted[known].mean())
            found["realised_nonzero_gradient"] = float(realised.mean())
            found["brier_score"] = float(np.mean((predicted[known] - realised) ** 2))
        self.outcomes = found | lost

    def as_dict(self) -> dict[str, float]:
        """Return all numbers of the step."""
        allocation = {} if self.allocation is None else allocation_metrics(self.allocation, estimated=self.estimated)
        return allocation | self.details | self.outcomes


class LostGroups:
    """Groups that arrive and groups that do not, with their estimated difficulty and their length.

    An asynchronous engine drops groups whose policy is too old, and those that fail. Long rollouts are dropped more
    often than short ones, and hard prompts have long rollouts.
    """

    def __init__(self) -> None:
        self._any = False
        self._forget()

    def _forget(self) -> None:
        self._causes = Counter[str]()
        self._groups: dict[str, list[FloatArray]] = {"lost": [], "arrived": []}

    def arrive(self, success_rate_G: ArrayLike, length_G: ArrayLike) -> None:
        """Count groups that arrived.

        Args:
            success_rate_G: (G,) success rates estimated before they were generated, NaN where unknown.
            length_G: (G,) mean tokens of their rollouts, NaN where unknown.
        """
        self._groups["arrived"].append(np.column_stack([success_rate_G, length_G]))

    def lose(self, cause: str, success_rate_G: ArrayLike, length_G: ArrayLike) -> None:
        """Count groups that are lost; arguments as for :meth:`arrive`.

        Raises:
            ValueError: the cause is not one of :data:`LOST_CAUSES`.
        """
        if cause not in LOST_CAUSES:
            raise ValueError(f"cause must be one of {', '.join(LOST_CAUSES)}, got {cause!r}")
        groups = np.column_stack([success_rate_G, length_G])
        self._groups["lost"].append(groups)
        self._causes[cause] += len(groups)
        self._any |= len(groups) > 0

    def metrics(self) -> dict[str, float]:
        """Return the numbers since the last call; nothing in a run that has lost no group."""
        counts = {f"lost_groups/{cause}": float(number) for cause, number in self._causes.items()}
        lost, arrived = (np.concatenate([np.zeros((0, 2)), *self._groups[name]]) for name in ("lost", "arrived"))
        self._forget()
        if not self._any:
            return {}
        groups = len(lost) + len(arrived)
        found = {"lost_groups": float(len(lost)), "lost_groups_share": len(lost) / groups if groups else float("nan")}
        for name, rows in (("lost_groups", lost), ("arrived_groups", arrived)):
            for column, values in zip(("success_rate", "length"), rows.T, strict=True):
                known = values[~np.isnan(values)]
                found[f"{name}_{column}"] = float(known.mean()) if known.size else float("nan")
        return found | counts


def allocation_metrics(allocation: Allocation, *, estimated: bool) -> dict[str, float]:
    """Return how a budget was spread and, where it was based on estimates, over which prompts."""
    counts = allocation.counts
    spread = {"budget": float(counts.sum()), "budget_min": float(counts.min()), "budget_max": float(counts.max())}
    rates = allocation.success_rates
    if not estimated or rates is None:
        return spread
    unseen = np.isnan(rates)
    found = spread | {
        "expected_value": allocation.expected_value,
        "estimated_success_rate": float(rates[~unseen].mean()) if not unseen.all() else float("nan"),
        "fallback": float(allocation.reason.startswith("fallback") or "; fallback" in allocation.reason),
    }
    difficulty = np.searchsorted(DIFFICULTY_EDGES, rates, side="right")  # NaN is sorted to the end
    given = np.bincount(difficulty, weights=counts, minlength=len(DIFFICULTIES)) / max(counts.sum(), 1)
    found |= {f"budget_to/{name}": float(share) for name, share in zip(DIFFICULTIES, given, strict=True)}
    bins = np.searchsorted(BUDGET_BINS, counts, side="right") - 1
    shares = np.bincount(bins, minlength=len(BUDGET_BINS)) / counts.size
    names = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(BUDGET_BINS)]
    names.append(f"{BUDGET_BINS[-1]}+")
    return found | {f"budget_share/{name}": float(share) for name, share in zip(names, shares, strict=True)}


def lost_metrics(known: Records, successes: IntArray, totals: IntArray) -> dict[str, float]:
    """Return how many prompts had only successes at their last visit, and the share of them that now mostly fails.

    Args:
        known: (M,) records of the visited prompts before this visit.
        successes: (M,) successes of this visit.
        totals: (M,) scored rollouts of this visit.
    """
    solved = (known.newest_total > 0) & (known.newest_successes == known.newest_total)
    lost = 2 * successes < totals
    share = float(lost[solved].mean()) if solved.any() else float("nan")
    return {"solved_before": float(solved.sum()), "lost": share}


def select_metrics(metrics: dict[str, float], which: str) -> dict[str, float]:
    """Return the metrics that an engine logs.

    Args:
        metrics: all numbers of a step, by name.
        which: ``"core"`` or ``"all"``.
    """
    if which == "all":
        return metrics

    def shown(name: str) -> bool:
        return (
            name in (*CORE, *LOST_GROUPS)
            or name.startswith("failures/")
            or metrics.get(OCCASIONAL.get(name, ""), 0.0) > 0
        )

    return {name: number for name, number in metrics.items() if shown(name)}
