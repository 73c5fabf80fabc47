"""Compiled loops of the solver. Imported on the first solve, because numba takes longer to import than numpy."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def fill_marginals(success_rates, start, table):  # pragma: no cover - compiled
    """table[i, n] = start_i (p^(n-1) + q^(n-1)) for n >= 1, each column by two multiplications."""
    for i in range(table.shape[0]):
        p = success_rates[i]
        q = 1.0 - p
        by_p = start[i]
        by_q = start[i]
        table[i, 0] = 0.0
        for n in range(1, table.shape[1]):
            table[i, n] = by_p + by_q
            by_p *= p
            by_q *= q


@njit(cache=True)
def sum_taken(marginals, counts):  # pragma: no cover - compiled
    """Sum of the first counts[i] marginals of every row: the value of the allocation."""
    total = 0.0
    for i in range(marginals.shape[0]):
        row = 0.0
        for n in range(counts[i]):
            row += marginals[i, n]
        total += row
    return total


@njit(cache=True)
def examine(marginals, lower, upper, tolerance):  # pragma: no cover - compiled
    """Return (all entries finite, no row rises within its bounds by more than its rounding)."""
    concave = True
    for i in range(marginals.shape[0]):
        first, last = lower[i], upper[i]
        rises = 0
        for n in range(first + 1, last):  # counted without a branch, which lets it run on whole vectors
            rises += not (marginals[i, n] <= marginals[i, n - 1])
        # Falling rows lie between their ends; before the lower bound anything finite is allowed.
        finite = True
        for n in range(last if rises else min(first + 1, last)):
            finite &= abs(marginals[i, n]) < np.inf
        if last > 0:
            finite &= abs(marginals[i, last - 1]) < np.inf
        if not finite:
            return False, False
        if rises:
            largest = np.abs(marginals[i, :last]).max()
            for n in range(first + 1, last):
                if marginals[i, n] > marginals[i, n - 1] + tolerance * largest:
                    concave = False
    return True, concave


@njit(cache=True)
def _comes_before(a, b, key, tier, count, priority):  # pragma: no cover - compiled
    """The documented order of rollouts: marginal value, tier, rollouts held, priority, position."""
    if key[a] != key[b]:
        return key[a] > key[b]
    if tier[a] != tier[b]:
        return tier[a] < tier[b]
    if count[a] != count[b]:
        return count[a] < count[b]
    if priority[a] != priority[b]:
        return priority[a] < priority[b]
    return a < b


@njit(cache=True)
def _sift_down(heap, size, start, key, tier, count, priority):  # pragma: no cover - compiled
    at = start
    moving = heap[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _comes_before(heap[child + 1], heap[child], key, tier, count, priority):
            child += 1
        if not _comes_before(heap[child], moving, key, tier, count, priority):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = moving


@njit(cache=True)
def take_best(marginals, lower, upper, budget, tier, priority):  # pragma: no cover - compiled
    """Take the ``budget - sum(lower)`` best marginal rollouts.

    Nearly all of them are found by bisection on a threshold: every rollout whose marginal lies strictly above it
    comes first in the documented order, whatever the ties. A heap with one candidate per prompt takes the few that
    are left, in that order.
    """
    count = _take_above_threshold(marginals, lower, upper, budget)
    prompts = marginals.shape[0]
    spent = 0
    key = np.empty(prompts)
    heap = np.empty(prompts, np.int64)
    size = 0
    for i in range(prompts):
        spent += count[i]
        if count[i] < upper[i]:
            key[i] = marginals[i, count[i]]
            heap[size] = i
            size += 1
    if spent == budget:
        return count
    for start in range(size // 2 - 1, -1, -1):
        _sift_down(heap, size, start, key, tier, count, priority)
    while spent < budget:
        best = heap[0]
        count[best] += 1
        spent += 1
        if count[best] < upper[best]:
            key[best] = marginals[best, count[best]]
        else:
            size -= 1
            heap[0] = heap[size]
        _sift_down(heap, size, 0, key, tier, count, priority)
    return count


@njit(cache=True)
def _take_above_threshold(marginals, lower, upper, budget):  # pragma: no cover - compiled
    """Counts at the lowest threshold tried under which the budget is not exceeded.

    Invariant: ``few`` (marginals > high) fits the budget, ``many`` (marginals > low) exceeds it, and a row's count
    at any threshold between lies between the two, which narrows the binary searches as the interval shrinks.
    """
    prompts = marginals.shape[0]
    few = lower.copy()
    many = upper.copy()
    high = 0.0
    spent = 0
    for i in range(prompts):
        spent += lower[i]
        if lower[i] < upper[i]:
            high = max(high, marginals[i, lower[i]])
    low = 0.0
    trial = np.empty_like(few)
    close_enough = max(8, prompts // 8)
    for _ in range(200):  # a bound for safety: halving an interval of doubles cannot go on for longer
        if budget - spent <= close_enough:
            break
        middle = np.sqrt(low * high) if low > 0.0 else high / 64.0
        if not low < middle < high:
            break
        total = 0
        for i in range(prompts):
            at, end = few[i], many[i]
            while at < end:
                half = (at + end) // 2
                if marginals[i, half] > middle:
                    at = half + 1
                else:
                    end = half
            trial[i] = at
            total += at
        if total <= budget:
            few, trial = trial, few
            high = middle
            spent = total
        else:
            many, trial = trial, many
            low = middle
    return few


@njit(cache=True)
def best_of_table(values, lower, upper, budget):  # pragma: no cover - compiled
    """Dynamic program over any table: maximise sum values[i, n_i] with sum n_i = budget, lower <= n <= upper.

    Among equal totals a later row takes fewer rollouts. Only totals from which the budget can still be met are
    visited.
    """
    prompts = values.shape[0]
    best = np.full(budget + 1, -np.inf)
    best[0] = 0.0
    choice = np.zeros((prompts, budget + 1), np.int32)
    rest_low, rest_high = 0, 0
    for i in range(prompts):
        rest_low += lower[i]
        rest_high += upper[i]
    low, high = 0, 0
    for i in range(prompts):
        rest_low -= lower[i]
        rest_high -= upper[i]
        previous_low, previous_high = low, high
        low = max(previous_low + lower[i], budget - rest_high)
        high = min(previous_high + upper[i], budget - rest_low)
        following = np.full(budget + 1, -np.inf)
        for total in range(low, high + 1):
            top = -np.inf
            take = lower[i]
            for n in range(max(lower[i], total - previous_high), min(upper[i], total - previous_low) + 1):
                candidate = best[total - n] + values[i, n]
                if candidate > top:
                    top = candidate
                    take = n
            following[total] = top
            choice[i, total] = take
        best = following
    count = np.zeros(prompts, np.int64)
    total = budget
    for i in range(prompts - 1, -1, -1):
        count[i] = choice[i, total]
        total -= count[i]
    return count


@njit(cache=True)
def shift_rows(rows, cells, shifted):  # pragma: no cover - compiled
    """shifted[i] = rows[i] moved up by cells[i] columns, linearly between columns; end values move in from outside."""
    last = rows.shape[1] - 1
    for i in range(rows.shape[0]):
        whole = int(np.floor(cells[i]))
        part = cells[i] - whole
        for g in range(rows.shape[1]):
            near = rows[i, min(max(g - whole, 0), last)]
            far = rows[i, min(max(g - whole - 1, 0), last)]
            shifted[i, g] = near + part * (far - near)
