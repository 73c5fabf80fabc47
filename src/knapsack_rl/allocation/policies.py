"""Allocation policies: from success rates or beliefs to rollouts per prompt.

All policies use one solver. :func:`allocate` takes success rates as known, optionally with the paper's fallback rule;
:func:`allocate_estimated` does the same with estimates in a run, where it degrades instead of raising;
:func:`allocate_expected` takes posterior-expected marginal values and needs no special rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation import solver
from knapsack_rl.allocation.checks import FloatArray, IntArray, check_success_rates, check_whole
from knapsack_rl.allocation.costs import Certificate, check_affordable, check_costs, solve_with_costs
from knapsack_rl.allocation.degradation import affordable_minimum, feasible_bounds, joined
from knapsack_rl.allocation.marginals import Marginals
from knapsack_rl.allocation.value import ValueLike, rollouts_for_probability

FALLBACK_PROBABILITY = 0.9
"""The paper's alpha: an effective prompt needs no more rollouts once a non-zero gradient is this likely."""

LARGEST_BUDGET = 2**28
"""Largest budget of :func:`allocate`; memory grows with it, and a mistaken number must not fill it."""

# Classes of success rates, in the order in which they receive budget that has no value for any prompt.
UNSOLVED, UNSEEN, SOLVED, EFFECTIVE = range(4)


@dataclass(frozen=True, eq=False)
class Allocation:
    """How many rollouts each prompt of a batch gets.

    Attributes:
        counts: (M,) int64 rollouts per prompt, in the order of the batch.
        expected_value: the objective at these counts: sum of V(N_i, p_i), or of its posterior expectation.
        reason: deviations from the plain optimum (fallback, left-over budget, degradation), "" if none.
        degraded: whether the bounds had to be changed to make the batch feasible.
        success_rates: (M,) rates used; for the stateful allocator the estimates, NaN for unseen prompts.
        nonzero_gradient: (M,) predicted probability of a non-zero gradient at these counts, NaN for an unseen prompt;
            the stateful allocator sets it.
        certificate: the value and a bound on the value of any counts within budget and bounds; None where the counts
            are not meant to be an optimum (the paper's fallback rule, counts given from outside).
    """

    counts: IntArray
    expected_value: float
    reason: str = ""
    degraded: bool = False
    success_rates: FloatArray | None = None
    nonzero_gradient: FloatArray | None = None
    certificate: Certificate | None = None

    def expand(self) -> IntArray:
        """Return (budget,) int64 prompt index of each rollout; the rollouts of a prompt are adjacent."""
        return np.repeat(np.arange(self.counts.size), self.counts)

    def rearranged(self, places: IntArray) -> Allocation:
        """Return the allocation of the prompts at (M,) ``places``."""
        rates, nonzero = self.success_rates, self.nonzero_gradient
        return replace(
            self,
            counts=self.counts[places],
            success_rates=None if rates is None else rates[places],
            nonzero_gradient=None if nonzero is None else nonzero[places],
        )


def unpredicted(counts: IntArray, reason: str, *, degraded: bool = False) -> Allocation:
    """Return an allocation without predictions: its value and predictions are NaN."""
    unknown = np.full(counts.size, np.nan)
    return Allocation(counts, float("nan"), reason, degraded, success_rates=unknown, nonzero_gradient=unknown.copy())


def allocate(
    success_rates: ArrayLike,
    budget: float,
    min_rollouts: ArrayLike = 2,
    max_rollouts: ArrayLike = 128,
    *,
    costs: ArrayLike | None = None,
    value: ValueLike | ArrayLike = "knapsack",
    fallback: bool = False,
    method: solver.Method = "auto",
) -> Allocation:
    """Allocate a rollout budget over prompts whose success rates are known: maximise sum V(N_i, p_i).

    The optimum is exact. An unseen prompt (NaN) is valued as a prompt drawn from the other rates of the batch; if no
    rate is known, the allocation is uniform. Budget without value for any prompt (all at p = 0, p = 1 or their cap)
    goes evenly to unsolved prompts, then to unseen, then to solved ones; a rate whose square is 0 as a double (below
    1e-162) counts as unsolved there. Equal marginal values go to the prompt with
    fewer rollouts, then to the one with the lower success rate; counts do not depend on the order of the prompts.

    Args:
        success_rates: (M,) in [0, 1]; NaN for an unseen prompt.
        budget: total rollouts, within [sum of minima, sum of maxima], at most 2^28.
        min_rollouts: N_low, a whole number or (M,). 0 allows skipping and makes the problem non-concave, so it is
            solved by dynamic programming, O(M budget max_rollouts).
        max_rollouts: N_up, a whole number or (M,).
        costs: (M,) > 0, cost of a rollout of each prompt: expected tokens, seconds, environment steps. ``budget`` is
            then a number in the same unit, which the costs of all rollouts must not exceed; budget that would buy
            nothing of value stays unspent. ``Allocation.certificate`` bounds the distance from the optimum.
        value: the value of N rollouts: a name of :data:`knapsack_rl.allocation.value.VALUES`, ``"power-A-B"``
            for the gain p^A (1-p)^B, an import path ``"package.module:function"``, a function
            ``f(counts, success_rates)`` that broadcasts like numpy and is 0 for no rollouts, an object with the methods
            of ``ValueFunction`` there, or an (M, K+1) table V[i, n] with V[i, 0] = 0. Values that are not concave go to
            dynamic programming; ``reason`` says so. Named values need little memory at any number of prompts.
        fallback: apply the paper's rule instead: unseen prompts get the uniform budget, solved and unsolved ones
            N_low, and budget that the effective prompts do not need for a non-zero gradient with probability 0.9 goes
            evenly to the unsolved prompts, or to the solved ones if there are none.
        method: see :func:`knapsack_rl.allocation.solver.solve`.

    Raises:
        ValueError: a rate is outside [0, 1], a number is not whole, or the budget does not fit the bounds.

    Source: paper, section 3 (knapsack) and its fallback strategy.

    >>> allocate([0.5, 0.1, 1.0, 0.0], budget=32).counts.tolist()
    [7, 21, 2, 2]
    """
    rates = check_success_rates(success_rates, allow_nan=True)
    if rates.ndim != 1 or rates.size == 0:
        raise ValueError(f"success_rates must be a non-empty one-dimensional array, got shape {rates.shape}")
    # Below 1e-162 the paper's value, about p^2, is no double above 0; its fallback rule compares with 0 itself.
    unsolved = rates == 0.0 if fallback else rates * rates == 0.0
    kind = np.select([unsolved, np.isnan(rates), rates == 1.0], [UNSOLVED, UNSEEN, SOLVED], EFFECTIVE)
    if costs is None:
        rollouts = check_whole("budget", budget, minimum=0)
        lower, upper = solver.check_bounds(rates.size, rollouts, min_rollouts, max_rollouts)
        if rollouts > LARGEST_BUDGET:
            raise ValueError(f"budget must be at most {LARGEST_BUDGET} rollouts, got {budget}; split the prompts")
    else:
        if fallback or method != "auto":
            raise ValueError(f"with costs, fallback must be False and method 'auto', got {fallback!r} and {method!r}")
        price = check_costs(costs, rates.size)
        lower, upper = check_affordable(price, budget, min_rollouts, max_rollouts)
    solver.check_method(method)
    if fallback and not (isinstance(value, str) and value == "knapsack"):
        raise ValueError(f"fallback=True is the paper's rule for value='knapsack', got value={value!r}; choose one")
    # In a tie, unseen prompts come last.
    priority = np.where(kind == UNSEEN, 2.0, rates)
    marginals = Marginals(value, rates, int(upper.max()))
    if costs is not None:
        return _priced(marginals.table(), price, budget, lower, upper, kind, priority, rates)
    if fallback:
        counts, reason = _paper_rule(rates, kind, marginals, rollouts, lower, upper, priority, method)
    else:
        counts, reason = _optimum(kind, marginals, rollouts, lower, upper, priority, method)
    total = marginals.total(counts)
    certificate = None if fallback else Certificate(total, total)
    return Allocation(counts, total, reason, success_rates=rates, certificate=certificate)


def _optimum(
    kind: IntArray,
    marginals: Marginals,
    budget: int,
    lower: IntArray,
    upper: IntArray,
    priority: FloatArray,
    method: solver.Method,
) -> tuple[IntArray, str]:
    """Solve the knapsack over the prompts with a value, and spread what they cannot take over the others."""
    valued, concave = marginals.valued(), marginals.concave(lower, upper)
    if concave and method != "dynamic-programming":
        # The tie rule of the greedy hands out rollouts without value evenly, class by class.
        counts = marginals.solve(np.ones(kind.size, bool), budget, lower, upper, kind, priority, method)
        return counts, _gift(np.where(valued, 0, counts - lower), kind)
    note = "" if concave else "the values are not concave: solved by dynamic programming"
    spend = min(budget - int(lower[~valued].sum()), int(upper[valued].sum()))
    counts = lower.copy()
    if valued.any():
        counts[valued] = marginals.solve(
            valued, spend, lower[valued], upper[valued], kind[valued], priority[valued], method
        )
    filled = solver.share_out(counts, upper, budget, kind, priority)
    return filled, joined(note, _gift(filled - counts, kind))


def _gift(extra: IntArray, kind: IntArray) -> str:
    """Describe which prompts got rollouts without value; "" if none did."""
    left = int(extra.sum())
    return f"{left} rollouts that no prompt values went to {_by_class(extra, kind)}" if left else ""


def _by_class(extra: IntArray, kind: IntArray) -> str:
    """Describe which prompts got extra rollouts: "2 unsolved, 1 solved prompts"."""
    names = {UNSOLVED: "unsolved", UNSEEN: "unseen", SOLVED: "solved", EFFECTIVE: "effective"}
    parts = [f"{int((extra[kind == k] > 0).sum())} {name}" for k, name in names.items() if (extra[kind == k] > 0).any()]
    return ", ".join(parts) + " prompts"


def _paper_rule(
    rates: FloatArray,
    kind: IntArray,
    marginals: Marginals,
    budget: int,
    lower: IntArray,
    upper: IntArray,
    priority: FloatArray,
    method: solver.Method,
) -> tuple[IntArray, str]:
    """Allocate by the paper's fallback strategy; all bounds hold and all rollouts are spent."""
    effective, unseen = kind == EFFECTIVE, kind == UNSEEN
    counts = lower.copy()
    uniform = np.clip(budget // rates.size, lower[unseen], upper[unseen])
    # Per-prompt minima of the others may leave less than the uniform share.
    room = min(int(uniform.sum()), budget - int(lower[~unseen].sum()))
    counts[unseen] = solver.share_out(lower[unseen], uniform, room, kind[unseen], priority[unseen])
    available = budget - int(counts[~effective].sum())
    if (kind == UNSOLVED).any() or (kind == SOLVED).any():
        # Rollouts that the prompt needs, within its bounds.
        need = rollouts_for_probability(rates[effective], FALLBACK_PROBABILITY)
        need = np.clip(need, lower[effective], upper[effective])
        spend = min(available, math.ceil(need.sum()))
    else:
        spend = min(available, int(upper[effective].sum()))  # there is no prompt to fall back on
    if effective.any():
        level = np.zeros(int(effective.sum()), np.int64)
        counts[effective] = marginals.solve(
            effective, spend, lower[effective], upper[effective], level, priority[effective], method
        )
    surplus = budget - int(counts.sum())
    if surplus == 0:
        return counts, ""
    order = np.array([0, 3, 1, 2])  # tier of UNSOLVED, UNSEEN, SOLVED, EFFECTIVE
    filled = solver.share_out(counts, upper, budget, order[kind], priority)
    receivers = _by_class(filled - counts, kind)
    return filled, f"fallback: {surplus} rollouts beyond the need of the effective prompts went to {receivers}"


def _priced(
    table: FloatArray,
    price: FloatArray,
    budget: float,
    lower: IntArray,
    upper: IntArray,
    kind: IntArray,
    priority: FloatArray,
    rates: FloatArray,
) -> Allocation:
    """Solve the knapsack with costs; the reason names what stays unspent because nothing of value is left to buy."""
    counts, certificate, sated = solve_with_costs(table, price, budget, lower, upper, kind, priority)
    unspent = budget - float((price * counts).sum())
    reason = f"{unspent:g} of the budget stay unspent: no further rollout has a value" if sated and unspent > 0 else ""
    return Allocation(counts, certificate.value, reason, success_rates=rates, certificate=certificate)


def allocate_estimated(
    success_rates: FloatArray,
    marginals: FloatArray,
    budget: int,
    min_rollouts: int,
    max_rollouts: int,
    *,
    priority: ArrayLike,
    value: ValueLike = "knapsack",
    fallback: bool = True,
) -> Allocation:
    """Allocate by estimates as if they were true; an infeasible batch degrades instead of raising.

    Args:
        success_rates: (M,) estimates, NaN for an unseen prompt.
        marginals: (M, K >= 2) marginal values, used only by
            :func:`~knapsack_rl.allocation.degradation.feasible_bounds`.
        budget: total rollouts, >= 0.
        min_rollouts: N_low.
        max_rollouts: N_up.
        priority: (M,) who is served first in a degraded batch, lower first.
        value: see :func:`allocate`.
        fallback: see :func:`allocate`.
    """
    lower, upper, degradation = feasible_bounds(budget, min_rollouts, max_rollouts, marginals, priority)
    found = allocate(success_rates, budget, lower, upper, value=value, fallback=fallback)
    reason = joined(degradation, found.reason)
    return Allocation(found.counts, found.expected_value, reason, degraded=bool(degradation))


def allocate_expected(
    marginals: FloatArray,
    budget: float,
    min_rollouts: int,
    max_rollouts: int,
    *,
    priority: ArrayLike | None = None,
    costs: FloatArray | None = None,
) -> Allocation:
    """Allocate by posterior-expected marginal values; an infeasible batch degrades instead of raising.

    A mixture of concave values is concave, so the greedy optimum stays exact (``docs/method.md``: expectation keeps
    concavity). See :func:`~knapsack_rl.allocation.degradation.feasible_bounds` for the order of degradation.

    Args:
        marginals: (M, K >= 2) E[D(n)] per prompt; columns beyond K count as 0.
        budget: total rollouts, >= 0.
        min_rollouts: N_low.
        max_rollouts: N_up.
        priority: (M,) last tie-break, lower first; a stable hash of the prompt ids makes the result independent of
            their order.
        costs: (M,) > 0, expected cost of a rollout; at most the budget is spent, and none of it on rollouts without
            value.
    """
    order = np.zeros(marginals.shape[0]) if priority is None else np.asarray(priority, dtype=np.float64)
    if costs is not None:
        return _expected_with_costs(marginals, costs, budget, min_rollouts, max_rollouts, order)
    budget = int(budget)
    lower, upper, degradation = feasible_bounds(budget, min_rollouts, max_rollouts, marginals, order)
    table = padded(marginals, upper)
    counts = solver.solve_checked(table, budget, lower, upper, np.zeros(lower.size, np.int64), order)
    total = solver.total_value(table, counts)
    return Allocation(counts, total, degradation, degraded=bool(degradation), certificate=Certificate(total, total))


def padded(marginals: FloatArray, most: IntArray) -> FloatArray:
    """Return (M, K) marginal values with columns of zeros up to the largest count."""
    missing = int(most.max(initial=0)) - marginals.shape[1]
    return np.pad(marginals, ((0, 0), (0, missing))) if missing > 0 else marginals


def _expected_with_costs(
    marginals: FloatArray,
    costs: FloatArray,
    budget: float,
    min_rollouts: int,
    max_rollouts: int,
    priority: FloatArray,
) -> Allocation:
    lower, degradation = affordable_minimum(budget, min_rollouts, costs, marginals, priority)
    upper = np.where(lower > 0, max_rollouts, 0) if degradation else max_rollouts
    low, high = check_affordable(costs, budget, lower, upper)
    level, unknown = np.zeros(low.size, np.int64), np.full(low.size, np.nan)
    found = _priced(padded(marginals, high), costs, budget, low, high, level, priority, unknown)
    reason = joined(degradation, found.reason)
    return replace(found, reason=reason, degraded=bool(degradation), success_rates=None)
