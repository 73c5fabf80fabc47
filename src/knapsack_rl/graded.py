"""Rewards of more than two levels: partial credit, scores, rubric points.

A prompt's reward takes level l_k with probability pi_k; levels are scaled to [0, 1] here. A group of N rollouts has a
zero gradient only if all its rewards are equal, so

    P(non-zero gradient | N) = 1 - sum_k pi_k^N.

**Information gain.** The paper's p (1-p)^2 is what the success rate gains to first order when a success becomes more
likely, dp/dz = p (1-p) for its logit z, times the head-room 1-p. With graded rewards an update raises the logit of each
outcome in proportion to its reward: tilting pi_k to pi_k e^(t l_k) / (normaliser) changes the mean reward at the rate
d E[r] / dt = E[r^2] - E[r]^2 = Var(r) at t = 0, and the head-room is 1 - E[r]. The gain is Var(r) (1 - E[r]). For two
levels, 0 and 1, that is p (1-p) (1-p): the paper's.

The value is (1 - sum_k pi_k^N) Var(r) (1 - E[r]), concave from one rollout on because each -pi_k^N is. So is its
expectation under any posterior, and the greedy solver stays exact.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl import solver
from knapsack_rl.allocation import Allocation
from knapsack_rl.costs import Certificate, check_affordable, check_costs, solve_with_costs
from knapsack_rl.products import product
from knapsack_rl.rows import Rows
from knapsack_rl.value import FloatArray, check_counts, check_whole


def scaled_levels(levels: ArrayLike) -> FloatArray:
    """(L,) reward levels, moved and scaled so that the least is 0 and the greatest 1.

    Raises:
        ValueError: they are not at least two different finite numbers.
    """
    array = np.asarray(levels, dtype=np.float64)
    if array.ndim != 1 or array.size < 2 or not np.isfinite(array).all() or np.unique(array).size < array.size:
        raise ValueError(f"levels must be at least two different finite rewards, got {levels!r}")
    return (array - array.min()) / (array.max() - array.min())


def check_level_probabilities(probabilities: ArrayLike) -> FloatArray:
    """(M, L) float64, or say which row is no distribution.

    Raises:
        ValueError: an entry is outside [0, 1] or a row does not sum to 1 (within 1e-9).
    """
    pi = np.asarray(probabilities, dtype=np.float64)
    if pi.ndim != 2 or pi.shape[1] < 2:
        raise ValueError(f"probabilities must be a table (prompts, levels) with at least two levels, got {pi.shape}")
    wrong = ~((pi >= 0.0) & (pi <= 1.0)).all(axis=1) | ~(np.abs(pi.sum(axis=1) - 1.0) <= 1e-9)
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"probabilities[{i}] is {pi[i].tolist()}; a row must be in [0, 1] and sum to 1")
    return pi


def nonzero_gradient_probability(counts: ArrayLike, probabilities: ArrayLike) -> FloatArray:
    """(M,) probability that a group of N rollouts holds two different rewards: 1 - sum_k pi_k^N; 0 for N < 2.

    Args:
        counts: rollouts per prompt, a whole number or (M,).
        probabilities: (M, L) of the levels.

    Raises:
        ValueError: a count is no whole number >= 0, or a row is no distribution.
    """
    n, pi = check_counts(counts), check_level_probabilities(probabilities)
    same = (pi ** np.broadcast_to(n, pi.shape[:1])[:, None]).sum(axis=1)
    return np.where(n >= 2, np.maximum(1.0 - same, 0.0), 0.0)


def information_gain(probabilities: ArrayLike, levels: ArrayLike) -> FloatArray:
    """(M,) variance of the scaled reward times its head-room: Var(r) (1 - E[r]).

    The variance is summed over pairs of levels, pi_j pi_k (l_j - l_k)^2, which cancels nothing.

    Raises:
        ValueError: a row is no distribution, or the levels do not fit it.
    """
    pi = check_level_probabilities(probabilities)
    scale = _fitting(levels, pi.shape[1])
    variance = sum(pi[:, j] * pi[:, k] * (scale[j] - scale[k]) ** 2 for j, k in combinations(range(scale.size), 2))
    return np.asarray(variance * product(pi, 1.0 - scale))


def value(counts: ArrayLike, probabilities: ArrayLike, levels: ArrayLike) -> FloatArray:
    """(M,) value of giving each prompt N rollouts: P(non-zero gradient) times the information gain.

    Raises:
        ValueError: see :func:`nonzero_gradient_probability` and :func:`information_gain`.
    """
    return nonzero_gradient_probability(counts, probabilities) * information_gain(probabilities, levels)


def marginal_values(probabilities: ArrayLike, levels: ArrayLike, max_rollouts: int) -> FloatArray:
    """(M, max_rollouts) table D[i, n] = gain_i sum_k pi_ik^n (1 - pi_ik) for n >= 1; the first column is 0.

    Raises:
        ValueError: a row is no distribution, the levels do not fit it, or max_rollouts is below 1.
    """
    pi = check_level_probabilities(probabilities)
    gain = information_gain(pi, levels)
    table = np.zeros((pi.shape[0], check_whole("max_rollouts", max_rollouts, minimum=1)))
    others = pi.sum(axis=1, keepdims=True) - pi
    power = gain[:, None] * others
    for n in range(1, max_rollouts):
        power = power * pi
        table[:, n] = power.sum(axis=1)
    return table


def expected_marginal_values(level_counts: ArrayLike, levels: ArrayLike, max_rollouts: int, prior: float) -> FloatArray:
    """(M, max_rollouts) expected marginal values under a Dirichlet posterior, in closed form.

    With a_k = prior + counts_k, A = sum a_k and rising factorials (x)_m = x (x+1) ... (x+m-1),

        E[prod_i pi_i^m_i] = prod_i (a_i)_m_i / (A)_(sum m).

    The gain is a sum of monomials of degree 3 with coefficients >= 0, (l_j - l_k)^2 (1 - l_m) for pi_j pi_k pi_m, and
    1 - pi_k is the sum of the other probabilities. So with C_ke >= 0 collected once per prompt,

        E[D(n)] = sum_k sum_e C_ke (a_k)_(n+e) / (A)_(n+4),   e = 0..3,

    and from n to n+1 each term takes one multiplication. Nothing is subtracted. For two levels this is the Beta
    posterior's E[D(n)] of the documentation.

    Args:
        level_counts: (M, L) rollouts seen at each level, >= 0; discounted counts need not be whole.
        levels: (L,) rewards, scaled by :func:`scaled_levels`.
        max_rollouts: columns, >= 1.
        prior: pseudo-count per level, > 0.

    Raises:
        ValueError: counts are negative or do not fit the levels, or the prior is not positive.
    """
    a = _posterior(level_counts, levels, prior)
    total = a.sum(axis=1)
    table = np.zeros((a.shape[0], check_whole("max_rollouts", max_rollouts, minimum=1)))
    for k in range(a.shape[1]):
        coefficient = np.zeros((4, a.shape[0]))
        for e, weight, others in _monomials(tuple(scaled_levels(levels).tolist()), k):
            term = np.full(a.shape[0], weight)
            for i, power in others:
                for step in range(power):
                    term *= a[:, i] + step
            coefficient[e] += term
        series = a[:, k] / (total * (total + 1) * (total + 2) * (total + 3) * (total + 4))  # (a)_n / (A)_(n+4), n = 1
        for n in range(1, max_rollouts):
            b = a[:, k] + n
            c0, c1, c2, c3 = coefficient
            table[:, n] += series * (c0 + b * (c1 + (b + 1) * (c2 + (b + 2) * c3)))
            series = series * (b / (total + n + 4))
    return table


@lru_cache(maxsize=64)
def _monomials(scale: tuple[float, ...], k: int) -> list[tuple[int, float, tuple[tuple[int, int], ...]]]:
    """(1 - pi_k) Var (1 - E) as monomials: (power of pi_k, coefficient, powers of the other probabilities)."""
    found: dict[tuple[int, ...], float] = {}
    size = len(scale)
    for i in (i for i in range(size) if i != k):
        for j, other in combinations(range(size), 2):
            for m in range(size):
                weight = (scale[j] - scale[other]) ** 2 * (1.0 - scale[m])
                if weight:
                    name = tuple(sorted((i, j, other, m)))
                    found[name] = found.get(name, 0.0) + weight
    return [
        (name.count(k), weight, tuple((i, name.count(i)) for i in sorted(set(name)) if i != k))
        for name, weight in found.items()
    ]


def allocate_graded(
    level_counts: ArrayLike,
    levels: ArrayLike,
    budget: float,
    min_rollouts: ArrayLike = 2,
    max_rollouts: ArrayLike = 128,
    *,
    prior: float | None = None,
    costs: ArrayLike | None = None,
) -> Allocation:
    """Allocate a rollout budget by what was seen of a graded reward: maximise the expected value.

    Each prompt's level probabilities have a Dirichlet posterior, so prompts never seen, and prompts whose rewards were
    all equal, need no rule of their own. Equal marginal values go to the prompt with fewer rollouts, then to the one
    with the lower mean reward.

    Args:
        level_counts: (M, L) rollouts seen at each level, >= 0; a row of zeros is an unseen prompt.
        levels: (L,) the rewards, at least two different ones; only their relative distances matter.
        budget: total rollouts, or their cost if ``costs`` is given.
        min_rollouts: N_low, a whole number >= 1 or (M,); 0 is allowed and makes the problem non-concave.
        max_rollouts: N_up, a whole number or (M,).
        prior: pseudo-count per level, > 0; 1/L by default, which for two levels is Beta(1/2, 1/2).
        costs: see :func:`knapsack_rl.allocate`.

    Returns:
        The allocation; its ``success_rates`` are the posterior means of the reward scaled to [0, 1].

    Raises:
        ValueError: counts, levels or prior are out of range, or bounds and budget do not fit.

    >>> allocate_graded([[0, 0, 0], [8, 0, 0], [2, 4, 2]], levels=[0, 0.5, 1], budget=24).counts.sum()
    np.int64(24)
    """
    size = np.size(levels)
    prior = 1.0 / max(size, 1) if prior is None else prior
    a = _posterior(level_counts, levels, prior)
    mean = product(a, scaled_levels(levels)) / a.sum(axis=1)
    prompts = a.shape[0]
    if prompts == 0:
        raise ValueError("level_counts is empty; a batch needs at least one prompt")
    if costs is None:
        budget = check_whole("budget", budget, minimum=0)
        low, high = solver.check_bounds(prompts, budget, min_rollouts, max_rollouts)
    else:
        price = check_costs(costs, prompts)
        low, high = check_affordable(price, budget, min_rollouts, max_rollouts)
    rows = Rows(table=expected_marginal_values(level_counts, levels, max(int(high.max()), 1), prior))
    tier = np.zeros(prompts, np.int64)
    if costs is None:
        counts = solver.solve_checked(rows, int(budget), low, high, tier, mean)
        total = solver.total_value(rows, counts)
        certificate = Certificate(total, total)
    else:
        counts, certificate, _ = solve_with_costs(rows, price, budget, low, high, tier, mean)
    return Allocation(counts, certificate.value, success_rates=mean, certificate=certificate)


def _fitting(levels: ArrayLike, size: int) -> FloatArray:
    scale = scaled_levels(levels)
    if scale.size != size:
        raise ValueError(f"levels must hold one reward per column ({size}), got {scale.size}")
    return scale


def _posterior(level_counts: ArrayLike, levels: ArrayLike, prior: float) -> FloatArray:
    """(M, L) parameters of the Dirichlet posterior."""
    counts = np.asarray(level_counts, dtype=np.float64)
    if counts.ndim != 2 or not ((counts >= 0.0) & (counts < np.inf)).all():
        raise ValueError(f"level_counts must be a table (prompts, levels) of finite numbers >= 0, got {level_counts!r}")
    _fitting(levels, counts.shape[1])
    if not 0.0 < prior < np.inf:
        raise ValueError(f"prior must be a positive number, got {prior!r}")
    return counts + prior
