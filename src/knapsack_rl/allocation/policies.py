"""Allocation policy: from what is known of the prompts to rollouts per prompt.

Three policies use the one solver. :func:`allocate` takes success rates as known (with the paper's fallback rule on
request); :func:`allocate_estimated` does so with estimates, inside a run that must not end; :func:`allocate_expected`
takes posterior-expected marginal values, for which no special rule is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation import solver
from knapsack_rl.allocation.checks import FloatArray, IntArray, check_success_rates, check_whole
from knapsack_rl.allocation.costs import Certificate, check_affordable, check_costs, solve_with_costs
from knapsack_rl.allocation.degradation import affordable_minimum, feasible_bounds, joined
from knapsack_rl.allocation.fallback import UNSEEN, by_class, paper_rule, spread
from knapsack_rl.allocation.rows import Rows
from knapsack_rl.allocation.value_functions import MixedOutcomes, ValueLike, differences, make_value_function
from knapsack_rl.estimation.products import dot


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
        certificate: the value and what no counts within budget and bounds can exceed; None where the counts are not
            meant to be an optimum (the paper's fallback rule, counts given from outside).
    """

    counts: IntArray
    expected_value: float
    reason: str = ""
    degraded: bool = False
    success_rates: FloatArray | None = None
    nonzero_gradient: FloatArray | None = None
    certificate: Certificate | None = None

    def expand(self) -> IntArray:
        """(budget,) int64 prompt index of each rollout; the rollouts of a prompt stand together."""
        return np.repeat(np.arange(self.counts.size), self.counts)


def unpredicted(counts: IntArray, reason: str, *, degraded: bool = False) -> Allocation:
    """An allocation of which nothing is expected: its value and predictions are NaN."""
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
        costs: (M,) > 0, what a rollout of each prompt costs: expected tokens, seconds, environment steps. ``budget`` is
            then a number in the same unit, which the costs of all rollouts must not exceed; what would buy nothing of
            value stays unspent. ``Allocation.certificate`` says how far the counts can be from the optimum.
        value: what N rollouts are worth: a name of :data:`knapsack_rl.allocation.value_functions.VALUES`, a function
            ``f(counts, success_rates)`` that broadcasts like numpy and is 0 for no rollouts, an object with the methods
            of ``ValueFunction`` there, or an (M, K+1) table V[i, n] with V[i, 0] = 0.
            Values that are not concave go to dynamic programming; ``reason`` says so. ``"knapsack"`` and
            ``"nonzero-gradient"`` need no table and so little memory at any number of prompts.
        fallback: apply the paper's rule instead: unseen prompts get the uniform budget, solved and unsolved ones
            N_low, and what the effective prompts do not need for a non-zero gradient with probability 0.9 goes evenly
            to the unsolved prompts, or to the solved ones if there are none.
        method: see :func:`knapsack_rl.allocation.solver.solve`.

    Raises:
        ValueError: a rate is outside [0, 1], a number is not whole, or the bounds make the budget infeasible.

    Source: paper, section 3 (knapsack) and its fallback strategy.

    >>> allocate([0.5, 0.1, 1.0, 0.0], budget=32).counts.tolist()
    [7, 21, 2, 2]
    """
    rates, kind, unseen = _classified(success_rates)
    if costs is None:
        rollouts = check_whole("budget", budget, minimum=0)
        lower, upper = solver.check_bounds(rates.size, rollouts, min_rollouts, max_rollouts)
    else:
        if fallback or method != "auto":
            raise ValueError(f"with costs, fallback must be False and method 'auto', got {fallback!r} and {method!r}")
        price = check_costs(costs, rates.size)
        lower, upper = check_affordable(price, budget, min_rollouts, max_rollouts)
    if method not in solver.METHODS:
        raise ValueError(f"method must be one of {', '.join(solver.METHODS)}, got {method!r}")
    if fallback and not (isinstance(value, str) and value == "knapsack"):
        raise ValueError(f"fallback=True is the paper's rule for value='knapsack', got value={value!r}; choose one")
    # An unseen prompt comes after all others that it ties with.
    priority = np.where(kind == UNSEEN, 2.0, rates) if unseen else rates
    rows = _rows(value, rates, kind, unseen, upper)
    if costs is not None:
        return _priced(rows, price, budget, lower, upper, kind, priority, rates)
    if fallback:
        counts, reason = paper_rule(rates, kind, rows, rollouts, lower, upper, priority, method)
    else:
        counts, reason = _optimum(kind, rows, rollouts, lower, upper, priority, method)
    total = solver.total_value(rows, counts)
    certificate = None if fallback else Certificate(total, total)
    return Allocation(counts, total, reason, success_rates=rates, certificate=certificate)


def _classified(success_rates: ArrayLike) -> tuple[FloatArray, IntArray, int]:
    """Success rates as float64, the class of each, and how many are unseen.

    Raises:
        ValueError: the rates are no one-dimensional array, or one is outside [0, 1].
    """
    from knapsack_rl.allocation._kernels import classify

    try:
        rates = np.asarray(success_rates, dtype=np.float64)
    except (TypeError, ValueError):
        rates = check_success_rates(success_rates, allow_nan=True)  # says what is wrong
    if rates.ndim != 1 or rates.size == 0:
        raise ValueError(f"success_rates must be a non-empty one-dimensional array, got shape {rates.shape}")
    rates = np.ascontiguousarray(rates)
    kind = np.empty(rates.size, np.int64)
    wrong, unseen = classify(rates, kind)
    if wrong >= 0:
        check_success_rates(rates, allow_nan=True)
    return rates, kind, unseen


def _rows(value: ValueLike | ArrayLike, rates: FloatArray, kind: IntArray, unseen: int, upper: IntArray) -> Rows:
    """Marginal values of every prompt; an unseen one is worth the mean of the others, or of p = 0 if there is none."""
    from knapsack_rl.allocation._kernels import mean_row

    if isinstance(value, (np.ndarray, list, tuple)):
        return Rows(table=_given_table(value, rates.size))
    function = make_value_function(value)  # type: ignore[arg-type]
    if isinstance(function, MixedOutcomes):
        rows = function.rows(rates)
        if unseen:
            rows.weight[kind == UNSEEN] = -1.0
            mean = np.empty((1, max(int(upper.max()), 2)))
            mean_row(rows.weight, rows.first, rows.second, mean[0])
            rows = rows._replace(table=mean)
        return rows
    width = max(int(upper.max()), 1)
    table = function.marginals(np.where(kind == UNSEEN, 0.0, rates) if unseen else rates, width)
    if 0 < unseen < rates.size:
        table[kind == UNSEEN] = table[kind != UNSEEN].mean(axis=0)
    return Rows(table=table)


def _given_table(value: ArrayLike, prompts: int) -> FloatArray:
    """Marginal values of a table of values V[i, n], n = 0..K."""
    values = np.asarray(value, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != prompts or values.shape[1] < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"a table of values must be finite, of shape ({prompts}, K + 1) with K >= 1, got shape {values.shape}"
        )
    return differences(values)


def _optimum(
    kind: IntArray,
    rows: Rows,
    budget: int,
    lower: IntArray,
    upper: IntArray,
    priority: FloatArray,
    method: solver.Method,
) -> tuple[IntArray, str]:
    """The knapsack over the prompts that have a value; what they cannot take is spread over the others."""
    valued = _valued(rows)
    rows, concave = solver.concave_rows(rows, lower, upper)
    if concave and method != "dynamic-programming":
        # The greedy's tie rule hands out what no prompt values, evenly and class by class.
        counts = solver.greedy(rows, budget, lower, upper, kind, priority)
        if valued.all():
            return counts, ""
        return counts, _gift(np.where(valued, 0, counts - lower), kind)
    note = "" if concave else "the values are not concave: solved by dynamic programming"
    spend = min(budget - int(lower[~valued].sum()), int(upper[valued].sum()))
    counts = lower.copy()
    if valued.any():
        counts[valued] = solver.solve_checked(
            rows.take(valued), spend, lower[valued], upper[valued], kind[valued], priority[valued], method
        )
    filled = spread(budget, counts, upper, kind, priority)
    return filled, joined(note, _gift(filled - counts, kind))


def _gift(extra: IntArray, kind: IntArray) -> str:
    """Who got what no prompt values, in words; "" if nobody did."""
    left = int(extra.sum())
    return f"{left} rollouts that no prompt values went to {by_class(extra, kind)}" if left else ""


def _priced(
    rows: Rows,
    price: FloatArray,
    budget: float,
    lower: IntArray,
    upper: IntArray,
    kind: IntArray,
    priority: FloatArray,
    rates: FloatArray,
) -> Allocation:
    """The knapsack with costs; says what stays unspent if nothing of value was left to buy."""
    counts, certificate, sated = solve_with_costs(rows, price, budget, lower, upper, kind, priority)
    unspent = budget - dot(price, counts)
    reason = f"{unspent:g} of the budget stay unspent: no further rollout has a value" if sated and unspent > 0 else ""
    return Allocation(counts, certificate.value, reason, success_rates=rates, certificate=certificate)


def _valued(rows: Rows) -> NDArray[np.bool_]:
    """(M,) whether any rollout of the prompt is worth anything, for better or worse."""
    if not rows.closed_form:
        return (rows.table != 0.0).any(axis=1)
    return rows.weight != 0.0 if rows.table.size and rows.table[0, 1] > 0.0 else rows.weight > 0.0


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
    """Allocate by estimates that are taken for the truth; an infeasible batch degrades instead of raising.

    Args:
        success_rates: (M,) estimates, NaN for an unseen prompt.
        marginals: (M, K >= 2) marginal values, for :func:`~knapsack_rl.allocation.degradation.feasible_bounds` alone.
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
        costs: (M,) > 0, expected cost of a rollout; no more than the budget is spent, and a rollout that no prompt
            values is not bought.
    """
    if priority is None:
        priority = np.zeros(marginals.shape[0])
    if costs is not None:
        return _expected_with_costs(marginals, costs, budget, min_rollouts, max_rollouts, priority)
    budget = int(budget)
    lower, upper, degradation = feasible_bounds(budget, min_rollouts, max_rollouts, marginals, priority)
    width = max(int(upper.max(initial=0)), 1)
    if width > marginals.shape[1]:
        marginals = np.pad(marginals, ((0, 0), (0, width - marginals.shape[1])))
    counts = solver.solve(marginals, budget, lower, upper, priority=priority)
    total = solver.total_value(marginals, counts)
    return Allocation(counts, total, degradation, degraded=bool(degradation), certificate=Certificate(total, total))


def _expected_with_costs(
    marginals: FloatArray,
    costs: FloatArray,
    budget: float,
    min_rollouts: int,
    max_rollouts: int,
    priority: ArrayLike,
) -> Allocation:
    prompts = marginals.shape[0]
    lower, degradation = affordable_minimum(budget, min_rollouts, costs, marginals, priority)
    upper = np.where(lower > 0, max_rollouts, 0) if degradation else max_rollouts
    low, high = check_affordable(costs, budget, lower, upper)
    width = max(int(high.max(initial=0)), 1)
    table = np.pad(marginals, ((0, 0), (0, max(width - marginals.shape[1], 0))))
    found = _priced(
        Rows(table=np.ascontiguousarray(table)),
        costs,
        budget,
        low,
        high,
        np.zeros(prompts, np.int64),
        np.ascontiguousarray(priority, dtype=np.float64),
        np.full(prompts, np.nan),
    )
    reason = joined(degradation, found.reason)
    return replace(found, reason=reason, degraded=bool(degradation), success_rates=None)
