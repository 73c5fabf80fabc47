"""Compiled loops of solver and allocation. Imported on the first solve: numba takes longer to import than numpy."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def fill_marginals(weight, first, second, table):  # pragma: no cover - compiled
    """table[i, n] = weight_i (first_i^(n-1) + second_i^(n-1)) for n >= 1, each column by two multiplications."""
    for i in range(table.shape[0]):
        x = y = weight[i]
        table[i, 0] = 0.0
        for n in range(1, table.shape[1]):
            table[i, n] = x + y
            x *= first[i]
            y *= second[i]


@njit(cache=True)
def mean_row(weight, first, second, row):  # pragma: no cover - compiled
    """row[n] = mean over the rows with weight >= 0 of their marginals, summed row by row."""
    row[:] = 0.0
    rows = 0
    for i in range(weight.size):
        if weight[i] < 0.0:
            continue
        rows += 1
        x = y = weight[i]
        for n in range(1, row.size):
            if x + y == 0.0:
                break
            row[n] += x + y
            x *= first[i]
            y *= second[i]
    row /= max(rows, 1)


@njit(cache=True)
def classify(success_rates, kind):  # pragma: no cover - compiled
    """Fill in the classes; return (first that is no probability or -1, number of NaN)."""
    unseen = 0
    for i in range(success_rates.size):
        p = success_rates[i]
        if np.isnan(p):
            kind[i] = 1
            unseen += 1
        elif p > 0.0 and p < 1.0:
            kind[i] = 3
        elif p == 0.0:
            kind[i] = 0
        elif p == 1.0:
            kind[i] = 2
        else:
            return i, unseen
    return -1, unseen


@njit(cache=True)
def fit_bounds(lower, upper, budget):  # pragma: no cover - compiled
    """Lower each upper bound to what the budget can reach; return (fits, smallest lower bound, largest upper bound).

    ``fits`` is false if a bound is negative, bounds are out of order or the budget is outside their sums.
    """
    least = 0
    for i in range(lower.size):
        if lower[i] < 0 or lower[i] > upper[i]:
            return False, 0, 0
        least += lower[i]
        if least > budget:  # also keeps the sum from overflowing
            return False, 0, 0
    room = budget - least
    reachable = 0
    smallest, largest = budget, 0
    for i in range(lower.size):
        upper[i] = min(upper[i], lower[i] + room)
        reachable = min(reachable + upper[i] - lower[i], room)
        smallest = min(smallest, lower[i])
        largest = max(largest, upper[i])
    return reachable == room, smallest, largest


@njit(cache=True)
def examine(marginals, lower, upper, tolerance):  # pragma: no cover - compiled
    """Return (all entries finite, no row rises within its bounds by more than its rounding, none rises at all)."""
    concave = falling = True
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
            return False, False, False
        if rises:
            falling = False
            largest = np.abs(marginals[i, :last]).max()
            for n in range(first + 1, last):
                if marginals[i, n] > marginals[i, n - 1] + tolerance * largest:
                    concave = False
    return True, concave, falling


@njit(cache=True)
def smoothed(marginals, lower, upper):  # pragma: no cover - compiled
    """A copy whose rows never rise within their bounds: an entry above its predecessor takes its value."""
    table = marginals.copy()
    for i in range(table.shape[0]):
        for n in range(lower[i] + 1, upper[i]):
            table[i, n] = min(table[i, n], table[i, n - 1])
    return table


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
