"""What the compiled solver asks of one row of marginal values, for both kinds of rows.

``rows`` is a table (2-d array), or a :class:`knapsack_rl.rows.GeometricRows`. numba compiles the callers once per kind.
A row must never rise between the bounds asked about; tables are checked (and smoothed) before, geometric rows are made
so that rounding cannot let them rise: see ``_walk``.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

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
def _search(row, value, lower, upper):  # pragma: no cover - compiled
    """First n in [lower, upper] with row[n] <= value, by galloping: row[lower:upper] never rises."""
    stride = 1
    start = lower
    while start + stride <= upper and row[start + stride - 1] > value:
        start += stride
        stride *= 2
    end = min(start + stride - 1, upper)
    while start < end:
        half = (start + end) // 2
        if row[half] > value:
            start = half + 1
        else:
            end = half
    return start


@njit(cache=True)
def _counts_in_row(row, value, lower, upper):  # pragma: no cover - compiled
    above = _search(row, value, lower, upper)
    at_least = above
    if above < upper and row[above] == value:
        at_least = _search(row, np.nextafter(value, -np.inf), above, upper)
    return above, at_least


def counts_at(rows, i, value, lower, upper):
    """Rollouts of row i, within its bounds, whose marginal is (above ``value``, at least ``value``)."""
    raise NotImplementedError("compiled code only")


def marginal(rows, i, n, upper):
    """Marginal value of rollout n + 1 of row i, whose upper bound is ``upper`` > n."""
    raise NotImplementedError("compiled code only")


def total(rows, i, n):
    """Value of the first n rollouts of row i."""
    raise NotImplementedError("compiled code only")


@overload(counts_at)
def _counts_at(rows, i, value, lower, upper):  # pragma: no cover - compiled
    if isinstance(rows, types.Array):
        return lambda rows, i, value, lower, upper: _counts_in_row(rows[i], value, lower, upper)

    def geometric(rows, i, value, lower, upper):
        weight = rows.weight[i]
        if weight < 0.0:
            return _counts_in_row(rows.common, value, lower, upper)
        first, second = rows.first[i], rows.second[i]
        above, following = _walk(weight, first, second, value, upper)
        at_least = above
        if following == value:
            at_least, _ = _walk(weight, first, second, np.nextafter(value, -np.inf), upper)
        return max(above, lower), max(at_least, lower)

    return geometric


@overload(marginal)
def _marginal(rows, i, n, upper):  # pragma: no cover - compiled
    if isinstance(rows, types.Array):
        return lambda rows, i, n, upper: rows[i, n]

    def geometric(rows, i, n, upper):
        if rows.weight[i] < 0.0:
            return rows.common[n]
        first, second = rows.first[i], rows.second[i]
        x = y = rows.weight[i]
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

    return geometric


@overload(total)
def _total(rows, i, n):  # pragma: no cover - compiled
    if isinstance(rows, types.Array):

        def of_table(rows, i, n):
            result = 0.0
            for k in range(n):
                result += rows[i, k]
            return result

        return of_table

    def geometric(rows, i, n):
        result = 0.0
        if rows.weight[i] < 0.0:
            for k in range(n):
                result += rows.common[k]
            return result
        first, second = rows.first[i], rows.second[i]
        x = y = rows.weight[i]
        left = n - 1
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

    return geometric
