"""The knapsack: how many rollouts each prompt gets, exactly.

    maximise    sum_i V[i, n_i]
    subject to  sum_i n_i = budget,   lower_i <= n_i <= upper_i,   n_i whole

This module sees tables, bounds and a budget, never a success rate. A table of *marginal values*
D[i, n] = V[i, n+1] - V[i, n] is its input, because differences of values near saturation have no digits left.

If every row of D never increases within its bounds (V concave there) and every rollout costs one, taking the
``budget - sum(lower)`` largest marginals is an exact optimum: each row hands out its marginals in falling order, so
the largest ones overall are always reachable, and no other choice of as many marginals has a larger sum. That is
the greedy method; no heap is needed, see ``_selection``. Any other table goes to a dynamic program,
O(M budget upper) in time and O(M budget) in memory, which refuses what would not fit :data:`MOST_STATES`.

**Ties.** Among rollouts of equal marginal value the greedy takes, in this order: the lower ``tier``; the prompt that
holds fewer rollouts; the lower ``priority``; the earlier position. Where tier and priority are functions of the
prompt, counts do not depend on the order of the batch (prompts that agree in everything are interchangeable). The
dynamic program visits prompts in the order (tier, priority) and, among optima, gives fewer rollouts to later ones.

Source: Li et al., arXiv 2509.25849, section 3 (the knapsack); Fox 1966 and Ibaraki & Katoh 1988 for the greedy
optimum of separable concave resource allocation.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray, check_whole
from knapsack_rl.allocation.rows import Rows

Method = Literal["auto", "greedy", "dynamic-programming"]
METHODS = ("auto", "greedy", "dynamic-programming")

CONCAVITY_TOLERANCE = 1e-12
"""A marginal may rise by this share of the largest magnitude in its row and still count as level: rounding."""

MOST_STATES = 2**29
"""Prompts times budget that the dynamic program takes on: 2 GiB."""


def marginals_of(values: ArrayLike) -> FloatArray:
    """Marginal values of a value table V[i, n], n = 0, 1, ...

    Args:
        values: (M, K+1) finite; column n is the value of exactly n rollouts.

    Returns:
        (M, K) float64.

    Raises:
        ValueError: the table is not two-dimensional with at least two columns, or holds a non-finite entry.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] < 2 or not np.isfinite(table).all():
        raise ValueError(
            f"values must be a finite table (prompts, rollouts 0..K) with K >= 1, got shape {table.shape}"
            + ("" if np.isfinite(table).all() else " with non-finite entries")
        )
    return np.diff(table, axis=1)


def check_bounds(prompts: int, budget: int, lower: ArrayLike, upper: ArrayLike) -> tuple[IntArray, IntArray]:
    """Broadcast bounds to (M,) int64 and check that the budget fits between them.

    An upper bound that the budget cannot reach is lowered to what it can, which keeps tables small.

    Raises:
        ValueError: bounds are not whole, out of order, or the budget is outside [sum(lower), sum(upper)].
    """
    from knapsack_rl.allocation._kernels import fit_bounds

    low = _bound("min_rollouts", lower, prompts)
    high = _bound("max_rollouts", upper, prompts)
    # A budget beyond the compiled code's whole numbers fits no bounds either.
    if budget > 2**62 or not fit_bounds(low, high, budget)[0]:
        low, high = check_order(prompts, lower, upper)
        least, most = sum(low.tolist()), sum(high.tolist())  # Python's whole numbers do not overflow
        raise ValueError(
            f"a budget of {budget} rollouts does not fit {prompts} prompts: min_rollouts needs at least {least} and "
            f"max_rollouts allows at most {most}; choose a budget in [{least}, {most}] or change the bounds"
        )
    return low, high


def _bound(name: str, bound: ArrayLike, prompts: int) -> IntArray:
    array = np.asarray(bound)
    if array.dtype.kind not in "iu" or array.shape not in ((), (prompts,)):
        raise ValueError(f"{name} must be a whole number >= 0, or one per prompt ({prompts}), got {bound!r}")
    full = np.empty(prompts, np.int64)
    full[:] = array
    return full


def check_order(prompts: int, lower: ArrayLike, upper: ArrayLike) -> tuple[IntArray, IntArray]:
    """Broadcast bounds to (M,) int64.

    Raises:
        ValueError: bounds are not whole numbers >= 0, or out of order.
    """
    low, high = _bound("min_rollouts", lower, prompts), _bound("max_rollouts", upper, prompts)
    for name, bound, given in (("min_rollouts", low, lower), ("max_rollouts", high, upper)):
        if prompts and bound.min() < 0:
            raise ValueError(f"{name} must be a whole number >= 0, or one per prompt ({prompts}), got {given!r}")
    if (low > high).any():
        i = int(np.flatnonzero(low > high)[0])
        raise ValueError(f"min_rollouts {low[i]} is above max_rollouts {high[i]} (prompt {i}); lower the minimum")
    return low, high


def total_value(marginals: FloatArray | Rows, counts: IntArray) -> float:
    """Value of an allocation: the sum of the marginals it takes, because V[i, 0] = 0.

    Args:
        marginals: (M, K) D[i, n], or geometric rows.
        counts: (M,) rollouts per prompt, at most K.
    """
    from knapsack_rl.allocation._rows import total_value

    rows = marginals if isinstance(marginals, Rows) else _check_table(marginals)
    return float(total_value(tuple(rows), counts))


def solve(
    marginals: ArrayLike | Rows,
    budget: float,
    lower: ArrayLike,
    upper: ArrayLike,
    *,
    costs: ArrayLike | None = None,
    method: Method = "auto",
    tier: ArrayLike | None = None,
    priority: ArrayLike | None = None,
) -> IntArray:
    """Solve the knapsack exactly.

    Args:
        marginals: (M, K) finite; D[i, n] is the gain of rollout n+1 of prompt i. Or geometric rows, which need no
            table as long as every lower bound is at least 1.
        budget: rollouts to hand out, within [sum(lower), sum(upper)].
        lower: fewest rollouts per prompt, a whole number or (M,).
        upper: most rollouts per prompt, a whole number or (M,), at most K.
        costs: (M,) > 0, cost of a rollout; the budget is then a number in the same unit that must not be exceeded, and
            the counts are the best found: :func:`knapsack_rl.allocation.costs.solve_with_costs` certifies them.
        method: ``"auto"`` tests concavity and chooses; ``"greedy"`` refuses rows that are not concave;
            ``"dynamic-programming"`` works for all.
        tier: (M,) whole numbers, first tie-break (lower first); all equal by default.
        priority: (M,) numbers, third tie-break (lower first); all equal by default.

    Returns:
        (M,) int64 counts; without costs they sum to the budget.

    Raises:
        ValueError: the marginals are not finite or too few, the budget does not fit the bounds, the method is
            unknown, or greedy is asked for rows that are not concave.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    rows = _check_rows(marginals) if isinstance(marginals, Rows) else _check_table(marginals)
    prompts = rows.prompts
    tiers = _tie_break("tier", tier, prompts, np.int64)
    priorities = _tie_break("priority", priority, prompts, np.float64)
    if costs is None:
        budget = check_whole("budget", budget, minimum=0)
        low, high = check_bounds(prompts, budget, lower, upper)
        return solve_checked(rows, budget, low, high, tiers, priorities, method)
    if method != "auto":
        raise ValueError(f"with costs there is one method, 'auto'; got {method!r}")
    from knapsack_rl.allocation import costs as priced  # which builds on this module

    price = priced.check_costs(costs, prompts)
    low, high = priced.check_affordable(price, budget, lower, upper)
    return priced.solve_with_costs(rows, price, budget, low, high, tiers, priorities)[0]


def solve_checked(
    rows: Rows,
    budget: int,
    low: IntArray,
    high: IntArray,
    tier: IntArray,
    priority: FloatArray,
    method: Method = "auto",
) -> IntArray:
    """:func:`solve` for arguments that are checked already: contiguous float64 and int64 arrays that fit.

    Raises:
        ValueError: as :func:`solve` for the table and the method, or the dynamic program would be too large.
    """
    from knapsack_rl.allocation._kernels import best_of_table

    rows, concave = concave_rows(rows, low, high)
    if method == "greedy" and not concave:
        raise ValueError("greedy needs a concave table; use method='auto' or 'dynamic-programming'")
    if concave and method != "dynamic-programming":
        return greedy(rows, budget, low, high, tier, priority)
    if low.size * (budget + 1) > MOST_STATES:
        raise ValueError(
            f"rows that are not concave need a dynamic program, which takes at most {MOST_STATES} prompts x rollouts, "
            f"got {low.size} x {budget}; pass costs=np.ones({low.size}) for a solution with a certificate, raise "
            "min_rollouts to at least 1, or split the prompts"
        )
    table = rows.as_table(int(high.max(initial=1)))
    order = np.lexsort((priority, tier))
    reachable = np.where(np.arange(table.shape[1]) < high[:, None], table, 0.0)  # columns beyond may hold anything
    values = np.concatenate([np.zeros((low.size, 1)), np.cumsum(reachable[order], axis=1)], axis=1)
    counts = np.empty(low.size, dtype=np.int64)
    counts[order] = best_of_table(values, low[order], high[order], budget)
    return counts


def greedy(rows: Rows, budget: int, low: IntArray, high: IntArray, tier: IntArray, priority: FloatArray) -> IntArray:
    """The best rollouts of rows that :func:`concave_rows` found concave; arguments as for :func:`solve_checked`."""
    from knapsack_rl.allocation._selection import take_best

    return take_best(tuple(rows), low, high, budget, tier, priority)


def _check_table(marginals: ArrayLike) -> Rows:
    table = np.ascontiguousarray(marginals, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"marginals must be a table (prompts, rollouts), got shape {table.shape}")
    return Rows(table=table)


def _check_rows(rows: Rows) -> Rows:
    if not rows.closed_form:
        return _check_table(rows.table)
    other = rows.weight < 0.0
    named = -rows.weight[other] - 1.0
    sound = np.isin(named, np.arange(rows.table.shape[0])).all() and not np.isnan(rows.weight).any()
    for ratio in (rows.first[~other], rows.second[~other]):
        sound = sound and bool(((ratio >= 0.0) & (ratio <= 1.0)).all())
    if not sound:
        raise ValueError("geometric rows need weights >= 0 and ratios in [0, 1]; -1, -2, ... name rows of their table")
    return rows


def concave_rows(rows: Rows, low: IntArray, high: IntArray) -> tuple[Rows, bool]:
    """The rows, rid of rises that are mere rounding, and whether they never rise within their bounds.

    Raises:
        ValueError: an entry within the bounds is not finite, or the rows are shorter than an upper bound.
    """
    from knapsack_rl.allocation._kernels import examine, smoothed

    if rows.closed_form:
        # The first rollout is worth nothing and the second something, so a row that starts at 0 rises.
        return rows, bool(low.size == 0 or low.min() >= 1)
    table = rows.table
    if low.size and int(high.max()) > table.shape[1]:
        raise ValueError(f"max_rollouts {int(high.max())} needs as many columns of marginals, got {table.shape[1]}")
    finite, concave, falling = examine(table, low, high, CONCAVITY_TOLERANCE)
    if not finite:
        raise ValueError("marginals must be finite; the table holds NaN or infinity within the bounds")
    return (Rows(table=smoothed(table, low, high)) if concave and not falling else rows), concave


def _tie_break(name: str, given: ArrayLike | None, prompts: int, dtype: type) -> NDArray:
    if given is not None and dtype is np.int64 and np.asarray(given).dtype.kind not in "iu":
        raise ValueError(f"{name} must hold whole numbers, got type {np.asarray(given).dtype}")
    array: NDArray = np.zeros(prompts, dtype) if given is None else np.ascontiguousarray(given, dtype=dtype)
    if array.shape != (prompts,) or np.isnan(array).any():
        raise ValueError(f"{name} must hold one number per prompt ({prompts}) and no NaN, got shape {array.shape}")
    return array
