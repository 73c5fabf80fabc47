"""One run of any engine: the plan of a step, learning from its outcomes, log and state.

The TRL and verl adapters, the simulator and the command line share this. An engine makes two calls a step::

    plan = session.plan(ids, mean)  # before generation: rollouts per prompt
    groups, metrics = session.observe(plan, prompt_R, outcome_R, lengths_R, step)  # after scoring

With two rounds in a step, ``first = session.plan_first(ids, mean)`` and, once these rollouts are scored,
``plan = session.plan_rest(first, mean * len(ids), prompt_R, outcome_R)`` take the place of the first call.

A configuration that cannot work is refused when the settings are made. After that a run never ends because of
allocation: where allocating fails, every prompt of the batch gets the mean, and the failure is logged once and counted
by kind.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.degradation import first_share, uniform_counts
from knapsack_rl.allocation.policies import Allocation, unpredicted
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.groups import GroupOutcomes, outcomes_by_position
from knapsack_rl.ids import PromptId, numbered
from knapsack_rl.metrics import LostGroups
from knapsack_rl.plan import Plan, checked_counts
from knapsack_rl.runs.allocations import allocation_row
from knapsack_rl.runs.files import ALLOCATION_LOG, STATE_FILE, WARNINGS_FILE, append_row, finite_or_none
from knapsack_rl.runs.watch import WarningLog
from knapsack_rl.settings import AllocationSettings, check_rounds
from knapsack_rl.success import describe_rule

logger = logging.getLogger(__name__)

T = TypeVar("T")

EARLIER = "earlier rate"
"""Name of the feature that is a prompt's success rate in an earlier run."""

STEPS_JUDGED = 25
"""Steps with the same outcome everywhere after which a run is warned."""


class Observation(NamedTuple):
    """The outcomes of a step.

    Attributes:
        groups: the rollouts, grouped by position among the plan's prompts.
        metrics: numbers for a logger.
        expected: (G, 2) chance that was given to the success of rollouts that failed and of those that succeeded, see
            :meth:`~knapsack_rl.allocator.KnapsackAllocator.expected_outcomes`; by the rest of the group alone where
            the history was not asked for, is not that of a prompt, or cannot be read.
    """

    groups: GroupOutcomes
    metrics: dict[str, float]
    expected: FloatArray

    @property
    def baseline(self) -> FloatArray:
        """(R,) chance that was given to the success of each rollout, for ``advantage="posterior-mean"``."""
        return self.groups.by_outcome(self.expected)


class Session:
    """The allocator of one run, its log, and its failures.

    Args:
        settings: how to allocate.
        allocator: an allocator to use instead of the one that the settings describe.
        folder: for the allocation log and the warnings; None for neither.
        log_allocations: append each step's row to the allocation log.
        watch: look for signs of failure in the metrics, log each once and append it to the warnings.
        smallest_group: fewest rollouts that a served prompt may have; verl cannot take groups of one.
        rewards: names of the parts of the outcome, for what is said about success.
        says: whether this process says what counts as a success.
        earlier: success rates of prompts in an earlier run, a feature of each of them.
    """

    def __init__(
        self,
        settings: AllocationSettings,
        allocator: KnapsackAllocator | None = None,
        *,
        folder: Path | None = None,
        log_allocations: bool = False,
        watch: bool = False,
        smallest_group: int = 1,
        rewards: Sequence[str] = ("reward",),
        says: bool = True,
        earlier: Mapping[PromptId, float] | None = None,
    ) -> None:
        self.settings = settings
        self._earlier = earlier
        self.says = says
        self.rewards = tuple(rewards)
        self.allocator = settings.make_allocator() if allocator is None else allocator
        if settings.rounds == 2:
            check_rounds(self.allocator)
        self.folder = folder
        self.log_allocations = log_allocations
        self.smallest_group = smallest_group
        self._watches = watch
        self._warnings: WarningLog | None = None
        self._lengths_known = self._knows_lengths()
        self._pending: dict[PromptId, tuple[int, float, float]] = {}
        self._rule: tuple[str, float] | None = None
        self.lost = LostGroups()
        self._same_outcome = [0, 0]  # steps in a row without a failure, and without a success

    # -- one step ---------------------------------------------------------------------------------------------------

    def plan(
        self,
        ids: Sequence[PromptId],
        mean: int,
        *,
        budget: int | None = None,
        multiple: int = 1,
        features: Mapping[str, ArrayLike] | None = None,
    ) -> Plan:
        """Return the rollouts for the prompts of a batch.

        With a budget in rollouts the counts sum to it; with one in tokens they are expected to take the tokens of
        ``mean`` rollouts per row. A prompt that is in the batch several times gets one count for all its rows, see
        :meth:`~knapsack_rl.plan.Plan.rows_of`.

        Args:
            ids: (B,) prompt of each row of the batch.
            mean: mean rollouts per row; every row gets it under uniform allocation, or if allocation fails; the first
                rows get one more if the budget is not a multiple.
            budget: rollouts of the step, from ``mean * B`` (the default) to fewer than B more.
            multiple: with a budget in tokens, the number of rollouts is a multiple of this.
            features: (B,) values by name, see :meth:`knapsack_rl.KnapsackAllocator.note_features`.
        """
        started = time.perf_counter()
        distinct, place_B = numbered(ids)
        self.note_features(ids, features or {})
        rollouts = mean * len(ids) if budget is None else budget
        found = None
        if self.settings.allocation != "uniform" and (self.allocator.budget_unit == "rollouts" or self._lengths_known):
            found = self.survive("allocation", lambda: self._allocate(distinct, ids, mean, rollouts, multiple))
        if found is None:
            rollouts_B = uniform_counts(len(ids), rollouts)
            found = self.adopt(distinct, np.bincount(place_B, rollouts_B).astype(np.int64))
        return self._expect(Plan(distinct, found, time.perf_counter() - started))

    def plan_first(
        self,
        ids: Sequence[PromptId],
        mean: int,
        *,
        multiple: int = 1,
        features: Mapping[str, ArrayLike] | None = None,
    ) -> Plan:
        """Return the first of two rounds: as many rollouts for each row of the batch, whatever is known of its prompt.

        Args:
            ids: (B,) prompt of each row of the batch.
            mean: mean rollouts per row of both rounds.
            multiple: the number of rollouts is a multiple of this, which ``mean * B`` must be too; the first rows get
                one more where it does not divide evenly.
            features: see :meth:`plan`.
        """
        started = time.perf_counter()
        distinct, place_B = numbered(ids)
        self.note_features(ids, features or {})
        share = first_share(len(ids), mean, self.allocator.min_rollouts, multiple)
        counts = np.bincount(place_B, uniform_counts(len(ids), share)).astype(np.int64)
        return self._expect(Plan(distinct, self.adopt(distinct, counts), time.perf_counter() - started))

    def plan_rest(self, first: Plan, budget: int, prompt_R: IntArray, outcome_R: ArrayLike) -> Plan:
        """Return the rollouts of both rounds, by the outcomes of the first.

        Nothing is learned from these outcomes before :meth:`observe` gets those of both rounds. Where allocating fails,
        the rest is divided evenly. A rollout without an outcome does not count towards ``max_rollouts``.

        Args:
            first: from :meth:`plan_first`.
            budget: rollouts of both rounds.
            prompt_R: (R,) position of each rollout's prompt among the plan's.
            outcome_R: see :meth:`observe`.

        Returns:
            A plan whose counts, at least those of the first, sum to the budget. Its estimates are from before the step,
            its predictions from after the first round.
        """
        started = time.perf_counter()
        left = budget - int(first.counts.sum())
        more = self.survive("top-up", lambda: self._top_up(first.ids, left, prompt_R, outcome_R))
        if more is None:
            counts = first.counts + uniform_counts(len(first.ids), left)
            whole = self.adopt(first.ids, counts)
        else:
            whole = replace(more, counts=first.counts + more.counts, success_rates=first.allocation.success_rates)
            self.survive("prediction", lambda: self.allocator.describe(whole))
        return self._expect(Plan(first.ids, whole, first.seconds + time.perf_counter() - started))

    def _top_up(self, ids: list[PromptId], left: int, prompt_R: IntArray, outcome_R: ArrayLike) -> Allocation:
        """Ask the allocator for the rest of a step, and check its answer."""
        groups = self.allocator.outcomes_of(prompt_R, self._scored(outcome_R), len(ids), keep=False)
        found = self.allocator.top_up(ids, groups.totals, groups.successes, left)
        checked_counts(found, len(ids), left)
        return found

    def _scored(self, outcome_R: ArrayLike) -> FloatArray:
        """Return outcomes, NaN for an infinite one."""
        outcomes = np.asarray(outcome_R, dtype=np.float64)
        if not np.isinf(outcomes).any():
            return outcomes
        self.warn_once("infinite", "a reward is infinite; the rollout counts as unscored")
        return np.where(np.isinf(outcomes), np.nan, outcomes)

    def _expect(self, plan: Plan) -> Plan:
        """Keep the predictions of a plan for :meth:`arrived`, and return it."""
        unknown = np.full(len(plan.ids), np.nan)
        rates, nonzero = plan.allocation.success_rates, plan.allocation.nonzero_gradient
        columns = (plan.counts, unknown if rates is None else rates, unknown if nonzero is None else nonzero)
        kept = zip(*(column.tolist() for column in columns), strict=True)
        self._pending.update(zip(plan.ids, kept, strict=True))
        return plan

    def note_features(self, ids: Sequence[PromptId], features: Mapping[str, ArrayLike]) -> None:
        """Keep the features of prompts, and their success rates in an earlier run; :meth:`plan` does this too.

        Args:
            ids: (B,) prompts.
            features: (B,) values by name, see :meth:`knapsack_rl.KnapsackAllocator.note_features`.
        """
        given: dict[str, Any] = dict(features)
        if self._earlier is not None and (given or not self.settings.columns):
            given[EARLIER] = rates = [self._earlier.get(prompt_id) for prompt_id in ids]
            if all(rate is None for rate in rates):
                self.warn_once(
                    "earlier", "no prompt of a batch is in the earlier run named by prior; ids must be the same"
                )
        if given:
            self.survive("features", lambda: self.allocator.note_features(ids, given))

    def plan_unidentified(self, groups: int, mean: int) -> Plan:
        """Return the plan of groups whose prompts cannot be told apart: the mean for each.

        Args:
            groups: their number.
            mean: rollouts of each.
        """
        counts = np.full(groups, mean, dtype=np.int64)
        return Plan([*range(groups)], unpredicted(counts, "prompts are not identified"), identified=False)

    def _allocate(
        self, distinct: list[PromptId], ids: Sequence[PromptId], mean: int, rollouts: int, multiple: int
    ) -> Allocation:
        """Ask the allocator, which may be one of the user's, and check its answer."""
        if self.allocator.budget_unit == "rollouts":
            found = self.allocator.allocate(distinct, rollouts)
        else:
            budget = mean * float(self.allocator.predicted_lengths(ids).sum())
            found = self.allocator.allocate(distinct, budget, multiple=multiple)
        in_rollouts = self.allocator.budget_unit == "rollouts"
        counts = checked_counts(found, len(distinct), rollouts if in_rollouts else None)
        if self.allocator.budget_unit == "tokens" and counts.sum() % multiple:
            raise ArithmeticError(f"the allocator gave {counts.sum()} rollouts, which is not a multiple of {multiple}")
        if ((counts > 0) & (counts < self.smallest_group)).any():
            raise ArithmeticError(f"the allocator gave a group of fewer than {self.smallest_group} rollouts: {counts}")
        return found

    def adopt(self, ids: list[PromptId], counts: IntArray) -> Allocation:
        """Return counts that the allocator did not choose, with its predictions for them if it has any."""
        adopted = self.survive("prediction", lambda: self.allocator.adopt(ids, counts))
        return adopted or unpredicted(counts, "divided evenly")

    def arrived(self, ids: Sequence[PromptId]) -> tuple[Plan, IntArray]:
        """Return the plan of the prompts whose rollouts arrived, for engines that mix batches.

        Args:
            ids: (R,) prompt of each rollout that arrived.

        Returns:
            The plan of these prompts, and (R,) the position of each rollout among them.
        """
        distinct, prompt_R = numbered(ids)
        kept = [self._pending.pop(prompt_id, (0, math.nan, math.nan)) for prompt_id in distinct]
        counts, estimate, predicted = (np.array(column) for column in zip(*kept, strict=True)) if kept else ([], [], [])
        allocation = Allocation(
            np.asarray(counts, dtype=np.int64),
            math.nan,
            success_rates=np.asarray(estimate, dtype=np.float64),
            nonzero_gradient=np.asarray(predicted, dtype=np.float64),
        )
        return Plan(distinct, allocation), prompt_R

    def observe(
        self,
        plan: Plan,
        prompt_R: IntArray,
        outcome_R: ArrayLike,
        lengths_R: ArrayLike | None = None,
        step: int = 0,
        *,
        expected: bool = False,
    ) -> Observation:
        """Learn from the outcomes of a step, log them, and return them with the metrics.

        Args:
            plan: of the step.
            prompt_R: (R,) position of each rollout's prompt among the plan's.
            outcome_R: (R,) outcome that decides on success, or (R, F) parts that add up to it; NaN and infinite ones
                count as unscored.
            lengths_R: (R,) tokens of each rollout, if known.
            step: number of the step, for the log.
            expected: whether chances of success go by the history of the prompts, and not by the step alone.
        """
        outcomes = self._scored(outcome_R)
        allocator, prompts = self.allocator, len(plan.ids)
        groups = self.survive("success rule", lambda: allocator.outcomes_of(prompt_R, outcomes, prompts))
        if groups is None:  # the successes of the step are unknown
            groups = outcomes_by_position(prompt_R, np.full(prompt_R.shape, np.nan), prompts)
        if self.says and self.settings.allocation != "uniform":
            self.survive("reporting", lambda: self._tell_success(groups))
        chances: FloatArray | None = None
        if plan.identified:
            record = partial(allocator.record, plan.ids, groups, lengths_R, expected=expected)
            chances = self.survive("observation", record)
        else:
            self.survive("observation", lambda: allocator.note_unidentified(plan.allocation, groups))
        if lengths_R is not None and not self._lengths_known:
            self._lengths_known = self._knows_lengths()
        for prompt_id in plan.ids if plan.identified else ():
            self._pending.pop(prompt_id, None)
        if plan.identified and self.log_allocations and self.folder is not None:
            self.survive("logging", lambda: self._log(plan, groups, step))
        self.survive("reporting", lambda: self.lost.arrive(*plan.groups_of(prompt_R, lengths_R)))
        metrics = self.survive("reporting", allocator.metrics) or {}
        metrics |= self.survive("reporting", self.lost.metrics) or {}
        metrics["allocation_seconds"] = plan.seconds
        if self._watches:
            self.survive("watching", lambda: self._watch(step, metrics))
        return Observation(groups, metrics, groups.expected_alone if chances is None else chances)

    def lose(
        self, cause: str, plan: Plan, prompt_R: IntArray | None = None, lengths_R: ArrayLike | None = None
    ) -> None:
        """Count groups that the engine drops; the metrics of the next :meth:`observe` have them.

        Nothing is learned from them. Groups without lengths count with those that are expected of their prompts.

        Args:
            cause: one of :data:`knapsack_rl.metrics.LOST_CAUSES`.
            plan: of the lost groups, see :meth:`arrived`.
            prompt_R: (R,) position among the plan's prompts of each of their rollouts that was generated, if known.
            lengths_R: (R,) tokens of each, if known.
        """

        def count() -> None:
            if prompt_R is not None and lengths_R is not None:
                self.lost.lose(cause, *plan.groups_of(prompt_R, lengths_R))
            else:
                expected = self.allocator.predicted_lengths(plan.ids) if self._lengths_known else None
                rates, unknown = plan.groups_of()
                self.lost.lose(cause, rates, unknown if expected is None else expected)

        self.survive("reporting", count)

    def success_rule(self) -> dict[str, Any]:
        """Return what counts as a success, as JSON values: the reward, its cutoff and, if learned, its range."""
        rule, learned = self.allocator.success, self.allocator.learned
        if learned is None:
            name = self.rewards[0] if len(self.rewards) == 1 else f"the sum of {', '.join(self.rewards)}"
            return {"reward": name, "above": None if callable(rule) else rule}
        part = learned.deciding
        name = self.rewards[learned.order[0]] if len(self.rewards) == len(learned.parts) else f"part {learned.order[0]}"
        return {
            "reward": name,
            "above": part.cutoff,
            "low": finite_or_none(part.low),
            "high": finite_or_none(part.high),
        }

    def _tell_success(self, groups: GroupOutcomes) -> None:
        """Say what counts as a success, at the start and when that changes, and warn if all outcomes are the same."""
        scored, good = int(groups.totals.sum()), int(groups.successes.sum())
        if not scored:
            return
        rule = self.success_rule()
        text = describe_rule(rule)
        if (rule["reward"], rule["above"]) != self._rule:
            self._rule = rule["reward"], rule["above"]
            logger.log(
                # A reward of 0 and 1 is as everyone expects; of others, one wants to know what was made of them.
                logging.INFO if (rule.get("low"), rule.get("high")) == (0.0, 1.0) else logging.WARNING,
                "allocation counts as a success: %s; %.0f %% of the rollouts of this step",
                *(text, 100 * good / scored),
            )
        same = good == scored, good == 0
        self._same_outcome = [steps + 1 if now else 0 for steps, now in zip(self._same_outcome, same, strict=True)]
        for steps, kind in zip(self._same_outcome, ("success", "failure"), strict=True):
            if steps == STEPS_JUDGED:
                self.warn_once(
                    f"only {kind}",
                    f"every rollout of {steps} steps was a {kind} ({text}), so allocation has nothing to go by. Check "
                    "the reward functions, or say what is a success with outcome_reward or success_threshold",
                )

    def _log(self, plan: Plan, groups: GroupOutcomes, step: int) -> None:
        assert self.folder is not None
        row = allocation_row(step, plan.ids, plan.allocation, groups, plan.seconds)
        append_row(self.folder / ALLOCATION_LOG, row | {"success": self.success_rule()})

    def _watch(self, step: int, metrics: dict[str, float]) -> None:
        if self._warnings is None:
            self._warnings = WarningLog((self.folder or Path()) / WARNINGS_FILE)
        self._warnings.row({"step": step} | {f"knapsack/{name}": number for name, number in metrics.items()})

    def predicted_lengths(self, ids: Sequence[PromptId]) -> FloatArray | None:
        """Return the (M,) expected tokens of a rollout of each prompt, or None if they could not be predicted."""
        return self.survive("length prediction", lambda: self.allocator.predicted_lengths(ids))

    # -- failures ---------------------------------------------------------------------------------------------------

    def survive(self, what: str, call: Callable[[], T]) -> T | None:
        """Return the result of a call that must not end the run, or None if it raised; failures are counted by kind."""
        return self.allocator.survive(what, call)

    def warn_once(self, topic: str, message: str) -> None:
        """Log a warning unless there was one on this topic before."""
        self.allocator.warn_once(topic, message)

    # -- state ------------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Path) -> None:
        """Write the allocator's state into the folder of a checkpoint.

        Raises:
            OSError: the file cannot be written.
        """
        self.allocator.save(checkpoint / STATE_FILE)

    def restore(self, state: Path) -> None:
        """Load a state that :meth:`save` wrote.

        Args:
            state: the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: the state is damaged or belongs to another estimator.
        """
        self.allocator.restore(state)
        self._lengths_known = self._knows_lengths()
        self._forget_other_features()

    def _forget_other_features(self) -> None:
        """Start the knowledge that prompts share anew where a restored one is of other columns than the settings'."""
        wanted, shared = [*self.settings.columns, *([] if self._earlier is None else [EARLIER])], self.allocator.shared
        if wanted and shared is not None and shared.features.names != sorted(wanted):
            self.warn_once(
                "columns",
                f"the restored state has the features {shared.features.names}, the settings name {sorted(wanted)}: "
                "what prompts share is learned anew",
            )
            self.allocator.shared = None

    def _knows_lengths(self) -> bool:
        return bool(self.allocator.tracker.records().length_count.any())
