"""The greedy of :mod:`knapsack_rl.allocation.solver` without a table: block by block.

Marginals are computed when they are needed, for some prompts and so many rollouts at a time, which takes half the time
of a table at hundreds of prompts and a small part of its memory at millions. A first scan keeps the
largest ``budget - sum(lower)`` of those met so far; the smallest of them is a floor that only rises, so a prompt whose
marginals have fallen below it is finished. What remains at the end starts at the critical value. A second scan counts
each prompt's marginals around it. Time and memory are linear in prompts plus budget.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.solver import share_out

BLOCK = 2**15
"""Entries of a block: small enough for a core's cache."""

_GROWTH = 4  # of the columns from one round of a scan to the next

Marginals = Callable[[IntArray, int], FloatArray]
"""Maps (m,) prompts and a number of columns to their (m, columns) marginal values."""

Visit = Callable[[IntArray, FloatArray], float]


def greedy_in_blocks(
    marginals: Marginals, budget: int, low: IntArray, high: IntArray, tier: IntArray, priority: FloatArray
) -> IntArray:
    """The counts of :func:`knapsack_rl.allocation.solver.greedy`, identical to the last rollout.

    Args:
        marginals: of rows that are >= 0 and never rise from their lower bound on.
        budget: rollouts to hand out, within [sum(low), sum(high)].
        low: (M,) lower bounds.
        high: (M,) upper bounds.
        tier: (M,) first tie-break, lower first.
        priority: (M,) third tie-break, lower first.
    """
    room = budget - int(low.sum())
    if room == 0:
        return low.copy()
    columns = min(max(2 * room // low.size, 32), 4096) + int(low.max())
    critical = _critical_value(marginals, room, low, high, columns)
    few, many = low.copy(), low.copy() if critical > 0.0 else high.copy()

    def count(rows: IntArray, open_: FloatArray) -> float:
        few[rows] += (open_ > critical).sum(axis=1)
        if critical == 0.0:
            return 0.0
        many[rows] += (open_ >= critical).sum(axis=1)
        return float(np.nextafter(critical, 0.0))

    _scan(marginals, low, high, columns, count)
    return share_out(few, many, budget, tier, priority)


def _critical_value(marginals: Marginals, room: int, low: IntArray, high: IntArray, columns: int) -> float:
    """The ``room``-th largest marginal within the bounds; 0 if fewer are positive."""
    kept, size, floor = np.empty(room + room // 2 + 1), 0, 0.0

    def collect(_: IntArray, open_: FloatArray) -> float:
        nonlocal size, floor
        found = open_[open_ > floor]
        while found.size:
            fitting = found[: kept.size - size]
            kept[size : size + fitting.size] = fitting
            size, found = size + fitting.size, found[fitting.size :]
            if size == kept.size:  # keep the largest
                kept.partition(size - room)
                kept[:room] = kept[size - room :]
                size, floor = room, float(kept[:room].min())
        return floor

    _scan(marginals, low, high, columns, collect)
    return float(np.partition(kept[:size], size - room)[size - room]) if size >= room else 0.0


def _scan(marginals: Marginals, low: IntArray, high: IntArray, columns: int, visit: Visit) -> None:
    """Show blocks of marginals to ``visit``, which returns the value at or below which it needs no further ones.

    Columns are visited from the first on, more of them in each round, for those prompts that are not finished.
    Marginals outside the bounds are shown as 0.
    """
    active, first, widest = np.arange(low.size), int(low.min()), int(high.max())
    columns = min(columns, widest)
    while active.size:
        last, size = np.empty(active.size), max(BLOCK // columns, 1)
        for at in range(0, active.size, size):
            rows = active[at : at + size]
            open_ = marginals(rows, columns)[:, first:]
            if low[rows].max() > first or high[rows].min() < columns:
                column = np.arange(first, columns)
                open_ = np.where((column >= low[rows, None]) & (column < high[rows, None]), open_, 0.0)
            enough = visit(rows, open_)
            last[at : at + size] = open_[:, -1]
        active = active[(last > enough) & (high[active] > columns)]
        first, columns = columns, min(_GROWTH * columns, widest)
