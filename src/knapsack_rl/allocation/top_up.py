"""The second round of a step: the rest of its budget, after the outcomes of a first share."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation import solver
from knapsack_rl.allocation.belief import Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray, check_counts
from knapsack_rl.allocation.costs import Certificate
from knapsack_rl.allocation.policies import Allocation, padded


def top_up(belief: Belief, counts: IntArray, budget: int, max_rollouts: int, priority: FloatArray) -> Allocation:
    """Allocate the rest of a step's budget exactly, after the outcomes of a first share.

    Rollouts without value for any group are spread evenly. If the budget exceeds the room below ``max_rollouts``, the
    maximum is raised.

    Args:
        belief: belief after these outcomes; its marginals are those of further rollouts.
            The counts are those of a wider table if none of them reaches the last column.
        counts: (M,) rollouts so far.
        budget: rollouts to hand out.
        max_rollouts: N_up, of both shares together.
        priority: (M,) tie-break, lower first.

    Returns:
        Additional counts; predictions are about both shares together.
    """
    raised = int(np.maximum(max_rollouts - counts, 0).sum()) < budget
    note = f"max_rollouts {max_rollouts} is too low for the rest of the budget: raised" if raised else ""
    room = room_left(counts, budget, max_rollouts)
    within = np.minimum(room, belief.marginals.shape[1])
    room = within if int(within.sum()) >= budget else room
    table = padded(belief.marginals, room)
    extra = _with_new_groups(table, (counts == 0) & (table[:, :2].sum(axis=1) > 0.0), budget, room, priority)
    value = solver.total_value(table, extra)
    return Allocation(
        extra,
        value,
        note,
        degraded=raised,
        success_rates=belief.mean,
        nonzero_gradient=belief.nonzero_gradient(extra),
        certificate=Certificate(value, value),
    )


def _with_new_groups(
    table: FloatArray, empty: NDArray[np.bool_], budget: int, room: IntArray, priority: FloatArray
) -> IntArray:
    """Return the optimum of rows that fall, except that the first rollout of an empty group has no value.

    The concave hull of such a row has a level start, up to the most value per rollout. The greedy on the hulls is
    optimal unless it leaves groups within that start. Then fewer of these groups share what they had: every number of
    them is tried, the most value per rollout first. For a value of mixed outcomes, whose third rollout gains half as
    much as the first two, this is the optimum: to change any other group by more than a rollout costs more. For other
    values it is within the value of one group.

    Args:
        table: (M, K) marginal values of further rollouts.
        empty: (M,) groups without rollouts, of positive value.
        budget: rollouts to hand out, at most the sum of the room.
        room: (M,) most further rollouts per group, at most K.
        priority: (M,) tie-break, lower first.
    """
    if not empty.any() or table.shape[1] < 2:
        return solver.solve(table, budget, 0, room, priority=priority)
    rollouts = np.arange(1, table.shape[1] + 1)
    each = np.where(rollouts <= room[empty, None], np.cumsum(table[empty], axis=1) / rollouts, 0.0)
    start, slope = np.zeros_like(room), np.zeros(room.size)
    start[empty], slope[empty] = each.argmax(axis=1) + 1, each.max(axis=1)
    hull = np.where(rollouts <= start[:, None], slope[:, None], table)
    hull[empty, 1:] = np.minimum(hull[empty, 1:], hull[empty, :1])  # rounding may make the rest rise
    level = solver.solve(hull, budget, 0, room, priority=priority)
    within = (level > 0) & (level < start)
    if not within.any():
        return level
    by_value = np.flatnonzero(empty)[np.lexsort((priority[empty], -slope[empty]))]
    whole, shared, plans = int((empty & (level >= start)).sum()), int(level[within].sum()), [level]
    for served in range(whole + shared // int(start[within].max()), whole + shared // 2 + 2):
        low, high = np.zeros_like(room), np.where(empty, 0, room)
        low[by_value[:served]], high[by_value[:served]] = 2, room[by_value[:served]]
        if int(low.sum()) <= budget <= int(high.sum()) and (low <= high).all():
            plans.append(solver.solve(table, budget, low, high, priority=priority))
    return max(reversed(plans), key=lambda plan: solver.total_value(table, plan))


def room_left(counts: IntArray, budget: int, max_rollouts: int) -> IntArray:
    """Return (M,) rollouts that each group may still get: up to the maximum, or evenly beyond it if too few.

    No group can get more than the budget.
    """
    room = np.minimum(np.maximum(max_rollouts - counts, 0), budget)
    missing = budget - int(room.sum())
    return room + math.ceil(missing / counts.size) if missing > 0 else room


def check_outcomes(counts: ArrayLike, successes: ArrayLike, prompts: int) -> tuple[IntArray, IntArray]:
    """Return counts and successes of a first share as (M,) whole numbers.

    Raises:
        ValueError: they do not match the prompts or each other.
    """
    n, s = check_counts(counts), check_counts(successes)
    if n.shape != (prompts,) or s.shape != (prompts,) or (s > n).any():
        raise ValueError(
            f"counts_so_far and successes_so_far must hold one number per prompt ({prompts}), successes at most the "
            f"counts, got shapes {n.shape} and {s.shape}"
        )
    return n, s
