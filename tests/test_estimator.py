"""Estimators against slow re-implementations, numerical integration and simulated populations."""

from __future__ import annotations

import functools
import itertools
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import betaln
from scipy.stats import binom

import knapsack_rl as kr
from cases import named_case
from knapsack_rl.allocation.value import marginal_values
from knapsack_rl.estimation.named import (
    ESTIMATORS,
    BayesFilterEstimator,
    BetaEstimator,
    EmpiricalBayesEstimator,
    WindowEstimator,
    make_estimator,
)
from knapsack_rl.estimation.protocol import Estimator
from knapsack_rl.estimation.tracker import Records, Tracker
from strategies import no_deadline, visits


def counted(successes, failures) -> Records:
    """Records of prompts with the given counts from one visit."""
    records = Records.empty(len(successes))
    records.successes[:], records.failures[:] = successes, failures
    records.rollouts[:] = np.ceil(np.add(successes, failures))
    records.visits[:] = 1
    return records


def recorded(history: list[list[list[bool]]], estimator: Estimator | None = None) -> Records:
    """Records of prompts whose outcomes are listed visit by visit, with the evidence of an estimator."""
    estimator = estimator or WindowEstimator()
    tracker = Tracker(estimator.evidence_size)
    for prompt, visits_of_prompt in enumerate(history):
        for outcomes in visits_of_prompt:
            counts = np.array([sum(outcomes)]), np.array([len(outcomes)])
            evidence = estimator.absorb(tracker.lookup([prompt]), *counts)
            tracker.record([prompt], np.zeros(len(outcomes), dtype=np.int64), np.array(outcomes), evidence=evidence)
    return tracker.lookup(range(len(history)))


# --- window: the paper's rule ---


def window_by_hand(history: list[list[bool]], window: int, minimum: int) -> float:
    everything = [outcome for visit in history for outcome in visit]
    if len(everything) < minimum:
        return float("nan")
    taken = history[-1] if len(history[-1]) >= window else everything[-window:]
    return sum(taken) / len(taken)


@no_deadline
@given(st.lists(visits(), min_size=1, max_size=3), st.integers(1, 64), st.integers(1, 20))
def test_window_matches_full_reward_lists(history, window: int, minimum: int) -> None:
    expected = [window_by_hand(prompt, window, minimum) for prompt in history]
    found = WindowEstimator(window, minimum).believe(recorded(history), 4).mean
    np.testing.assert_array_equal(found, expected)


@no_deadline
@given(visits(max_rollouts=24))
def test_window_has_the_papers_settings(history: list[list[bool]]) -> None:
    found = WindowEstimator().believe(recorded([history]), 4).mean
    np.testing.assert_array_equal(found, [window_by_hand(history, 16, 8)])


def test_window_worked_examples() -> None:
    def rate(*history: list[bool]) -> float:
        return float(WindowEstimator().believe(recorded([list(history)]), 4).mean[0])

    yes, no = [True], [False]
    assert np.isnan(rate(yes * 7))
    assert rate(yes * 8) == 1.0
    assert rate(yes * 4, no * 4) == 0.5  # the eight may come from several visits
    assert rate(no * 100, yes * 20) == 1.0  # a newest visit of 16 counts alone, in full
    assert rate(no * 100, no * 10 + yes * 20) == pytest.approx(20 / 30)
    assert rate(no * 100, yes * 12) == 0.75  # else the newest 16 across visits
    assert rate(yes * 10, no * 2) == pytest.approx(10 / 12)  # and fewer while there are fewer


def test_window_belief() -> None:
    records = recorded([[[True, False] * 5], [[True] * 3], [[True] * 9]])
    belief = WindowEstimator().believe(records, 12)
    np.testing.assert_allclose(belief.marginals[[0, 2]], marginal_values([0.5, 1.0], 12), rtol=1e-14)
    predicted = belief.nonzero_gradient(np.array([4, 4, 4]))
    assert predicted[0] == pytest.approx(1 - 2 / 16)
    assert np.isnan(predicted[1])
    assert predicted[2] == 0.0
    assert WindowEstimator.paper_rule


@no_deadline
@given(st.lists(visits(max_visits=2, max_rollouts=20), min_size=1, max_size=8), st.integers(0, 40))
def test_without_the_fallback_the_window_is_the_plain_knapsack_on_its_means(history, extra: int) -> None:
    budget = 2 * len(history) + extra
    allocator = kr.KnapsackAllocator("window", max_rollouts=60, window=8, minimum=1, fallback=False)
    for step in range(2):
        batch = [(i, outcome) for i, prompt in enumerate(history) if step < len(prompt) for outcome in prompt[step]]
        allocator.observe([i for i, _ in batch], [float(outcome) for _, outcome in batch])
    rates = np.array([window_by_hand(prompt, 8, 1) for prompt in history])
    found = allocator.allocate(range(len(history)), budget)
    np.testing.assert_array_equal(found.success_rates, rates)
    # Equal values may go to either of two prompts, so what is compared is what the allocation is worth.
    best = kr.value(kr.allocate(rates, budget, 2, 60, fallback=False).counts, rates).sum()
    assert kr.value(found.counts, rates).sum() == pytest.approx(best, rel=1e-12)
    assert not found.reason.startswith("fallback")


# --- Beta ---


def integrate(function, a: float, b: float) -> float:
    """Expectation under Beta(a, b): the singular ends are the quadrature's weight."""
    total, _ = quad(function, 0, 1, weight="alg", wvar=(a - 1, b - 1), epsabs=0, epsrel=1e-11)
    return total / np.exp(betaln(a, b))


def test_beta_matches_numerical_integration() -> None:
    for successes, failures, prior in itertools.product(
        [0.0, 0.4, 3.0, 16.0], [0.0, 2.5, 8.0], [(0.5, 0.5), (1.0, 1.0), (0.3, 2.0)]
    ):
        with named_case(successes=successes, failures=failures, prior=prior):
            a, b = prior[0] + successes, prior[1] + failures
            belief = BetaEstimator(*prior).believe(counted([successes], [failures]), 24)
            assert belief.mean[0] == pytest.approx(integrate(lambda p: p, a, b), rel=1e-9)
            assert belief.marginals[0, 0] == 0.0
            for n in (1, 2, 3, 7, 23):
                expected = integrate(lambda p, n=n: p * (1 - p) ** 2 * (p**n * (1 - p) + (1 - p) ** n * p), a, b)
                assert belief.marginals[0, n] == pytest.approx(expected, rel=1e-8)
                mixed = integrate(lambda p, n=n: 1 - p**n - (1 - p) ** n, a, b)
                assert belief.nonzero_gradient(np.array([n]))[0] == pytest.approx(mixed, rel=1e-8, abs=1e-12)


@no_deadline
@given(st.floats(0, 200), st.floats(0, 200), st.floats(0.05, 5), st.floats(0.05, 5), st.integers(1, 150))
def test_beta_matches_the_closed_form(successes, failures, prior_a, prior_b, width: int) -> None:
    a, b = prior_a + successes, prior_b + failures
    belief = BetaEstimator(prior_a, prior_b).believe(counted([successes], [failures]), width)
    n = np.arange(1, width)
    scale = betaln(a, b)
    expected = np.exp(betaln(a + n + 1, b + 3) - scale) + np.exp(betaln(a + 2, b + n + 2) - scale)
    assert belief.marginals.shape == (1, width)
    np.testing.assert_allclose(belief.marginals[0, 1:], expected, rtol=1e-7)
    assert (np.diff(belief.marginals[0, 1:]) <= 0).all()  # a mixture of concave values is concave
    counts = np.array([width])
    mixed = 1 - np.exp(betaln(a + width, b) - scale) - np.exp(betaln(a, b + width) - scale)
    assert belief.nonzero_gradient(counts)[0] == pytest.approx(0.0 if width < 2 else mixed, rel=1e-7, abs=1e-9)


def test_beta_values_match_numerical_integration() -> None:
    """The posterior expectation of every value with a closed form, one rollout more at a time."""
    marginals = {
        "likelihood": lambda p, n: p * (1 - p) ** n,
        "nonzero-gradient": lambda p, n: p**n * (1 - p) + (1 - p) ** n * p,
        "power-0.5-2": lambda p, n: p**0.5 * (1 - p) ** 2 * (p**n * (1 - p) + (1 - p) ** n * p),
        "power-1.25-0.75": lambda p, n: p**1.25 * (1 - p) ** 0.75 * (p**n * (1 - p) + (1 - p) ** n * p),
    }
    successes, failures = np.array([0.0, 0.4, 16.0, 0.0]), np.array([0.0, 8.0, 2.5, 30.0])
    for value, marginal in marginals.items():
        estimator = BetaEstimator(0.3, 2.0)
        estimator.use_value(value)
        found = estimator.believe(counted(successes, failures), 24).marginals
        assert (found[:, 0] == 0.0).all()
        assert (np.diff(found[:, 1:]) <= 0).all(), "a mixture of concave values is concave"
        for k, n in itertools.product(range(4), (1, 2, 7, 23)):
            with named_case(value=value, prompt=k, n=n):
                expected = integrate(functools.partial(marginal, n=n), 0.3 + successes[k], 2.0 + failures[k])
                assert found[k, n] == pytest.approx(expected, rel=1e-7)


@no_deadline
@given(st.floats(0, 200), st.floats(0, 200), st.floats(0.05, 5), st.floats(0.05, 5), st.integers(1, 150))
def test_beta_matches_the_closed_form_of_the_likelihood(successes, failures, prior_a, prior_b, width: int) -> None:
    a, b = prior_a + successes, prior_b + failures
    estimator = BetaEstimator(prior_a, prior_b)
    estimator.use_value("likelihood")
    found = estimator.believe(counted([successes], [failures]), width).marginals[0]
    expected = np.exp(betaln(a + 1, b + np.arange(1, width)) - betaln(a, b))
    np.testing.assert_allclose(found[1:], expected, rtol=1e-7)


def test_grid_estimators_expect_the_likelihood_over_their_posterior() -> None:
    for name in ("bayes-filter", "empirical-bayes"):
        allocator = kr.KnapsackAllocator(name, value="likelihood")
        allocator.observe(["a"] * 8 + ["b"] * 8, [1] + [0] * 7 + [1] * 6 + [0] * 2)
        records = allocator.tracker.lookup(["a", "b", "new"])
        belief = allocator.estimator.believe(records, 40)
        posterior, grid = allocator.estimator.posterior(records), allocator.estimator.grid  # type: ignore[attr-defined]
        for n in range(1, 40):
            expected = [sum(w * p * (1 - p) ** n for w, p in zip(row, grid, strict=True)) for row in posterior]
            np.testing.assert_allclose(belief.marginals[:, n], expected, rtol=1e-11)


def test_beta_predictions_for_several_prompts() -> None:
    belief = BetaEstimator(1.0, 1.0).believe(counted([0, 4, 1], [0, 0, 7]), 16)
    together = belief.nonzero_gradient(np.array([5, 0, 9]))
    alone = [belief.nonzero_gradient(np.full(3, n))[i] for i, n in enumerate((5, 0, 9))]
    np.testing.assert_allclose(together, alone, rtol=1e-13)
    assert together[1] == 0.0
    assert together[0] == pytest.approx(1 - 2 / 6)  # uniform rate: each number of successes is equally likely
    assert belief.nonzero_gradient(np.array([1, 1, 1])).tolist() == [0.0, 0.0, 0.0]


# --- empirical Bayes ---


def log_likelihood(estimator: EmpiricalBayesEstimator, successes, failures) -> float:
    grid = estimator.grid
    table = np.exp(np.outer(successes, np.log(grid)) + np.outer(failures, np.log1p(-grid)))
    return float(np.log(table @ estimator.prior).sum())


def population(rates: NDArray, rollouts: int, seed: int) -> tuple[NDArray, NDArray]:
    successes = np.random.default_rng(seed).binomial(rollouts, rates)
    return successes, rollouts - successes


def test_each_em_step_increases_the_likelihood() -> None:
    """With the weight of one prompt for a flat prior, as documented; without it the end beats the start."""
    rates = np.random.default_rng(5).beta(0.4, 0.3, 300)
    counts = population(rates, 8, 6)
    penalised, plain = [], []
    for iterations in (1, 2, 3, 5, 10, 20, 40):
        estimator = EmpiricalBayesEstimator(iterations=iterations)
        estimator.refit(counted(*counts))
        assert estimator.prior.sum() == pytest.approx(1.0, rel=1e-12)
        assert (estimator.prior > 0).all()
        plain.append(log_likelihood(estimator, *counts))
        penalised.append(plain[-1] + np.log(estimator.prior).mean())
    assert all(after > before for before, after in pairwise(penalised))
    flat = EmpiricalBayesEstimator()
    assert plain[-1] > log_likelihood(flat, *counts) + 10


def test_the_fit_is_near_the_maximum() -> None:
    """At the maximum-likelihood mixture no grid point has a mean likelihood ratio above one (Lindsay 1983)."""
    counts = population(np.random.default_rng(7).beta(0.4, 0.3, 2000), 8, 8)
    estimator = EmpiricalBayesEstimator(iterations=300)
    estimator.refit(counted(*counts))
    grid = estimator.grid
    table = np.exp(np.outer(counts[0], np.log(grid)) + np.outer(counts[1], np.log1p(-grid)))
    ratio = (table / (table @ estimator.prior)[:, None]).mean(axis=0)
    assert ratio.max() < 1.01


@pytest.mark.parametrize(
    ("atoms", "weights"), [((0.1, 0.9), (0.3, 0.7)), ((0.05, 0.5, 0.95), (0.5, 0.2, 0.3)), ((0.01, 0.3), (0.6, 0.4))]
)
def test_a_known_mixture_is_recovered(atoms, weights) -> None:
    rng = np.random.default_rng(11)
    rates = rng.choice(atoms, 6000, p=weights)
    records = counted(*population(rates, 48, 12))
    estimator = EmpiricalBayesEstimator()
    estimator.refit(records)
    nearest = np.abs(estimator.grid[:, None] - np.array(atoms)).argmin(axis=1)
    mass = np.bincount(nearest, weights=estimator.prior, minlength=len(atoms))
    np.testing.assert_allclose(mass, weights, atol=0.03)
    centres = np.bincount(nearest, weights=estimator.prior * estimator.grid, minlength=len(atoms)) / mass
    np.testing.assert_allclose(centres, atoms, atol=0.03)
    error = np.abs(estimator.believe(records, 2).mean - rates).mean()
    assert error < 0.6 * np.abs(records.successes / 48 - rates).mean()  # the population sharpens each estimate


def test_posterior_matches_direct_bayes() -> None:
    records = counted([0, 1, 5, 8, 30], [0, 7, 5, 0, 2])
    estimator = EmpiricalBayesEstimator(grid_points=31)
    estimator.refit(counted(*population(np.random.default_rng(1).random(200), 8, 2)))
    joint = binom.pmf(records.successes[:, None], (records.successes + records.failures)[:, None], estimator.grid)
    joint = joint * estimator.prior
    expected = joint / joint.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(estimator.posterior(records), expected, rtol=1e-9, atol=1e-300)
    belief = estimator.believe(records, 20)
    np.testing.assert_allclose(belief.mean, expected @ estimator.grid, rtol=1e-10)
    np.testing.assert_allclose(belief.marginals, expected @ marginal_values(estimator.grid, 20), rtol=1e-10)
    counts = np.array([0, 1, 2, 9, 40])
    mixed = (expected * kr.nonzero_gradient_probability(counts[:, None], estimator.grid)).sum(axis=1)
    np.testing.assert_allclose(belief.nonzero_gradient(counts), mixed, rtol=1e-10)


def test_posterior_survives_long_histories() -> None:
    belief = EmpiricalBayesEstimator().believe(counted([50_000, 0, 100_000], [50_000, 100_000, 0]), 8)
    assert np.isfinite(belief.marginals).all()
    assert belief.mean[0] == pytest.approx(0.5, abs=1e-6)
    assert belief.mean[1] == pytest.approx(1 - belief.mean[2], rel=1e-9)
    assert belief.mean[1] < 0.001


@no_deadline
@given(st.lists(st.tuples(st.floats(0, 60), st.floats(0, 60)), min_size=1, max_size=20), st.integers(2, 60))
def test_expected_values_are_concave(counts, width: int) -> None:
    records = counted(*np.array(counts).T)
    estimator = EmpiricalBayesEstimator(iterations=5)
    estimator.refit(records)
    table = estimator.believe(records, width).marginals
    assert (table[:, 0] == 0).all()
    assert (np.diff(table[:, 1:], axis=1) <= 1e-15 * table[:, 1:-1]).all()


@no_deadline
@given(st.randoms(use_true_random=False))
def test_the_order_of_prompts_does_not_matter(random) -> None:
    successes, failures = population(np.linspace(0, 1, 60), 8, 3)
    order = np.array(random.sample(range(60), 60))
    one, other = EmpiricalBayesEstimator(), EmpiricalBayesEstimator()
    one.refit(counted(successes, failures))
    other.refit(counted(successes[order], failures[order]))
    np.testing.assert_allclose(one.prior, other.prior, rtol=1e-9)
    found = one.believe(counted(successes, failures), 9)
    moved = other.believe(counted(successes[order], failures[order]), 9)
    np.testing.assert_allclose(found.marginals[order], moved.marginals, rtol=1e-12)


def test_an_unseen_prompt_has_the_mean_of_the_prior() -> None:
    estimator = EmpiricalBayesEstimator()
    estimator.refit(counted(*population(np.random.default_rng(1).beta(1, 4, 500), 8, 2)))
    belief = estimator.believe(Records.empty(2), 6)
    np.testing.assert_allclose(belief.mean, estimator.prior @ estimator.grid, rtol=1e-12)
    np.testing.assert_allclose(belief.marginals[0], estimator.prior @ marginal_values(estimator.grid, 6), rtol=1e-12)
    assert belief.mean[0] == pytest.approx(0.2, abs=0.03)


def test_an_unsolved_prompt_is_not_hopeless_and_a_wide_table_is_not_reused_when_too_narrow() -> None:
    estimator = EmpiricalBayesEstimator()
    estimator.refit(counted(*population(np.random.default_rng(1).beta(0.5, 2, 500), 8, 2)))
    narrow, wide = estimator.believe(counted([0], [8]), 4), estimator.believe(counted([0], [8]), 30)
    assert wide.marginals.shape == (1, 30)
    np.testing.assert_array_equal(wide.marginals[:, :4], narrow.marginals)
    assert wide.marginals[0, 4] > 1e-4
    assert 0.0 < wide.mean[0] < 0.15


# --- gain on a population (section 5 of the method) ---


def simulated_rates(rng: np.random.Generator, prompts: int) -> NDArray:
    """38 % near 1, 22 % near 0, the rest spread."""
    rates = rng.random(prompts)
    group = rng.random(prompts)
    easy, hard = group < 0.38, (group >= 0.38) & (group < 0.60)
    rates[easy] = 1 - 0.02 * rng.random(int(easy.sum())) ** 2
    rates[hard] = 0.02 * rng.random(int(hard.sum())) ** 2
    return rates


def captured_gain(allocator: kr.KnapsackAllocator, rates: NDArray, seed: int, visits_made: int = 3) -> float:
    """Share of the gain between uniform allocation and known rates, after a few visits of 8 per prompt."""
    rng = np.random.default_rng(seed)
    ids, budget = list(range(rates.size)), 8 * rates.size
    for _ in range(visits_made):
        prompts = allocator.allocate(ids, budget).expand()
        allocator.observe(prompts.tolist(), (rng.random(budget) < rates[prompts]).astype(float))
    value = {
        "found": kr.value(allocator.allocate(ids, budget).counts, rates).sum(),
        "uniform": kr.value(8, rates).sum(),
        "known": kr.value(kr.allocate(rates, budget).counts, rates).sum(),
    }
    assert value["uniform"] < value["known"]
    return float((value["found"] - value["uniform"]) / (value["known"] - value["uniform"]))


def test_empirical_bayes_captures_more_than_the_papers_rule_and_a_fixed_prior() -> None:
    rates = simulated_rates(np.random.default_rng(2), 4096)
    gain = {
        name: np.mean([captured_gain(kr.KnapsackAllocator(name), rates, seed) for seed in (3, 4)])
        for name in ESTIMATORS
    }
    assert gain["empirical-bayes"] > gain["window"] + 0.02
    assert gain["empirical-bayes"] > gain["beta"] + 0.02
    assert 0.7 < gain["empirical-bayes"] <= 1.0
    assert gain["window"] > 0.3
    assert gain["beta"] > 0.3
    # The rates are static here, and empirical Bayes discounts: the filter must find that nothing moves.
    assert gain["empirical-bayes"] - 0.02 < gain["bayes-filter"] <= 1.0


def test_more_visits_capture_more() -> None:
    rates = simulated_rates(np.random.default_rng(4), 4096)
    gains = [captured_gain(kr.KnapsackAllocator(), rates, seed=5, visits_made=made) for made in (1, 2, 4)]
    assert 0.4 < gains[0] < gains[1] < gains[2] <= 1.0


# --- making, settings, state ---


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("window", {"window": 32, "minimum": 3, "fallback": False}),
        ("beta", {"prior_successes": 1.5, "prior_failures": 0.25, "discount": 0.5}),
        ("empirical-bayes", {"discount": 1.0, "grid_points": 21, "iterations": 7}),
        ("bayes-filter", {"grid_points": 21, "iterations": 7}),
    ],
)
def test_settings_and_state_make_an_equal_estimator(name: str, changed) -> None:
    estimator = make_estimator(name, **changed)
    assert estimator.settings() == changed
    records = recorded([[[True] * 9, [False] * 3], [[False] * 5], [[True, False] * 12]], estimator)
    estimator.refit(records)
    twin = make_estimator(name, **estimator.settings())
    twin.load_state_dict(estimator.state_dict())
    one, other = estimator.believe(records, 12), twin.believe(records, 12)
    np.testing.assert_array_equal(one.mean, other.mean)
    np.testing.assert_array_equal(one.marginals, other.marginals)
    counts = np.array([2, 7, 4])
    np.testing.assert_array_equal(one.nonzero_gradient(counts), other.nonzero_gradient(counts))


def test_the_recipe_for_an_estimator_works(tmp_path: Path) -> None:
    """The block of CONTRIBUTING.md, then a run with its estimator: the defaults of all parts that it leaves out."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipe = text.split("## Adding an estimator")[1].split("```python")[1].split("```")[0]
    space: dict[str, Any] = {}
    exec(recipe, space)
    allocator, ids = space["allocator"], ["a", "b"]
    assert allocator.allocate(ids, 8).counts.tolist() == [4, 4]
    allocator.observe(ids * 4, [1, 0, 1, 0, 1, 0, 1, 1], lengths=[9] * 8)
    assert allocator.belief(ids).mean.tolist() == [5 / 6, 2 / 6]
    assert allocator.allocate(ids, 12).counts.sum() == 12
    assert allocator.metrics()["allocation_failures"] == 0
    allocator.save(tmp_path / "state.npz")
    twin = kr.KnapsackAllocator.load(tmp_path / "state.npz", estimator=space["LaplaceEstimator"]())
    assert twin.allocate(ids, 12).counts.tolist() == allocator.allocate(ids, 12).counts.tolist()
    with pytest.raises(ValueError, match="LaplaceEstimator has the paper's value built in"):
        kr.KnapsackAllocator(space["LaplaceEstimator"](), value="nonzero-gradient")


def test_an_estimator_that_lacks_parts_is_refused_when_the_allocator_is_made() -> None:
    class Half:
        discount = 0.5

        def believe(self, records, max_rollouts): ...

    with pytest.raises(ValueError, match=r"estimator Half lacks paper_rule, .*derive it from"):
        kr.KnapsackAllocator(Half())  # type: ignore[arg-type]

    class Growing(Estimator):
        discount = 1.5

    with pytest.raises(ValueError, match=r"discount must be in \(0, 1\], got 1.5"):
        kr.KnapsackAllocator(Growing())  # type: ignore[abstract]


def test_every_named_estimator_can_be_made() -> None:
    for name, kind in ESTIMATORS.items():
        assert isinstance(make_estimator(name), kind)  # type: ignore[arg-type]
    assert WindowEstimator().discount == 1.0  # the window is what forgets


@pytest.mark.parametrize("kind", [EmpiricalBayesEstimator, BayesFilterEstimator])
def test_a_state_is_a_copy(kind) -> None:
    estimator = kind(grid_points=3)
    estimator.state_dict()["prior"][:] = 0.0
    assert estimator.prior.sum() == pytest.approx(1.0)


def test_settings_out_of_range_are_refused() -> None:
    for name, settings, message in [
        ("bayes", {}, "estimator must be one of window, beta, empirical-bayes, bayes-filter, got 'bayes'"),
        ("window", {"window": 0}, "window must be a whole number >= 1, got 0"),
        ("window", {"window": 65}, "window must be at most 64.*got 65"),
        ("window", {"minimum": 0}, "minimum must be a whole number >= 1"),
        ("window", {"window": 8.0}, "window must be a whole number"),
        ("window", {"fallback": 0}, "fallback must be true or false, got 0"),
        ("beta", {"prior_successes": 0.0}, "prior_successes must be a positive number, got 0.0"),
        ("beta", {"prior_failures": float("inf")}, "prior_failures must be a positive number, got inf"),
        ("beta", {"prior_failures": float("nan")}, "prior_failures must be a positive number"),
        ("beta", {"discount": 0.0}, r"discount must be in \(0, 1\], got 0.0"),
        ("empirical-bayes", {"discount": 1.1}, r"discount must be in \(0, 1\], got 1.1"),
        ("empirical-bayes", {"discount": float("nan")}, r"discount must be in \(0, 1\]"),
        ("empirical-bayes", {"grid_points": 2}, "grid_points must be a whole number from 3 to 1025, got 2"),
        ("empirical-bayes", {"iterations": 0}, "iterations must be a whole number from 1 to 10000, got 0"),
        ("bayes-filter", {"grid_points": 2}, "grid_points must be a whole number from 3 to 1025, got 2"),
        ("bayes-filter", {"iterations": 0}, "iterations must be a whole number from 1 to 10000, got 0"),
        ("bayes-filter", {"discount": 0.5}, "'bayes-filter' has no setting discount; it has grid_points, iterations"),
    ]:
        with named_case(name=name, settings=settings), pytest.raises(ValueError, match=message):
            make_estimator(name, **settings)


def test_a_prior_that_is_not_a_distribution_is_refused() -> None:
    for prior in [None, [0.5, 0.5], [1.0, 1.0, 1.0], [1.5, -0.5, 0.0], [np.nan, 0.5, 0.5]]:
        with named_case(prior=prior):
            estimator = EmpiricalBayesEstimator(grid_points=3)
            with pytest.raises(ValueError, match="distribution over 3 success rates"):
                estimator.load_state_dict({} if prior is None else {"prior": np.array(prior)})
            np.testing.assert_array_equal(estimator.prior, np.full(3, 1 / 3))
