"""The greedy of :mod:`knapsack_rl.allocation.solver` without a table: block by block.

Marginals are computed when needed, a block of prompts and rollouts at a time. That takes half the time of a table at
hundreds of prompts and a small part of its memory at millions. A first scan keeps the ``budget - sum(lower)`` largest
marginals seen so far. The smallest of them is a floor that only rises, so a prompt whose marginals have fallen below it
is finished; at the end it is the critical value. A second scan counts each prompt's marginals around that value. Time
and memory are linear in prompts plus budget.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.solver import share_out

BLOCK = 2**15
"""Entries of a block, small enough for the cache of a core."""

_GROWTH = 4  # of the columns from one round of a scan to the next

Marginals = Callable[[IntArray, int], FloatArray]
"""Maps (m,) prompts and a number of columns to their (m, columns) marginal values."""

Visit = Callable[[IntArray, FloatArray], float]


def greedy_in_blocks(
    marginals: Marginals, budget: int, low: IntArray, high: IntArray, tier: IntArray, priority: FloatArray
) -> IntArray:
    """Return exactly the counts of :func:`knapsack_rl.allocation.solver.greedy`.

    Args:
        marginals: marginal values >= 0 that never rise from the lower bound of their row on.
        budget: rollouts to hand out, within [sum(low), sum(high)].
        low: (M,) lower bounds.
        high: (M,) upper bounds.
        tier: (M,) first tie-break, lower first.
        priority: (M,) third tie-break, lower first.
    """
    room = budget - int(low.sum())
    if room in (0, int((high - low).sum())):
        return (high if room else low).copy()
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
    """Return the ``room``-th largest marginal within the bounds; 0 if fewer are positive."""
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
    """Pass blocks of marginals to ``visit``, which returns the value at or below which it needs no more of them.

    Each round visits further columns, more than the round before, of the prompts that are not finished. Marginals
    outside the bounds are passed as 0.
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
