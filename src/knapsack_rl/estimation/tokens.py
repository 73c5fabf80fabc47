"""What a rollout is expected to cost, in tokens, and budgets in that unit.

A failure runs longer than a success of the same prompt, often to the limit. So lengths are kept apart by outcome, and

    c_i = p_i E[length | success] + (1 - p_i) E[length | failure].

Either expectation is the prompt's mean, shrunk to the population's by :func:`knapsack_rl.balance.predict_work`: a
prompt that never succeeded has the population's length of a success.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl import balance
from knapsack_rl.allocation.belief import Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.degradation import joined
from knapsack_rl.allocation.policies import Allocation, allocate_expected
from knapsack_rl.allocation.value_functions import ValueLike, make_value_function
from knapsack_rl.estimation.protocol import Estimator
from knapsack_rl.estimation.tracker import Outcome, Records

LEAST_TOKENS = 1.0
"""A cost must be positive: an empty answer counts as one token."""

LONGEST = 1e9
"""Tokens of one rollout; squares of mistaken numbers would overflow what is kept of lengths."""

FIRST_GROUP = 2
"""Rollouts per prompt that a budget of tokens is taken to pay for while no length was ever observed."""


def first_group(min_rollouts: int, max_rollouts: int) -> int:
    """Rollouts per prompt where nothing is known of their lengths."""
    return min(max(FIRST_GROUP, min_rollouts), max_rollouts)


def shrunk_lengths(sums: tuple[FloatArray, FloatArray, FloatArray], rows: IntArray) -> FloatArray:
    """(M,) expected length of a rollout of each prompt, shrunk to the population; ones if nothing was observed.

    Args:
        sums: (P,) count, sum and sum of squares of the lengths of every known prompt.
        rows: (M,) which of the P prompts; -1 for one never seen, which has the population's mean.
    """
    # One prompt without observations is put last, where -1 finds it.
    return balance.predict_work(*(np.append(column, 0.0) for column in sums))[rows]


def expected_tokens(everyone: Records, rows: IntArray, success_rates: FloatArray) -> FloatArray | None:
    """(M,) expected tokens per rollout, at least 1; None while no length was ever observed.

    Where lengths are known of one outcome only, they stand for the other too.

    Args:
        everyone: records of all known prompts.
        rows: (M,) their rows, -1 for a prompt never seen.
        success_rates: (M,) estimates; where NaN, the share of successes among all rollouts of known length is used.
    """
    observed = {outcome: everyone.lengths_of(outcome) for outcome in _OUTCOMES}
    counts = {outcome: float(sums[0].sum()) for outcome, sums in observed.items()}
    known = [outcome for outcome in _OUTCOMES if (observed[outcome][0] >= balance.MIN_COUNT).any()]
    if not known:
        return None
    lengths = {outcome: shrunk_lengths(observed[outcome], rows) for outcome in known}
    if len(known) == 1:
        return np.maximum(lengths[known[0]], LEAST_TOKENS)
    p = np.where(np.isnan(success_rates), counts["success"] / sum(counts.values()), success_rates)
    return np.maximum(p * lengths["success"] + (1.0 - p) * lengths["failure"], LEAST_TOKENS)


_OUTCOMES: tuple[Outcome, Outcome] = ("success", "failure")


def allocate_tokens(
    belief: Belief,
    tokens: FloatArray | None,
    budget: float,
    min_rollouts: int,
    max_rollouts: int,
    priority: FloatArray,
) -> Allocation:
    """Allocate a budget of tokens: the expected tokens of all rollouts do not exceed it.

    While no length is known every rollout costs the same, scaled so that the budget pays for ``FIRST_GROUP`` rollouts
    per prompt (``min_rollouts`` if that is more): the first batch is small rather than over the budget.

    Args:
        belief: of the batch.
        tokens: (M,) expected tokens per rollout, or None if no length is known.
        budget: tokens, >= 0.
        min_rollouts: N_low.
        max_rollouts: N_up.
        priority: (M,) tie-break, lower first.
    """
    note = ""
    if tokens is None:
        group = first_group(min_rollouts, max_rollouts)
        tokens = np.full(len(belief.mean), max(budget, LEAST_TOKENS) / (len(belief.mean) * group))
        note = f"no length known: the budget is taken to pay for {group} rollouts per prompt"
    found = allocate_expected(belief.marginals, budget, min_rollouts, max_rollouts, priority=priority, costs=tokens)
    return replace(found, reason=joined(note, found.reason))


BudgetUnit = Literal["rollouts", "tokens"]
BUDGET_UNITS = ("rollouts", "tokens")


def check_choices(estimator: Estimator, budget_unit: str, value: ValueLike, min_rollouts: int) -> None:
    """Refuse a unit or a value that the estimator or the bounds cannot serve.

    Raises:
        ValueError: the unit or the value is unknown, tokens meet a minimum below two, or the estimator has another
            value than the paper's built in.
    """
    if budget_unit not in BUDGET_UNITS:
        raise ValueError(f"budget_unit must be one of {', '.join(BUDGET_UNITS)}, got {budget_unit!r}")
    make_value_function(value)
    papers_fallback = estimator.paper_rule and getattr(estimator, "fallback", True)
    plain = budget_unit == "rollouts" and isinstance(value, str) and value == "knapsack"
    if papers_fallback and not plain:
        raise ValueError(
            f"the paper's fallback rule counts rollouts and is for value='knapsack', got budget_unit={budget_unit!r} "
            f"and value={value!r}; use WindowEstimator(fallback=False) or another estimator"
        )
    if budget_unit == "tokens" and min_rollouts < FIRST_GROUP:
        raise ValueError(
            f"budget_unit='tokens' needs min_rollouts >= {FIRST_GROUP}, got {min_rollouts}: skipping weighs the value "
            "of looking again in rollouts"
        )
    if not (isinstance(value, str) and value == "knapsack") and not hasattr(estimator, "use_value"):
        raise ValueError(
            f"{type(estimator).__name__} has the paper's value built in, got value={value!r}; use 'bayes-filter', "
            "'empirical-bayes' or WindowEstimator(fallback=False)"
        )


def check_tokens(budget: float) -> float:
    """Return a budget of tokens, or raise ``ValueError`` if it is no finite number >= 0."""
    number = isinstance(budget, (int, float, np.integer, np.floating)) and not isinstance(budget, bool)
    if not number or not 0.0 <= budget < math.inf:
        raise ValueError(f"budget must be a finite number of tokens >= 0, got {budget!r}")
    return float(budget)


def check_lengths(lengths: ArrayLike, rollouts: int) -> FloatArray:
    """Return the tokens of each rollout as (R,) float64.

    Raises:
        ValueError: there is not one per rollout, or one is no number from 0 to ``LONGEST``.
    """
    array = np.asarray(lengths, dtype=np.float64)
    if array.shape != (rollouts,) or not ((array >= 0) & (array <= LONGEST)).all():
        raise ValueError(
            f"lengths must be {rollouts} numbers from 0 to {LONGEST:g}, one per rollout, got shape {array.shape}"
        )
    return array
