"""The Bayes filter against matrix exponentials, sums over all paths and simulated walks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import expm
from scipy.stats import binom

import knapsack_rl as kr
from cases import named_case
from knapsack_rl.allocation.value import marginal_values
from knapsack_rl.estimation import grid as grid_module
from knapsack_rl.estimation.bayes import BayesFilterEstimator, _distinct
from knapsack_rl.estimation.grid import LARGEST_LOGIT, EmpiricalBayesEstimator
from knapsack_rl.estimation.tracker import Records
from oracles import assert_same_state
from strategies import no_deadline

FLOOR = BayesFilterEstimator.FLOOR
Array = NDArray[np.float64]


def make(
    points: int = 57, *, variance: float | None = None, drift=0.0, hazard=0.0, prior: Array | None = None, **options
):
    """An estimator with one model of movement, all of them by default, and on request a prior (flat otherwise)."""
    kind = BayesFilterEstimator
    if variance is not None:
        model = {"VARIANCES": variance, "DRIFTS": drift, "HAZARDS": hazard}
        kind = type("OneModel", (kind,), {name: np.array([number]) for name, number in model.items()})
    estimator = kind(points, **options)
    if prior is not None:
        estimator.load_state_dict(estimator.state_dict() | {"prior": prior})
    return estimator


def seen(evidence: Array, age: Any = 0.0) -> Records:
    """Records of prompts visited before, with this evidence and age."""
    records = Records.empty(*evidence.shape)
    records.visits[:], records.evidence[:], records.age[:] = 1, evidence, age
    return records


def visit(estimator: BayesFilterEstimator, records: Records, successes, totals) -> None:
    """Every prompt of the records has a visit; its age is then 0."""
    records.evidence[:] = estimator.absorb(records, np.asarray(successes), np.asarray(totals))
    records.visits += 1
    records.age[:] = 0.0


def logits(points: int) -> Array:
    return np.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, points)


def walk_matrix(points: int, variance: float) -> Array:
    """(from, to) probabilities: every neighbour is stepped to at half the rate that makes this variance.

    A step moves by one spacing h, so the variance per unit of time is 2 rate h^2.
    """
    spacing = 2 * LARGEST_LOGIT / (points - 1)
    rate = variance / (2 * spacing**2)
    generator = np.zeros((points, points))
    for i, j in [(i, i + 1) for i in range(points - 1)]:
        generator[i, j] = generator[j, i] = rate
    generator -= np.diag(generator.sum(axis=1))
    return expm(generator)


def drift_matrix(points: int, drift: float) -> Array:
    """(from, to) probabilities: every point moves by the drift, divided between neighbours, and stays on the grid."""
    matrix, cells = np.zeros((points, points)), drift * (points - 1) / (2 * LARGEST_LOGIT)
    for i in range(points):
        below = int(np.floor(i + cells))
        for point, part in ((below, below + 1 - i - cells), (below + 1, i + cells - below)):
            matrix[i, min(max(point, 0), points - 1)] += part
    return matrix


def kernel(prior: Array, age: float, variance: float, drift: float, hazard: float) -> Array:
    """(from, to) probabilities of a model over an age: drift and walk, or a jump to a rate of the population."""
    points, stays = prior.size, np.exp(-hazard * age)
    return stays * drift_matrix(points, drift * age) @ walk_matrix(points, variance * age) + (1 - stays) * prior


def backwards(prior: Array, *model: float) -> Array:
    """(now, before) probabilities by Bayes' rule in a population that stays as it is; alike where nobody can be."""
    forwards = prior[:, None] * kernel(prior, *model)
    reached = forwards.sum(axis=0)
    return np.where(reached > 0, forwards / np.where(reached > 0, reached, 1), prior[:, None]).T


def random_evidence(prompts: int, points: int, seed: int) -> Array:
    """Rows as float32 holds them, so that an oracle starts from the same numbers."""
    rows = np.random.default_rng(seed).random((prompts, points)) ** 3
    return (rows / rows.max(axis=1, keepdims=True)).astype(np.float32).astype(np.float64)


def random_prior(points: int, seed: int) -> Array:
    return np.random.default_rng(seed).dirichlet(np.ones(points))


def normalised(rows: Array) -> Array:
    return rows / rows.sum(axis=-1, keepdims=True)


# --- the walk ---


def test_the_walk_is_the_exponential_of_its_generator() -> None:
    for points, variance, age in itertools.product([3, 8, 57], [1e-6, 0.09, 2.0, 25.0], [0.0, 0.125, 1.0, 8.0]):
        with named_case(points=points, variance=variance, age=age):
            rows = random_evidence(4, points, seed=1)
            expected = rows @ walk_matrix(points, variance * age)
            found = make(points, variance=variance).posterior(seen(rows, age))  # flat prior
            np.testing.assert_allclose(found, normalised(expected), rtol=1e-9, atol=2 * FLOOR)


def test_the_walk_keeps_totals_symmetry_and_sign() -> None:
    estimator = make(variance=0.5)
    matrix = estimator._likelihood_after(np.eye(57), _distinct(np.full(57, 2.0))) / 57  # in a flat population
    assert (matrix > 0).all()
    np.testing.assert_allclose(matrix, matrix.T, atol=2 * FLOOR)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=57 * 2 * FLOOR)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=2 * FLOOR)  # neither end is special
    far = logits(57) - logits(57)[28]
    assert matrix[28] @ far**2 == pytest.approx(1.0, rel=1e-6)  # 2 epochs of variance 0.5, far from the ends


def test_two_walks_make_one() -> None:
    rows = random_evidence(5, 31, seed=2)
    once = make(31, variance=0.8).posterior(seen(rows, 1.0))
    half = make(31, variance=0.8).posterior(seen(rows, 0.5))
    np.testing.assert_allclose(make(31, variance=0.8).posterior(seen(half, 0.5)), once, rtol=1e-5)  # float32 between


def test_ages_are_rounded_by_less_than_a_twentieth() -> None:
    ages = np.concatenate([[0.0], np.geomspace(1e-5, 1e5, 1000), 2.0 ** np.arange(-10, 10)])
    distinct, which = _distinct(ages)
    np.testing.assert_allclose(distinct[which], ages, rtol=0.045)
    np.testing.assert_array_equal(distinct[which][-20:], ages[-20:])
    assert distinct.size < 8 * np.log2(1e10) + 3


# --- drift and jumps ---


def test_evidence_moves_by_bayes_rule() -> None:
    """Drifts of whole, fractional and tiny cells (0.25 wide on a grid of 57), over the ends too; walks and jumps."""
    drifts = [-1.0, -0.35, -0.25, -1e-9, 0.0, 0.05, 0.25, 0.9]
    for points, variance, drift, hazard in itertools.product([5, 57], [0.0, 0.3], drifts, [0.0, 0.2, 1e9]):
        with named_case(points=points, variance=variance, drift=drift, hazard=hazard):
            ages = np.array([0.0, 0.5, 1.0, 4.0, 16.0, 128.0])
            rows, prior = random_evidence(ages.size, points, seed=3), random_prior(points, 4)
            expected = [prior * (backwards(prior, age, variance, drift, hazard) @ row)
                        for row, age in zip(rows, ages, strict=True)]  # fmt: skip
            found = make(points, variance=variance, drift=drift, hazard=hazard, prior=prior).posterior(seen(rows, ages))
            # A point that only walks of less than the floor reach may be off.
            np.testing.assert_allclose(found, normalised(np.array(expected)), rtol=1e-5, atol=1e-7)


def test_several_models_move_evidence_by_their_average() -> None:
    prior, age, estimator = random_prior(15, 1), 2.0, make(15)
    rng = np.random.default_rng(2)
    weights = rng.dirichlet(np.ones(estimator.weights.size)).reshape(estimator.weights.shape)
    estimator.load_state_dict({"prior": prior, "weights": weights})
    rows, mean_drift = random_evidence(4, 15, seed=3), estimator.drift
    average = np.zeros((15, 15))
    for (v, h, _), weight in np.ndenumerate(weights):
        average += weight * kernel(prior, age, estimator.VARIANCES[v], mean_drift, estimator.HAZARDS[h])
    expected = (normalised(rows * prior) @ average) / (prior @ average) * prior
    np.testing.assert_allclose(estimator.posterior(seen(rows, age)), normalised(expected), rtol=1e-6)
    assert mean_drift == pytest.approx((weights.sum(axis=(0, 1)) * estimator.DRIFTS).sum())


@no_deadline
@given(st.integers(3, 12), st.floats(-40, 40), st.integers(0, 99))
def test_a_drift_divides_mass_between_neighbours(points: int, drift: float, seed: int) -> None:
    row = normalised(random_evidence(1, points, seed))
    found = make(points)._drifted(row, (np.ones(1), np.zeros(1, int)), drift)
    np.testing.assert_allclose(found, row @ drift_matrix(points, drift), atol=1e-9)


def test_an_upward_drift_raises_the_estimate() -> None:
    means = []
    for drift in (-0.4, 0.0, 0.4):
        estimator = make(drift=drift, variance=0.01)
        records = Records.empty(1, 57)
        visit(estimator, records, [10], [20])
        records.age[:] = 2.0
        means.append(estimator.believe(records, 2).mean[0])
    assert means[0] < means[1] < means[2]
    assert np.log(means[2] / (1 - means[2])) == pytest.approx(0.8, abs=0.05)


# --- the posterior ---


def test_static_prompts_have_the_product_of_their_likelihoods() -> None:
    rng = np.random.default_rng(4)
    rates = np.array([0.02, 0.3, 0.5, 0.9, 0.995])
    prior = random_prior(57, 5)
    estimator = make(variance=1e-12, prior=prior)
    records = Records.empty(rates.size, 57)
    expected = np.ones((rates.size, 57))
    for _ in range(6):
        totals = rng.integers(1, 9, rates.size)
        successes = rng.binomial(totals, rates)
        expected *= binom.pmf(successes[:, None], totals[:, None], estimator.grid)
        visit(estimator, records, successes, totals)
        records.age[:] = rng.random(rates.size)
        best = expected / expected.max(axis=1, keepdims=True)
        # Float32 keeps seven digits, and nothing falls below the floor.
        np.testing.assert_allclose(records.evidence, best, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(estimator.posterior(records), normalised(expected * prior), rtol=1e-5, atol=1e-9)


def paths_of(points: int, visits_made: int):
    return itertools.product(range(points), repeat=visits_made + 1)


def test_posterior_is_the_sum_over_all_paths() -> None:
    """The rate now has the prior; read backwards, every epoch is undone by Bayes' rule."""
    for points, drift, seed in itertools.product([5, 7], [0.0, 0.8, -1.0], [1, 2]):
        with named_case(points=points, drift=drift, seed=seed):
            rng = np.random.default_rng(seed)
            variance, hazard, visits_made = 6.0, 0.1, 3  # a cell is 2.3 or 3.5 logits wide
            prior = random_prior(points, seed)
            totals = rng.integers(1, 5, visits_made)
            successes = rng.binomial(totals, rng.random(visits_made))

            estimator = make(points, variance=variance, drift=drift, hazard=hazard, prior=prior)
            records = Records.empty(1, points)
            for s, n in zip(successes, totals, strict=True):
                visit(estimator, records, [s], [n])
                records.age[:] = 1.0
            back = backwards(prior, 1.0, variance, drift, hazard)
            likelihood = binom.pmf(successes[:, None], totals[:, None], estimator.grid)
            expected = np.zeros(points)
            for path in paths_of(points, visits_made):  # the rate now comes first, then newest to oldest visit
                weight = prior[path[0]]
                for step, (later, earlier) in enumerate(itertools.pairwise(path)):
                    weight *= back[later, earlier] * likelihood[visits_made - 1 - step, earlier]
                expected[path[0]] += weight
            np.testing.assert_allclose(estimator.posterior(records)[0], normalised(expected), rtol=2e-6, atol=1e-9)


def test_the_posterior_of_a_stationary_population_is_that_of_the_forward_model() -> None:
    """A flat population stays flat under the walk: here the ordinary hidden Markov model agrees."""
    points, variance = 6, 5.0
    totals, successes, gaps = [3, 2, 4], [1, 2, 3], [1.0, 0.5, 2.0]
    estimator = make(points, variance=variance)
    records = Records.empty(1, points)
    for s, n, gap in zip(successes, totals, gaps, strict=True):
        visit(estimator, records, [s], [n])
        records.age[:] = gap
    steps = [walk_matrix(points, variance * gap) for gap in gaps]
    expected = np.zeros(points)
    for path in paths_of(points, 3):  # oldest first
        weight = 1 / points
        for step, (here, after) in enumerate(itertools.pairwise(path)):
            weight *= binom.pmf(successes[step], totals[step], estimator.grid[here]) * steps[step][here, after]
        expected[path[-1]] += weight
    np.testing.assert_allclose(estimator.posterior(records)[0], normalised(expected), rtol=2e-6)


def test_an_unseen_prompt_has_the_prior() -> None:
    prior = random_prior(57, 8)
    estimator = make(variance=0.09, drift=0.3, prior=prior)
    records = Records.empty(3, 57)
    visit(estimator, records, [1, 2, 3], [4, 4, 4])
    records = records.take(np.array([0, -1, 2, -1]))
    found = estimator.posterior(records)
    np.testing.assert_allclose(found[[1, 3]], [prior, prior], rtol=1e-12)
    assert np.abs(found[0] - prior).max() > 0.01
    belief = estimator.believe(records, 6)
    assert belief.mean[1] == pytest.approx(prior @ estimator.grid, rel=1e-12)
    np.testing.assert_allclose(belief.marginals[1], prior @ marginal_values(estimator.grid, 6), rtol=1e-12)
    np.testing.assert_allclose(kr.KnapsackAllocator("bayes-filter").belief(["x"]).mean, 0.5, rtol=1e-12)


def test_belief_is_the_expectation_under_the_posterior() -> None:
    estimator = make(31, prior=random_prior(31, 9))
    records = seen(random_evidence(6, 31, seed=10), np.arange(6.0))
    posterior = estimator.posterior(records)
    np.testing.assert_allclose(posterior.sum(axis=1), 1.0, rtol=1e-12)
    belief = estimator.believe(records, 20)
    np.testing.assert_allclose(belief.mean, posterior @ estimator.grid, rtol=1e-12)
    np.testing.assert_allclose(belief.marginals, posterior @ marginal_values(estimator.grid, 20), rtol=1e-11)
    counts = np.array([0, 1, 2, 9, 40, 9])
    mixed = (posterior * kr.nonzero_gradient_probability(counts[:, None], estimator.grid)).sum(axis=1)
    np.testing.assert_allclose(belief.nonzero_gradient(counts), mixed, rtol=1e-11)
    assert (np.diff(belief.marginals[:, 1:], axis=1) <= 1e-15).all()


# --- age ---


def test_evidence_fades_towards_the_prior() -> None:
    """A walk averages, so it narrows the range of the likelihood, which is the posterior's ratio to the prior."""
    prior = random_prior(57, 11)
    estimator = make(prior=prior)
    records = Records.empty(1, 57)
    visit(estimator, records, [2], [4])
    ages = np.array([0.0, 0.5, 1.0, 2.0, 5.0, 20.0, 300.0, 1e6])
    aged = seen(np.repeat(records.evidence, ages.size, axis=0), ages)
    ratio = estimator.posterior(aged) / prior
    assert (np.diff(ratio.max(axis=1) / ratio.min(axis=1)) < 0).all()
    np.testing.assert_allclose(ratio[-1], 1.0, atol=1e-6)


def spread(posterior: Array) -> Array:
    """Standard deviation in logits."""
    at = logits(posterior.shape[1])
    return np.sqrt(posterior @ at**2 - (posterior @ at) ** 2)


def epoch(allocator: kr.KnapsackAllocator, ids: NDArray[np.int64], size: int, rate_of: Callable, rng, step) -> None:
    """Visit the prompts once in batches of eight rollouts per prompt; ``step`` follows every batch."""
    for batch in np.array_split(rng.permutation(ids), max(ids.size // size, 1)):
        rollouts = np.repeat(batch, 8)
        allocator.observe(rollouts.tolist(), (rng.random(rollouts.size) < rate_of(rollouts)).astype(float))
        step(batch.size)


class Walkers:
    """Prompts whose logits walk while they are trained on."""

    def __init__(self, prompts: int, *, sigma: float, drift: float = 0.0, start: float = 0.0, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.at = self.rng.normal(start, 1.0, prompts)
        self.sigma, self.drift = sigma, drift

    def rates(self, ids: Any = slice(None)) -> Array:
        return 1 / (1 + np.exp(-self.at[ids]))

    def walk(self, epochs: float = 1.0) -> None:
        self.at += self.drift * epochs + self.rng.normal(0, self.sigma * np.sqrt(epochs), self.at.size)

    def epochs(self, allocator: kr.KnapsackAllocator, ids: NDArray[np.int64], times: int, batches: int = 8) -> None:
        size = ids.size // batches
        for _ in range(times):
            epoch(allocator, ids, size, self.rates, self.rng, lambda seen: self.walk(seen / self.at.size))


def test_prompts_left_out_for_some_epochs_are_less_certain() -> None:
    prompts = Walkers(160, sigma=0.6, seed=12)
    allocator = kr.KnapsackAllocator("bayes-filter")
    everyone = np.arange(160)
    prompts.epochs(allocator, everyone, 10)
    before = spread(allocator.estimator.posterior(allocator.tracker.lookup(everyone.tolist())))
    prompts.epochs(allocator, everyone[:80], 8)
    after = spread(allocator.estimator.posterior(allocator.tracker.lookup(everyone.tolist())))
    ages = allocator.tracker.lookup(everyone.tolist()).age
    assert ages[80:].min() > ages[:80].max()
    assert after[80:].mean() > 1.4 * after[:80].mean()
    assert before[80:].mean() < 1.2 * before[:80].mean()


# --- learning ---


def learned_walk(prompts: Walkers, epochs: int, rollouts: int, grid_points: int = 57) -> NDArray:
    """(epochs, 2) variance and drift after each epoch in which every prompt is visited, an epoch after the last."""
    estimator = make(grid_points)
    records = Records.empty(prompts.at.size, grid_points)
    found = []
    for _ in range(epochs):
        visit(estimator, records, prompts.rng.binomial(rollouts, prompts.rates()), np.full(prompts.at.size, rollouts))
        records.age[:] = 1.0
        prompts.walk()
        estimator.refit(records)
        found.append((estimator.variance, estimator.drift))
    return np.array(found)


def settled(found: NDArray) -> tuple[float, float]:
    """Standard deviation and drift per epoch, over the second half: one epoch's choice is a jump to a neighbour."""
    late = found[len(found) // 2 :]
    return float(np.exp(0.5 * np.log(late[:, 0]).mean())), float(late[:, 1].mean())


@pytest.mark.parametrize("sigma", [0.1, 0.6])
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_the_walk_of_a_population_is_found(sigma: float, drift: float) -> None:
    """Sigma within a factor of two, the drift within a notch.

    64 rollouts know a logit to 0.25 at best, so of the squared surprise of a visit no more than an eighth is due to
    sigma = 0.1: 700 visits prefer it over half or double by a few nats, and a choice of one epoch is often wrong.

    A drift of 0.4 cells an epoch adds a variance of 0.4 * 0.6 cells^2 = 0.015 by linear interpolation. That is more
    than 0.1^2, so nothing is left for the walk to explain.
    """
    found = learned_walk(Walkers(700, sigma=sigma, drift=drift, start=-15 * drift, seed=13), 30, rollouts=64)
    found_sigma, found_drift = settled(found)
    assert found_sigma < 2 * sigma
    assert found_sigma > sigma / 2 or sigma**2 < 0.015 * (drift > 0)
    assert found_drift == pytest.approx(drift, abs=0.05)


def test_a_walk_of_rarely_sampled_prompts_is_found() -> None:
    """8 rollouts a visit carry less information than the population does, which is the usual case."""
    found_sigma, found_drift = settled(learned_walk(Walkers(1000, sigma=0.3, seed=13), 20, rollouts=8))
    assert found_drift == pytest.approx(0.0, abs=0.025)
    assert 0.2 < found_sigma < 0.45


def test_a_static_population_is_found_to_be_static() -> None:
    found = learned_walk(Walkers(700, sigma=0.0, seed=14), 30, rollouts=16)
    found_sigma, found_drift = settled(found)
    assert found_sigma < 0.05
    assert found[-1, 0] < 0.005
    assert found_drift == pytest.approx(0.0, abs=0.025)


@pytest.mark.parametrize(("sigma", "drift"), [(0.1, 0.0), (0.6, 0.0), (0.3, 0.1)])
def test_the_walk_is_found_through_the_allocator(sigma: float, drift: float) -> None:
    """With 8 rollouts a visit, as in a run: only a small and a large variance, a drift and none are distinguished."""
    prompts = Walkers(400, sigma=sigma, drift=drift, start=-10 * drift, seed=15)
    allocator = kr.KnapsackAllocator("bayes-filter")
    found = []
    for _ in range(20):
        prompts.epochs(allocator, np.arange(400), 1)
        found.append((allocator.estimator.variance, allocator.estimator.drift))
    found_sigma, found_drift = settled(np.array(found))
    assert (found_sigma > 0.35) == (sigma == 0.6)
    assert found_sigma < 1.5 * sigma
    assert found_drift == pytest.approx(drift, abs=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_models_are_weighed_by_the_probability_of_the_outcomes(seed: int) -> None:
    points = 15
    rng = np.random.default_rng(seed)
    prior = random_prior(points, seed)
    estimator = make(points, prior=prior)
    rows, ages = random_evidence(40, points, seed) ** 4, 2.0 ** rng.integers(-3, 4, 40)
    totals = rng.integers(1, 12, 40)
    successes = rng.binomial(totals, rng.choice([0.1, 0.5, 0.97], 40))
    records = seen(rows, ages)
    rows = records.evidence.astype(np.float64)
    at_first = estimator.weights.copy()
    expected = at_first
    for batch in (slice(0, 15), slice(15, 40)):
        log = np.zeros(expected.shape)
        for index in np.ndindex(expected.shape):
            model = [numbers[k] for numbers, k in
                     zip((estimator.VARIANCES, estimator.HAZARDS, estimator.DRIFTS), index, strict=True)]  # fmt: skip
            variance, hazard, drift = model
            for row, age, s, n in zip(rows[batch], ages[batch], successes[batch], totals[batch], strict=True):
                now = normalised(row * prior) @ kernel(prior, age, variance, drift, hazard)
                log[index] += np.log(now @ binom.pmf(s, n, estimator.grid))
        share = estimator.SHARE * log[0, 0, 0].size * (batch.stop - batch.start) / estimator.SHARE_VISITS
        expected = ((1 - share) * expected + share * at_first) * np.exp(log - log.max())
        expected /= expected.sum()
        estimator.absorb(records.take(np.arange(40)[batch]), successes[batch], totals[batch])
        np.testing.assert_allclose(estimator.weights, expected, rtol=1e-6, atol=1e-9)
    assert at_first.sum() == pytest.approx(1.0)


def test_first_visits_give_no_information_about_the_walk() -> None:
    estimator = make()
    records, before = Records.empty(20, 57), estimator.weights.copy()
    visit(estimator, records, np.arange(20) % 5, np.full(20, 4))
    for _ in range(3):
        estimator.refit(records)
    np.testing.assert_array_equal(estimator.weights, before)


def test_visits_without_information_about_the_walk_do_not_move_it() -> None:
    """Two visits at the same time: every model predicts the second alike."""
    estimator = make()
    records, before = Records.empty(20, 57), estimator.weights.copy()
    for _ in range(2):
        visit(estimator, records, np.arange(20) % 5, np.full(20, 4))
    np.testing.assert_allclose(estimator.weights, before, rtol=1e-9)


def test_a_walk_is_found_where_every_batch_holds_every_prompt() -> None:
    prompts = Walkers(300, sigma=0.6, seed=16)
    allocator = kr.KnapsackAllocator("bayes-filter")
    prompts.epochs(allocator, np.arange(300), 12, batches=1)
    assert 0.3 < np.sqrt(allocator.estimator.variance) < 1.2
    assert abs(allocator.estimator.drift) <= 0.15


def test_the_age_of_a_visit_is_the_time_since_its_rollouts_were_made() -> None:
    """A batch of B of N prompts is B/N of an epoch: after two of them, the prompts of the first are 2B/N old."""
    allocator = kr.KnapsackAllocator("bayes-filter")
    for batch in (["a", "b"], ["c", "d"], ["a", "b"], ["c", "d"]):
        allocator.observe(batch * 4, [0, 1] * 4)
    assert allocator.tracker.lookup(["a", "c"]).age.tolist() == [1.0, 0.5]


# --- the prior ---


def test_the_prior_of_static_prompts_is_that_of_their_counts() -> None:
    rng = np.random.default_rng(17)
    rates = rng.beta(0.5, 0.5, 300)
    estimator, other = make(variance=0.0), EmpiricalBayesEstimator()
    estimator.SMOOTHING = 0.0
    records, counts = Records.empty(300, 57), Records.empty(300)
    for _ in range(2):
        good = rng.binomial(4, rates)
        records.visits[:] = 0  # nothing to learn of the walk
        evidence = records.evidence.copy()
        visit(estimator, records, good, np.full(300, 4))
        records.evidence[:] *= np.where(evidence.any(axis=1, keepdims=True), evidence, 1)
        counts.successes += good
        counts.failures += 4 - good
    estimator.refit(records)
    other.refit(counts)
    np.testing.assert_allclose(estimator.prior, other.prior, rtol=1e-4, atol=1e-8)


def test_the_prior_is_that_of_the_current_population() -> None:
    """The same evidence, older, under an upward drift: the population has moved up since."""
    evidence = np.repeat(np.exp(-2.0 * (logits(57) + 1.0) ** 2)[None], 200, axis=0)
    centres = []
    for age in (0.0, 4.0):
        estimator = make(variance=1e-6, drift=0.5)
        estimator.refit(seen(evidence, age))
        centres.append(float(estimator.prior @ logits(57)))
    assert centres[1] - centres[0] == pytest.approx(2.0, abs=0.1)


def test_the_fitted_prior_is_smoothed() -> None:
    """By a walk of a third of a logit, so that what few prompts show is not all that is possible."""
    evidence = np.exp(-2.0 * (logits(57) - np.array([[-3.0], [0.5]])) ** 2)
    spiky, smooth = make(variance=1e-6), make(variance=1e-6)
    spiky.SMOOTHING = 0.0
    for estimator in (spiky, smooth):
        estimator.refit(seen(evidence, 1.0))
    np.testing.assert_allclose(smooth.prior, spiky.prior @ walk_matrix(57, smooth.SMOOTHING), rtol=1e-6)


def test_the_prior_is_that_of_prompts_in_use() -> None:
    evidence = np.exp(-2.0 * (logits(57) - np.repeat([-3.0, 3.0], 50)[:, None]) ** 2)
    ages = np.repeat([1.5 * BayesFilterEstimator.IN_USE, 1.0], 50)
    estimator, alone = make(variance=1e-6), make(variance=1e-6)
    estimator.refit(seen(evidence, ages))
    alone.refit(seen(evidence[50:], 1.0))
    np.testing.assert_array_equal(estimator.prior, alone.prior)


@pytest.mark.parametrize("kind", [BayesFilterEstimator, EmpiricalBayesEstimator])
def test_a_refit_on_a_sample_is_close_to_one_on_all(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the prompts were seen first and are hard; a sample of the first ones would miss the rest."""
    rng = np.random.default_rng(18)
    rates = np.concatenate([rng.beta(1, 6, 3000), rng.beta(6, 1, 3000)])
    good, prompts = rng.binomial(8, rates), rates.size

    def fitted(limit: int) -> Array:
        monkeypatch.setattr(grid_module, "REFIT_SAMPLE", limit)
        estimator = kind()
        records = Records.empty(prompts, estimator.evidence_size)
        records.successes[:], records.failures[:] = good, 8 - good
        if kind is BayesFilterEstimator:
            visit(estimator, records, good, np.full(prompts, 8))
        estimator.refit(records)
        return estimator.prior

    whole, sampled = fitted(prompts), fitted(600)
    assert not np.array_equal(whole, sampled)
    # Of 600 prompts a distribution function is known to 0.04 (standard error 0.02).
    np.testing.assert_allclose(np.cumsum(sampled), np.cumsum(whole), atol=0.06)
    np.testing.assert_array_equal(fitted(prompts + 1), whole)


def test_the_order_of_prompts_does_not_matter() -> None:
    rng = np.random.default_rng(19)
    order = rng.permutation(50)
    one, other = make(), make()
    straight, turned = Records.empty(50, 57), Records.empty(50, 57)
    for _ in range(3):
        good, age = rng.integers(0, 9, 50), rng.random(50)
        for estimator, records, by in ((one, straight, np.arange(50)), (other, turned, order)):
            visit(estimator, records, good[by], np.full(50, 8))
            records.age[:] = age[by]
            estimator.refit(records)
    np.testing.assert_allclose(one.weights, other.weights, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(one.prior, other.prior, rtol=1e-6, atol=1e-12)
    # Only to rounding: the position of a row in a matrix decides which loop of the BLAS library sums it.
    np.testing.assert_allclose(straight.evidence[order], turned.evidence, rtol=1e-6, atol=1e-12)
    found, moved = one.believe(straight, 9), other.believe(turned, 9)
    np.testing.assert_allclose(found.mean[order], moved.mean, rtol=1e-6)
    np.testing.assert_allclose(found.marginals[order], moved.marginals, rtol=1e-6, atol=1e-12)
    by_itself = one.believe(straight.take(np.array([7])), 9)
    np.testing.assert_allclose(by_itself.marginals[0], found.marginals[7], rtol=1e-12)


# --- numbers stay numbers ---


def check_belief(estimator: BayesFilterEstimator, records: Records) -> None:
    posterior = estimator.posterior(records)
    assert (posterior >= 0).all()
    np.testing.assert_allclose(posterior.sum(axis=1), 1.0, rtol=1e-9)
    belief = estimator.believe(records, 12)
    assert ((belief.mean >= 0) & (belief.mean <= 1)).all()
    assert (belief.marginals >= 0).all()
    assert (np.diff(belief.marginals[:, 1:], axis=1) <= 1e-15).all()
    predicted = belief.nonzero_gradient(np.full(len(records), 5))
    assert ((predicted >= -1e-12) & (predicted <= 1 + 1e-12)).all()


def test_extreme_counts() -> None:
    for variance, drift in itertools.product([1e-6, 0.09, 25.0], [-1.0, 0.0, 1.0]):
        with named_case(variance=variance, drift=drift):
            many = 10**5
            estimator = make(variance=variance, drift=drift)
            records = Records.empty(3, 57)
            for good in ([0, many, many // 2], [0, many, many // 2], [many, 0, 0], [1, many - 1, 1]):
                visit(estimator, records, good, [many] * 3)
                check_belief(estimator, records)
                records.age[:] = 0.5
                estimator.refit(records)
                check_belief(estimator, records)
            assert estimator.prior.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("variance", [1e-6, 0.09])
def test_in_a_long_conflict_newer_outcomes_win(variance: float) -> None:
    """1000 successes, then 1000 failures: a prompt may have jumped, and its current rate is found."""
    estimator = make(variance=variance)
    records = Records.empty(2, 57)
    for good in ([8, 0], [0, 8]):
        for _ in range(125):
            visit(estimator, records, good, [8, 8])
            records.age[:] = 1.0
            check_belief(estimator, records)
    mean = estimator.believe(records, 2).mean
    assert mean[0] < 0.1
    assert mean[1] > 0.9
    visit(estimator, records, [0, 0], [1000, 1000])  # and in one go
    visit(estimator, records, [1000, 1000], [1000, 1000])
    check_belief(estimator, records)


@settings(no_deadline, max_examples=40)
@given(
    history=st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=3, max_size=3),
            st.sampled_from([0.0, 1e-9, 0.3, 1.0, 40.0, 1e7]),
            st.booleans(),
        ),
        max_size=8,
    ),
    points=st.sampled_from([3, 9, 57]),
)
def test_any_history_gives_a_belief(history, points: int) -> None:
    estimator = make(points, iterations=3)
    records = Records.empty(4, points)  # one is never visited
    check_belief(estimator, records)
    for counts, gap, refit in history:
        successes = np.array([good for good, _ in counts])
        totals = np.maximum([good + bad for good, bad in counts], 1)
        records.evidence[:3] = estimator.absorb(records.take(np.arange(3)), successes, totals)
        records.visits[:3] += 1
        records.age[:3] = gap
        if refit:
            estimator.refit(records.take(np.arange(3)))
        check_belief(estimator, records)
        assert estimator.weights.min() >= 0 and estimator.weights.sum() == pytest.approx(1.0)


# --- state ---


def in_mid_epoch(batches: int, seed: int = 20, **options) -> kr.KnapsackAllocator:
    """Return an allocator that has seen a number of batches of 7 out of 40 prompts."""
    allocator = kr.KnapsackAllocator("bayes-filter", **options)
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        go_on(rng, allocator)
    return allocator


def go_on(rng: np.random.Generator, *allocators: kr.KnapsackAllocator) -> list[list[int]]:
    """One more batch for each, with the same outcomes; their counts."""
    ids = rng.choice(40, 7, replace=False)
    noise = rng.random(56)
    counts = []
    for allocator in allocators:
        found = allocator.allocate(ids.tolist(), 56)
        prompts = ids[found.expand()]
        allocator.observe(prompts.tolist(), (noise < prompts / 39).astype(float), 10 + prompts)
        counts.append(found.counts.tolist())
    return counts


@pytest.mark.parametrize("seed", range(4))
def test_a_state_saved_at_any_moment_has_the_same_future(seed: int, tmp_path: Path) -> None:
    moment = int(np.random.default_rng(seed).integers(1, 40))
    allocator = in_mid_epoch(moment, seed, min_rollouts=0 if seed % 2 else 2)
    allocator.save(tmp_path / "state.npz")
    twin = kr.KnapsackAllocator.load(tmp_path / "state.npz")
    assert_same_state(twin.state_dict(), allocator.state_dict())
    other = kr.KnapsackAllocator("bayes-filter", allocator.min_rollouts)
    other.load_state_dict(allocator.state_dict())
    rng = np.random.default_rng(100 + seed)
    for _ in range(20):
        counts = go_on(rng, allocator, twin, other)
        assert counts[0] == counts[1] == counts[2]
    assert_same_state(twin.state_dict(), allocator.state_dict())
    assert_same_state(other.state_dict(), allocator.state_dict())


def test_the_weights_are_part_of_the_state() -> None:
    allocator = in_mid_epoch(16)
    state = allocator.estimator.state_dict()
    assert not np.array_equal(state["weights"], make().weights)
    twin = make()
    twin.load_state_dict(state)
    for name, array in twin.state_dict().items():
        np.testing.assert_array_equal(array, state[name])
        array[:] = 7.0
    assert twin.prior.sum() == pytest.approx(1.0)  # what was handed out is a copy
    assert (twin.variance, twin.drift) == (allocator.estimator.variance, allocator.estimator.drift)


def test_evidence_is_kept_in_single_precision() -> None:
    arrays = in_mid_epoch(16).state_dict()["arrays"]
    assert arrays["tracker.evidence"].dtype == np.float32
    assert arrays["tracker.evidence"].shape == (arrays["tracker.visits"].size, 57)


def with_array(name: str, array) -> Callable[[dict], dict]:
    return lambda state: {**state, "arrays": {**state["arrays"], name: np.asarray(array)}}


def without(name: str) -> Callable[[dict], dict]:
    return lambda state: {**state, "arrays": {key: a for key, a in state["arrays"].items() if key != name}}


def single(state: dict) -> dict:
    evidence = state["arrays"]["tracker.evidence"]
    return with_array("tracker.evidence", evidence.astype(np.float64))(state)


def not_finite(state: dict) -> dict:
    evidence = state["arrays"]["tracker.evidence"].copy()
    evidence[3, 5] = np.nan
    return with_array("tracker.evidence", evidence)(state)


def of_the_future(state: dict) -> dict:
    return with_array("tracker.last_visit", state["arrays"]["tracker.last_visit"] + 1000)(state)


def test_a_wrong_state_is_refused_and_changes_nothing() -> None:
    for change, message in [
        (without("estimator.prior"), "prior"),
        (without("estimator.weights"), r"weights .*got shape \(0,\)"),
        (with_array("estimator.weights", np.full((6, 4, 5), 1.0)), r"weights .*shape \(6, 4, 5\) with sum 120"),
        (with_array("estimator.weights", np.full((6, 4, 5), np.nan)), "weights .*sum nan"),
        (with_array("estimator.weights", np.full(120, 1 / 120)), r"weights .*got shape \(120,\)"),
        (with_array("estimator.prior", np.full(57, 1.0)), "distribution over 57 success rates"),
        (with_array("estimator.prior", np.full(21, 1 / 21)), "distribution over 57 success rates"),
        (without("tracker.evidence"), "evidence"),
        (single, r"evidence .*float64.*expected .*float32"),
        (lambda _: in_mid_epoch(5, grid_points=21).state_dict(), "use the same one"),
        (lambda _: in_mid_epoch(5, iterations=7).state_dict(), "use the same one"),
        (without("tracker.last_visit"), "last_visit"),
        (not_finite, "evidence"),
        (of_the_future, "last_visit"),
    ]:
        with named_case(change=change, message=message):
            allocator = in_mid_epoch(9)
            before = allocator.state_dict()
            with pytest.raises(ValueError, match=message):
                allocator.load_state_dict(change(in_mid_epoch(20).state_dict()))
            assert_same_state(allocator.state_dict(), before)


def test_a_wrong_part_leaves_the_estimator_unchanged() -> None:
    """The prior is checked last; nothing before it may have been applied."""
    estimator = make()
    before = estimator.state_dict()
    state = in_mid_epoch(16).estimator.state_dict() | {"prior": np.ones(57)}
    with pytest.raises(ValueError, match="distribution"):
        estimator.load_state_dict(state)
    for name, array in estimator.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
