"""The allocator of a run: tracker, estimator and allocation behind two calls, ``allocate`` and ``observe``."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.belief import Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray, as_float64, check_counts, check_step_budget, check_whole
from knapsack_rl.allocation.coverage import allocate_with_skips
from knapsack_rl.allocation.degradation import evenly, reachable_maximum
from knapsack_rl.allocation.policies import Allocation, allocate_estimated, allocate_expected, unpredicted
from knapsack_rl.allocation.solver import total_value
from knapsack_rl.allocation.tokens import BudgetUnit, allocate_tokens, check_tokens, first_group
from knapsack_rl.allocation.top_up import check_outcomes, room_left, top_up
from knapsack_rl.allocation.value import ValueLike, named_value
from knapsack_rl.estimation.bayes import BayesFilterEstimator
from knapsack_rl.estimation.grid import check_posterior, check_top_up
from knapsack_rl.estimation.lengths import check_lengths, expected_lengths, expected_tokens
from knapsack_rl.estimation.named import make_estimator
from knapsack_rl.estimation.products import dot
from knapsack_rl.estimation.protocol import (
    Estimator,
    check_choices,
    check_estimator,
    finite_belief,
    finite_evidence,
)
from knapsack_rl.estimation.shared import SharedKnowledge
from knapsack_rl.estimation.tracker import Records, Tracker
from knapsack_rl.groups import GroupOutcomes, outcomes_by_position
from knapsack_rl.guarded import one_at_a_time
from knapsack_rl.ids import PromptId, check_batch, check_prompt_ids, in_id_order, numbered, stable_order, twin_warning
from knapsack_rl.metrics import StepMetrics, lost_metrics
from knapsack_rl.stored import Stored
from knapsack_rl.success import BoolArray, LearnedSuccess, SuccessRule, check_success_rule

ALLOCATION_FAILURES = (
    "allocation",
    "features",
    "top-up",
    "prediction",
    "learning",
    "refitting",
    "success rule",
    "observation",
)
"""Kinds of failures that are about allocation itself, not about logs and samples."""

EVENLY = "allocation failed: divided evenly"

LARGEST_MINIMUM = 2**16
"""Largest ``min_rollouts``; tables of values grow with it, and it may come from the header of a state file."""

FIRST_COLUMNS = 128
"""Columns of marginal values that an allocation starts with; it takes more where a prompt gets as many rollouts."""


class KnapsackAllocator(Stored):
    """Allocates each step's rollouts from what earlier steps observed.

    One step of a run is ``a = allocate(ids, budget)``, generate ``a.counts[i]`` rollouts of prompt i, then
    ``observe(ids_per_rollout, rewards)``. Prompts are known by id, so an id must name the same prompt in every epoch.

    Allocation never ends a run: a batch whose bounds and budget contradict each other degrades in the order of
    :mod:`knapsack_rl.allocation.degradation`, is counted in the metrics and logged once. If the estimator or the solver
    raises, the budget is divided evenly; the failure is counted by kind (``failures/allocation``, ...) and logged once
    with its traceback. Invalid arguments raise ``ValueError``.

    Calls from several threads are safe and run one after the other. The result depends on their order, so a
    reproducible run must make them in a fixed order.

    Args:
        estimator: ``"bayes-filter"``, ``"empirical-bayes"``, ``"beta"``, ``"window"`` (the paper's rule with its
            fallback), or an object with the methods of :class:`knapsack_rl.estimation.protocol.Estimator`.
        min_rollouts: N_low, 0 to 65,536. With 0 a prompt may be skipped until another check is worth its rollouts, see
            :mod:`knapsack_rl.allocation.coverage`; a group of one has no gradient.
        max_rollouts: N_up, >= max(min_rollouts, 2).
        success: what counts as a success: by default it is learned from the rewards, which may be graded or sums
            (:mod:`knapsack_rl.success`). A number is a threshold, above which a reward is a success; a function maps
            rewards to booleans.
        budget_unit: ``"rollouts"``, or ``"tokens"``: the budget of :meth:`allocate` is then in expected tokens
            (:mod:`knapsack_rl.estimation.lengths`), and the number of rollouts varies.
        value: the value to maximise, as for :func:`knapsack_rl.allocate` except for tables. Estimators on a grid
            accept any value, and so does the window without its fallback.
        **estimator_settings: keyword arguments of the named estimator.

    Raises:
        ValueError: a setting is out of range or unknown.

    >>> allocator = KnapsackAllocator()
    >>> allocator.allocate(["a", "b"], budget=8).counts.tolist()  # nothing is known yet: uniform
    [4, 4]
    >>> allocator.observe(["a"] * 4 + ["b"] * 4, [1, 1, 1, 1, 0, 1, 0, 0])
    >>> counts = allocator.allocate(["a", "b"], budget=8).counts
    >>> bool(counts[1] > counts[0])
    True
    """

    def __init__(
        self,
        estimator: str | Estimator = "bayes-filter",
        min_rollouts: int = 2,
        max_rollouts: int = 128,
        *,
        success: SuccessRule | None = None,
        budget_unit: BudgetUnit = "rollouts",
        value: ValueLike = "knapsack",
        **estimator_settings: Any,
    ) -> None:
        super().__init__()
        self.min_rollouts = check_whole("min_rollouts", min_rollouts, minimum=0, maximum=LARGEST_MINIMUM)
        self.max_rollouts = check_whole("max_rollouts", max_rollouts, minimum=2)
        if self.min_rollouts > self.max_rollouts:
            raise ValueError(f"min_rollouts {min_rollouts} is above max_rollouts {max_rollouts}; lower the minimum")
        if isinstance(estimator, str):
            self.estimator_name: str | None = estimator
            self.estimator = make_estimator(estimator, **estimator_settings)
        else:
            if estimator_settings:
                raise ValueError(f"pass the settings {sorted(estimator_settings)} to the estimator object itself")
            self.estimator_name, self.estimator = None, check_estimator(estimator)
        if success is not None:
            check_success_rule(success)
        self.success = success
        self.learned = LearnedSuccess() if success is None else None
        self.budget_unit, self.value = budget_unit, value
        check_choices(self.estimator, budget_unit, value, self.min_rollouts, self.max_rollouts)
        self.tracker = Tracker(self.estimator.evidence_size)
        self.shared: SharedKnowledge | None = None
        self._batches_at_refit = 0
        self._prompts_at_refit = 0
        self._degraded_batches = 0
        self._unscored_rollouts = 0
        self._step = StepMetrics()

    @one_at_a_time
    def use_value(self, value: ValueLike) -> None:
        """Maximise another value from now on, and keep all that was learned.

        Raises:
            ValueError: the value is unknown, or does not suit the estimator.
        """
        check_choices(self.estimator, self.budget_unit, value, self.min_rollouts, self.max_rollouts)
        self.estimator.use_value(value)
        self.value = value

    @one_at_a_time
    def allocate(
        self,
        prompt_ids: Iterable[PromptId],
        budget: float,
        *,
        multiple: int = 1,
        features: Mapping[str, ArrayLike] | None = None,
    ) -> Allocation:
        """Allocate a step: counts sum to a budget of rollouts, or their expected tokens do not exceed one of tokens.

        With ``min_rollouts=0`` the skips of each prompt are counted here, so call it once a step.

        Args:
            prompt_ids: M distinct ids, ``str`` or ``int``.
            budget: total rollouts, a whole number from 0 to 2^24; with ``budget_unit="tokens"`` finite tokens >= 0.
            multiple: with ``budget_unit="tokens"``, the number of rollouts is a multiple of this.
            features: see :meth:`note_features`.

        Raises:
            ValueError: ids repeat or have the wrong type, the batch is empty, the budget is out of range, or the
                features do not match.
        """
        started = time.perf_counter()
        ids = check_batch(prompt_ids)
        if features:
            self.note_features(ids, features)
        order = stable_order(ids)
        place = in_id_order(ids, order)  # sums and ties then depend on the prompts, not on the order of the batch
        ordered, order = [ids[k] for k in place.tolist()], order[place]
        if self.budget_unit == "tokens":
            decide = partial(
                self._allocate_tokens,
                ordered,
                order,
                check_tokens(budget),
                check_whole("multiple", multiple, minimum=1),
            )
            rollouts = len(ids) * first_group(self.min_rollouts, self.max_rollouts)  # only if allocation fails
        else:
            rollouts = check_step_budget(budget)
            decide = partial(self._allocate_rollouts, ordered, order, rollouts)
        found = self.survive("allocation", decide)
        if found is None:
            counts = evenly(rollouts, self.min_rollouts, order)
            found = self._step.expect_nothing(ordered, unpredicted(counts, EVENLY, degraded=True))
        self._step.details["allocation_seconds"] = time.perf_counter() - started
        return found.rearranged(np.argsort(place))

    @one_at_a_time
    def note_features(self, prompt_ids: Iterable[PromptId], features: Mapping[str, ArrayLike]) -> None:
        """Keep features of prompts: prompts that are alike then inform each other's estimates.

        Features are kept, so known prompts need not bring them again. Those that say nothing cost nothing, and a
        prompt's own outcomes outweigh them as they come.

        Args:
            prompt_ids: M ids.
            features: M values by name: texts are categories, numbers are divided into bins, None is a value of its own.
                The first call decides on the names, at most 16.

        Raises:
            ValueError: a name or a length differs, a column of numbers holds something else, or the estimator is not
                the Bayes filter.
        """
        ids = check_prompt_ids(prompt_ids)
        if not isinstance(self.estimator, BayesFilterEstimator):
            raise ValueError(f"features need the estimator 'bayes-filter', got {type(self.estimator).__name__}")
        shared = SharedKnowledge(self.estimator) if self.shared is None else self.shared
        shared.note(ids, features)
        self.shared = shared

    def _allocate_rollouts(self, ids: list[PromptId], order: FloatArray, budget: int) -> Allocation:
        low, high, records = self.min_rollouts, self.max_rollouts, self._lookup(ids)
        if self.estimator.paper_rule:  # needs the values of a pair alone: the rule has a scan of its own for the others
            belief = finite_belief(self.estimator, records, min(high, FIRST_COLUMNS))
            rates, pairs, rule = belief.mean, belief.marginals, self.estimator.fallback
            found = allocate_estimated(rates, pairs, budget, low, high, priority=order, value=self.value, fallback=rule)
        else:
            reach = reachable_maximum(budget, len(ids), low, high)
            skips = np.where(records.visits > 0, records.skips, np.inf)

            def decide(belief: Belief, high: int) -> Allocation:
                if low > 0 or budget > len(ids) * high:
                    return allocate_expected(belief.marginals, budget, low, high, priority=order)
                return allocate_with_skips(belief, skips, budget, high, order)

            found, belief = self._believe_and_decide(records, decide, lambda: reach)
            if low == 0:
                self.tracker.skip(ids[k] for k in np.flatnonzero(found.counts == 0).tolist())
        return self._step.expect(ids, self._note_degradation(found), belief)

    def _allocate_tokens(self, ids: list[PromptId], order: FloatArray, budget: float, multiple: int) -> Allocation:
        records, rows = self._lookup(ids), self.tracker.rows(ids)

        def tokens_of(belief: Belief) -> FloatArray | None:
            return expected_tokens(self.tracker.lengths(), rows, belief.mean)

        def decide(belief: Belief, high: int) -> Allocation:
            return allocate_tokens(belief, tokens_of(belief), budget, self.min_rollouts, high, order, multiple)

        def reach() -> int:
            tokens = tokens_of(finite_belief(self.estimator, records, 2))
            if tokens is None:  # each prompt gets its first group, or one of them all that the budget pays for
                return min(self.max_rollouts, len(ids) * first_group(self.min_rollouts, self.max_rollouts) + multiple)
            return min(self.max_rollouts, int(budget / tokens.min()) + multiple + 1)

        found, belief = self._believe_and_decide(records, decide, reach)
        found = self._step.expect(ids, self._note_degradation(found), belief)
        tokens = tokens_of(belief)
        if tokens is not None:
            self._step.details["expected_tokens"] = dot(tokens, found.counts)
        return found

    def _believe_and_decide(
        self, records: Records, decide: Callable[[Belief, int], Allocation], reach: Callable[[], int]
    ) -> tuple[Allocation, Belief]:
        """Return an allocation by beliefs with as many columns of marginal values as it needs, and the belief.

        Values of this package fall, so counts that do not reach the last column are those of the whole table. A user's
        value may rise anywhere and gets all columns that the budget can reach.

        Args:
            records: records of the batch.
            decide: allocates by a belief and a maximum, the number of its columns.
            reach: returns the most rollouts that the budget can give to a prompt, at most ``max_rollouts``.
        """
        falls = self.estimator_name is not None and named_value(self.value) is not None
        columns = min(self.max_rollouts, max(FIRST_COLUMNS, 2 * self.min_rollouts) if falls else max(reach(), 2))
        while True:
            belief = finite_belief(self.estimator, records, columns)
            found = decide(belief, columns)
            if not falls or columns == self.max_rollouts or found.counts.max() < columns:
                return found, belief
            columns = min(4 * columns, self.max_rollouts)

    def _note_degradation(self, allocation: Allocation) -> Allocation:
        if allocation.degraded:
            self._degraded_batches += 1
            self.warn_once("degraded", f"allocation degraded: {allocation.reason}; counted as degraded_batches")
        return allocation

    def records_of(self, ids: list[PromptId]) -> Records:
        """Return the records of prompts, with their priors by features if there are any."""
        records = self.tracker.lookup(ids)
        if self.shared is not None:
            assert isinstance(self.estimator, BayesFilterEstimator)
            records.prior = self.shared.prior(ids, self.estimator.prior)
        return records

    def _lookup(self, ids: list[PromptId]) -> Records:
        """Return the records of a batch; warn once of a new id known under the other type: 7 and "7" differ."""
        records = self.records_of(ids)
        if "twins" not in self._warned:
            unseen = np.flatnonzero(records.visits == 0)
            if twins := self.tracker.twin([ids[k] for k in unseen.tolist()]):
                self.warn_once("twins", twin_warning(*twins))
        return records

    @one_at_a_time
    def top_up(
        self, prompt_ids: Iterable[PromptId], counts_so_far: ArrayLike, successes_so_far: ArrayLike, budget: int
    ) -> Allocation:
        """Allocate the rest of a step's budget given the outcomes of a first share.

        Allocate and generate a first share, count successes, call this, generate the rest, then :meth:`observe` all
        rollouts of the step once. Group sizes then depend on outcomes, which biases group statistics but not the
        posteriors, see :meth:`knapsack_rl.estimation.grid.GridPosterior.believe_after`.

        Args:
            prompt_ids: M distinct ids.
            counts_so_far: (M,) rollouts scored so far in this step, not yet observed.
            successes_so_far: (M,) successes among them.
            budget: rollouts left, whatever the ``budget_unit``.

        Returns:
            Additional counts that sum to the budget; predictions are about both shares together.

        Raises:
            ValueError: arguments do not match, the estimator has no posterior on a grid, or the value cannot judge
                further rollouts of a group.
        """
        started = time.perf_counter()
        ids, left = check_batch(prompt_ids), check_step_budget(budget)
        counts, successes = check_outcomes(counts_so_far, successes_so_far, len(ids))
        grid, cap, order = check_top_up(self.estimator), self.max_rollouts, stable_order(ids)

        def spend() -> Allocation:
            records, most = self.records_of(ids), max(int(room_left(counts, left, cap).max()), 1)
            columns = min(most, FIRST_COLUMNS)
            while True:
                found = top_up(grid.believe_after(records, counts, successes, columns), counts, left, cap, order)
                if columns == most or found.counts.max() < columns:
                    return self._step.predict(ids, self._step.as_rewards(self._note_degradation(found), counts))
                columns = min(4 * columns, most)

        found = self.survive("top-up", spend)
        if found is None:
            found = self._step.predict(ids, unpredicted(evenly(left, 1, order), EVENLY, degraded=True))
        self._step.details["top_up_seconds"] = time.perf_counter() - started
        return found

    @one_at_a_time
    def describe(self, allocation: Allocation) -> None:
        """Let :meth:`metrics` describe an allocation, such as both shares of a step, in place of the newest one."""
        self._step.allocation = allocation

    @one_at_a_time
    def adopt(self, prompt_ids: Iterable[PromptId], counts: ArrayLike) -> Allocation:
        """Use given counts (a uniform baseline, an engine's choice) instead of :meth:`allocate`, with its predictions.

        Args:
            prompt_ids: M distinct ids.
            counts: (M,) rollouts per prompt, whole numbers >= 0 that sum to at most 2^24.

        Raises:
            ValueError: ids repeat or have the wrong type, or counts do not match them.
        """
        started = time.perf_counter()
        ids, given = check_batch(prompt_ids), check_counts(counts)
        if given.shape != (len(ids),):
            raise ValueError(f"counts must hold one number per prompt ({len(ids)}), got shape {given.shape}")
        check_step_budget(sum(given.tolist()))
        reason = "counts given from outside"

        def predict() -> Allocation:
            belief = finite_belief(self.estimator, self._lookup(ids), max(int(given.max()), 1))
            return self._step.expect(ids, Allocation(given, total_value(belief.marginals, given), reason), belief)

        found = self.survive("prediction", predict) or self._step.expect_nothing(ids, unpredicted(given, reason))
        self._step.details["allocation_seconds"] = time.perf_counter() - started
        return found

    @one_at_a_time
    def observe(
        self, prompt_ids_per_rollout: Iterable[PromptId], rewards: ArrayLike, lengths: ArrayLike | None = None
    ) -> None:
        """Record the outcomes of a generated batch; call it once per batch.

        Args:
            prompt_ids_per_rollout: (R,) id of each rollout's prompt, in any order; groups may have any size.
            rewards: (R,) outcome of each rollout, or (R, F) parts that add up to it; NaN, or None in a list, for an
                unscored one, which is counted and left out. A tensor of any type is accepted.
            lengths: (R,) tokens generated, 0 to 1e9, if known; feeds :meth:`predicted_lengths`.

        Raises:
            ValueError: the arguments differ in length, an id has the wrong type, or a reward is infinite; nothing is
                recorded then.
        """
        distinct, prompt_R = numbered(check_prompt_ids(prompt_ids_per_rollout))
        checked = None if lengths is None else check_lengths(lengths, prompt_R.size)  # before the rule learns
        self.record(distinct, self.outcomes_of(prompt_R, rewards, len(distinct)), checked)

    @one_at_a_time
    def outcomes_of(self, prompt_R: IntArray, rewards: ArrayLike, prompts: int, *, keep: bool = True) -> GroupOutcomes:
        """Group a generated batch by prompt and judge its rewards by the success rule, which learns from them.

        Args:
            prompt_R: (R,) position of each rollout's prompt.
            rewards: (R,) reward of each rollout, NaN for an unscored one; or (R, F) parts that add up to it.
            prompts: number of prompts.
            keep: whether to keep what the rule learns; not for a first share, whose rewards come again with the rest.

        Raises:
            ValueError: the arguments differ in length, or a reward is infinite.
        """
        if self.success is not None:
            return outcomes_by_position(prompt_R, rewards, prompts, self.success)
        assert self.learned is not None
        learned = self.learned if keep else copy.copy(self.learned)

        def learn_and_judge(whole: FloatArray) -> BoolArray:  # called once the rewards are known to be good
            parts = as_float64(rewards)[0]
            rows = parts if parts.ndim == 2 else whole[:, None]
            learned.learn(prompt_R, rows)
            return learned.successes(rows)

        groups = outcomes_by_position(prompt_R, rewards, prompts, learn_and_judge)
        if keep:
            self._step.differ_anyway = learned.differ_anyway
        return groups

    @one_at_a_time
    def record(
        self,
        prompt_ids: list[PromptId],
        groups: GroupOutcomes,
        lengths: ArrayLike | None = None,
        *,
        expected: bool = False,
    ) -> FloatArray | None:
        """Record rollouts that are already grouped, like :meth:`observe`; engines group them only once.

        Args:
            prompt_ids: (G,) distinct ids, the prompt of each group; a group may be empty.
            groups: from :meth:`outcomes_of`.
            lengths: (R,) tokens generated, 0 to 1e9, if known.
            expected: whether to return what was expected.

        Returns:
            With ``expected``, :meth:`expected_outcomes` before this, 1/2 for groups without a scored rollout; None if
            it cannot be computed, which is counted and logged.

        Raises:
            ValueError: the lengths are out of range or not one per rollout; nothing is recorded then.
        """
        lengths_R = None if lengths is None else check_lengths(lengths, groups.group_R.size)
        chances: FloatArray | None = np.full((len(prompt_ids), 2), 0.5) if expected else None
        if not groups.group_R.size:
            return chances
        scored = groups.scored_R
        self._unscored_rollouts += int((~scored).sum())
        visited = groups.totals > 0
        visitors = [prompt_id for prompt_id, seen in zip(prompt_ids, visited.tolist(), strict=True) if seen]
        successes, totals = groups.successes[visited], groups.totals[visited]
        known = self.records_of(visitors)
        lost = lost_metrics(known, successes, totals)
        if visitors:
            past = cache(lambda: check_posterior(self.estimator).likelihood(known))  # for both that need it
            if chances is not None:
                found = self.survive("baseline", lambda: self._expected(past(), known.prior, successes, totals))
                if found is None:
                    chances = None
                else:
                    chances[visited] = found
            visitor_R, success_R = (np.cumsum(visited) - 1)[groups.group_R[scored]], groups.success_R[scored]
            self.survive("learning", lambda: self._share(visitors, known, past, successes, totals))
            self.tracker.record(
                visitors,
                visitor_R,
                success_R,
                None if lengths_R is None else lengths_R[scored],
                discount=self.estimator.discount,
                evidence=self.survive("learning", lambda: finite_evidence(self.estimator, known, successes, totals)),
            )
            self._refit_when_due()
        self._step.compare(prompt_ids, groups, lost)
        return chances

    @one_at_a_time
    def expected_outcomes(self, prompt_ids: list[PromptId], groups: GroupOutcomes) -> FloatArray:
        """Return the (G, 2) probability that a rollout succeeds, by its prompt's history and the rest of its group.

        The rest is all but one failure in the first column, and all but one success in the second: what is expected of
        a rollout that failed, and of one that succeeded. It does not depend on the rollout itself, so that as a
        baseline it leaves the gradient without bias. :meth:`~knapsack_rl.groups.GroupOutcomes.by_outcome` picks that of
        each rollout. Ask before :meth:`record`, which makes the outcomes part of the history, or let it return them.

        Args:
            prompt_ids: (G,) distinct ids, the prompt of each group.
            groups: from :meth:`outcomes_of`.

        Raises:
            ValueError: the estimator has no posterior on a grid.
        """
        known = self.records_of(prompt_ids)
        past = check_posterior(self.estimator).likelihood(known)
        return self._expected(past, known.prior, groups.successes, groups.totals)

    def _expected(
        self, past: FloatArray, prior: FloatArray | None, successes: IntArray, totals: IntArray
    ) -> FloatArray:
        """Return :meth:`expected_outcomes` of groups, by the likelihood of what their prompts had before."""
        estimator = check_posterior(self.estimator)
        return estimator.means_without_one(estimator.posterior_of(past, prior), successes, totals - successes)

    def _share(
        self,
        ids: list[PromptId],
        known: Records,
        past: Callable[[], FloatArray],
        successes: IntArray,
        totals: IntArray,
    ) -> None:
        """Let prompts that are alike learn from these outcomes, before the prompts themselves do."""
        if self.shared is None or known.prior is None:
            return
        assert isinstance(self.estimator, BayesFilterEstimator)
        visit = self.estimator.binomial_likelihood(successes, totals - successes)
        self.shared.learn(ids, self.estimator.prior, past(), visit)

    @one_at_a_time
    def note_unidentified(self, allocation: Allocation, groups: GroupOutcomes) -> None:
        """Note a step whose prompts cannot be told apart: it counts in the metrics, nothing is learned."""
        self._unscored_rollouts += int((~groups.scored_R).sum())
        self._step = StepMetrics(allocation=allocation)
        self._step.compare([*range(allocation.counts.size)], groups, {})

    def _refit_when_due(self) -> None:
        tracker = self.tracker
        if tracker.refit_due(self._batches_at_refit, self._prompts_at_refit):
            self.survive("refitting", lambda: self.estimator.refit(tracker.records()))
            self._batches_at_refit, self._prompts_at_refit = tracker.clock, len(tracker)

    @one_at_a_time
    def metrics(self) -> dict[str, float]:
        """Return the metrics of the newest ``allocate`` and ``observe``, and totals of the run."""
        totals = {
            "prompts_seen": float(len(self.tracker)),
            "degraded_batches": float(self._degraded_batches),
            "unscored_rollouts": float(self._unscored_rollouts),
            "allocation_failures": float(sum(self.failures[kind] for kind in ALLOCATION_FAILURES)),
        }
        if self.shared is not None:
            totals |= {f"features/{name}": weight for name, weight in self.shared.trust().items()}
        return self._step.as_dict() | totals | {f"failures/{kind}": float(n) for kind, n in self.failures.items()}

    @one_at_a_time
    def belief(self, prompt_ids: Iterable[PromptId], max_rollouts: int | None = None) -> Belief:
        """Return the belief about the given prompts: mean success rate, marginal values, predictions.

        Args:
            prompt_ids: M ids.
            max_rollouts: columns of marginal values; the allocator's maximum by default.
        """
        columns = self.max_rollouts if max_rollouts is None else check_whole("max_rollouts", max_rollouts, minimum=1)
        return self.estimator.believe(self.records_of(check_prompt_ids(prompt_ids)), columns)

    @one_at_a_time
    def predicted_lengths(self, prompt_ids: Iterable[PromptId]) -> FloatArray:
        """Return (M,) expected tokens of a rollout of each prompt, for the balancer; all ones before any is known."""
        return expected_lengths(self.tracker.lengths(), self.tracker.rows(check_prompt_ids(prompt_ids)))
