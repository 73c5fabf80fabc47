"""A budget in tokens: rollouts cost what they are expected to take."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np

from knapsack_rl.allocation import solver
from knapsack_rl.allocation.belief import Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.degradation import joined
from knapsack_rl.allocation.policies import Allocation, allocate_expected, padded

LEAST_TOKENS = 1.0
"""Costs must be positive, so an empty answer counts as one token."""

FIRST_GROUP = 2
"""Rollouts per prompt that a budget of tokens is assumed to pay for before any length is observed."""

BudgetUnit = Literal["rollouts", "tokens"]
BUDGET_UNITS = ("rollouts", "tokens")


def first_group(min_rollouts: int, max_rollouts: int) -> int:
    """Return the rollouts per prompt while no length is known."""
    return min(max(FIRST_GROUP, min_rollouts), max_rollouts)


def check_tokens(budget: float) -> float:
    """Return a budget of tokens, or raise ``ValueError`` if it is not a finite number >= 0."""
    number = isinstance(budget, (int, float, np.integer, np.floating)) and not isinstance(budget, bool)
    if not number or not 0.0 <= budget < math.inf:
        raise ValueError(f"budget must be a finite number of tokens >= 0, got {budget!r}")
    return float(budget)


def allocate_tokens(
    belief: Belief,
    tokens: FloatArray | None,
    budget: float,
    min_rollouts: int,
    max_rollouts: int,
    priority: FloatArray,
    multiple: int = 1,
) -> Allocation:
    """Allocate a budget of tokens: the expected tokens of all rollouts do not exceed it.

    While no length is known every rollout costs the same, scaled so that the budget pays for ``FIRST_GROUP`` rollouts
    per prompt (``min_rollouts`` if that is more): the first batch is rather too small than over the budget.

    Args:
        belief: belief about the batch.
        tokens: (M,) expected tokens per rollout, or None if no length is known.
        budget: tokens, >= 0.
        min_rollouts: N_low.
        max_rollouts: N_up.
        priority: (M,) tie-break, lower first.
        multiple: an engine's number of rows must be a multiple of this, for which the last rollouts by value per token
            are given up; only where the minimum leaves none to give up, the budget is exceeded.
    """
    note = ""
    if tokens is None:
        group = first_group(min_rollouts, max_rollouts)
        tokens = np.full(len(belief.mean), max(budget, LEAST_TOKENS) / (len(belief.mean) * group))
        note = f"no length is known: the budget is assumed to pay for {group} rollouts per prompt"
    found = allocate_expected(belief.marginals, budget, min_rollouts, max_rollouts, priority=priority, costs=tokens)
    reason = joined(note, found.reason)
    if found.counts.sum() % multiple == 0:
        return replace(found, reason=reason)
    counts = rounded(found.counts, multiple, min_rollouts, belief.marginals / tokens[:, None])
    return replace(found, counts=counts, expected_value=_value_of(belief, counts), reason=reason, certificate=None)


def rounded(counts: IntArray, multiple: int, min_rollouts: int, gains: FloatArray) -> IntArray:
    """Return counts whose sum is a multiple: the rollouts of least gain go, or those of most gain are added.

    Args:
        counts: (M,) rollouts per prompt.
        multiple: >= 1.
        min_rollouts: no served group is made smaller than this, or than two.
        gains: (M, K) of each further rollout; beyond the last column it is 0.

    Returns:
        (M,) counts; all of them may be raised where the minimum leaves nothing to give up.
    """
    result, rows = counts.copy(), np.arange(counts.size)
    wider = np.pad(gains, ((0, 0), (0, 1)))
    surplus = int(counts.sum()) % multiple
    least = np.minimum(counts, max(min_rollouts, 2))
    if 0 < surplus <= int((counts - least).sum()):
        for _ in range(surplus):
            last = wider[rows, np.clip(result - 1, 0, gains.shape[1])]
            result[np.argmin(np.where(result > least, last, np.inf))] -= 1
    else:
        served = result > 0 if result.any() else np.ones(result.size, bool)
        for _ in range(-int(counts.sum()) % multiple):
            following = wider[rows, np.minimum(result, gains.shape[1])]
            result[np.argmax(np.where(served, following, -np.inf))] += 1
    return result


def _value_of(belief: Belief, counts: IntArray) -> float:
    return solver.total_value(padded(belief.marginals, counts), counts)
