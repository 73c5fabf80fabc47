"""The paper's dynamic program, to compare optima and time with the solver."""

from __future__ import annotations

import numba
import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray


@numba.njit  # not cached: a cache holds the name by which this module was imported
def paper_dynamic_program(values: FloatArray, budget: int, low: int, high: int) -> IntArray:
    """Loop over prompts, budgets and rollouts, as the paper describes its solver: O(M B N_up).

    Args:
        values: (M, K+1) V[i, n], with K >= ``high``.
        budget: rollouts to hand out, within [M low, M high]; not checked.
        low: N_low of every prompt.
        high: N_up of every prompt.

    Returns:
        (M,) counts that sum to the budget.

    Source: Li et al., arXiv 2509.25849, section 3 (compiled with numba there, too).
    """
    prompts = values.shape[0]
    best = np.full((prompts + 1, budget + 1), -np.inf)
    choice = np.zeros((prompts + 1, budget + 1), np.int64)
    best[0, 0] = 0.0
    for i in range(1, prompts + 1):
        for spent in range(budget + 1):
            for n in range(low, min(high, spent) + 1):
                candidate = best[i - 1, spent - n] + values[i - 1, n]
                if candidate > best[i, spent]:
                    best[i, spent] = candidate
                    choice[i, spent] = n
    counts = np.zeros(prompts, np.int64)
    spent = budget
    for i in range(prompts, 0, -1):
        counts[i - 1] = choice[i, spent]
        spent -= counts[i - 1]
    return counts
