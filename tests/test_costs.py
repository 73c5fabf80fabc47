"""The knapsack with costs: its certificate against enumeration, integer programming and the bound written out."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import knapsack_rl as kr
from cases import named_case
from knapsack_rl.allocation.costs import ROUNDING, check_affordable, check_costs, solve_with_costs
from knapsack_rl.allocation.value import marginal_values
from oracles import milp_optimum, values_of
from strategies import no_deadline, success_rates

SEED = 1995


def at(values: NDArray, counts) -> float:
    return float(values[np.arange(len(values)), counts].sum())


def enumerated(values: NDArray, costs, budget: float, lower, upper) -> float:
    ranges = [range(low, high + 1) for low, high in zip(lower, upper, strict=True)]
    counts = np.array(list(itertools.product(*ranges)))
    affordable = counts @ np.asarray(costs, float) <= budget * (1 + ROUNDING)
    return float(values[np.arange(len(values)), counts[affordable]].sum(axis=1).max())


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
        np.asarray(table, dtype=float),
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
    assert certificate.value <= optimum + rel * scale
    if (np.diff(table, axis=1) <= 0).all():  # concave: what is missing is less than one rollout is worth
        assert certificate.gap <= table.max(initial=0.0) + rel * scale
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
    assert proven > 30


@pytest.mark.slow
def test_ten_thousand_instances_match_enumeration() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(10_000):
        table, costs, budget, lower, upper = random_case(rng, int(rng.integers(1, 5)), int(rng.integers(1, 6)))
        check(table, costs, budget, lower, upper, enumerated(values_of(table), costs, budget, lower, upper))


def test_costs_sixteen_decades_apart_match_enumeration_in_fractions() -> None:
    """The rounding of a dear prompt pays for cheap ones: the certificate must know, and the budget must hold."""
    rng = np.random.default_rng(SEED)
    for case in range(1500):
        prompts, width = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        table = rng.random((prompts, width)) * 10.0 ** rng.integers(-12, 1, (prompts, 1))
        if case % 2:
            table = -np.sort(-table, axis=1)
        costs = 10.0 ** rng.integers(-8, 9, prompts) * rng.choice([1.0, 1.5, 3.0], prompts)
        lower, upper = np.sort(rng.integers(0, width + 1, (prompts, 2)), axis=1).T
        plan = np.array([rng.integers(low, high + 1) for low, high in zip(lower, upper, strict=True)])
        budget = float((costs * plan).sum())
        low, high = check_affordable(costs, budget, lower, upper)
        counts, certificate, _ = solve_with_costs(table, costs, budget, low, high, np.zeros(prompts, int), costs)
        price, exact = [Fraction(c) for c in costs], Fraction(budget)
        spent = sum(c * int(n) for c, n in zip(price, counts, strict=True))
        values = [[sum(map(Fraction, row[:n]), Fraction()) for n in range(width + 1)] for row in table.tolist()]
        affordable = (
            plan
            for plan in itertools.product(*map(range, lower, upper + 1))
            if sum(c * n for c, n in zip(price, plan, strict=True)) <= exact * (1 + Fraction(ROUNDING) / 2)
        )
        best = max(sum(row[n] for row, n in zip(values, plan, strict=True)) for plan in affordable)
        with named_case(case=case, table=table, costs=costs, budget=budget, counts=counts):
            assert ((lower <= counts) & (counts <= upper)).all()
            assert spent <= exact * (1 + 2 * Fraction(ROUNDING))
            assert best <= Fraction(certificate.upper_bound) * (1 + Fraction(ROUNDING))


def test_medium_instances_match_integer_programming() -> None:
    for seed in range(16):
        with named_case(seed=seed):
            rng = np.random.default_rng(SEED + seed)
            prompts, width = int(rng.integers(5, 13)), int(rng.integers(5, 17))
            table, costs, budget, lower, upper = random_case(rng, prompts, width)
            values = values_of(table)
            check(table, costs, budget, lower, upper, milp_optimum(values, budget, lower, upper, costs=costs), rel=1e-7)


@no_deadline
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6))
def test_the_certificate_is_as_strong_as_the_continuous_relaxation(seed: int, prompts: int, width: int) -> None:
    table, costs, budget, lower, upper = random_case(np.random.default_rng(seed), prompts, width)
    _, certificate, _ = solved(table, costs, budget, lower, upper)
    bound = lagrangian_bound(values_of(table), costs, budget, lower, upper)
    assert certificate.upper_bound <= bound + 1e-9 * (1 + abs(bound))


# --- through kr.allocate ---


@st.composite
def priced_batches(draw: st.DrawFn, costs: st.SearchStrategy[float]):
    rates = draw(st.lists(success_rates(allow_nan=True), min_size=1, max_size=7))
    price = np.array(draw(st.lists(costs, min_size=len(rates), max_size=len(rates))))
    low = draw(st.integers(0, 3))
    budget = float(price.sum() * low + draw(st.floats(0.0, 12.0)) * price.sum())
    return np.array(rates), budget, low, draw(st.integers(max(low, 1), 14)), price


@no_deadline
@given(priced_batches(st.floats(0.1, 100.0)))
def test_bounds_and_budget_hold(drawn) -> None:
    rates, budget, low, high, price = drawn
    found = kr.allocate(rates, budget, low, high, costs=price)
    assert found.counts.min() >= low
    assert found.counts.max() <= high
    assert price @ found.counts <= budget * (1 + 2 * ROUNDING)
    assert found.certificate is not None
    assert found.certificate.gap >= 0.0
    assert found.certificate.value == found.expected_value


@no_deadline
@given(priced_batches(st.integers(1, 9).map(float)), st.randoms(use_true_random=False))
def test_the_order_of_the_prompts_does_not_matter(drawn, random) -> None:
    rates, budget, low, high, price = drawn
    order = np.array(random.sample(range(rates.size), rates.size))
    found = kr.allocate(rates, budget, low, high, costs=price).certificate
    moved = kr.allocate(rates[order], budget, low, high, costs=price[order]).certificate
    assert moved.value == pytest.approx(found.value, rel=1e-12, abs=1e-300)


@no_deadline
@given(st.lists(success_rates(), min_size=1, max_size=9), st.integers(0, 60), st.sampled_from([1.0, 0.1, 3.5]))
def test_equal_costs_change_nothing(rates: list[float], extra: int, cost: float) -> None:
    budget = min(2 * len(rates) + extra, 20 * len(rates))
    plain = kr.allocate(rates, budget, 2, 20)
    priced = kr.allocate(rates, budget * cost, 2, 20, costs=np.full(len(rates), cost))
    assert priced.certificate is not None
    assert priced.certificate.gap == 0.0
    assert priced.expected_value == pytest.approx(plain.expected_value, rel=1e-12, abs=1e-300)
    if "no prompt values" not in plain.reason and plain.counts.sum() == priced.counts.sum():
        assert priced.counts.tolist() == plain.counts.tolist()


def test_scaling_costs_and_budget_changes_nothing() -> None:
    rng = np.random.default_rng(SEED)
    rates, costs = rng.beta(0.5, 0.5, 40), rng.integers(1, 9, 40).astype(float)
    found = kr.allocate(rates, 700.0, costs=costs)
    for scale in (2.0**-40, 2.0**30):
        assert kr.allocate(rates, 700.0 * scale, costs=costs * scale).counts.tolist() == found.counts.tolist()


def test_more_budget_is_never_worth_less_than_the_gap() -> None:
    rng = np.random.default_rng(SEED)
    rates, costs = rng.beta(0.5, 0.5, 20), rng.uniform(0.5, 8.0, 20)
    found = [kr.allocate(rates, b, costs=costs).certificate for b in np.linspace(2 * costs.sum(), 900, 60)]
    for less, more in itertools.pairwise(found):
        assert more.upper_bound >= less.upper_bound - 1e-12
        assert more.value >= less.value - more.gap - 1e-12


def test_a_cheap_prompt_gets_more_than_an_expensive_one() -> None:
    found = kr.allocate([0.4, 0.4], 60.0, costs=[1.0, 4.0])
    assert found.counts[0] > found.counts[1]


def test_budget_without_value_stays_unspent() -> None:
    found = kr.allocate([0.5, 0.0, 1.0], 500.0, 2, 16, costs=[2.0, 3.0, 1.0])
    assert found.counts.tolist() == [16, 2, 2]
    assert found.reason == "460 of the budget stay unspent: no further rollout has a value"
    assert found.certificate is not None
    assert found.certificate.optimal
    nothing = kr.allocate([0.0, 1.0], 50.0, costs=[1.0, 1.0])
    assert nothing.counts.tolist() == [2, 2]
    assert nothing.expected_value == 0.0


def test_thousands_of_prompts_have_a_tiny_gap() -> None:
    rng = np.random.default_rng(SEED)
    rates, costs = rng.beta(0.3, 0.3, 5000), rng.lognormal(5, 1, 5000)
    found = kr.allocate(rates, 8 * costs.sum(), costs=costs)
    assert found.certificate is not None
    assert found.certificate.gap <= 1e-6 * found.certificate.value
    assert costs @ found.counts <= 8 * costs.sum() * (1 + ROUNDING)


def test_tables_with_costs() -> None:
    table = np.array([[5.0, 4.0, 1.0], [6.0, 0.5, 0.1]])
    # 5 + 4 for two units each, or 6 for three: 7 units buy 5 + 6 with two left over, or 5 + 4 + 1 with one.
    assert solved(table, [2, 3], 7, 0, 3)[0].tolist() == [2, 1]
    assert solved(table, [2, 3], 6, 0, 3)[0].tolist() == [1, 1]
    assert solved(np.array([[0.0, 9.0], [1.0, 1.0]]), [1, 1], 2, 0, 2)[0].tolist() == [2, 0]  # not concave


def test_errors_say_what_is_allowed() -> None:
    for arguments, options, message in [
        (([0.5, 0.5], 8.0), {"costs": [1.0]}, r"one number > 0 per prompt \(2\)"),
        (([0.5, 0.5], 8.0), {"costs": [1.0, 0.0]}, r"costs\[1\] is .*0\.0.*finite numbers > 0"),
        (([0.5, 0.5], 8.0), {"costs": [1.0, np.nan]}, r"costs\[1\] is .*nan"),
        (([0.5, 0.5], 8.0), {"costs": [1.0, np.inf]}, r"costs\[1\] is .*inf"),
        (([0.5, 0.5], 8.0), {"costs": "ab"}, "costs must hold one number"),
        (([0.5, 0.5], 5.0), {"costs": [1.0, 2.0]}, r"budget of 5\.0 .*costs at least 6\.0.*at least that"),
        (([0.5, 0.5], np.nan), {"costs": [1.0, 2.0]}, "budget of nan"),
        (([0.5, 0.5], np.inf), {"costs": [1.0, 2.0]}, "finite budget"),
        (([0.5, 0.5], "9"), {"costs": [1.0, 2.0]}, "budget must be a number in the unit of the costs"),
        (([0.5, 0.5], 9.0, 3, 2), {"costs": [1.0, 1.0]}, "min_rollouts 3 is above max_rollouts 2"),
        (([0.5, 0.5], 9.0), {"costs": [1.0, 1.0], "fallback": True}, "fallback must be False"),
        (([0.5, 0.5], 9.0), {"costs": [1.0, 1.0], "method": "greedy"}, "method 'auto'"),
    ]:
        with named_case(arguments=arguments, options=options), pytest.raises(ValueError, match=message):
            kr.allocate(*arguments, **options)
