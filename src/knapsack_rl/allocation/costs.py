"""The knapsack in which a rollout of prompt i costs c_i: tokens, seconds or environment steps.

    maximise    sum_i V[i, n_i]
    subject to  sum_i c_i n_i <= budget,   lower_i <= n_i <= upper_i,   n_i whole

Greedy by value per cost ("density") is exact for the continuous relaxation: take all rollouts above the critical
density v, and a fraction of one at v. Without the fraction the counts are feasible, and their value plus v times the
remainder is a bound on the value of any counts (the Lagrangian bound at v). The remainder is filled with what still
fits, best density first. The counts come with their value and the bound: :class:`Certificate`.

To find v and the bound, rows that are not concave are replaced by their concave hulls, which are never below them.

Source: Fox 1966 (marginal analysis); Everett 1963 (the Lagrangian bound).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation import solver
from knapsack_rl.allocation.checks import FloatArray, IntArray

ROUNDING = 1e-12
"""Sums of costs may exceed the budget by this share of it, and values are exact to this share: rounding."""


def within_rounding(budget: float) -> float:
    """Return the largest sum of costs that counts as within the budget."""
    return budget + ROUNDING * abs(budget)


@dataclass(frozen=True)
class Certificate:
    """The value of an allocation and an upper bound on the value of any allocation.

    Both are sums of up to millions of doubles and valid to a relative 1e-12.

    Attributes:
        value: the objective at the counts.
        upper_bound: at least the optimum: the Lagrangian bound, which is the optimum of the continuous relaxation;
            equal to ``value`` where the counts reach it.
    """

    value: float
    upper_bound: float

    @property
    def gap(self) -> float:
        """Most by which the optimum can exceed the value, >= 0."""
        return self.upper_bound - self.value

    @property
    def optimal(self) -> bool:
        """Whether the gap is zero, which proves the counts optimal."""
        return self.gap == 0.0


def check_costs(costs: ArrayLike, prompts: int) -> FloatArray:
    """Return costs per rollout as (M,) float64.

    Raises:
        ValueError: they are not one positive finite number per prompt.
    """
    array = np.asarray(costs)
    if array.dtype.kind not in "iuf" or array.shape != (prompts,):
        raise ValueError(f"costs must hold one number > 0 per prompt ({prompts}), got {costs!r}")
    price = np.ascontiguousarray(array, dtype=np.float64)
    wrong = ~((price > 0.0) & (price < np.inf))
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"costs[{i}] is {price[i]!r}; allowed are finite numbers > 0, in the unit of the budget")
    return price


def check_affordable(costs: FloatArray, budget: float, lower: ArrayLike, upper: ArrayLike) -> tuple[IntArray, IntArray]:
    """Return bounds as (M,) int64, the upper ones lowered to what the budget with its rounding can reach.

    Raises:
        ValueError: the budget is not a finite number, bounds are not whole numbers or out of order, or the budget does
            not pay for the lower ones.
    """
    if isinstance(budget, (bool, np.bool_)) or not isinstance(budget, (int, float, np.integer, np.floating)):
        raise ValueError(f"budget must be a number in the unit of the costs, got {budget!r}")
    low, high = solver.check_order(costs.size, lower, upper)
    least = float((costs * low).sum())
    if not least <= within_rounding(budget) or budget == np.inf:
        raise ValueError(
            f"a budget of {budget!r} does not fit {costs.size} prompts: min_rollouts costs at least {least!r}; choose "
            f"a finite budget of at least that, or lower min_rollouts"
        )
    # Of a prompt that costs 1e-16 of another, the rounding alone pays for thousands. One more than fits: it is checked
    # later, against the exact sum.
    with np.errstate(over="ignore"):
        affordable = np.maximum(within_rounding(budget) - least, 0.0) / costs + 1.0
    reachable = np.minimum(affordable, 2.0**53).astype(np.int64)
    return low, low + np.minimum(high - low, reachable)


def solve_with_costs(
    table: FloatArray,
    costs: FloatArray,
    budget: float,
    low: IntArray,
    high: IntArray,
    tier: IntArray,
    priority: FloatArray,
) -> tuple[IntArray, Certificate, bool]:
    """Return counts within a budget of costs, greedy by value per cost, with their certificate.

    Rollouts without a positive value are never bought, so part of the budget may stay unspent.

    Args:
        table: (M, K) marginal values.
        costs: (M,) > 0.
        budget: budget in the unit of the costs.
        low: (M,) lower bounds.
        high: (M,) upper bounds.
        tier: (M,) first tie-break among rollouts of equal density, lower first.
        priority: (M,) tie-break after the count, lower first.

    Returns:
        (M,) counts; the certificate; whether every rollout of positive value was affordable.

    Raises:
        ValueError: an entry within the bounds is not finite, or the rows are shorter than an upper bound.
    """
    allowed = within_rounding(budget)
    table, concave = solver.concave_table(table, low, high)
    hull = table if concave else _concave_hull(table, low, high)
    column = np.arange(table.shape[1])
    inside = (column >= low[:, None]) & (column < high[:, None])
    density = np.where(inside, hull / costs[:, None], -np.inf)
    critical = _critical_density(density, costs, allowed - float((costs * low).sum()))
    counts = low + (density > critical).sum(axis=1)
    value = solver.total_value(table, counts)
    room = max(allowed - float((costs * counts).sum()), 0.0)
    if critical == 0.0:
        return counts, Certificate(value, value), True
    bound = value + critical * room
    _fill(table, costs, counts, high, room, tier, priority, concave=concave)
    value = solver.total_value(table, counts)
    exact = bound - value <= ROUNDING * (abs(bound) + critical * allowed)
    return counts, Certificate(value, value if exact else bound), False


def _critical_density(density: FloatArray, costs: FloatArray, room: float) -> float:
    """Return the density at which the room ends, densest rollouts first; 0 if all rollouts of value fit."""
    row, column = np.nonzero(density > 0.0)
    found = density[row, column]
    order = np.argsort(-found)
    spent = np.cumsum(costs[row[order]])
    end = int(np.searchsorted(spent, room, side="right"))
    return float(found[order[end]]) if end < found.size else 0.0


def _fill(
    table: FloatArray,
    costs: FloatArray,
    counts: IntArray,
    high: IntArray,
    room: float,
    tier: IntArray,
    priority: FloatArray,
    *,
    concave: bool,
) -> None:
    """Raise the counts by what still fits the room, best density first, ties in the documented order."""

    def best_step(i: int) -> tuple[float, int, int, float, int, int]:
        """Return the heap entry of a prompt: its next rollouts, as many as have the best mean value."""
        n = int(counts[i])
        most = 1 if concave else int(min(high[i] - n, room // costs[i]))
        mean = np.cumsum(table[i, n : n + most]) / np.arange(1, most + 1)
        step = int(mean.argmax())
        return (-float(mean[step]) / costs[i], int(tier[i]), n, float(priority[i]), i, step + 1)

    heap = [best_step(int(i)) for i in np.flatnonzero((counts < high) & (costs <= room))]
    heapq.heapify(heap)
    while heap and heap[0][0] < 0.0:
        *_, i, step = heap[0]
        if step * costs[i] <= room:
            counts[i] += step
            room -= step * costs[i]
        if counts[i] < high[i] and costs[i] <= room:
            heapq.heapreplace(heap, best_step(i))
        else:
            heapq.heappop(heap)


def _concave_hull(table: FloatArray, low: IntArray, high: IntArray) -> FloatArray:
    """Return marginals of the smallest concave function above each row within its bounds, equal along each piece."""
    hull = table.copy()
    for i in range(low.size):
        n = int(low[i])
        while (np.diff(table[i, n : high[i]]) > 0.0).any():
            mean = np.cumsum(table[i, n : high[i]]) / np.arange(1, high[i] - n + 1)
            step = mean.size - int(mean[::-1].argmax())  # the longest of the steepest pieces from n on
            hull[i, n : n + step] = mean[step - 1]
            n += step
    return hull
