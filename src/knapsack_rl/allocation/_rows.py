"""Compiled: what the solver asks of one row of marginal values.

``rows`` is a ``Rows`` as a plain tuple: a type of this package in the signature would be
pickled into numba's cache and break that cache when it is renamed. Between the bounds asked about no row may rise;
tables are checked (and smoothed) before, and rounding cannot let a geometric row rise: see ``_walk``.

Who asks about many rows tells geometric ones from those of the table itself and passes numbers: to pass arrays to a
call per prompt, inlined or not, would cost several times what the call does.
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


@njit(cache=True, forceinline=True)
def _walk(n, x, y, first, second, value, upper):  # pragma: no cover - compiled
    """Go on down a geometric row from a *place*: n rollouts taken, whose two terms of the next marginal are x and y.

    Return (n <= upper: rollouts whose marginal is above ``value``, marginal of rollout n + 1, place to go on from).
    Every row begins at place (1, weight, weight).

    Each marginal follows from the one before by two multiplications, which rounding cannot make rise. A long row is
    first walked in blocks, and places are where blocks begin. Where a block's last marginals would by rounding fall
    below the first of the next block, they count as equal to it, so that the row never rises, whatever the path.
    """
    if value < 0.0:
        return upper, -np.inf, n, x, y
    if upper <= BLOCK:
        while n < upper and x + y > value:
            x *= first
            y *= second
            n += 1
        return n, x + y if n < upper else -np.inf, n, x, y
    by_first, by_second = _block_ratio(first), _block_ratio(second)
    ahead = x * by_first + y * by_second
    while ahead > value:
        if n + BLOCK >= upper:
            return upper, -np.inf, n, x, y
        x *= by_first
        y *= by_second
        n += BLOCK
        ahead = x * by_first + y * by_second
    end = min(upper, n + BLOCK)
    at, u, v = n, x, y
    while at < end and u + v > value:
        u *= first
        v *= second
        at += 1
    if at >= upper:
        return upper, -np.inf, n, x, y
    return at, ahead if at == end else max(u + v, ahead), n, x, y


@njit(cache=True)
def collect_of_sequence(n, x, y, first, second, low, high, lower, upper, values, size):  # pragma: no cover - compiled
    """Append the marginals strictly between low and high of a geometric row to values[:size]; return the new size."""
    by_first = by_second = 0.0
    if upper > BLOCK:
        by_first, by_second = _block_ratio(first), _block_ratio(second)
    while n < upper:
        ahead = x * by_first + y * by_second
        at, u, v = n, x, y
        end = min(upper, n + BLOCK) if upper > BLOCK else upper
        while at < end:
            found = max(u + v, ahead)
            if found <= low:
                return size
            if found < high and at >= lower:
                values[size] = found
                size += 1
            u *= first
            v *= second
            at += 1
        x *= by_first
        y *= by_second
        n = end
    return size


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


@njit(cache=True, forceinline=True)
def counts_of_sequence(n, x, y, first, second, value, lower, upper):  # pragma: no cover - compiled
    """Rollouts of a geometric row, within its bounds, whose marginal is (above, at least) ``value``; the place reached.

    (n, x, y) is a place that the row reached for a larger value, or its beginning.
    """
    above, following, n, x, y = _walk(n, x, y, first, second, value, upper)
    at_least = above
    if following == value:
        at_least = _walk(n, x, y, first, second, np.nextafter(value, -np.inf), upper)[0]
    return max(above, lower), max(at_least, lower), n, x, y


@njit(cache=True)
def counts_of_table(table, row, n, value, upper):  # pragma: no cover - compiled
    """The same for a row of the table, of which ``n`` rollouts, at least its lower bound, are above a larger value."""
    above = _search(table, row, value, n, upper)
    at_least = above
    if above < upper and table[row, above] == value:
        at_least = _search(table, row, np.nextafter(value, -np.inf), above, upper)
    return above, at_least


@njit(cache=True)
def collect_of_table(table, row, n, low, high, upper, values, size):  # pragma: no cover - compiled
    """As :func:`collect_of_sequence` for a row of the table."""
    while n < upper and table[row, n] > low:
        if table[row, n] < high:
            values[size] = table[row, n]
            size += 1
        n += 1
    return size


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
