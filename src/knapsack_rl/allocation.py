"""Allocation policy: from what is known of the prompts to rollouts per prompt.

Two policies use the one solver. :func:`allocate` takes success rates as known (with the paper's fallback rule on
request); :func:`allocate_expected` takes posterior-expected marginal values, for which no special rule is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl import solver
from knapsack_rl.value import (
    FloatArray,
    IntArray,
    check_success_rates,
    check_whole,
    marginal_values,
    rollouts_for_probability,
)

FALLBACK_PROBABILITY = 0.9
"""The paper's alpha: an effective prompt is served once its non-zero gradient is this likely."""

# Classes of a success rate, in the order in which they receive budget that no prompt values.
UNSOLVED, UNSEEN, SOLVED, EFFECTIVE = range(4)


@dataclass(frozen=True, eq=False)
class Allocation:
    """How many rollouts each prompt of a batch gets.

    Attributes:
        counts: (M,) int64 rollouts per prompt, in the order of the batch.
        expected_value: the objective at these counts: sum of V(N_i, p_i), or of its posterior expectation.
        reason: what happened beside the plain optimum (fallback, left-over budget, degradation), "" if nothing.
        degraded: whether the bounds had to be changed to make the batch feasible.
        success_rates: (M,) rates it was made from; for the stateful allocator the estimates, NaN for unseen prompts.
        nonzero_gradient: (M,) predicted probability of a non-zero gradient at these counts; the stateful allocator
            sets it, and NaN in it stands for an unseen prompt.
    """

    counts: IntArray
    expected_value: float
    reason: str = ""
    degraded: bool = False
    success_rates: FloatArray | None = None
    nonzero_gradient: FloatArray | None = None

    def expand(self) -> IntArray:
        """(budget,) int64 prompt index of each rollout; the rollouts of a prompt stand together."""
        return np.repeat(np.arange(self.counts.size), self.counts)


def allocate(
    success_rates: ArrayLike,
    budget: int,
    min_rollouts: ArrayLike = 2,
    max_rollouts: ArrayLike = 128,
    *,
    fallback: bool = False,
    method: solver.Method = "auto",
) -> Allocation:
    """Allocate a rollout budget over prompts whose success rates are known: maximise sum V(N_i, p_i).

    The optimum is exact. An unseen prompt (NaN) is valued as a prompt drawn from the other rates of the batch; with
    no other rate known, all prompts are alike and the allocation is uniform. Budget that no prompt values (all at
    p = 0, p = 1 or at their cap) goes evenly to unsolved prompts, then to unseen, then to solved ones. Equal marginal
    values go to the prompt with fewer rollouts, then to the one with the lower success rate; counts do not depend on
    the order of the prompts.

    Args:
        success_rates: (M,) in [0, 1]; NaN for an unseen prompt.
        budget: total rollouts, within [sum of minima, sum of maxima].
        min_rollouts: N_low, a whole number or (M,). 0 allows skipping and makes the problem non-concave, so it is
            solved by dynamic programming, O(M budget max_rollouts).
        max_rollouts: N_up, a whole number or (M,).
        fallback: apply the paper's rule instead: unseen prompts get the uniform budget, solved and unsolved ones
            N_low, and what the effective prompts do not need for a non-zero gradient with probability 0.9 goes evenly
            to the unsolved prompts, or to the solved ones if there are none.
        method: see :func:`knapsack_rl.solver.solve`.

    Raises:
        ValueError: a rate is outside [0, 1], a number is not whole, or the bounds make the budget infeasible.

    Source: paper, section 3 (knapsack) and its fallback strategy.

    >>> allocate([0.5, 0.1, 1.0, 0.0], budget=32).counts.tolist()
    [7, 21, 2, 2]
    """
    rates = check_success_rates(success_rates, allow_nan=True)
    if rates.ndim != 1 or rates.size == 0:
        raise ValueError(f"success_rates must be a non-empty one-dimensional array, got shape {rates.shape}")
    budget = check_whole("budget", budget, minimum=0)
    lower, upper = solver.check_bounds(rates.size, budget, min_rollouts, max_rollouts)
    unseen = np.isnan(rates)
    kind = np.where(unseen, UNSEEN, np.where(rates == 0.0, UNSOLVED, np.where(rates == 1.0, SOLVED, EFFECTIVE)))
    priority = np.where(unseen, 2.0, rates)
    table = marginal_values(np.where(unseen, 0.0, rates), max(int(upper.max()), 1))
    if fallback:
        counts, reason = _paper_rule(rates, kind, table, budget, lower, upper, priority, method)
    else:
        if unseen.any() and not unseen.all():
            table[unseen] = table[~unseen].mean(axis=0)
        counts, reason = _optimum(kind, table, budget, lower, upper, priority, method)
    return Allocation(counts, solver.total_value(table, counts), reason, success_rates=rates)


def allocate_expected(
    marginals: FloatArray,
    budget: int,
    min_rollouts: int,
    max_rollouts: int,
    *,
    priority: ArrayLike | None = None,
) -> Allocation:
    """Allocate by posterior-expected marginal values; an infeasible batch degrades instead of raising.

    A mixture of concave values is concave, so the greedy optimum stays exact (``docs/method.md``: expectation keeps
    concavity). See :func:`feasible_bounds` for the order of degradation.

    Args:
        marginals: (M, K >= 2) E[D(n)] per prompt; columns beyond K count as 0.
        budget: total rollouts, >= 0.
        min_rollouts: N_low.
        max_rollouts: N_up.
        priority: (M,) last tie-break, lower first; a stable hash of the prompt ids makes the result independent of
            their order.
    """
    if priority is None:
        priority = np.zeros(marginals.shape[0])
    lower, upper, degradation = feasible_bounds(budget, min_rollouts, max_rollouts, marginals, priority)
    width = max(int(upper.max(initial=0)), 1)
    if width > marginals.shape[1]:
        marginals = np.pad(marginals, ((0, 0), (0, width - marginals.shape[1])))
    counts = solver.solve(marginals, budget, lower, upper, priority=priority)
    return Allocation(counts, solver.total_value(marginals, counts), degradation, degraded=bool(degradation))


def feasible_bounds(
    budget: int, min_rollouts: int, max_rollouts: int, marginals: FloatArray, priority: ArrayLike
) -> tuple[IntArray, IntArray, str]:
    """Bounds under which the budget can be met, and what had to give way ("" if nothing).

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


def _paper_rule(
    rates: FloatArray,
    kind: IntArray,
    table: FloatArray,
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
    counts[unseen] = _spread(min(int(uniform.sum()), room), lower[unseen], uniform, kind[unseen], priority[unseen])
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
            table[effective], spend, lower[effective], upper[effective], method=method, priority=priority[effective]
        )
    surplus = budget - int(counts.sum())
    if surplus == 0:
        return counts, ""
    order = np.array([0, 3, 1, 2])  # tier of UNSOLVED, UNSEEN, SOLVED, EFFECTIVE
    filled = _spread(budget, counts, upper, order[kind], priority)
    receivers = _by_class(filled - counts, kind)
    return filled, f"fallback: {surplus} rollouts beyond the need of the effective prompts went to {receivers}"


def _optimum(
    kind: IntArray,
    table: FloatArray,
    budget: int,
    lower: IntArray,
    upper: IntArray,
    priority: FloatArray,
    method: solver.Method,
) -> tuple[IntArray, str]:
    """The knapsack over the prompts that have a value; what they cannot take is spread over the others."""
    valued = table[:, 1] > 0.0 if table.shape[1] > 1 else np.zeros(kind.size, bool)  # the largest marginal of a row
    if lower.min() >= 1 and method != "dynamic-programming":
        # Concave: the greedy's tie rule hands out what no prompt values, evenly and class by class.
        counts = solver.solve(table, budget, lower, upper, method=method, tier=kind, priority=priority)
        extra = np.where(valued, 0, counts - lower)
    else:
        spend = min(budget - int(lower[~valued].sum()), int(upper[valued].sum()))
        counts = lower.copy()
        if valued.any():
            counts[valued] = solver.solve(
                table[valued],
                spend,
                lower[valued],
                upper[valued],
                method=method,
                tier=kind[valued],
                priority=priority[valued],
            )
        filled = _spread(budget, counts, upper, kind, priority)
        counts, extra = filled, filled - counts
    left = int(extra.sum())
    return counts, f"{left} rollouts that no prompt values went to {_by_class(extra, kind)}" if left else ""


def _spread(budget: int, counts: IntArray, upper: IntArray, tier: IntArray, priority: FloatArray) -> IntArray:
    """Raise counts evenly to the budget, tier by tier, within the caps: the solver's tie rule on an all-zero table."""
    worthless = np.zeros((counts.size, max(int(upper.max(initial=0)), 1)))
    return solver.solve(worthless, budget, counts, upper, tier=tier, priority=priority)


def _by_class(extra: IntArray, kind: IntArray) -> str:
    names = {UNSOLVED: "unsolved", UNSEEN: "unseen", SOLVED: "solved", EFFECTIVE: "effective"}
    parts = [f"{int((extra[kind == k] > 0).sum())} {name}" for k, name in names.items() if (extra[kind == k] > 0).any()]
    return ", ".join(parts) + " prompts"
