"""The knapsack where a rollout of prompt i costs c_i: tokens, seconds, steps of an environment.

    maximise    sum_i V[i, n_i]
    subject to  sum_i c_i n_i <= budget,   lower_i <= n_i <= upper_i,   n_i whole

By value per cost ("density") greedy is exact for the continuous relaxation: take all rollouts above the critical
density v, and a fraction of one at v. Without the fraction the counts are feasible, and they lack at most v times the
remainder (the Lagrangian bound at v). The remainder is then filled with what fits, and a search over the prompts
that can still matter closes the gap, usually to nothing. What is proven comes with the counts: :class:`Certificate`.

Rows that are not concave are bounded by their concave hulls; the search looks at their true values.

Source: Fox 1966 (marginal analysis); Everett 1963 (the Lagrangian bound); Pisinger 1995 (the core).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation import solver
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.rows import Rows
from knapsack_rl.estimation.products import dot

ROUNDING = 1e-12
"""Sums of costs may pass the budget by this share of it, and values are exact to this share: rounding."""

CORE_PROMPTS = 512
REACH = 64
STATES = 400_000
FILL_CANDIDATES = 4096


@dataclass(frozen=True)
class Certificate:
    """What an allocation is worth and what no allocation can exceed.

    Both are sums of up to millions of doubles and valid to a relative 1e-12.

    Attributes:
        value: the objective at the counts.
        upper_bound: at least the optimum. Equal to ``value`` where the counts are proven optimal; otherwise the
            Lagrangian bound, which is the optimum of the continuous relaxation.
    """

    value: float
    upper_bound: float

    @property
    def gap(self) -> float:
        """At most this much is missing to the optimum; >= 0."""
        return self.upper_bound - self.value

    @property
    def optimal(self) -> bool:
        """Whether nothing is missing."""
        return self.gap == 0.0


def check_costs(costs: ArrayLike, prompts: int) -> FloatArray:
    """Costs per rollout as (M,) float64.

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
    """Bounds as (M,) int64, the upper ones lowered to what the budget can reach.

    Raises:
        ValueError: the budget is no finite number, bounds are no whole numbers or out of order, or the budget does not
            pay for the lower ones.
    """
    if isinstance(budget, (bool, np.bool_)) or not isinstance(budget, (int, float, np.integer, np.floating)):
        raise ValueError(f"budget must be a number in the unit of the costs, got {budget!r}")
    low, high = solver.check_order(costs.size, lower, upper)
    least = dot(costs, low)
    if not least <= budget * (1.0 + ROUNDING) or budget == np.inf:
        raise ValueError(
            f"a budget of {budget!r} does not fit {costs.size} prompts: min_rollouts costs at least {least!r}; choose "
            f"a finite budget of at least that, or lower min_rollouts"
        )
    # One more than fits: rounding is settled later, against the exact sum.
    reachable = np.minimum(np.maximum(budget - least, 0.0) / costs + 1.0, 2.0**53).astype(np.int64)
    return low, low + np.minimum(high - low, reachable)


def solve_with_costs(
    rows: Rows, costs: FloatArray, budget: float, low: IntArray, high: IntArray, tier: IntArray, priority: FloatArray
) -> tuple[IntArray, Certificate, bool]:
    """Best counts within a budget of costs, with what is proven of them.

    Rollouts without a positive value are never bought, so that part of the budget may stay unspent.

    Args:
        rows: marginal values.
        costs: (M,) > 0.
        budget: in the unit of the costs.
        low: (M,) lower bounds.
        high: (M,) upper bounds.
        tier: (M,) first tie-break among rollouts of equal density, lower first.
        priority: (M,) tie-break after the count, lower first.

    Returns:
        (M,) counts; the certificate; whether every rollout of positive value was affordable.
    """
    from knapsack_rl.allocation._core import concave_hull
    from knapsack_rl.allocation._selection import beginnings, counts_around, critical_value

    allowed = budget + ROUNDING * abs(budget)
    rows, concave = solver.concave_rows(rows, low, high)
    if rows.closed_form and not concave:
        rows = Rows(table=rows.as_table(max(int(high.max()), 1)))
    bounding = rows if concave else Rows(table=concave_hull(rows.table, low, high))
    by_density = bounding.per_cost(costs)
    density, places = critical_value(tuple(by_density), costs, low, high, allowed)
    if density <= 0.0:
        counts, _ = counts_around(tuple(by_density), low, high, 0.0, beginnings(tuple(by_density), low, 1))
        value = solver.total_value(rows, counts)
        return counts, Certificate(value, value), True
    base, at_least = counts_around(tuple(by_density), low, high, density, places)
    base_value, room = solver.total_value(rows, base), max(allowed - dot(costs, base), 0.0)
    bound = base_value + density * room
    counts = base.copy()
    if concave:
        _fill(rows, by_density, costs, counts, at_least, high, room, tier, priority)
    value = solver.total_value(rows, counts)
    exact = ROUNDING * abs(bound)
    if bound - value > exact:
        improved, exhaustive = _improve(rows, by_density, costs, base, low, high, density, room, bound - value, concave)
        better = solver.total_value(rows, improved)
        if better > value:
            counts, value = improved, better
        bound = value if exhaustive else max(float(bound), value)
    else:
        bound = value
    return counts, Certificate(value, bound), False


def _fill(
    rows: Rows,
    by_density: Rows,
    costs: FloatArray,
    counts: IntArray,
    at_least: IntArray,
    high: IntArray,
    room: float,
    tier: IntArray,
    priority: FloatArray,
) -> None:
    """Raise ``counts`` by what still fits: first the rollouts at the critical density, then the best of the rest."""
    from knapsack_rl.allocation._core import fill, next_values
    from knapsack_rl.allocation._selection import share_out

    tied = np.flatnonzero(counts < at_least)
    if tied.size and costs[tied].min() == costs[tied].max():
        price = costs[tied[0]]
        affordable = min(int(room / price), int((at_least - counts)[tied].sum()))
        share_out(counts, at_least, affordable, tier, priority)
        room -= affordable * price
    else:
        room = fill(tuple(by_density), costs, counts, at_least, room, tied, tier, priority)
    open_ = np.flatnonzero((counts < high) & (costs <= room))
    if open_.size > FILL_CANDIDATES:
        following = next_values(tuple(by_density), counts, high, open_)
        open_ = np.sort(open_[np.argsort(-following, kind="stable")[:FILL_CANDIDATES]])
    if open_.size:
        fill(tuple(by_density), costs, counts, high, room, open_, tier, priority)


def _improve(
    rows: Rows,
    by_density: Rows,
    costs: FloatArray,
    base: IntArray,
    low: IntArray,
    high: IntArray,
    density: float,
    room: float,
    gap: float,
    concave: bool,
) -> tuple[IntArray, bool]:
    """Search the prompts whose counts may still differ from the base; whether that proves the optimum."""
    from knapsack_rl.allocation._core import losses, margins, search

    reach = REACH if concave else int((high - low).max())
    margin = margins(tuple(rows), costs, base, low, high, density, 1 if concave else reach)  # one step loses least
    chosen = np.flatnonzero(margin < gap)
    every = chosen.size <= CORE_PROMPTS
    order = np.argsort(margin[chosen], kind="stable")[:CORE_PROMPTS]
    chosen = chosen[order]
    loss = losses(tuple(rows), costs, base, low, high, chosen, density, reach)
    # Beyond the reach a concave row loses even more than at its end; at a bound there is nothing beyond.
    inside = (np.maximum(base - low, high - base)[chosen] <= reach) | (np.minimum(loss[:, 0], loss[:, -1]) >= gap)
    deviation, _, exhaustive = search(loss, costs[chosen], room, density, gap, STATES)
    counts = base.copy()
    counts[chosen] += deviation
    return counts, bool(every and exhaustive and inside.all())
