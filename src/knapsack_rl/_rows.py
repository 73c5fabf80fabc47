"""Compiled: what the solver asks of one row of marginal values.

``rows`` is a :class:`knapsack_rl.rows.Rows` as a plain tuple: a type of this package in the signature would be
pickled into numba's cache and break that cache when it is renamed. Between the bounds asked about no row may rise;
tables are checked (and smoothed) before, and rounding cannot let a geometric row rise: see ``_walk``.

The two functions inlined take arrays; passing those to a call per prompt would cost more than the call does.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK_BITS = 7
BLOCK = 1 << BLOCK_BITS  # rollouts that are skipped at a time in a long geometric row


@njit(cache=True)
def _block_ratio(ratio):  # pragma: no cover - compiled
    for _ in range(BLOCK_BITS):
        ratio *= ratio
    return ratio


@njit(cache=True)
def _walk(weight, first, second, value, upper):  # pragma: no cover - compiled
    """Return (n <= upper: rollouts whose marginal is above ``value``, the marginal of rollout n + 1).

    Each marginal follows from the one before by two multiplications, which rounding cannot make rise. A long row is
    first walked in blocks. Where a block's last marginals would by rounding fall below the first of the next block,
    they count as equal to it, so that the row never rises, whatever the path.
    """
    if value < 0.0:
        return upper, -np.inf
    n = 1
    x = y = weight
    ahead = 0.0
    end = upper
    if upper > BLOCK:
        by_first, by_second = _block_ratio(first), _block_ratio(second)
        ahead = x * by_first + y * by_second
        while ahead > value:
            if n + BLOCK >= upper:
                return upper, -np.inf
            x *= by_first
            y *= by_second
            n += BLOCK
            ahead = x * by_first + y * by_second
        end = min(upper, n + BLOCK)
    while n < end and x + y > value:
        x *= first
        y *= second
        n += 1
    if n >= upper:
        return upper, -np.inf
    return n, ahead if n == end else max(x + y, ahead)


@njit(cache=True)
def _walk_both(weight, first, second, value, lower, upper):  # pragma: no cover - compiled
    above, following = _walk(weight, first, second, value, upper)
    if following == value:
        at_least = _walk(weight, first, second, np.nextafter(value, -np.inf), upper)[0]
        return max(above, lower), max(at_least, lower)
    return max(above, lower), max(above, lower)


@njit(cache=True)
def _search(table, row, value, lower, upper):  # pragma: no cover - compiled
    """First n in [lower, upper] with table[row, n] <= value, by galloping."""
    stride = 1
    start = lower
    while start + stride <= upper and table[row, start + stride - 1] > value:
        start += stride
        stride *= 2
    end = min(start + stride - 1, upper)
    while start < end:
        half = (start + end) // 2
        if table[row, half] > value:
            start = half + 1
        else:
            end = half
    return start


@njit(cache=True)
def _search_both(table, row, value, lower, upper):  # pragma: no cover - compiled
    above = _search(table, row, value, lower, upper)
    if above < upper and table[row, above] == value:
        return above, _search(table, row, np.nextafter(value, -np.inf), above, upper)
    return above, above


@njit(inline="always")
def counts_at(weight, first, second, table, i, value, lower, upper):  # pragma: no cover - compiled
    """Rollouts of row i, within its bounds, whose marginal is (above ``value``, at least ``value``)."""
    if weight.size and weight[i] >= 0.0:
        return _walk_both(weight[i], first[i], second[i], value, lower, upper)
    return _search_both(table, int(-weight[i]) - 1 if weight.size else i, value, lower, upper)


@njit(cache=True)
def _geometric_marginal(weight, first, second, n, upper):  # pragma: no cover - compiled
    x = y = weight
    ahead = 0.0
    if upper > BLOCK:
        by_first, by_second = _block_ratio(first), _block_ratio(second)
        for _ in range((n - 1) // BLOCK):
            x *= by_first
            y *= by_second
        ahead = x * by_first + y * by_second
    for _ in range((n - 1) % BLOCK):
        x *= first
        y *= second
    return max(x + y, ahead)


@njit(inline="always")
def marginal(weight, first, second, table, i, n, upper):  # pragma: no cover - compiled
    """Marginal value of rollout n + 1 of row i, whose upper bound is ``upper`` > n."""
    if weight.size and weight[i] >= 0.0:
        return _geometric_marginal(weight[i], first[i], second[i], n, upper)
    return table[int(-weight[i]) - 1 if weight.size else i, n]


@njit(cache=True)
def _geometric_total(weight, first, second, n):  # pragma: no cover - compiled
    """Sum of the first n marginals of a geometric row."""
    result = 0.0
    x = y = weight
    left = n - 1  # the first rollout is worth nothing
    if left >= BLOCK:
        by_first, by_second = first, second
        sum_first = sum_second = 1.0  # 1 + r + ... + r^(BLOCK-1) = (1 + r) (1 + r^2) (1 + r^4) ...
        for _ in range(BLOCK_BITS):
            sum_first *= 1.0 + by_first
            sum_second *= 1.0 + by_second
            by_first *= by_first
            by_second *= by_second
        while left >= BLOCK:
            result += x * sum_first + y * sum_second
            x *= by_first
            y *= by_second
            left -= BLOCK
    for _ in range(left):
        result += x + y
        x *= first
        y *= second
    return result


@njit(cache=True)
def total_value(rows, counts):  # pragma: no cover - compiled
    """Sum of the first counts[i] marginals of every row: the value of the allocation.

    Rows are added with compensation (Kahan 1965), so that millions of prompts cost no digits.
    """
    weight, first, second, table = rows
    result = lost = 0.0
    for i in range(counts.size):
        if weight.size and weight[i] >= 0.0:
            value = _geometric_total(weight[i], first[i], second[i], counts[i])
        else:
            row = int(-weight[i]) - 1 if weight.size else i
            value = 0.0
            for n in range(counts[i]):
                value += table[row, n]
        value -= lost
        added = result + value
        lost = (added - result) - value
        result = added
    return result
