"""The knapsack problem, solved exactly: how many rollouts each prompt gets.

    maximise    sum_i V[i, n_i]
    subject to  sum_i n_i = budget,   lower_i <= n_i <= upper_i,   n_i whole

This module works on tables, bounds and a budget, never on success rates. Its input is a table of *marginal values*
D[i, n] = V[i, n+1] - V[i, n], because differences of values near saturation would lose all digits.

If no row of D rises within its bounds (V is concave there), taking the ``budget - sum(lower)`` largest marginals is an
exact optimum: each row hands out its marginals in falling order, so the largest ones overall are always reachable, and
no other choice of as many marginals has a larger sum. This greedy method needs no heap: one selection finds the
*critical value*, the marginal at which the budget ends. Each prompt takes its marginals above that value, and the tie
rule shares out those equal to it. Any other table goes to a dynamic program, O(M budget upper) in time and
O(M budget) in memory, which refuses more than :data:`MOST_STATES`.

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
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray, check_whole

Method = Literal["auto", "greedy", "dynamic-programming"]
METHODS = ("auto", "greedy", "dynamic-programming")

CONCAVITY_TOLERANCE = 1e-12
"""A rise by at most this share of the largest magnitude in a row is rounding and counts as level."""

MOST_STATES = 2**29
"""Largest number of prompts times budget for the dynamic program: 2 GiB."""

_CHUNK = 2**20  # candidates that the dynamic program compares at a time


def check_bounds(prompts: int, budget: int, lower: ArrayLike, upper: ArrayLike) -> tuple[IntArray, IntArray]:
    """Broadcast bounds to (M,) int64 and check that the budget fits between them.

    Upper bounds that the budget cannot reach are lowered to what it can, which keeps tables small.

    Raises:
        ValueError: bounds are not whole, out of order, or the budget is outside [sum(lower), sum(upper)].
    """
    low, high = check_order(prompts, lower, upper)
    least, most = _sum(low), _sum(high)
    if not least <= budget <= most:
        raise ValueError(
            f"a budget of {budget} rollouts does not fit {prompts} prompts: min_rollouts needs at least {least} and "
            f"max_rollouts allows at most {most}; choose a budget in [{least}, {most}] or change the bounds"
        )
    return low, low + np.minimum(high - low, min(budget - least, 2**62))


def check_order(prompts: int, lower: ArrayLike, upper: ArrayLike) -> tuple[IntArray, IntArray]:
    """Broadcast bounds to (M,) int64.

    Raises:
        ValueError: bounds are not whole numbers >= 0, or out of order.
    """
    low, high = _bound("min_rollouts", lower, prompts), _bound("max_rollouts", upper, prompts)
    if (low > high).any():
        i = int(np.flatnonzero(low > high)[0])
        raise ValueError(f"min_rollouts {low[i]} is above max_rollouts {high[i]} (prompt {i}); lower the minimum")
    return low, high


def _bound(name: str, bound: ArrayLike, prompts: int) -> IntArray:
    array = np.asarray(bound)
    whole = array.dtype.kind in "iu" and array.shape in ((), (prompts,))
    counts = np.full(prompts, array if whole else -1, np.int64)
    if not whole or (counts < 0).any():  # numbers beyond 64 bits are refused, too
        raise ValueError(f"{name} must be a whole number >= 0, or one per prompt ({prompts}), got {bound!r}")
    return counts


def _sum(counts: IntArray) -> int:
    """Return the sum as a Python integer, which does not overflow."""
    return int(counts.sum()) if counts.max(initial=0) < 2**31 else sum(counts.tolist())


def total_value(marginals: FloatArray, counts: IntArray) -> float:
    """Return the value of an allocation: the sum of the marginals it takes, because V[i, 0] = 0.

    Args:
        marginals: (M, K) D[i, n].
        counts: (M,) rollouts per prompt, at most K.
    """
    width = int(counts.max(initial=0))
    return float(np.where(np.arange(width) < counts[:, None], marginals[:, :width], 0.0).sum())


def solve(
    marginals: ArrayLike,
    budget: int,
    lower: ArrayLike,
    upper: ArrayLike,
    *,
    method: Method = "auto",
    tier: ArrayLike | None = None,
    priority: ArrayLike | None = None,
) -> IntArray:
    """Solve the knapsack exactly.

    Args:
        marginals: (M, K) finite; D[i, n] is the gain of rollout n+1 of prompt i.
        budget: rollouts to hand out, within [sum(lower), sum(upper)].
        lower: fewest rollouts per prompt, a whole number or (M,).
        upper: most rollouts per prompt, a whole number or (M,), at most K.
        method: ``"auto"`` tests concavity and chooses; ``"greedy"`` refuses rows that are not concave;
            ``"dynamic-programming"`` works for all.
        tier: (M,) whole numbers, first tie-break (lower first); all equal by default.
        priority: (M,) numbers, third tie-break (lower first); all equal by default.

    Returns:
        (M,) int64 counts that sum to the budget.

    Raises:
        ValueError: the marginals are not finite or too few, the budget does not fit the bounds, the method is
            unknown, or it is greedy and a row is not concave.
    """
    check_method(method)
    table = np.ascontiguousarray(marginals, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"marginals must be a table (prompts, rollouts), got shape {table.shape}")
    prompts = table.shape[0]
    tiers = _tie_break("tier", tier, prompts, np.int64)
    priorities = _tie_break("priority", priority, prompts, np.float64)
    budget = check_whole("budget", budget, minimum=0)
    low, high = check_bounds(prompts, budget, lower, upper)
    return solve_checked(table, budget, low, high, tiers, priorities, method)


def check_method(method: str) -> None:
    """Raise ``ValueError`` if the method is unknown."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def _tie_break(name: str, given: ArrayLike | None, prompts: int, dtype: type) -> NDArray:
    if given is not None and dtype is np.int64 and np.asarray(given).dtype.kind not in "iu":
        raise ValueError(f"{name} must hold whole numbers, got type {np.asarray(given).dtype}")
    array: NDArray = np.zeros(prompts, dtype) if given is None else np.ascontiguousarray(given, dtype=dtype)
    if array.shape != (prompts,) or np.isnan(array).any():
        raise ValueError(f"{name} must hold one number per prompt ({prompts}) and no NaN, got shape {array.shape}")
    return array


def solve_checked(
    table: FloatArray,
    budget: int,
    low: IntArray,
    high: IntArray,
    tier: IntArray,
    priority: FloatArray,
    method: Method = "auto",
) -> IntArray:
    """Solve like :func:`solve`, for arguments that are already checked: matching float64 and int64 arrays.

    Raises:
        ValueError: as :func:`solve` for the table and the method, or the dynamic program would be too large.
    """
    table, concave = concave_table(table, low, high)
    if method == "greedy" and not concave:
        raise ValueError("greedy needs a concave table; use method='auto' or 'dynamic-programming'")
    if concave and method != "dynamic-programming":
        return greedy(table, budget, low, high, tier, priority)
    check_states(low.size, budget)
    order = np.lexsort((priority, tier))
    counts = np.empty(low.size, dtype=np.int64)
    counts[order] = _dynamic_program(table[order], budget, low[order], high[order])
    return counts


def check_states(prompts: int, budget: int) -> None:
    """Raise ``ValueError`` if the dynamic program would be too large."""
    if prompts * (budget + 1) > MOST_STATES:
        raise ValueError(
            f"rows that are not concave need a dynamic program, which takes at most {MOST_STATES} prompts x rollouts, "
            f"got {prompts} x {budget}; pass costs=np.ones({prompts}) for a solution with a certificate, raise "
            "min_rollouts to at least 1, or split the prompts"
        )


def concave_table(table: FloatArray, low: IntArray, high: IntArray) -> tuple[FloatArray, bool]:
    """Return the table without rises due to rounding, and whether its rows never rise within their bounds.

    Raises:
        ValueError: an entry within the bounds is not finite, or the rows are shorter than an upper bound.
    """
    width = int(high.max(initial=0))
    if width > table.shape[1]:
        raise ValueError(f"max_rollouts {width} needs as many columns of marginals, got {table.shape[1]}")
    table = table[:, :width]
    possible = table[:, int(low.min(initial=width)) :]
    if np.isfinite(table).all() and not (possible[:, 1:] > possible[:, :-1]).any():
        return table, True  # the usual case, without comparing the bounds of each row
    column = np.arange(width)
    reached = column < high[:, None]
    if not (np.isfinite(table) | ~reached).all():
        raise ValueError("marginals must be finite; the table holds NaN or infinity within the bounds")
    compared = reached[:, 1:] & (column[1:] > low[:, None])
    before, after = table[:, :-1], table[:, 1:]
    if not (compared & (after > before)).any():
        return table, True
    largest = np.where(reached, np.abs(table), 0.0).max(axis=1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        if (compared & (after > before + CONCAVITY_TOLERANCE * largest)).any():
            return table, False
    inside = reached & (column >= low[:, None])
    return np.where(inside, np.minimum.accumulate(np.where(inside, table, np.inf), axis=1), table), True


def greedy(
    table: FloatArray, budget: int, low: IntArray, high: IntArray, tier: IntArray, priority: FloatArray
) -> IntArray:
    """Return the optimum of a table that :func:`concave_table` found concave; arguments as of :func:`solve_checked`."""
    room = budget - int(low.sum())
    if room == 0:
        return low.copy()
    first, last = int(low.min()), int(high.max())
    open_ = table[:, first:last]
    if low.max() > first or high.min() < last:
        column = np.arange(first, last)
        open_ = np.where((column >= low[:, None]) & (column < high[:, None]), open_, -np.inf)
    critical = np.partition(open_, open_.size - room, axis=None)[open_.size - room]
    few = low + (open_ > critical).sum(axis=1, dtype=np.int32)
    many = low + (open_ >= critical).sum(axis=1, dtype=np.int32)
    return share_out(few, many, budget, tier, priority)


def share_out(few: IntArray, many: IntArray, budget: int, tier: IntArray, priority: FloatArray) -> IntArray:
    """Return counts between ``few`` and ``many`` that sum to the budget; all rollouts in between have the same value.

    They are handed out in the order of ties: tier, count, priority, position.
    """
    left = budget - int(few.sum())
    if int(many.sum()) - int(few.sum()) == left:
        return many.copy()
    counts = few.copy()
    tied = np.flatnonzero(few < many)
    for level in np.unique(tier[tied]):
        members = tied[tier[tied] == level]
        wanted = int((many - few)[members].sum())
        if wanted <= left:
            counts[members] = many[members]
        else:
            counts[members] = _level(few[members], many[members], left, priority[members])
        left -= min(wanted, left)
    return counts


def _level(few: IntArray, many: IntArray, left: int, priority: FloatArray) -> IntArray:
    """Raise ``few`` to a common level as far as ``left`` goes; the remainder goes by priority, then position."""
    low, high = int(few.min()), int(many.max())  # the budget suffices for ``low`` and not for ``high``
    while high - low > 1:
        level = (low + high) // 2
        if int(np.maximum(np.minimum(many, level) - few, 0).sum()) <= left:
            low = level
        else:
            high = level
    counts = np.maximum(np.minimum(many, low), few)
    last = np.flatnonzero((counts == low) & (many > low))
    last = last[np.argsort(priority[last], kind="stable")]
    counts[last[: left - int((counts - few).sum())]] += 1
    return counts


def _dynamic_program(table: FloatArray, budget: int, low: IntArray, high: IntArray) -> IntArray:
    """Maximise over any table, row by row: best(total) = max_n best of the rows before (total - n) + V[i, n].

    Among equal totals later rows take fewer rollouts. Only totals from which the budget can still be met are visited.
    """
    prompts = low.size
    choice = np.zeros((prompts, budget + 1), np.int32)
    best = np.zeros(1)  # for totals from ``start`` on
    start = 0
    rest_low, rest_high = int(low.sum()), int(high.sum())
    for i in range(prompts):
        least, most = int(low[i]), int(high[i])
        rest_low, rest_high = rest_low - least, rest_high - most
        values = np.concatenate([[0.0], np.cumsum(table[i, :most])])[least:]
        first = max(start + least, budget - rest_high)
        last = min(start + best.size - 1 + most, budget - rest_low)
        # Row t of the windows holds the best of the rows before at totals t - most .. t - least; reversed, n rises.
        edge = np.full(most, -np.inf)
        padded = np.concatenate([edge, best, edge])
        windows = sliding_window_view(padded, most - least + 1)[first - start : last - start + 1, ::-1]
        following = np.empty(last - first + 1)
        rows = max(_CHUNK // values.size, 1)
        for at in range(0, following.size, rows):
            candidates = windows[at : at + rows] + values
            taken = candidates.argmax(axis=1)
            following[at : at + rows] = np.take_along_axis(candidates, taken[:, None], axis=1)[:, 0]
            choice[i, first + at : first + at + taken.size] = least + taken
        best, start = following, first
    counts = np.zeros(prompts, np.int64)
    total = budget
    for i in range(prompts - 1, -1, -1):
        counts[i] = choice[i, total]
        total -= int(counts[i])
    return counts
