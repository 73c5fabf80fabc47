"""Value functions against their definitions in fractions, by simulation of groups, and through kr.allocate."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import experiments
import knapsack_rl as kr
from cases import named_case
from knapsack_rl.allocation.value import (
    KNAPSACK,
    VALUES,
    ValueFunction,
    make_value_function,
    marginal_values,
)
from strategies import Batch, batches, no_deadline

VARIANCE, SIGNAL, FITTED = (f"experiments.values:{name}" for name in ("reward_variance", "signal_to_noise", "fitted"))
POWERS = {"power-0.5-2": (0.5, 2.0), "power-2-0": (2.0, 0.0), "power-0-1.25": (0.0, 1.25)}
HARD = {"likelihood-0.5": 0.5, "likelihood-0.75": 0.75}
NAMED = (*VALUES, *POWERS, *HARD)
NAMES = (*NAMED, VARIANCE, SIGNAL, FITTED)

RATES = [Fraction(0), Fraction(1, 8), Fraction(1, 3), Fraction(1, 2), Fraction(9, 10), Fraction(1)]


def groups(n: int, p: Fraction):
    """(probability, successes) of every group of n rollouts."""
    for outcome in itertools.product((0, 1), repeat=n):
        k = sum(outcome)
        yield p**k * (1 - p) ** (n - k), k


def by_definition(name: str, n: int, p: Fraction) -> Fraction:
    gain = p * (1 - p) ** 2
    if name == VARIANCE:
        return (
            sum((w * Fraction(k, n) * (1 - Fraction(k, n)) for w, k in groups(n, p)), Fraction(0)) if n else Fraction(0)
        )
    if name == SIGNAL:
        x = max(n - 1, 0) * p * (1 - p)
        return gain * x / (1 + x)
    if name == "likelihood":  # half the mean size of the advantages (r - mean) / mean of a group
        return sum((w * (1 - Fraction(k, n)) for w, k in groups(n, p) if k), Fraction(0)) if n else Fraction(0)
    if name in HARD:
        return by_definition("likelihood", n, p) * Fraction(math.pow(p, -HARD[name]) if p else 0)
    mixed = sum((w for w, k in groups(n, p) if 0 < k < n), Fraction(0))
    if name in POWERS:
        a, b = POWERS[name]
        gain = Fraction(math.pow(p, a) * math.pow(1 - p, b))
    if name == FITTED:
        shipped = json.loads((Path(experiments.__file__).parent / "data" / "fitted_value.json").read_text())
        gain = Fraction(float(p) ** shipped["success_exponent"] * float(1 - p) ** shipped["failure_exponent"])
    return mixed if name == "nonzero-gradient" else mixed * gain


def test_values_and_marginals_are_those_of_the_definition() -> None:
    for name in NAMES:
        with named_case(name=name):
            function, rates = make_value_function(name), [float(p) for p in RATES]
            exact = np.array([[by_definition(name, n, p) for n in range(9)] for p in RATES])
            values = function.values(np.arange(9), np.array(rates)[:, None])
            assert values == pytest.approx(exact.astype(float), rel=1e-12, abs=1e-15)
            assert function.marginals(rates, 8) == pytest.approx(np.diff(exact).astype(float), rel=1e-12, abs=1e-16)


def test_values_are_concave_from_one_rollout_on() -> None:
    for name in NAMES:
        with named_case(name=name):
            rounding = 0.0 if name in NAMED else 4e-16  # differences round like the values
            table = make_value_function(name).marginals(np.linspace(0, 1, 101), 300)
            assert (table[:, 0] == 0).all()
            assert (table[:, 2:] <= table[:, 1:-1] + rounding).all()
            assert (table >= -rounding).all()


def test_the_knapsacks_table_is_that_of_the_equations() -> None:
    p = np.random.default_rng(0).random(50)
    assert (KNAPSACK.marginals(p, 40) == marginal_values(p, 40)).all()


def test_the_noise_of_a_groups_gradient() -> None:
    """The advantage's variance in the derivation of "signal-to-noise": p q N/(N-1) with the others as baseline."""
    for n, p in itertools.product((2, 3, 6), RATES[1:5]):
        moment = Fraction(0)
        for weight, k in groups(n, p):
            for reward, times in ((1, k), (0, n - k)):
                moment += weight * Fraction(times, n) * (reward - Fraction(k - reward, n - 1)) ** 2
        assert moment == p * (1 - p) * Fraction(n, n - 1)


def test_the_likelihood_is_the_chance_of_a_success_beyond_the_first_rollout() -> None:
    likelihood = make_value_function("likelihood")
    for n, p in itertools.product(range(1, 7), RATES):
        chance = sum((w for w, k in groups(n, p) if k), Fraction(0))
        assert likelihood.values(n, float(p)) == pytest.approx(float(chance - p), rel=1e-13, abs=1e-15)
    tiny = float(likelihood.values(3, 1e-18))
    assert tiny == pytest.approx(2e-18, rel=1e-12), "1 - (1-p)^3 - p would be 0 in doubles"
    assert likelihood.values(200, np.array([0.0, 1.0])).tolist() == [0.0, 0.0]


def test_the_gradient_of_advantages_over_the_mean_is_that_of_the_likelihood_truncated() -> None:
    """By enumeration: the mean of A times the score is (1 - (1-p)^(N-1)) d log p, and V is (1-p) times the factor."""
    for n, p in itertools.product(range(1, 7), RATES[1:-1]):
        expected = Fraction(0)
        for weight, k in groups(n, p):
            if not k:
                continue
            over_mean = {reward: (reward - Fraction(k, n)) / Fraction(k, n) for reward in (0, 1)}
            score = {1: 1 / p, 0: -1 / (1 - p)}  # d log prob / d p of a success and of a failure
            expected += weight * sum(
                Fraction(times, n) * over_mean[reward] * score[reward] for reward, times in ((1, k), (0, n - k))
            )
        factor = 1 - (1 - p) ** (n - 1)
        assert expected == factor / p
        assert make_value_function("likelihood").values(n, float(p)) == pytest.approx(float((1 - p) * factor))


def test_the_power_family_has_the_paper_as_a_member() -> None:
    p = np.linspace(0, 1, 41)
    for name, same in (("power-1-2", "knapsack"), ("power-0-0", "nonzero-gradient")):
        assert (make_value_function(name).marginals(p, 30) == make_value_function(same).marginals(p, 30)).all()
    for nonsense in ("power-", "power-1", "power-1-2-3", "power--1-2", "power-nan-1", "power-1e9-1", "power-x-y",
                     "power-0.5- 2", "power-1,2", "power-٣-1", "power-1-2\n"):  # fmt: skip
        with named_case(name=nonsense), pytest.raises(ValueError, match="two plain numbers from 0 to 999"):
            make_value_function(nonsense)


def test_named_values_are_kept_in_a_state(tmp_path: Path) -> None:
    for value in ("likelihood", "likelihood-0.5", "power-0.5-2"):
        with named_case(value=value):
            saved = kr.KnapsackAllocator(value=value)
            saved.observe(["a"] * 8 + ["b"] * 8, [1] + [0] * 7 + [1] * 6 + [0] * 2)
            saved.save(tmp_path / "state.npz")
            loaded = kr.KnapsackAllocator.load(tmp_path / "state.npz")
            assert loaded.value == value
            assert (
                loaded.allocate(["a", "b", "c"], 40).counts.tolist()
                == saved.allocate(["a", "b", "c"], 40).counts.tolist()
            )


def test_hard_prompts_get_more_by_the_likelihood() -> None:
    """At p -> 0 the paper's marginal is 2 p (1-p)^(N+...) p: of order p^2; the likelihood's is of order p."""
    rates = [0.02, 0.5]
    paper, likelihood = (kr.allocate(rates, 64, value=value).counts for value in ("knapsack", "likelihood"))
    assert likelihood[0] > paper[0]
    best = min(range(2, 63), key=lambda n: 0.98**n + 0.5 ** (64 - n))  # the chance that neither has a success
    assert likelihood.tolist() == [best, 64 - best]


@no_deadline
@given(batches(least=1, allow_nan=True), st.sampled_from(NAMES))
def test_every_named_value_is_allocated_to_its_optimum(batch: Batch, name: str) -> None:
    """One rollout at a time by the best gain is optimal for concave values."""
    found = kr.allocate(*batch, value=name)
    lower, upper = (np.broadcast_to(b, batch.rates.shape) for b in (batch.lower, batch.upper))
    seen = ~np.isnan(batch.rates)
    values = make_value_function(name).values(np.arange(16), np.where(seen, batch.rates, 0.0)[:, None])
    if seen.any():
        values[~seen] = values[seen].mean(axis=0)
    counts = lower.copy()
    for _ in range(batch.budget - counts.sum()):
        gains = [values[i, n + 1] - values[i, n] if n < upper[i] else -1.0 for i, n in enumerate(counts)]
        counts[int(np.argmax(gains))] += 1
    best = values[np.arange(counts.size), counts].sum()
    assert found.counts.sum() == batch.budget
    assert values[np.arange(counts.size), found.counts].sum() == pytest.approx(best, rel=1e-12, abs=1e-15)
    assert found.expected_value == pytest.approx(best, rel=1e-11, abs=1e-14)


def test_a_users_function_gives_the_same_as_the_named_value() -> None:
    rates = [0.5, 0.1, 0.02, 0.9]
    named = kr.allocate(rates, 60)
    own = kr.allocate(rates, 60, value=lambda n, p: (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2 * (n > 0))
    table = kr.allocate(rates, 60, value=kr.value(np.arange(129), np.array(rates)[:, None]))
    assert own.counts.tolist() == table.counts.tolist() == named.counts.tolist()
    assert own.expected_value == pytest.approx(named.expected_value, rel=1e-12)


def test_an_object_with_the_methods_is_accepted() -> None:
    class Halves:
        def values(self, counts, success_rates):
            return np.broadcast_to(1.0 - 0.5 ** np.asarray(counts), np.broadcast(counts, success_rates).shape)

        def marginals(self, success_rates, max_rollouts):
            return np.tile(0.5 ** np.arange(1, max_rollouts + 1), (len(success_rates), 1))

    assert isinstance(Halves(), ValueFunction)
    assert make_value_function(Halves()).marginals([0.1], 2).tolist() == [[0.5, 0.25]]
    assert kr.allocate([0.1, 0.9, 0.5], 12, value=Halves()).counts.tolist() == [4, 4, 4]


def test_a_value_that_is_not_concave_goes_to_dynamic_programming() -> None:
    """A value from four rollouts on: a greedy choice of one rollout at a time finds nothing."""
    found = kr.allocate([0.5, 0.25, 0.75], 8, 0, 8, value=lambda n, p: (n >= 4) * p)
    assert found.counts.tolist() == [4, 0, 4]
    assert found.expected_value == 1.25
    assert "not concave: solved by dynamic programming" in found.reason
    with pytest.raises(ValueError, match="greedy needs a concave table"):
        kr.allocate([0.5, 0.25], 6, value=lambda n, p: (n >= 4) * p, method="greedy")


def test_a_posterior_on_a_grid_multiplies_the_table() -> None:
    for name in NAMES:
        with named_case(name=name):
            grid = np.linspace(0.01, 0.99, 40)
            weights = np.random.default_rng(1).dirichlet(np.ones(40), 6)
            function = make_value_function(name)
            expected = weights @ function.marginals(grid, 30)
            values = function.values(np.arange(31), grid[:, None])
            assert expected.cumsum(axis=1) == pytest.approx((weights @ values)[:, 1:], rel=1e-10)


def test_values_that_cannot_be_used_are_explained() -> None:
    for value, message in [
        ("best", "value must be one of knapsack, nonzero-gradient, likelihood, likelihood-B, power-A-B.*'best'"),
        (3.0, "value must be one of"),
        (np.zeros((3, 9)), r"table of values must be finite, of shape \(2, K \+ 1\).*\(3, 9\)"),
        (np.full((2, 129), np.nan), "table of values must be finite"),
        (np.ones((2, 129)), "value of no rollouts must be 0, got .*1.0.* for prompt 0"),
        (np.zeros((2, 9)), "max_rollouts 16 needs as many columns of marginals, got 8"),
        (lambda n, p: n + 1.0 + 0 * p, "value of no rollouts must be 0"),
        (lambda n, p: 1.0, r"must return finite numbers of shape \(\d, \d\).*got shape \(\)"),
        (lambda n, p: np.full(np.broadcast(n, p).shape, np.inf), "with NaN or infinity"),
        (lambda n: n, "value function fails for counts .*TypeError"),
        ("experiments.values:no_such", "'experiments.values:no_such' cannot be imported.*no_such.*search path"),
        ("no_such_module:f", "'no_such_module:f' cannot be imported.*no_such_module"),
        ("experiments.values:FITTED_VALUE", "value must be one of .*'package.module:function'"),
    ]:
        with named_case(value=value, message=message), pytest.raises(ValueError, match=message):
            kr.allocate([0.5, 0.25], 18, 2, 16, value=value)


@pytest.mark.parametrize("estimator", ["bayes-filter", "empirical-bayes"])
def test_an_allocator_tries_its_value_when_it_is_made(estimator: str) -> None:
    """Not at the first step, where a failure would cost the run its allocation (case 13 from the field)."""
    with pytest.raises(ValueError, match="value of no rollouts must be 0"):
        kr.KnapsackAllocator(estimator, value=lambda n, p: 1.0 + n * p)
    with pytest.raises(ValueError, match="with NaN or infinity"):
        kr.KnapsackAllocator(estimator, value=lambda n, p: np.where(n > 0, np.inf, 0.0) + 0 * p)


def test_the_papers_rule_keeps_the_papers_value() -> None:
    with pytest.raises(
        ValueError, match="fallback=True is the paper's rule for value='knapsack', got value='nonzero-gradient'"
    ):
        kr.allocate([0.5, 0.25], 16, value="nonzero-gradient", fallback=True)
    with pytest.raises(ValueError, match="fallback=True is the paper's rule"):
        kr.allocate([0.5, 0.25], 16, value=np.zeros((2, 17)), fallback=True)
