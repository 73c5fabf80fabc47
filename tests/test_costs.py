"""The knapsack with costs against enumeration, integer programming and the Lagrangian bound written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

import knapsack_rl as kr
from knapsack_rl import solver
from knapsack_rl.costs import ROUNDING, check_costs, solve_with_costs
from knapsack_rl.rows import Rows
from knapsack_rl.value import marginal_values
from strategies import no_deadline, success_rates

SEED = 1995


def values_of(marginals: NDArray) -> NDArray:
    return np.concatenate([np.zeros((len(marginals), 1)), np.cumsum(marginals, axis=1)], axis=1)


def at(values: NDArray, counts) -> float:
    return float(values[np.arange(len(values)), counts].sum())


def enumerated(values: NDArray, costs, budget: float, lower, upper) -> float:
    ranges = [range(low, high + 1) for low, high in zip(lower, upper, strict=True)]
    counts = np.array(list(itertools.product(*ranges)))
    affordable = counts @ np.asarray(costs, float) <= budget * (1 + ROUNDING)
    return float(values[np.arange(len(values)), counts[affordable]].sum(axis=1).max())


def integer_programme(values: NDArray, costs, budget: float, lower, upper) -> float:
    prompts, width = values.shape
    counts = np.arange(width)
    allowed = (counts >= np.reshape(lower, (-1, 1))) & (counts <= np.reshape(upper, (-1, 1)))
    scale = np.abs(values).max()
    found = milp(
        -values.ravel() / scale,
        integrality=np.ones(values.size),
        bounds=Bounds(0, np.broadcast_to(allowed, values.shape).ravel().astype(float)),
        constraints=[
            LinearConstraint(np.kron(np.eye(prompts), np.ones(width)), 1, 1),
            LinearConstraint((np.asarray(costs)[:, None] * counts).ravel()[None, :], -np.inf, budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    return -float(found.fun) * scale


def lagrangian_bound(values: NDArray, costs, budget: float, lower, upper) -> float:
    """min over v >= 0 of sum_i max_n [V_i(n) - v c_i n] + v budget: the best at one of the slopes."""
    counts = np.arange(values.shape[1])
    allowed = (counts >= np.reshape(lower, (-1, 1))) & (counts <= np.reshape(upper, (-1, 1)))
    spent = np.asarray(costs)[:, None] * counts
    slopes = {0.0}
    for row, cost in zip(values, spent, strict=True):
        for a, b in itertools.combinations(range(len(row)), 2):
            slopes.add(max(0.0, float((row[b] - row[a]) / (cost[b] - cost[a]))))
    return min(np.where(allowed, values - v * spent, -np.inf).max(axis=1).sum() + v * budget for v in slopes)


def solved(table: NDArray, costs, budget: float, lower, upper):
    prompts = len(table)
    low, high = np.broadcast_to(lower, prompts).astype(np.int64), np.broadcast_to(upper, prompts).astype(np.int64)
    nothing = np.zeros(prompts)
    return solve_with_costs(
        Rows(table=np.ascontiguousarray(table, dtype=float)),
        check_costs(costs, prompts),
        budget,
        low,
        high,
        nothing.astype(np.int64),
        nothing,
    )


def check(table: NDArray, costs, budget: float, lower, upper, optimum: float, rel: float = 1e-12) -> None:
    counts, certificate, _ = solved(table, costs, budget, lower, upper)
    values = values_of(table)
    assert (counts >= lower).all()
    assert (counts <= upper).all()
    assert counts @ np.asarray(costs, float) <= budget * (1 + 2 * ROUNDING)
    scale = np.abs(values).max() + abs(optimum)
    assert certificate.value == pytest.approx(at(values, counts), rel=1e-12, abs=1e-12 * scale)
    assert certificate.gap >= 0.0
    assert certificate.upper_bound >= optimum - rel * scale
    if certificate.optimal:
        assert certificate.value == pytest.approx(optimum, rel=rel, abs=rel * scale)


def random_case(rng: np.random.Generator, prompts: int, width: int):
    """Tables of every kind, whole and broken costs, bounds per prompt, budgets over the whole range."""
    kind = rng.integers(0, 4)
    if kind == 0:
        table = marginal_values(rng.beta(0.5, 0.5, prompts), width)
        least = int(rng.integers(0, 3))
    elif kind == 1:
        table, least = -np.sort(-rng.normal(0.5, 1.0, (prompts, width)), axis=1), 0
    elif kind == 2:
        table, least = rng.normal(0.5, 1.0, (prompts, width)), 0
    else:
        table, least = -np.sort(-rng.integers(0, 4, (prompts, width)).astype(float), axis=1), 0
    pairs = np.sort(rng.integers(min(least, width), width + 1, (prompts, 2)), axis=1)
    lower, upper = pairs[:, 0], pairs[:, 1]
    costs = rng.integers(1, 6, prompts).astype(float) if rng.random() < 0.5 else rng.uniform(0.2, 5.0, prompts)
    least_cost, most_cost = costs @ lower, costs @ upper
    budget = least_cost + rng.random() * 1.1 * (most_cost - least_cost)
    return table, costs, float(np.floor(budget) if (costs == np.round(costs)).all() else budget), lower, upper


@pytest.mark.parametrize("seed", range(4))
def test_small_instances_match_enumeration(seed: int) -> None:
    rng = np.random.default_rng(SEED + seed)
    proven = 0
    for _ in range(150):
        table, costs, budget, lower, upper = random_case(rng, int(rng.integers(1, 5)), int(rng.integers(1, 6)))
        check(table, costs, budget, lower, upper, enumerated(values_of(table), costs, budget, lower, upper))
        proven += solved(table, costs, budget, lower, upper)[1].optimal
    assert proven == 150


@pytest.mark.slow
def test_ten_thousand_instances_match_enumeration() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(10_000):
        table, costs, budget, lower, upper = random_case(rng, int(rng.integers(1, 5)), int(rng.integers(1, 6)))
        check(table, costs, budget, lower, upper, enumerated(values_of(table), costs, budget, lower, upper))


@pytest.mark.parametrize("case", range(16))
def test_medium_instances_match_integer_programming(case: int) -> None:
    rng = np.random.default_rng(SEED + case)
    prompts, width = int(rng.integers(5, 13)), int(rng.integers(5, 17))
    table, costs, budget, lower, upper = random_case(rng, prompts, width)
    values = values_of(table)
    check(table, costs, budget, lower, upper, integer_programme(values, costs, budget, lower, upper), rel=1e-7)
    assert solved(table, costs, budget, lower, upper)[1].optimal
