"""Compiled: the best rollouts of concave rows, by the marginal value at which the budget ends.

A *critical value* v is such that the rollouts with a marginal above v fit the budget and those with a marginal of at
least v do not. Given v, every prompt's count is known but for rollouts worth exactly v, which the tie rule shares out.

The search for v counts rollouts at trial values and keeps an open interval (low, high) that holds v. It starts from
the critical value of every 16th prompt (found in the same way), narrows by interpolation, and ends by selecting among
the marginals inside as soon as those are fewer than half the prompts. So a batch of any size needs a few passes.

Doubles are compared as whole numbers in the same order (``key``), which makes halving and interpolation logarithmic
in the value, whatever its scale and sign, and lets halving end after at most 64 steps.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from knapsack_rl.allocation._rows import (
    collect_of_sequence,
    collect_of_table,
    counts_of_sequence,
    counts_of_table,
    marginal,
)

STRIDE = 16  # of a sample of the prompts
FIRST_LOOK = 16  # prompts that give the first guess
OCTAVE = 1 << 52  # a factor of two between doubles, in keys
SIGN = np.int64(2**63 - 1)


@njit(cache=True)
def _key(value):  # pragma: no cover - compiled
    bits = np.float64(value).view(np.int64)
    return bits if bits >= 0 else bits ^ SIGN


@njit(cache=True)
def _value(key):  # pragma: no cover - compiled
    return np.int64(key if key >= 0 else key ^ SIGN).view(np.float64)


@njit(cache=True)
def beginnings(rows, lower, step):  # pragma: no cover - compiled
    """Places at which the rows of every ``step``-th prompt begin: arrays n, x and y."""
    weight = rows[0]
    size = (lower.size + step - 1) // step
    n, x, y = np.empty(size, np.int64), np.empty(size), np.empty(size)
    for k in range(size):
        i = k * step
        if weight.size and weight[i] >= 0.0:
            n[k], x[k], y[k] = 1, weight[i], weight[i]
        else:
            n[k], x[k], y[k] = lower[i], 0.0, 0.0
    return n, x, y


@njit(cache=True)
def count_rollouts(rows, cost, lower, upper, step, value, start, reached):  # pragma: no cover - compiled
    """Of every ``step``-th prompt: (cost above, cost at least, rollouts above, rollouts at least) the value.

    ``start`` has the places at a larger value, ``reached`` gets those at this one.
    """
    weight, first, second, table = rows
    start_n, start_x, start_y = start
    n, x, y = reached
    cost_above = cost_at_least = above = at_least = 0.0
    for k in range(n.size):
        i = k * step
        if weight.size and weight[i] >= 0.0:
            n_above, n_at_least, n[k], x[k], y[k] = counts_of_sequence(
                start_n[k], start_x[k], start_y[k], first[i], second[i], value, lower[i], upper[i]
            )
        else:
            row = int(-weight[i]) - 1 if weight.size else i
            n_above, n_at_least = counts_of_table(table, row, start_n[k], value, upper[i])
            n[k] = n_above
        above += n_above
        at_least += n_at_least
        if cost.size:
            cost_above += cost[i] * n_above
            cost_at_least += cost[i] * n_at_least
    if cost.size:
        return cost_above, cost_at_least, above, at_least
    return above, at_least, above, at_least


@njit(cache=True)
def _gather(rows, cost, lower, upper, step, low, high, start, capacity):  # pragma: no cover - compiled
    """Marginals strictly between low and high, and their costs (empty for unit costs)."""
    weight, first, second, table = rows
    n, x, y = start
    values = np.empty(capacity)
    weights = np.empty(capacity if cost.size else 0)
    size = 0
    for k in range(n.size):
        i = k * step
        before = size
        if weight.size and weight[i] >= 0.0:
            size = collect_of_sequence(
                n[k], x[k], y[k], first[i], second[i], low, high, lower[i], upper[i], values, size
            )
        else:
            row = int(-weight[i]) - 1 if weight.size else i
            size = collect_of_table(table, row, n[k], low, high, upper[i], values, size)
        if cost.size:
            weights[before:size] = cost[i]
    return values[:size], weights[:size]


@njit(cache=True)
def _select(values, weights, room):  # pragma: no cover - compiled
    """The value at which ``room`` ends when the largest are taken first (quickselect; reorders its arguments)."""
    start, end = 0, values.size
    while end - start > 1:
        a, b, c = values[start], values[(start + end) // 2], values[end - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        left, at, right = start, start, end  # larger | equal | not looked at | smaller
        larger = equal = 0.0
        while at < right:
            value = values[at]
            weight = weights[at] if weights.size else 1.0
            if value > pivot:
                other = left
                left += 1
                larger += weight
            elif value < pivot:
                right -= 1
                other = right
            else:
                at += 1
                equal += weight
                continue
            values[at], values[other] = values[other], value
            if weights.size:
                weights[at], weights[other] = weights[other], weight
            if value > pivot:
                at += 1
        if larger > room:
            end = left
        elif larger + equal > room or right == end:
            return pivot
        else:
            room -= larger + equal
            start = right
    return values[start]


@njit(cache=True)
def _search(rows, cost, lower, upper, step, budget, guess, slope):  # pragma: no cover - compiled
    """Of every ``step``-th prompt: critical value (-inf: all rollouts fit), how fast cost falls with the key, places.

    ``guess`` is a value near it, if possible; ``slope`` the cost per key near it, 0 if unknown.
    """
    least, greatest = _key(-np.inf), _key(np.inf)
    low, high = least, greatest
    below, fits = np.inf, -1.0  # cost at ``low`` (too much) and at ``high``, once tried; then the numbers of rollouts
    many, few = np.inf, 0.0
    limit = max(32.0, 0.5 * lower.size / step)
    trial = _key(guess)
    width = OCTAVE
    slow = 0
    places = beginnings(rows, lower, step)  # at ``high``
    trial_places = beginnings(rows, lower, step)
    while True:
        before = many - few
        above, at_least, n_above, n_at_least = count_rollouts(
            rows, cost, lower, upper, step, _value(trial), places, trial_places
        )
        if above > budget:
            low, below, many = trial, above, n_above
        elif at_least > budget:
            return _value(trial), slope, places
        elif trial == least:
            return -np.inf, slope, places
        else:
            high, fits, few = trial, at_least, n_at_least
            places, trial_places = trial_places, places
        if below == np.inf or fits < 0.0:  # one end is open: look beyond the budget, then further and further away
            if slope > 0.0:
                average = (budget / above if above > 0.0 else 1.0) if cost.size else 1.0
                wanted = (1.25 * abs(above - budget) + 0.25 * limit * average) / slope
                width = int(min(max(wanted, float(1 << 32)), float(1 << 58)))
                slope = 0.0
            if below == np.inf:
                trial = high - width if high > least + width else least
            else:
                trial = low + width if low < greatest - width else greatest
            width = width * 2 if width < (1 << 60) else width
            continue
        # The difference of keys of unlike signs may not fit an int64; a double is too coarse for those that are close.
        span = float(high - low) if (high < 0) == (low < 0) else float(high) - float(low)
        slope = (below - fits) / span
        if many - few <= limit:
            values, weights = _gather(
                rows, cost, lower, upper, step, _value(low), _value(high), places, int(many - few)
            )
            return _select(values, weights, budget - fits), slope, places
        # Aim a little beyond the budget, on the side of the end that is farther away; halve where that is slow.
        margin = 0.4 * limit * (below - fits) / (many - few)
        if below - budget > budget - fits:
            aim = budget + min(margin, (below - budget) / 2)
        else:
            aim = budget - min(margin, (budget - fits) / 2)
        slow = slow + 1 if many - few > 0.5 * before else 0
        share = 0.5 if slow >= 2 else min(max((below - aim) / (below - fits), 0.02), 0.98)
        trial = low + np.int64(share * span) if share <= 0.5 else high - np.int64((1.0 - share) * span)
        trial = min(max(trial, low + 1), high - 1)


@njit(cache=True)
def critical_value(rows, cost, lower, upper, budget):  # pragma: no cover - compiled
    """The marginal value at which the budget ends, -inf if every rollout fits; places at a larger value.

    Args:
        rows: :class:`knapsack_rl.allocation.rows.Rows` as a plain tuple; no row rises within its bounds.
        cost: (M,) of a rollout, or empty for costs of one.
        lower: (M,) int64, >= 1 for geometric rows.
        upper: (M,) int64.
        budget: float, at least the cost of all lower bounds.
    """
    prompts = lower.size
    least = most = 0.0
    for i in range(prompts):
        price = cost[i] if cost.size else 1.0
        least += price * lower[i]
        most += price * upper[i]
    if most <= budget:
        return -np.inf, beginnings(rows, lower, 1)
    # Where a budget spread evenly would end: the mean marginal of a few prompts there.
    weight, first, second, table = rows
    share = (budget - least) / (most - least)
    guess = slope = 0.0
    for k in range(FIRST_LOOK):
        i = k * prompts // FIRST_LOOK
        n = lower[i] + np.int64(share * (upper[i] - lower[i]))
        if n < upper[i]:
            guess += marginal(weight, first, second, table, i, n, upper[i]) / FIRST_LOOK
    step = 1
    while prompts // step >= 8 * STRIDE:
        step *= STRIDE
    while step > 1:
        least = most = 0.0
        for i in range(0, prompts, step):
            price = cost[i] if cost.size else 1.0
            least += price * lower[i]
            most += price * upper[i]
        found, slope, _ = _search(rows, cost, lower, upper, step, least + share * (most - least), guess, slope)
        guess = found if found > -np.inf else guess
        slope *= STRIDE
        step //= STRIDE
    value, _, places = _search(rows, cost, lower, upper, 1, budget, guess, slope)
    return value, places


@njit(cache=True)
def counts_around(rows, lower, upper, value, places):  # pragma: no cover - compiled
    """Counts of every prompt above the value, and at least it; ``places`` are at a larger value."""
    weight, first, second, table = rows
    n, x, y = places
    above, at_least = np.empty_like(lower), np.empty_like(lower)
    for i in range(lower.size):
        if weight.size and weight[i] >= 0.0:
            above[i], at_least[i], _, _, _ = counts_of_sequence(
                n[i], x[i], y[i], first[i], second[i], value, lower[i], upper[i]
            )
        else:
            row = int(-weight[i]) - 1 if weight.size else i
            above[i], at_least[i] = counts_of_table(table, row, n[i], value, upper[i])
    return above, at_least


@njit(cache=True)
def share_out(few, many, left, tier, priority):  # pragma: no cover - compiled
    """Raise ``few`` by ``left`` rollouts of equal value, to at most ``many``: tier, count, priority, position."""
    tied = np.flatnonzero(few < many)
    by_tier = tier[tied]
    if by_tier.size and by_tier.min() < by_tier.max():
        order = np.argsort(by_tier, kind="mergesort")
        tied, by_tier = tied[order], by_tier[order]
    start = 0
    while left > 0 and start < tied.size:
        end = start
        width = 0
        while end < tied.size and by_tier[end] == by_tier[start]:
            width += many[tied[end]] - few[tied[end]]
            end += 1
        if width <= left:
            for i in tied[start:end]:
                few[i] = many[i]
            left -= width
        else:
            _fill_evenly(few, many, left, tied[start:end], priority)
            left = 0
        start = end


@njit(cache=True)
def _fill_evenly(few, many, left, members, priority):  # pragma: no cover - compiled
    """Raise the members to a common level as far as ``left`` goes; what is then left goes by priority, position."""
    low, high = few[members].min(), many[members].max()  # at ``low`` the budget suffices, at ``high`` it does not
    while high - low > 1:
        level = (low + high) // 2
        needed = 0
        for i in members:
            needed += max(min(many[i], level) - few[i], 0)
        if needed <= left:
            low = level
        else:
            high = level
    for i in members:
        reached = max(min(many[i], low), few[i])
        left -= reached - few[i]
        few[i] = reached
    last = members[(few[members] == low) & (many[members] > low)]
    if left > 0:
        keys = priority[last]
        if keys.min() < keys.max():
            last = last[np.argsort(keys, kind="mergesort")]
        for i in last[:left]:
            few[i] += 1


@njit(cache=True)
def take_best(rows, lower, upper, budget, tier, priority):  # pragma: no cover - compiled
    """The ``budget - sum(lower)`` best rollouts in the documented order; all rollouts cost one."""
    value, places = critical_value(rows, np.empty(0), lower, upper, float(budget))
    if value == -np.inf:
        return upper.copy()
    few, many = counts_around(rows, lower, upper, value, places)
    left = budget - few.sum()
    if left > 0:
        share_out(few, many, left, tier, priority)
    return few
