"""Even counts, and the order in which bounds are widened if the bounds and the budget of a batch contradict each other.

Allocation never ends a run: bounds are widened in the order given here, and the reason is reported.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, IntArray

FIRST_SHARE = 0.5
"""Share of a step's rollouts that go to all prompts alike in the first of two rounds."""


def feasible_bounds(
    budget: int, min_rollouts: int, max_rollouts: int, marginals: FloatArray, priority: ArrayLike
) -> tuple[IntArray, IntArray, str]:
    """Return bounds under which the budget can be met, and what was changed ("" if nothing).

    1. A budget below M N_low lowers the minimum to ``budget // M``.
    2. If that is below two, a group could not hold both outcomes: the prompts with the largest value of a pair get
       two rollouts each as far as the budget goes, the others none (an odd rollout makes one group three).
    3. A budget above M N_up raises the maximum to ``ceil(budget / M)``.
    """
    prompts = marginals.shape[0]
    lower, upper = np.full(prompts, min_rollouts), np.full(prompts, max_rollouts)
    if prompts == 0 or prompts * min_rollouts <= budget <= prompts * max_rollouts:
        return lower, upper, ""
    if budget > prompts * max_rollouts:
        raised = math.ceil(budget / prompts)
        upper[:] = raised
        excess = f"budget {budget} exceeds {prompts} prompts x {max_rollouts}"
        return lower, upper, f"{excess}: max_rollouts raised to {raised}"
    shortage = f"budget {budget} is below {prompts} prompts x {min_rollouts}"
    lowered = budget // prompts
    if lowered >= 2:
        lower[:] = lowered
        return lower, upper, f"{shortage}: min_rollouts lowered to {lowered}"
    pairs = budget // 2
    by_value = np.lexsort((np.asarray(priority), -marginals[:, :2].sum(axis=1)))
    served = by_value[: max(pairs, min(budget, 1))]
    lower[:], upper[:] = 0, 0
    lower[served] = min(budget, 2)
    upper[served[:1]] = 3 if pairs else budget
    upper[served[1:]] = 2
    return lower, upper, f"{shortage}: {served.size} prompts served, the others skipped"


def reachable_maximum(budget: int, prompts: int, min_rollouts: int, max_rollouts: int) -> int:
    """Return the most rollouts that one prompt of a batch can get: N_up, or what the minima of the others leave.

    Under a larger maximum the counts are the same, so no table of values needs more columns.
    """
    least = min(min_rollouts, budget // prompts)
    odd_group = 3  # where the budget pays for pairs only
    return min(max_rollouts, max(budget - (prompts - 1) * least, odd_group))


def affordable_minimum(
    budget: float, min_rollouts: int, costs: FloatArray, marginals: FloatArray, priority: ArrayLike
) -> tuple[IntArray, str]:
    """Return (M,) minima that a budget of costs pays for, and what was changed ("" if nothing).

    1. A budget that does not pay for N_low rollouts of every prompt lowers the minimum to what it pays for.
    2. If that is below two, pairs go to the prompts with the largest value of a pair per cost as far as the budget
       goes; the others get none.
    """
    prompts = costs.size
    lower = np.full(prompts, min_rollouts)
    every = float(costs.sum())
    if min_rollouts * every <= budget:
        return lower, ""
    shortage = f"a budget of {budget:g} does not pay for {min_rollouts} rollouts of {prompts} prompts"
    lowered = int(budget // every)
    if lowered >= 2:
        lower[:] = lowered
        return lower, f"{shortage}: min_rollouts lowered to {lowered}"
    lower[:] = 0
    left = budget
    for i in np.lexsort((np.asarray(priority), -marginals[:, :2].sum(axis=1) / costs)):
        if 2.0 * costs[i] <= left:
            lower[i] = 2
            left -= 2.0 * costs[i]
    return lower, f"{shortage}: {int((lower > 0).sum())} prompts served, the others skipped"


def uniform_counts(prompts: int, budget: int) -> IntArray:
    """Return (M,) equal counts that sum to the budget; the remainder goes to the first prompts."""
    each, extra = divmod(budget, max(prompts, 1))
    return each + (np.arange(prompts) < extra)


def first_share(rows: int, mean: int, min_rollouts: int, multiple: int) -> int:
    """Return the rollouts of the first of two rounds: about half, as many for each row, and at least two.

    Args:
        rows: of the batch.
        mean: rollouts per row in both rounds.
        min_rollouts: fewest rollouts of a prompt.
        multiple: of which the result is one, as is ``rows * mean``.
    """
    each = max(int(FIRST_SHARE * mean), min_rollouts, 2)
    return min(-(-rows * each // multiple) * multiple, rows * mean)


def evenly(budget: int, min_rollouts: int, priority: FloatArray) -> IntArray:
    """Return equal counts for all, or the minimum for as many prompts as the budget serves; this cannot fail.

    Args:
        budget: total rollouts.
        min_rollouts: N_low.
        priority: (M,) who is served first, lower first.
    """
    served = min(priority.size, budget // max(min_rollouts, 1)) or 1
    counts = np.zeros(priority.size, np.int64)
    counts[np.argsort(priority, kind="stable")[:served]] = uniform_counts(served, budget)
    return counts


def joined(*reasons: str) -> str:
    """Return the reasons that are not empty, in one line."""
    return "; ".join(filter(None, reasons))
