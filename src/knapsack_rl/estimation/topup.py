"""Spending the rest of a step's budget after the first outcomes are in.

A group that holds both outcomes has its gradient: in the paper's value more rollouts gain it nothing. Of a group with n
equal outcomes the posterior, updated with them, says what k more are worth:

    all failures:   V(k) = E[gain(p) (1 - (1-p)^k)]     a success is missing
    all successes:  V(k) = E[gain(p) (1 - p^k)]         a failure is missing
    no rollout yet: V(k) = E[gain(p) (1 - p^k - (1-p)^k)]

All are concave (the last from k = 1 on), so the knapsack with these rows is exact.

**Bias.** How many rollouts a group gets then depends on its outcomes, as in any stopping rule. The posterior of a
success rate is not affected: its likelihood p^s (1-p)^f is the same under every stopping rule. Group statistics are: a
group that stops soon after its first success overstates its rate, E[s/n] > p, and advantages, which compare with the
group mean, inherit that. It is inverse binomial sampling.

Source: Haldane 1945 (inverse sampling and its bias); Berger & Wolpert 1988 (stopping rules and likelihood).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray, check_counts
from knapsack_rl.allocation.costs import Certificate
from knapsack_rl.allocation.policies import Allocation, solver
from knapsack_rl.allocation.value_functions import MixedOutcomes
from knapsack_rl.estimation.bayes import GridPosterior
from knapsack_rl.estimation.products import product
from knapsack_rl.estimation.protocol import Estimator
from knapsack_rl.estimation.tracker import Records


def check_estimator(estimator: Estimator) -> GridPosterior:
    """Return the estimator if it has a posterior on a grid and a value of mixed outcomes.

    Raises:
        ValueError: it has not.
    """
    if not isinstance(estimator, GridPosterior) or not isinstance(estimator.value, MixedOutcomes):
        raise ValueError(
            "top_up needs an estimator with a posterior on a grid ('bayes-filter', 'empirical-bayes') and the value "
            f"'knapsack' or 'nonzero-gradient', got {type(estimator).__name__}"
            + (f" with {type(estimator.value).__name__}" if isinstance(estimator, GridPosterior) else "")
        )
    return estimator


def posterior_after(estimator: GridPosterior, records: Records, counts: IntArray, successes: IntArray) -> FloatArray:
    """The (M, grid_points) posterior, updated with a first share of outcomes."""
    before: FloatArray = estimator.posterior(records)  # type: ignore[attr-defined]
    updated = before * estimator.binomial_likelihood(successes, counts - successes)
    return updated / updated.sum(axis=1, keepdims=True)


def top_up(
    estimator: GridPosterior,
    posterior: FloatArray,
    counts: IntArray,
    successes: IntArray,
    budget: int,
    max_rollouts: int,
    priority: FloatArray,
) -> Allocation:
    """Additional rollouts, exactly ``budget`` of them; see the module.

    What no group values is spread evenly. If all groups would pass ``max_rollouts`` the maximum is raised.

    Args:
        estimator: for its grid and value.
        posterior: (M, grid_points) after the first outcomes.
        counts: (M,) rollouts so far.
        successes: (M,) of them.
        budget: rollouts to hand out.
        max_rollouts: N_up, of both shares together.
        priority: (M,) tie-break, lower first.
    """
    room = np.maximum(max_rollouts - counts, 0)
    note = ""
    if room.sum() < budget:
        # Evenly beyond the cap, whatever the groups hold.
        room = room + math.ceil((budget - int(room.sum())) / counts.size)
        note = f"max_rollouts {max_rollouts} is too low for the rest of the budget: raised"
    table = more_marginals(estimator, posterior, counts, successes, max(int(room.max()), 1))
    # The first rollout of a group without any is worth nothing, its second something: not concave, so solved as such.
    extra = solver.solve(table, budget, 0, room, priority=priority)
    value = solver.total_value(table, extra)
    mixed = (successes > 0) & (successes < counts)
    return Allocation(
        extra,
        value,
        note,
        degraded=bool(note),
        success_rates=product(posterior, estimator.grid),
        nonzero_gradient=np.where(mixed, 1.0, _chance(estimator.grid, posterior, counts, successes, extra)),
        certificate=Certificate(value, value),
    )


def more_marginals(
    estimator: GridPosterior, posterior: FloatArray, counts: IntArray, successes: IntArray, width: int
) -> FloatArray:
    """(M, width) expected gain of each further rollout of groups with such outcomes."""
    p, q = estimator.grid, 1.0 - estimator.grid
    assert isinstance(estimator.value, MixedOutcomes)
    gain = estimator.value.gain(p)[:, None]
    k = np.arange(width)
    table = np.zeros((counts.size, width))
    for group, on_grid in (
        (_equal(counts, counts - successes), gain * p[:, None] * q[:, None] ** k),
        (_equal(counts, successes), gain * q[:, None] * p[:, None] ** k),
        (counts == 0, estimator.value.marginals(p, width)),
    ):
        table[group] = product(posterior[group], on_grid)
    return table


def _equal(counts: IntArray, same: IntArray) -> NDArray[np.bool_]:
    return (counts > 0) & (same == counts)


def _chance(
    grid: FloatArray, posterior: FloatArray, counts: IntArray, successes: IntArray, extra: IntArray
) -> FloatArray:
    """(M,) probability that both outcomes are there after the extra rollouts, for groups that are not mixed yet."""
    n, s = extra[:, None], successes[:, None]
    all_failures, all_successes = (1.0 - grid) ** n, grid**n
    still_equal = np.where(
        counts[:, None] == 0, all_failures + all_successes, np.where(s == 0, all_failures, all_successes)
    )
    return np.einsum("mg,mg->m", posterior, np.maximum(1.0 - still_equal, 0.0))


def check_outcomes(counts: ArrayLike, successes: ArrayLike, prompts: int) -> tuple[IntArray, IntArray]:
    """Counts and successes of a first share as (M,) whole numbers.

    Raises:
        ValueError: they do not fit the prompts or each other.
    """
    n, s = check_counts(counts), check_counts(successes)
    if n.shape != (prompts,) or s.shape != (prompts,) or (s > n).any():
        raise ValueError(
            f"counts_so_far and successes_so_far must hold one number per prompt ({prompts}), successes at most the "
            f"counts, got shapes {n.shape} and {s.shape}"
        )
    return n, s
