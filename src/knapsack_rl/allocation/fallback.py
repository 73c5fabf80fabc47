"""Classes of prompts, the budget that nobody values, and the paper's fallback rule."""

from __future__ import annotations

import math

import numpy as np

from knapsack_rl.allocation import solver
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.rows import Rows
from knapsack_rl.allocation.value import rollouts_for_probability

FALLBACK_PROBABILITY = 0.9
"""The paper's alpha: an effective prompt is served once its non-zero gradient is this likely."""

# Classes of a success rate, in the order in which they receive budget that no prompt values.
UNSOLVED, UNSEEN, SOLVED, EFFECTIVE = range(4)


def paper_rule(
    rates: FloatArray,
    kind: IntArray,
    rows: Rows,
    budget: int,
    lower: IntArray,
    upper: IntArray,
    priority: FloatArray,
    method: solver.Method,
) -> tuple[IntArray, str]:
    """The paper's fallback strategy; every bound holds and every rollout is spent."""
    effective, unseen = kind == EFFECTIVE, kind == UNSEEN
    counts = lower.copy()
    uniform = np.clip(budget // rates.size, lower[unseen], upper[unseen])
    # Per-prompt minima of the others may leave less than the uniform share.
    room = budget - int(lower[~unseen].sum())
    counts[unseen] = spread(min(int(uniform.sum()), room), lower[unseen], uniform, kind[unseen], priority[unseen])
    available = budget - int(counts[~effective].sum())
    if (kind == UNSOLVED).any() or (kind == SOLVED).any():
        # A prompt is served at its need, which no bound may contradict.
        need = rollouts_for_probability(rates[effective], FALLBACK_PROBABILITY)
        need = np.clip(need, lower[effective], upper[effective])
        spend = min(available, math.ceil(need.sum()))
    else:
        spend = min(available, int(upper[effective].sum()))  # nobody to fall back on
    if effective.any():
        counts[effective] = solver.solve(
            rows.take(effective), spend, lower[effective], upper[effective], method=method, priority=priority[effective]
        )
    surplus = budget - int(counts.sum())
    if surplus == 0:
        return counts, ""
    order = np.array([0, 3, 1, 2])  # tier of UNSOLVED, UNSEEN, SOLVED, EFFECTIVE
    filled = spread(budget, counts, upper, order[kind], priority)
    receivers = by_class(filled - counts, kind)
    return filled, f"fallback: {surplus} rollouts beyond the need of the effective prompts went to {receivers}"


def spread(budget: int, counts: IntArray, upper: IntArray, tier: IntArray, priority: FloatArray) -> IntArray:
    """Raise counts evenly to the budget, tier by tier, within the caps: the solver's tie rule."""
    from knapsack_rl.allocation._selection import share_out

    raised = counts.copy()
    share_out(raised, upper, budget - int(counts.sum()), tier, priority)
    return raised


def by_class(extra: IntArray, kind: IntArray) -> str:
    """Which prompts got something, in words: "2 unsolved, 1 solved prompts"."""
    names = {UNSOLVED: "unsolved", UNSEEN: "unseen", SOLVED: "solved", EFFECTIVE: "effective"}
    parts = [f"{int((extra[kind == k] > 0).sum())} {name}" for k, name in names.items() if (extra[kind == k] > 0).any()]
    return ", ".join(parts) + " prompts"
