"""Skipping prompts without losing sight of them: allocation with ``min_rollouts = 0``.

Two rollouts for every prompt spend a quarter of the budget at a mean of eight, most of it on solved prompts. With a
minimum of zero a prompt may be skipped. To keep estimates current, a skipped prompt is checked again as soon as the
*value of information* exceeds the cost of the rollouts; it grows because the posterior of a skipped prompt spreads.

A group of one has no gradient, so V is not concave at 0: a prompt is worth serving only with a whole *group*, the
number of rollouts g at which V(g)/g is largest. Replacing the first g marginals by V(g)/g gives the concave envelope,
on which the greedy is exact except for the one group that the budget cuts in two.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from knapsack_rl.allocation import solver
from knapsack_rl.allocation.belief import CHECK_ROLLOUTS, Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.policies import Allocation

LONGEST_SKIP = 8
"""Batches in a row in which a prompt may be skipped; the next one checks it whatever it is worth, so none starves."""


def allocate_with_skips(
    belief: Belief, skips: FloatArray, budget: int, max_rollouts: int, priority: FloatArray
) -> Allocation:
    """Allocate with a minimum of zero: serve by value, then check skipped prompts again where that is worthwhile.

    Args:
        belief: belief about the batch.
        skips: (M,) batches in a row in which the prompt was skipped; infinite for one never seen.
        budget: rollouts, 0 to M max_rollouts.
        max_rollouts: N_up.
        priority: (M,) tie-break, lower first.
    """
    counts = serve_or_skip(belief.marginals, budget, max_rollouts, priority)
    again = rechecks(belief, counts, skips, budget)
    missed, reason = again, ""
    while missed.any():  # paying for checks may drop a prompt that is due
        again = again | missed
        counts = _with_checks(belief.marginals, again, budget, max_rollouts, priority)
        due = np.flatnonzero((counts == 0) & (skips >= LONGEST_SKIP))
        missed = _most_skipped(due, skips, budget // CHECK_ROLLOUTS - int(again.sum()))
        reason = f"{int((counts == 0).sum())} prompts skipped, {int(again.sum())} others checked again"
    return Allocation(counts, solver.total_value(belief.marginals, counts), reason)


def _with_checks(
    marginals: FloatArray, again: NDArray[np.bool_], budget: int, max_rollouts: int, priority: FloatArray
) -> IntArray:
    """Return counts in which the chosen prompts are checked, and the others are served or skipped with what is left."""
    others, left = ~again, budget - CHECK_ROLLOUTS * int(again.sum())
    room = int(others.sum()) * max_rollouts
    if left <= room and left != 1:
        counts = np.full(again.size, CHECK_ROLLOUTS)
        counts[others] = serve_or_skip(marginals[others], left, max_rollouts, priority[others])
        return counts
    # More than the others have room for, or less than a pair: prompts that are checked get the rest.
    filled = max_rollouts if left > room else 0
    lower, upper = np.where(again, CHECK_ROLLOUTS, filled), np.where(again, max_rollouts, filled)
    return solver.solve(marginals, budget, lower, upper, priority=priority)


def _most_skipped(prompts: IntArray, skips: FloatArray, most: int) -> NDArray[np.bool_]:
    """Return which of (M,) prompts are among the given ones and, of these, the few skipped most often."""
    chosen = np.zeros(skips.size, bool)
    chosen[prompts[np.argsort(-skips[prompts], kind="stable")][: max(most, 0)]] = True
    return chosen


def serve_or_skip(marginals: FloatArray, budget: int, max_rollouts: int, priority: FloatArray) -> IntArray:
    """Return counts that are 0 or at least 2 and sum to the budget, best by the concave envelope.

    The total value is within the value of one group of the optimum. A group of one is made only for a budget of one
    rollout, or an odd one under a cap of two.

    Args:
        marginals: (M, K >= 2) D[i, n], falling from n = 1 on, D[i, 0] = 0.
        budget: rollouts, 0 to M max_rollouts.
        max_rollouts: N_up, 2 to K.
        priority: (M,) tie-break, lower first.
    """
    if marginals.shape[0] == 0:
        return np.zeros(0, np.int64)
    table = marginals[:, :max_rollouts]
    rollouts = np.arange(1, max_rollouts + 1)
    average = np.cumsum(table, axis=1) / rollouts
    group = 2 + np.argmax(average[:, 1:], axis=1)
    per_rollout = average[np.arange(group.size), group - 1]
    envelope = np.where(rollouts <= group[:, None], per_rollout[:, None], table)
    # The envelope falls up to rounding; the solver needs it to fall exactly.
    counts = solver.solve(np.minimum.accumulate(envelope, axis=1), budget, 0, max_rollouts, priority=priority)

    cut = counts < group
    counts[cut] = 0
    left = budget - int(counts.sum())
    for i in np.lexsort((priority, -per_rollout)):
        if left >= 2 and counts[i] == 0:
            counts[i] = min(left, group[i])
            left -= counts[i]
    if left > int((max_rollouts - counts[counts > 0]).sum()):
        # One rollout is left and no group has room: the group that loses least gives one more, for a pair.
        spare = np.flatnonzero(counts >= 3)
        paired = next(i for i in np.lexsort((priority, -per_rollout)) if counts[i] == 0)
        if spare.size:
            counts[spare[np.argmin(table[spare, counts[spare] - 1])]] -= 1
        counts[paired] = left + min(spare.size, 1)
        left = 0
    if left:  # less than a pair, or more than the caps of whole groups allow
        served = counts > 0 if counts.any() else np.ones(counts.size, bool)
        lower = np.where(served, counts, 0)
        upper = np.where(served, max_rollouts, 0)
        counts = solver.solve(table, budget, lower, upper, method="auto", priority=priority)
    return counts


def price_of_rollout(marginals: FloatArray, counts: IntArray) -> float:
    """Return the value of the last rollout handed out, the price of a rollout; 0 if none was.

    A pair counts by its mean.
    """
    served = np.flatnonzero(counts >= 2)
    if not served.size:
        return 0.0
    last = counts[served] - 1
    taken = marginals[served, last]
    return float(np.where(last == 1, taken / 2.0, taken).min())


def rechecks(belief: Belief, counts: IntArray, skips: FloatArray, budget: int) -> NDArray[np.bool_]:
    """Return which skipped prompts still get :data:`~knapsack_rl.allocation.belief.CHECK_ROLLOUTS` rollouts.

    A prompt is checked again if the value of those rollouts and of their information exceeds their price, or if it was
    skipped :data:`LONGEST_SKIP` times in a row. A prompt never seen is checked at once: about itself nothing is known.
    If the budget is too small for all, those skipped most often come first.

    Args:
        belief: belief about the batch.
        counts: (M,) the plan, 0 for a skipped prompt.
        skips: (M,) batches in a row in which the prompt was skipped; infinite for one never seen.
        budget: rollouts of the batch.
    """
    skipped = np.flatnonzero(counts == 0)
    if not skipped.size:
        return np.zeros(counts.size, bool)
    overdue = skips[skipped] >= LONGEST_SKIP
    worth = np.zeros(skipped.size, bool)
    if belief.value_of_information is not None:
        price = price_of_rollout(belief.marginals, counts)
        now = belief.marginals[skipped, :CHECK_ROLLOUTS].sum(axis=1)
        worth = now + belief.value_of_information(skipped, price) > CHECK_ROLLOUTS * price
    return _most_skipped(skipped[overdue | worth], skips, budget // CHECK_ROLLOUTS)
