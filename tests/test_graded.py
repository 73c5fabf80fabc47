"""Graded rewards against the definition in fractions, enumeration of groups, the Beta closed form and integration."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import knapsack_rl as kr
from knapsack_rl import graded
from knapsack_rl.estimator import BetaEstimator
from knapsack_rl.tracker import Tracker
from knapsack_rl.value import marginal_values
from strategies import no_deadline

SEED = 1763


@pytest.mark.parametrize("counts", range(6))
def test_nonzero_gradient_by_enumerating_groups(counts: int) -> None:
    pi = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
    mixed = Fraction(0)
    for group in itertools.product(range(3), repeat=counts):
        if len(set(group)) > 1:
            mixed += np.prod([pi[k] for k in group])
    found = graded.nonzero_gradient_probability(counts, [[float(x) for x in pi]])
    assert found == pytest.approx([float(mixed)], rel=1e-14)


@no_deadline
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(2, 40))
def test_two_levels_are_the_papers_value(rates: list[float], width: int) -> None:
    p = np.array(rates)
    pi = np.stack([1 - p, p], axis=1)
    for levels in ([0, 1], [-1.0, 1.0], [3, 7]):
        assert graded.information_gain(pi, levels) == pytest.approx(kr.information_gain(p), rel=1e-9, abs=1e-300)
        expected = marginal_values(p, width)
        assert graded.marginal_values(pi, levels, width) == pytest.approx(expected, rel=1e-9, abs=1e-20)
    n = np.arange(p.size) + 2
    assert graded.value(n, pi, [0, 1]) == pytest.approx(kr.value(n, p), rel=1e-9, abs=1e-14)


def test_the_gain_is_variance_times_head_room() -> None:
    """By moments, and the variance as the derivative of the mean when outcomes are tilted by their reward."""
    rng = np.random.default_rng(SEED)
    pi, levels = rng.dirichlet(np.ones(4), 20), np.array([0.0, 0.2, 0.7, 1.0])
    mean = pi @ levels
    variance = pi @ levels**2 - mean**2
    assert graded.information_gain(pi, levels) == pytest.approx(variance * (1 - mean), rel=1e-12)
    t = 1e-6
    tilted = [pi * np.exp(s * levels) for s in (t, -t)]
    up, down = (w @ levels / w.sum(axis=1) for w in tilted)
    assert (up - down) / (2 * t) == pytest.approx(variance, rel=1e-7)
    assert graded.information_gain(pi, 10 * levels - 3) == pytest.approx(variance * (1 - mean), rel=1e-12)


def test_marginals_add_up_to_the_value_and_never_rise() -> None:
    rng = np.random.default_rng(SEED)
    pi, levels = rng.dirichlet(np.full(5, 0.3), 50), [0, 1, 2, 3, 10]
    table = graded.marginal_values(pi, levels, 60)
    assert (np.diff(table[:, 1:], axis=1) <= 1e-15).all()
    for n in (0, 1, 2, 7, 60):
        assert table[:, :n].sum(axis=1) == pytest.approx(graded.value(n, pi, levels), rel=1e-9, abs=1e-15)


def test_dirichlet_expectation_for_two_levels_is_the_betas() -> None:
    tracker = Tracker()
    tracker.record(["a", "b"], np.array([0] * 5 + [1] * 7), np.array([1, 0, 0, 1, 0] + [0] * 7, bool), None, discount=1)
    beta = BetaEstimator().believe(tracker.lookup(["a", "b", "never"]), 50)
    found = graded.expected_marginal_values([[3, 2], [7, 0], [0, 0]], [0, 1], 50, prior=0.5)
    assert found == pytest.approx(beta.marginals, rel=1e-12)


def test_dirichlet_expectation_by_exact_moments() -> None:
    """Fractions: expand the polynomial of the definition and take each moment of the Dirichlet distribution."""
    a, levels = [Fraction(3, 2), Fraction(1, 3), Fraction(5)], [Fraction(0), Fraction(1, 4), Fraction(1)]

    def rising(x: Fraction, steps: int) -> Fraction:
        result = Fraction(1)
        for k in range(steps):
            result *= x + k
        return result

    def moment(powers: tuple[int, ...]) -> Fraction:
        top = np.prod([rising(x, m) for x, m in zip(a, powers, strict=True)])
        return top / rising(sum(a), sum(powers))

    def times(left: dict, right: dict) -> dict:
        product: dict = {}
        for (u, x), (v, y) in itertools.product(left.items(), right.items()):
            name = tuple(i + j for i, j in zip(u, v, strict=True))
            product[name] = product.get(name, 0) + x * y
        return product

    def plus(left: dict, right: dict, factor: int) -> dict:
        return {k: left.get(k, 0) + factor * right.get(k, 0) for k in left.keys() | right.keys()}

    unit = [tuple(int(i == k) for i in range(3)) for k in range(3)]
    one = {(0, 0, 0): Fraction(1)}
    mean = dict(zip(unit, levels, strict=True))
    square = {u: level**2 for u, level in zip(unit, levels, strict=True)}
    gain = times(plus(square, times(mean, mean), -1), plus(one, mean, -1))

    def expected_value(n: int) -> Fraction:
        if n == 0:
            return Fraction(0)
        mixed = one
        for k in range(3):
            mixed = plus(mixed, {tuple(n * x for x in unit[k]): Fraction(1)}, -1)
        return sum((x * moment(u) for u, x in times(gain, mixed).items()), Fraction(0))

    counts = [[float(x) - 0.25 for x in a]]
    table = graded.expected_marginal_values(counts, [float(x) for x in levels], 9, prior=0.25)
    exact = [float(expected_value(n + 1) - expected_value(n)) for n in range(9)]
    assert table[0] == pytest.approx(exact, rel=1e-12, abs=1e-18)


def test_expected_rows_never_rise() -> None:
    rng = np.random.default_rng(SEED)
    counts = rng.integers(0, 30, (40, 6)) * (rng.random((40, 6)) < 0.4)
    table = graded.expected_marginal_values(counts, [0, 1, 2, 3, 4, 5], 128, prior=1 / 6)
    assert (table[:, 2:] <= table[:, 1:-1]).all()
    assert (table[:, 1:] > 0).all()


def test_allocation_spends_the_budget_where_rewards_differ() -> None:
    found = kr.allocate_graded([[8, 0, 0], [0, 0, 8], [3, 2, 3], [0, 0, 0]], [0, 0.5, 1], 64)
    assert found.counts.sum() == 64
    assert found.counts.min() >= 2
    assert found.counts[1] == found.counts.min()  # nothing left to gain where the best reward is certain
    assert found.certificate is not None
    assert found.certificate.gap == 0.0
    assert found.success_rates is not None
    assert found.success_rates[3] == pytest.approx(0.5)


def test_two_levels_allocate_like_the_beta_posterior() -> None:
    rng = np.random.default_rng(SEED)
    counts = rng.integers(0, 9, (30, 2))
    found = kr.allocate_graded(counts, [0, 1], 240)
    a, b = counts[:, 1] + 0.5, counts[:, 0] + 0.5
    grid = (np.arange(20_000) + 0.5) / 20_000
    weights = grid ** (a[:, None] - 1) * (1 - grid) ** (b[:, None] - 1)
    table = (weights / weights.sum(axis=1, keepdims=True)) @ marginal_values(grid, 128)
    assert found.expected_value == pytest.approx(
        sum(float(row[:n].sum()) for row, n in zip(table, found.counts, strict=True)), rel=1e-3
    )
    other = kr.allocate(np.full(30, 0.5), 240, value=np.concatenate([np.zeros((30, 1)), table.cumsum(axis=1)], axis=1))
    assert np.abs(other.counts - found.counts).max() <= 1


def test_costs_are_kept() -> None:
    found = kr.allocate_graded([[3, 2, 3], [1, 1, 0]], [0, 1, 2], 50.0, costs=[1.0, 3.0])
    assert found.counts @ np.array([1.0, 3.0]) <= 50.0
    assert found.certificate is not None
    assert found.certificate.optimal


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kr.allocate_graded([[1, 2]], [0], 8), "levels must be at least two different"),
        (lambda: kr.allocate_graded([[1, 2]], [1, 1], 8), "levels must be at least two different"),
        (lambda: kr.allocate_graded([[1, 2]], [0, 1, 2], 8), r"one reward per column \(2\), got 3"),
        (lambda: kr.allocate_graded([[1, -2]], [0, 1], 8), "level_counts must be a table"),
        (lambda: kr.allocate_graded([1, 2], [0, 1], 8), "level_counts must be a table"),
        (lambda: kr.allocate_graded([[1, 2]], [0, 1], 8, prior=0.0), "prior must be a positive number"),
        (lambda: kr.allocate_graded(np.zeros((0, 2)), [0, 1], 8), "level_counts is empty"),
        (lambda: kr.allocate_graded([[1, 2]], [0, 1], 1), r"a budget of 1 rollouts .*\[2, 128\]"),
        (lambda: graded.value(4, [[0.5, 0.6]], [0, 1]), r"probabilities\[0\] is .* sum to 1"),
        (lambda: graded.value(4, [0.5, 0.5], [0, 1]), "probabilities must be a table"),
    ],
)
def test_errors_say_what_is_allowed(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
