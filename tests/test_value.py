"""The paper's equations against exact rational arithmetic, sampling and worked numbers."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import knapsack_rl as kr
from cases import named_case
from knapsack_rl.allocation.checks import check_counts, check_success_rates, check_whole
from knapsack_rl.allocation.value import marginal_values, rollouts_for_probability
from strategies import no_deadline, success_rates


def exact_probability(count: int, rate: float) -> Fraction:
    if count == 0:
        return Fraction(0)  # 1 - 1 - 1 is not a probability: an empty group has no gradient
    p = Fraction(rate)
    return 1 - p**count - (1 - p) ** count


def exact_value(count: int, rate: float) -> Fraction:
    p = Fraction(rate)
    return exact_probability(count, rate) * p * (1 - p) ** 2


def close(found: float, exact: Fraction, relative: float) -> bool:
    return abs(Fraction(found) - exact) <= Fraction(relative) * abs(exact) + Fraction(1e-305)


# --- worked numbers ---


@pytest.mark.parametrize(("rate", "rounded"), [(0.5, 0.992), (0.05, 0.34), (0.95, 0.34), (0.01, 0.08), (0.99, 0.08)])
def test_worked_probabilities_of_eight_rollouts(rate: float, rounded: float) -> None:
    digits = len(str(rounded)) - 2
    assert round(float(kr.nonzero_gradient_probability(8, rate)), digits) == rounded


def test_worked_rollouts_for_ninety_percent() -> None:
    assert round(float(rollouts_for_probability(0.01, 0.9)), 1) == 229.1
    assert round(float(rollouts_for_probability(0.99)), 1) == 229.1  # 0.9 is the default, and p, 1-p are alike


def test_information_gain_peaks_at_one_third() -> None:
    grid = np.linspace(0.0, 1.0, 3001)
    assert grid[np.argmax(kr.information_gain(grid))] == pytest.approx(1 / 3, abs=1e-12)
    assert float(kr.information_gain(1 / 3)) == pytest.approx(4 / 27, rel=1e-15)
    assert kr.information_gain([0.0, 1.0]).tolist() == [0.0, 0.0]


# --- exact arithmetic ---


@no_deadline
@given(st.integers(0, 64), success_rates())
def test_probability_matches_rational_arithmetic(count: int, rate: float) -> None:
    assert close(float(kr.nonzero_gradient_probability(count, rate)), exact_probability(count, rate), 1e-13)


@no_deadline
@given(st.integers(0, 64), success_rates())
def test_value_matches_rational_arithmetic(count: int, rate: float) -> None:
    assert close(float(kr.value(count, rate)), exact_value(count, rate), 1e-13)


@no_deadline
@given(st.integers(1, 40), success_rates())
def test_marginals_match_differences_in_rational_arithmetic(width: int, rate: float) -> None:
    row = marginal_values([rate], width)[0]
    for n, found in enumerate(row):
        assert close(float(found), exact_value(n + 1, rate) - exact_value(n, rate), 1e-12)


@no_deadline
@given(st.integers(1, 60), success_rates())
def test_marginals_match_the_formula_never_rise_and_sum_to_the_value(width: int, rate: float) -> None:
    row = marginal_values([rate], width)[0]
    n = np.arange(1, width)
    formula = kr.information_gain(rate) * (rate**n * (1 - rate) + (1 - rate) ** n * rate)
    np.testing.assert_allclose(row[1:], formula, rtol=1e-11, atol=1e-305)
    assert row[0] == 0.0
    assert (np.diff(row[1:]) <= 0).all()
    assert row.sum() == pytest.approx(float(kr.value(width, rate)), rel=1e-12, abs=1e-300)


def test_saturated_marginals_keep_their_digits() -> None:
    """V itself has no digits left there: the difference of two equal doubles is 0."""
    found = marginal_values([0.5], 200)[0, 199]
    assert float(kr.value(200, 0.5)) == float(kr.value(199, 0.5))
    assert found == pytest.approx(2.0**-202, rel=1e-12)  # 1/8 * 2 * 2^-200


def test_small_rates_keep_full_relative_precision() -> None:
    for rate in [1e-300, 1e-100, 1e-17, 1e-9]:
        with named_case(rate=rate):
            assert close(float(kr.nonzero_gradient_probability(8, rate)), exact_probability(8, rate), 1e-15)


def test_large_groups_match_high_precision_decimals() -> None:
    with localcontext() as context:
        context.prec = 60
        for rate in (0.001, 0.37, 0.9999):
            p = Decimal(rate)
            expected = 1 - p**5000 - (1 - p) ** 5000
            assert float(kr.nonzero_gradient_probability(5000, rate)) == pytest.approx(float(expected), rel=1e-12)
            needed = Decimal("0.1").ln() / max(p, 1 - p).ln()
            assert float(rollouts_for_probability(rate)) == pytest.approx(float(needed), rel=1e-12)


@no_deadline
@given(st.integers(0, 200), success_rates())
def test_probability_is_a_probability_symmetric_and_grows_with_the_group(count: int, rate: float) -> None:
    found = float(kr.nonzero_gradient_probability(count, rate))
    assert 0.0 <= found <= 1.0
    assert float(kr.nonzero_gradient_probability(count + 1, rate)) >= found - 1e-15
    if 1.0 - (1.0 - rate) == rate:
        assert float(kr.nonzero_gradient_probability(count, 1.0 - rate)) == found
    if count < 2:
        assert found == 0.0


@pytest.mark.parametrize(("count", "rate"), [(2, 0.5), (5, 0.3), (8, 0.05), (8, 0.95), (20, 0.02)])
def test_probability_matches_sampling(count: int, rate: float) -> None:
    samples = 200_000
    successes = np.random.default_rng(count).binomial(count, rate, samples)
    mixed = ((successes > 0) & (successes < count)).mean()
    expected = float(kr.nonzero_gradient_probability(count, rate))
    assert abs(mixed - expected) < 5 * math.sqrt(expected * (1 - expected) / samples)


@no_deadline
@given(st.floats(1e-6, 1 - 1e-6), st.floats(0.01, 0.99))
def test_rollouts_for_probability_solve_their_equation(rate: float, probability: float) -> None:
    """After that many rollouts the more common outcome has run uninterrupted with probability 1 - a."""
    needed = float(rollouts_for_probability(rate, probability))
    assert max(rate, 1 - rate) ** needed == pytest.approx(1 - probability, rel=1e-6)


def test_certain_prompts_never_mix() -> None:
    assert rollouts_for_probability([0.0, 1.0]).tolist() == [np.inf, np.inf]


def test_the_smallest_rate_overflows_quietly_to_infinity() -> None:
    assert rollouts_for_probability([5e-324]).tolist() == [np.inf]


# --- shapes and errors ---


def test_broadcasting() -> None:
    counts, rates = np.arange(12).reshape(4, 3, 1), np.linspace(0, 1, 5)
    for function in (kr.nonzero_gradient_probability, kr.value):
        table = function(counts, rates)
        assert table.shape == (4, 3, 5)
        assert table.dtype == np.float64
        assert table[2, 1, 3] == function(counts[2, 1, 0], rates[3])
    assert kr.value(8, 0.5).shape == ()
    assert kr.value([], []).shape == (0,)
    with pytest.raises(ValueError):
        kr.value([1, 2, 3], [0.1, 0.2])


def test_arguments_are_not_changed() -> None:
    rates, counts = np.array([0.2, 0.7]), np.array([3, 4])
    kr.value(counts, rates)
    marginal_values(rates, 5)
    assert rates.tolist() == [0.2, 0.7]
    assert counts.tolist() == [3, 4]


def test_rates_outside_the_unit_interval_are_refused() -> None:
    for bad in [-0.1, 1.0000001, 2, np.inf, -np.inf, np.nan, "x", None, [0.5, -1e-9]]:
        with named_case(bad=bad):
            for function in (
                kr.information_gain,
                lambda p: kr.value(2, p),
                lambda p: marginal_values(np.atleast_1d(p), 3),
            ):
                with pytest.raises(ValueError, match=r"success_rates.*\[0, 1\]"):
                    function(bad)


def test_the_message_names_the_entry() -> None:
    with pytest.raises(ValueError, match=r"success_rates\[1, 0\].*1\.5.*\[0, 1\]"):
        check_success_rates([[0.5, 0.5], [1.5, 0.2]])
    assert np.isnan(check_success_rates([0.5, np.nan], allow_nan=True)[1])
    with pytest.raises(ValueError, match=r"success_rates\[0\]"):
        check_success_rates([-1.0, np.nan], allow_nan=True)


def test_counts_that_are_not_whole_are_refused() -> None:
    for bad in [-1, 2.5, np.nan, np.inf, "3", None, True, [1, -2]]:
        with named_case(bad=bad), pytest.raises(ValueError, match="counts must be whole numbers >= 0"):
            kr.value(bad, 0.5)


def test_whole_floats_count() -> None:
    assert check_counts([2.0, 0.0]).tolist() == [2, 0]
    assert float(kr.value(8.0, 0.25)) == float(kr.value(8, 0.25))


def test_probability_outside_the_open_interval_is_refused() -> None:
    for bad in [0.0, 1.0, -1.0, 2.0, float("nan")]:
        with named_case(bad=bad), pytest.raises(ValueError, match=r"probability must be in \(0, 1\)"):
            rollouts_for_probability(0.5, bad)


def test_check_whole_names_the_argument() -> None:
    for bad in [1.0, "2", None, True, np.bool_(True), -1]:
        with named_case(bad=bad):
            with pytest.raises(ValueError, match="thing must be a whole number >= 0"):
                check_whole("thing", bad, minimum=0)
            assert type(check_whole("thing", np.int32(3), minimum=3)) is int
