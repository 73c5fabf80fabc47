"""Simulation of policies in an environment with known success rates.

:func:`simulate` runs one policy over one episode and keeps every visit. A policy sees ids, budgets and rewards, as in
training; only :class:`KnownRates` sees the true rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray, check_whole
from knapsack_rl.allocation.degradation import uniform_counts
from knapsack_rl.allocation.policies import allocate
from knapsack_rl.allocation.value import nonzero_gradient_probability, value
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.estimation.named import Estimator
from knapsack_rl.offline.environments import BoolArray, Environment, Episode
from knapsack_rl.plan import Plan
from knapsack_rl.session import Session
from knapsack_rl.settings import AllocationSettings

OUTCOMES = 3
"""Number of the random stream that decides on rewards; environments use the lower ones."""


class Policy(Protocol):
    """Decides on the rollouts per prompt."""

    def allocate(self, prompts: IntArray, budget: int) -> tuple[IntArray, FloatArray]:
        """Return counts (M,), and the predicted probability (M,) of a non-zero gradient, NaN without a prediction."""
        ...

    def observe(self, prompts_R: IntArray, successes_R: BoolArray) -> None:
        """Learn from the prompt and the outcome of each rollout."""
        ...


PolicyMaker = Callable[[Episode], Policy]
"""Makes a fresh policy for an episode."""


class Uniform:
    """The same number of rollouts for every prompt.

    Args:
        factor: multiple of the budget to spend, >= 1; 2 shows the gain from doubling the compute.
    """

    def __init__(self, factor: int = 1) -> None:
        self.factor = check_whole("factor", factor, minimum=1)

    def allocate(self, prompts: IntArray, budget: int) -> tuple[IntArray, FloatArray]:
        """Return equal counts without predictions."""
        return uniform_counts(prompts.size, self.factor * budget), np.full(prompts.size, np.nan)

    def observe(self, prompts_R: IntArray, successes_R: BoolArray) -> None:
        """Do nothing."""


class KnownRates:
    """The optimum for the true success rates: an upper bound for allocation.

    Args:
        episode: the episode, which knows the true rates.
        min_rollouts: N_low, >= 0; lowered where the budget of a step requires it.
        max_rollouts: N_up; raised where the budget of a step requires it.
    """

    def __init__(self, episode: Episode, min_rollouts: int = 2, max_rollouts: int = 128) -> None:
        self.episode, self.min_rollouts, self.max_rollouts = episode, min_rollouts, max_rollouts

    def allocate(self, prompts: IntArray, budget: int) -> tuple[IntArray, FloatArray]:
        """Return the exact optimum of the true values, and the true probabilities."""
        rates = self.episode.rates(prompts)
        share = budget // prompts.size
        # A group of fewer than two cannot hold both outcomes, so it is better to skip some prompts.
        lower = self.min_rollouts if share >= self.min_rollouts else share if share >= 2 else 0
        upper = max(self.max_rollouts, -(-budget // prompts.size))
        counts = allocate(rates, budget, lower, upper).counts
        return counts, nonzero_gradient_probability(counts, rates)

    def observe(self, prompts_R: IntArray, successes_R: BoolArray) -> None:
        """Do nothing: the rates are known."""


class Allocated:
    """A :class:`~knapsack_rl.session.Session` as a policy.

    Args:
        session: of the run.
        features: returns the features of prompts; None for none.
    """

    def __init__(self, session: Session, features: Callable[[IntArray], dict[str, list[str]]] | None = None) -> None:
        self.session, self._features = session, features

    def allocate(self, prompts: IntArray, budget: int) -> tuple[IntArray, FloatArray]:
        """Return the session's counts and predictions."""
        features = self._features and self._features(prompts)
        plan = self.session.plan(prompts.tolist(), budget // prompts.size, budget=budget, features=features)
        return self._planned(plan)

    def _planned(self, plan: Plan) -> tuple[IntArray, FloatArray]:
        predicted = plan.allocation.nonzero_gradient
        return plan.counts, np.full(plan.counts.size, np.nan) if predicted is None else predicted

    def observe(self, prompts_R: IntArray, successes_R: BoolArray) -> None:
        """Pass the outcomes to the session; they may be of an earlier step."""
        plan, prompt_R = self.session.arrived(prompts_R.tolist())
        self.session.observe(plan, prompt_R, successes_R.astype(np.float64))


class Watching(Allocated):
    """Uniform allocation observed by an allocator, to compare the predictions of estimators on the same data."""

    def allocate(self, prompts: IntArray, budget: int) -> tuple[IntArray, FloatArray]:
        """Return equal counts, and the allocator's predictions for them."""
        counts, ids = uniform_counts(prompts.size, budget), prompts.tolist()
        return self._planned(Plan(ids, self.session.adopt(ids, counts)))


def uniform(factor: int = 1) -> PolicyMaker:
    """Return a maker of :class:`Uniform`."""
    return lambda _: Uniform(factor)


def known_rates(min_rollouts: int = 2, max_rollouts: int = 128) -> PolicyMaker:
    """Return a maker of :class:`KnownRates`."""
    return lambda episode: KnownRates(episode, min_rollouts, max_rollouts)


def allocated(
    estimator: str | Callable[[], Estimator] = "bayes-filter",
    min_rollouts: int = 2,
    max_rollouts: int = 128,
    features: Sequence[str] = (),
    **settings: Any,
) -> PolicyMaker:
    """Return a maker of policies with a fresh allocator for every episode.

    Args:
        estimator: a name of ``ESTIMATORS``, or a function that makes an estimator.
        min_rollouts: N_low.
        max_rollouts: N_up.
        features: columns of the environment that the policy sees.
        **settings: keyword arguments of the named estimator.
    """

    def make(episode: Episode) -> Policy:
        chosen = estimator if isinstance(estimator, str) else estimator()
        session = Session(AllocationSettings(), KnapsackAllocator(chosen, min_rollouts, max_rollouts, **settings))

        def seen(prompts: IntArray) -> dict[str, list[str]]:
            columns = episode.features(prompts)
            return {name: columns[name] for name in features}

        return Allocated(session, seen if features else None)

    return make


def watching(estimator: str, **settings: Any) -> PolicyMaker:
    """Return a maker of :class:`Watching` with a fresh allocator for every episode."""
    return lambda _: Watching(Session(AllocationSettings(), KnapsackAllocator(estimator, **settings)))


@dataclass(frozen=True, eq=False)
class Simulation:
    """Every visit of one policy over one episode; arrays over visits have length V and ascend by step.

    Attributes:
        step: (V,) step of the visit.
        prompt: (V,) prompt.
        visit: (V,) how often the prompt was visited before.
        rates: (V,) true success rate.
        counts: (V,) rollouts given.
        predicted: (V,) predicted probability of a non-zero gradient, NaN without a prediction.
        successes: (V,) successful rollouts.
        uniform: (V,) equal counts of the step's budget.
        best: (V,) optimal counts for the true rates and the step's budget.
    """

    step: IntArray
    prompt: IntArray
    visit: IntArray
    rates: FloatArray
    counts: IntArray
    predicted: FloatArray
    successes: IntArray
    uniform: IntArray
    best: IntArray

    @cached_property
    def effective(self) -> BoolArray:
        """(V,) whether the group held both outcomes."""
        return (self.successes > 0) & (self.successes < self.counts)

    @cached_property
    def values(self) -> FloatArray:
        """(V,) true value V(N, p) of the counts given."""
        return value(self.counts, self.rates)

    @cached_property
    def values_if_uniform(self) -> FloatArray:
        """(V,) true value of equal counts."""
        return value(self.uniform, self.rates)

    @cached_property
    def values_if_known(self) -> FloatArray:
        """(V,) true value of the optimum for the true rates."""
        return value(self.best, self.rates)


def simulate(
    environment: Environment,
    make_policy: PolicyMaker,
    seed: int,
    budget: int | Sequence[int] = 8,
    *,
    min_rollouts: int = 2,
    max_rollouts: int = 128,
    advanced: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Run a policy over the episode of a seed.

    Each step: the policy allocates, every rollout succeeds with its prompt's true rate, the policy observes, the
    environment trains. The result also has the counts of equal allocation and of known rates for the same step, so
    policies can be placed between the two even if rates depend on earlier decisions of the policy.

    Args:
        environment: the source of rates and batches.
        make_policy: see :func:`uniform`, :func:`known_rates`, :func:`allocated`.
        seed: fixes the episode and the rewards.
        budget: rollouts per prompt, or one budget for each step.
        min_rollouts: N_low of the optimum to compare with.
        max_rollouts: N_up of the optimum to compare with.
        advanced: called with (steps done, steps in all) after each step.

    Raises:
        ValueError: there is not one budget for each step, or a budget is not a whole number >= 0.
    """
    episode = environment.start(seed)
    batches = episode.batches
    budgets = [budget * batch.size for batch in batches] if isinstance(budget, (int, np.integer)) else list(budget)
    if len(budgets) != len(batches):
        raise ValueError(f"there are {len(batches)} steps and {len(budgets)} budgets; give one for each step")
    policy, optimum = make_policy(episode), KnownRates(episode, min_rollouts, max_rollouts)
    columns: list[tuple[NDArray[Any], ...]] = []
    for step, (prompts, rollouts) in enumerate(zip(batches, budgets, strict=True)):
        rollouts = check_whole(f"budget of step {step}", rollouts, minimum=0)  # noqa: PLW2901 - the same number, checked
        rates = episode.rates(prompts)
        counts, predicted = policy.allocate(prompts, rollouts)
        best, _ = optimum.allocate(prompts, rollouts)
        row_R = np.repeat(np.arange(prompts.size), counts)
        # A generator for each step, so that the number of draws in one step does not change the next.
        success_R = np.random.default_rng([seed, OUTCOMES, step]).random(row_R.size) < rates[row_R]
        successes = np.bincount(row_R[success_R], minlength=prompts.size)
        policy.observe(prompts[row_R], success_R)
        episode.train(prompts, (successes > 0) & (successes < counts))
        columns.append((prompts, rates, counts, predicted, successes, uniform_counts(prompts.size, rollouts), best))
        if advanced is not None:
            advanced(step + 1, len(batches))
    prompt, rates, counts, predicted, successes, equal, best = (np.concatenate(c) for c in zip(*columns, strict=True))
    return Simulation(
        step=np.repeat(np.arange(len(batches)), [batch.size for batch in batches]),
        prompt=prompt,
        visit=_occurrence(prompt),
        rates=rates,
        counts=counts,
        predicted=predicted,
        successes=successes,
        uniform=equal,
        best=best,
    )


def _occurrence(prompt: IntArray) -> IntArray:
    """Return (V,) how often the same prompt appears earlier in the array."""
    order = np.argsort(prompt, kind="stable")
    sizes = np.bincount(prompt)
    rank = np.empty_like(order)
    rank[order] = np.arange(prompt.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank
