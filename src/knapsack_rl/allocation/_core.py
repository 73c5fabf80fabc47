"""Compiled: the last steps of the knapsack with costs, where greedy leaves a remainder.

At the critical density v (value per cost) every prompt has a *base* count. Giving prompt i n rollouts instead loses
``loss_i(n) = [V_i(base) - v c_i base] - [V_i(n) - v c_i n] >= 0`` of the Lagrangian bound, and a remainder left unspent
loses v per unit. So the gap of any solution is the sum of its losses plus v times what it leaves, and a prompt whose
smallest loss exceeds the best gap known keeps its base count. The few others are searched.

Source: Pisinger 1995 (the core of a multiple-choice knapsack problem), with the losses in place of the upper bounds.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from knapsack_rl.allocation._rows import marginal


@njit(cache=True)
def losses(rows, cost, base, lower, upper, chosen, density, reach):  # pragma: no cover - compiled
    """(R, 2 reach + 1): what the chosen rows lose by base - reach .. base + reach rollouts; inf out of bounds."""
    weight, first, second, table = rows
    found = np.full((chosen.size, 2 * reach + 1), np.inf)
    for k in range(chosen.size):
        i = chosen[k]
        price = density * cost[i]
        found[k, reach] = loss = 0.0
        for n in range(base[i], min(upper[i], base[i] + reach)):
            loss += price - marginal(weight, first, second, table, i, n, upper[i])
            found[k, reach + n + 1 - base[i]] = max(loss, 0.0)
        loss = 0.0
        for n in range(base[i] - 1, max(lower[i], base[i] - reach) - 1, -1):
            loss += marginal(weight, first, second, table, i, n, upper[i]) - price
            found[k, reach + n - base[i]] = max(loss, 0.0)
    return found


@njit(cache=True)
def concave_hull(table, lower, upper):  # pragma: no cover - compiled
    """Marginals of the smallest concave function above each row within its bounds; equal along a straight piece."""
    hull = table.copy()
    for i in range(table.shape[0]):
        size = 0
        corner = np.empty(upper[i] - lower[i] + 1, np.int64)  # corners of the hull so far
        slope = np.empty(upper[i] - lower[i] + 1)  # of the piece that ends at each
        corner[0], slope[0] = lower[i], np.inf
        value = np.zeros(upper[i] - lower[i] + 1)
        for n in range(lower[i], upper[i]):
            value[n + 1 - lower[i]] = value[n - lower[i]] + table[i, n]
        for n in range(lower[i] + 1, upper[i] + 1):
            while True:
                start = corner[size]
                piece = (value[n - lower[i]] - value[start - lower[i]]) / (n - start)
                if n - start == 1:
                    piece = table[i, start]
                if piece < slope[size]:
                    break
                size -= 1
            size += 1
            corner[size], slope[size] = n, piece
        for k in range(1, size + 1):
            hull[i, corner[k - 1] : corner[k]] = slope[k]
    return hull


@njit(cache=True)
def _comes_before(a, b, key, tier, count, priority):  # pragma: no cover - compiled
    """The documented order of rollouts: value (per cost), tier, rollouts held, priority, position."""
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
def fill(rows, cost, count, upper, room, candidates, tier, priority):  # pragma: no cover - compiled
    """Raise the candidates' counts, best density first, by what still fits the room; return the room left."""
    weight, first, second, table = rows
    key = np.zeros(count.size)
    heap = candidates.copy()
    size = 0
    for i in candidates:
        if count[i] < upper[i] and cost[i] <= room:
            key[i] = marginal(weight, first, second, table, i, count[i], upper[i])
            heap[size] = i
            size += 1
    for start in range(size // 2 - 1, -1, -1):
        _sift_down(heap, size, start, key, tier, count, priority)
    while size > 0:
        best = heap[0]
        if key[best] <= 0.0:
            break
        stays = cost[best] <= room
        if stays:
            room -= cost[best]
            count[best] += 1
            stays = count[best] < upper[best]
        if stays:
            key[best] = marginal(weight, first, second, table, best, count[best], upper[best])
        else:
            size -= 1
            heap[0] = heap[size]
        _sift_down(heap, size, 0, key, tier, count, priority)
    return room


@njit(cache=True)
def search(loss, cost, room, density, gap, most_states):  # pragma: no cover - compiled
    """Deviations from the base that leave the smallest gap: dynamic programming over undominated (cost, loss) states.

    Args:
        loss: (R, 2 reach + 1) of the rows, most promising first; column reach is the base.
        cost: (R,) of a rollout.
        room: what the base leaves of the budget.
        density: what a unit of the budget left is worth.
        gap: of the best solution known.
        most_states: states looked at before the search gives up.

    Returns:
        (R,) deviations (all zero if nothing better was found), their gap, whether the search was exhaustive.
    """
    rows, width = loss.shape
    reach = width // 2
    # Least loss per unit of cost, upwards and downwards, that rows k, k+1, ... can offer.
    rate_up, rate_down = np.full(rows + 1, density), np.full(rows + 1, np.inf)
    for k in range(rows - 1, -1, -1):
        rate_up[k], rate_down[k] = rate_up[k + 1], rate_down[k + 1]
        for step in range(1, reach + 1):
            rate_up[k] = min(rate_up[k], loss[k, reach + step] / (step * cost[k]))
            rate_down[k] = min(rate_down[k], loss[k, reach - step] / (step * cost[k]))
    parent, taken = np.zeros(most_states, np.int64), np.zeros(most_states, np.int64)  # of every state ever kept
    pool = 1
    spent, lost = np.zeros(1), np.zeros(1)
    first = 0  # where the newest states start in the pool
    best_state, best_row, best_gap = -1, -1, gap
    deviation = np.zeros(rows, np.int64)
    exhaustive = True
    for k in range(rows):
        options = np.flatnonzero(loss[k] < best_gap)
        size = 0
        capacity = spent.size * options.size
        if capacity > 4 * most_states:
            exhaustive = False
            break
        new_spent, new_lost = np.empty(capacity), np.empty(capacity)
        origin = np.empty(capacity, np.int64)
        for s in range(spent.size):
            for option in options:
                total_spent = spent[s] + (option - reach) * cost[k]
                total_lost = lost[s] + loss[k, option]
                over = total_spent - room
                bound = total_lost + (rate_down[k + 1] * over if over > 0.0 else -rate_up[k + 1] * over)
                if not bound < best_gap:  # NaN, too: nothing can bring it back
                    continue
                new_spent[size], new_lost[size] = total_spent, total_lost
                origin[size] = s * width + option
                size += 1
        # A state that costs no more and is worth no less makes another one superfluous.
        order = np.argsort(new_spent[:size], kind="mergesort")
        kept = 0
        worth = -np.inf
        for at in order:
            gain = density * new_spent[at] - new_lost[at]
            if gain <= worth:
                continue
            worth = gain
            order[kept] = at
            kept += 1
        if pool + kept > most_states:
            exhaustive = False
            break
        keep = order[:kept]
        for j in range(kept):
            at = keep[j]
            parent[pool + j] = first + origin[at] // width
            taken[pool + j] = origin[at] % width - reach
            if new_spent[at] <= room:
                reached = new_lost[at] + density * (room - new_spent[at])
                if reached < best_gap:
                    best_gap, best_state, best_row = reached, pool + j, k
        spent, lost = new_spent[keep], new_lost[keep]
        first = pool
        pool += kept
        if kept == 0:
            break
    state = best_state
    for k in range(best_row, -1, -1):
        deviation[k] = taken[state]
        state = parent[state]
    return deviation, best_gap, exhaustive


@njit(cache=True)
def next_values(rows, count, upper, chosen):  # pragma: no cover - compiled
    """Marginal value of the next rollout of the chosen rows, whose counts are below their upper bounds."""
    weight, first, second, table = rows
    found = np.empty(chosen.size)
    for k in range(chosen.size):
        i = chosen[k]
        found[k] = marginal(weight, first, second, table, i, count[i], upper[i])
    return found


@njit(cache=True)
def margins(rows, cost, base, lower, upper, density, reach):  # pragma: no cover - compiled
    """Least loss of every row by another count than its base, at most ``reach`` away; inf where there is none."""
    found = np.empty(base.size)
    one = np.empty(1, np.int64)
    for i in range(base.size):
        one[0] = i
        loss = losses(rows, cost, base, lower, upper, one, density, reach)
        loss[0, reach] = np.inf
        found[i] = loss.min()
    return found
