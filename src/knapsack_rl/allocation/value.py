"""The paper's value of a rollout budget: one equation, one pure function.

Source: Li et al., *Knapsack RL*, arXiv 2509.25849. A prompt with success rate p that is given N rollouts
yields a non-zero GRPO gradient unless all its rewards are equal. The paper values the item (prompt, N) as the
probability of a non-zero gradient times the information gain p (1 - p)^2.

Arrays here are per prompt and broadcast like numpy's; success rates are probabilities in [0, 1].
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, check_counts, check_success_rates


def nonzero_gradient_probability(counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
    """Probability that a group of N rollouts holds both a success and a failure: 1 - p^N - (1-p)^N.

    No rollouts and one rollout cannot differ, so the result is 0 there. Computed without cancellation: small p
    keeps full relative precision.

    Args:
        counts: rollouts N per group, whole numbers >= 0; broadcasts with ``success_rates``.
        success_rates: p in [0, 1].

    Returns:
        Float64 array of the broadcast shape, in [0, 1].

    Raises:
        ValueError: a count is negative or fractional, or a rate is outside [0, 1].

    Source: paper, section 3 (P(non-zero gradient | N, p)).
    """
    n = check_counts(counts)
    p = check_success_rates(success_rates)
    rare = np.minimum(p, 1.0 - p)
    with np.errstate(divide="ignore", under="ignore"):
        some_rare = -np.expm1(n * np.log1p(-rare))  # 1 - (1 - rare)^N
        result = some_rare - rare**n
    return np.where(n >= 2, np.maximum(result, 0.0), 0.0)


def information_gain(success_rates: ArrayLike) -> FloatArray:
    """Information gain p (1-p)^2 of a prompt: the largest at p = 1/3.

    It is the first-order change of the success probability after one gradient step on a softmax policy: the
    derivative p (1-p) times the remaining head-room (1-p).

    Raises:
        ValueError: a rate is outside [0, 1].

    Source: paper, section 3 (InfoGain).
    """
    p = check_success_rates(success_rates)
    return p * (1.0 - p) ** 2


def value(counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
    """Value V(N, p) = (1 - p^N - (1-p)^N) p (1-p)^2 of giving a prompt N rollouts.

    Args:
        counts: rollouts N, whole numbers >= 0; broadcasts with ``success_rates``.
        success_rates: p in [0, 1].

    Raises:
        ValueError: see :func:`nonzero_gradient_probability`.

    Source: paper, equation of the knapsack objective (section 3).
    """
    return nonzero_gradient_probability(counts, success_rates) * information_gain(success_rates)


def marginal_values(success_rates: ArrayLike, max_rollouts: int) -> FloatArray:
    """Table of marginal values D[i, n] = V(n+1, p_i) - V(n, p_i).

    For n >= 1 this is information_gain(p) [p^n (1-p) + (1-p)^n p], which never increases with n: the value is
    concave from one rollout on. D[i, 0] = 0 because a single rollout has no gradient. Each column follows from
    the one before by two multiplications, and no subtraction of nearly equal numbers occurs.

    Args:
        success_rates: (M,) p in [0, 1].
        max_rollouts: number of columns, >= 1.

    Returns:
        (M, max_rollouts) float64.

    Raises:
        ValueError: a rate is outside [0, 1], or max_rollouts is below 1.
    """
    p = check_success_rates(success_rates)
    from knapsack_rl.allocation import _kernels

    table = np.empty((p.size, max_rollouts))
    flat = p.ravel()
    _kernels.fill_marginals(information_gain(flat) * flat * (1.0 - flat), flat, 1.0 - flat, table)
    return table


def rollouts_for_probability(success_rates: ArrayLike, probability: float = 0.9) -> FloatArray:
    """Rollouts needed for a non-zero gradient with the given probability: ln(1-a) / ln(max(p, 1-p)).

    The paper's estimate: it counts only the commoner outcome's run. 229.1 for p = 0.01 and a = 0.9.

    Args:
        success_rates: p in [0, 1].
        probability: a in (0, 1).

    Returns:
        Float64 array, > 0; infinite where p is 0 or 1.

    Raises:
        ValueError: a rate or the probability is outside its range.

    Source: paper, section 3 (rollouts for a non-zero gradient) and its fallback rule.
    """
    p = check_success_rates(success_rates)
    if not 0.0 < probability < 1.0:
        raise ValueError(f"probability must be in (0, 1), got {probability!r}")
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(math.log1p(-probability) / np.log1p(-np.minimum(p, 1.0 - p)))


def expected_rollouts_until_mixed(success_rates: ArrayLike) -> FloatArray:
    """Expected rollouts until a group holds both outcomes: 1/p + 1/(1-p) - 1. 100.01 for p = 0.01.

    Returns:
        Float64 array, >= 3; infinite where p is 0 or 1.

    Raises:
        ValueError: a rate is outside [0, 1].

    Source: first success and first failure are both needed; the first draw is one of them.
    """
    p = check_success_rates(success_rates)
    with np.errstate(divide="ignore", over="ignore"):
        return 1.0 / p + 1.0 / (1.0 - p) - 1.0
