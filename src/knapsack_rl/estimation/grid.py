"""Posteriors on a grid of success rates, with a prior learned from the population of prompts.

In the estimators of this kind the posterior of a prompt is *prior times likelihood* on a grid that is evenly spaced in
logits. The prior is the nonparametric maximum-likelihood estimate from all prompts, so unseen, unsolved and solved
prompts need no special rule. The estimators differ in how evidence ages while the policy changes:
:class:`EmpiricalBayesEstimator` discounts old counts by a constant;
:class:`~knapsack_rl.estimation.bayes.BayesFilterEstimator` lets the rates behind old counts walk, drift and jump, by
amounts that it learns from how well it predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from knapsack_rl.allocation.belief import Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray, check_whole
from knapsack_rl.allocation.value import SequentialValue, ValueLike, make_value_function, nonzero_gradient_probability
from knapsack_rl.estimation.products import product, product_of_columns
from knapsack_rl.estimation.protocol import Estimator, check_discount
from knapsack_rl.estimation.tracker import Records

LARGEST_LOGIT = 7.0
"""The grid spans success rates from 0.0009 to 0.9991."""

MOST_GRID_POINTS, MOST_ITERATIONS = 1025, 10_000
"""Limits of settings, which may come from the header of a state file: tables grow with the square of the grid."""

REFIT_SAMPLE = 20_000
"""Most prompts used in a refit, evenly spaced in order of first observation; more only take more time."""


class GridPosterior(Estimator):
    """A prior over a grid of success rates, fitted to likelihoods, and beliefs from a posterior on the grid.

    Args:
        grid_points: success rates in the grid, 3 to 1025, evenly spaced in logits from -7 to 7.
        iterations: EM steps of a refit, 1 to 10,000.

    Raises:
        ValueError: a number is out of range.

    Source: Robbins 1950; Kiefer & Wolfowitz 1956; Laird 1978 (EM); Koenker & Mizera 2014.
    """

    def __init__(self, grid_points: int, iterations: int) -> None:
        self.iterations = check_whole("iterations", iterations, minimum=1, maximum=MOST_ITERATIONS)
        size = check_whole("grid_points", grid_points, minimum=3, maximum=MOST_GRID_POINTS)
        logits = np.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, size)
        self.grid = 1.0 / (1.0 + np.exp(-logits))
        self.prior = np.full(grid_points, 1.0 / grid_points)
        self._log_success, self._log_failure = np.log(self.grid), np.log1p(-self.grid)
        self.use_value("knapsack")

    def use_value(self, value: ValueLike) -> None:
        """Maximise another value from now on, and keep all that was learned about success rates.

        Raises:
            ValueError: the value is unknown.
        """
        self.value = make_value_function(value)
        self._values: FloatArray = np.empty((self.grid.size, 0))
        self._mixed: FloatArray = np.empty((0, self.grid.size))  # chance of mixed outcomes for 0, 1, ... rollouts

    def binomial_likelihood(self, successes: FloatArray | IntArray, failures: FloatArray | IntArray) -> FloatArray:
        """Return the (M, grid_points) likelihood of counts, scaled so that the largest entry of each row is 1."""
        log = np.outer(successes, self._log_success) + np.outer(failures, self._log_failure)
        return np.exp(log - log.max(axis=1, keepdims=True))

    def fit_prior(self, likelihood: FloatArray, start: FloatArray | None = None) -> None:
        """Fit the prior to (M, grid_points) likelihoods by EM, from a (grid_points,) start, flat if None.

        A flat prior with the weight of one prompt is added, so that every rate stays possible.
        """
        size = self.grid.size
        weights = np.full(size, 1.0 / size) if start is None else start
        for _ in range(self.iterations):
            responsibility = weights * product_of_columns(likelihood, 1.0 / product(likelihood, weights))
            weights = (responsibility + 1.0 / size) / (likelihood.shape[0] + 1.0)
        self.prior = weights

    def posterior_of(self, likelihood: FloatArray, prior: FloatArray | None = None) -> FloatArray:
        """Return the (M, grid_points) probability of each success rate of the grid; rows sum to 1.

        Args:
            likelihood: (M, grid_points) of all that was observed about each prompt.
            prior: (M, grid_points) of each prompt; by default that of the population.
        """
        joint = likelihood * (self.prior if prior is None else prior)
        joint /= joint.sum(axis=1, keepdims=True)
        return joint

    def belief_of(self, posterior: FloatArray, max_rollouts: int) -> Belief:
        """Return the posterior mean and expectations over the grid."""
        if self._values.shape[1] < max_rollouts:
            self._values = self.value.marginals(self.grid, max_rollouts)
            self._mixed = nonzero_gradient_probability(np.arange(max_rollouts + 1)[:, None], self.grid)

        def nonzero_gradient(counts: IntArray) -> FloatArray:
            if counts.max(initial=0) < self._mixed.shape[0]:
                return np.einsum("mg,mg->m", posterior, self._mixed[counts])
            return np.einsum("mg,mg->m", posterior, nonzero_gradient_probability(counts[:, None], self.grid))

        return Belief(
            product(posterior, self.grid), product(posterior, self._values[:, :max_rollouts]), nonzero_gradient
        )

    def likelihood(self, records: Records) -> FloatArray:
        """Return the (M, grid_points) likelihood of all visits by success rate now; constant for an unseen prompt."""
        raise NotImplementedError

    def posterior(self, records: Records) -> FloatArray:
        """Return the (M, grid_points) probability of each success rate of the grid; rows sum to 1."""
        return self.posterior_of(self.likelihood(records), records.prior)

    def believe_after(self, records: Records, counts: IntArray, successes: IntArray, more_rollouts: int) -> Belief:
        """Return the belief after a first share of outcomes: gains of further rollouts, and predictions.

        A group that has both outcomes gains nothing from more rollouts. For a group with equal outcomes the updated
        posterior gives the expected value of k more, here with a value of mixed outcomes; that of a success among k is
        in :meth:`knapsack_rl.allocation.value.Likelihood.marginals_after`:

            all failures:   V(k) = E[gain(p) (1 - (1-p)^k)]     a success is missing
            all successes:  V(k) = E[gain(p) (1 - p^k)]         a failure is missing
            no rollout yet: V(k) = E[gain(p) (1 - p^k - (1-p)^k)]

        All are concave (the last from k = 1 on), so the knapsack with these rows is exact.

        **Bias.** The size of a group then depends on its outcomes, as under any stopping rule. The posterior is not
        affected: its likelihood p^s (1-p)^f is the same under every stopping rule. Group statistics are affected: a
        group that stops soon after its first success overstates its rate, E[s/n] > p (inverse binomial sampling), and
        so do advantages, which are relative to the group mean.

        Args:
            records: records of M prompts.
            counts: (M,) rollouts of the first share.
            successes: (M,) successes among them.
            more_rollouts: number of columns of marginal values of further rollouts.

        Raises:
            ValueError: the value has no marginal values after a first share.

        Source: Haldane 1945 (inverse sampling and its bias); Berger & Wolpert 1988 (stopping rules and likelihood).
        """
        value: Any = check_top_up(self).value
        posterior = self.posterior(records) * self.binomial_likelihood(successes, counts - successes)
        posterior /= posterior.sum(axis=1, keepdims=True)
        p, q = self.grid, 1.0 - self.grid
        empty = counts == 0
        all_failures, all_successes = ~empty & (successes == 0), ~empty & (successes == counts)
        marginals = np.zeros((counts.size, more_rollouts))
        for groups, on_grid in (
            (all_failures, value.marginals_after(p, more_rollouts, successes=False)),
            (all_successes, value.marginals_after(p, more_rollouts, successes=True)),
            (empty, value.marginals(p, more_rollouts)),
        ):
            marginals[groups] = product(posterior[groups], on_grid)

        def nonzero_gradient(more: IntArray) -> FloatArray:
            failing, succeeding = q ** more[:, None], p ** more[:, None]
            still_equal = (empty | all_failures)[:, None] * failing + (empty | all_successes)[:, None] * succeeding
            chance = np.einsum("mg,mg->m", posterior, np.maximum(1.0 - still_equal, 0.0))
            return np.where(empty | all_failures | all_successes, chance, 1.0)

        return Belief(product(posterior, p), marginals, nonzero_gradient)

    def means_without_one(self, posterior: FloatArray, successes: IntArray, failures: IntArray) -> FloatArray:
        """Return (M, 2) posterior means after new outcomes: all of them but one failure, and all but one success.

        Where there is none to leave out, all count.

        Args:
            posterior: (M, grid_points) before the new outcomes.
            successes: (M,) new ones.
            failures: (M,) new ones.
        """

        def mean(successes: IntArray, failures: IntArray) -> FloatArray:
            known = posterior * self.binomial_likelihood(np.maximum(successes, 0), np.maximum(failures, 0))
            return product(known, self.grid) / known.sum(axis=1)

        return np.column_stack([mean(successes, failures - 1), mean(successes - 1, failures)])

    def load_prior(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore the prior.

        Raises:
            ValueError: the prior is missing, does not match the grid or is not a distribution.
        """
        prior = np.asarray(state.get("prior", ()), dtype=np.float64)
        if prior.shape != self.grid.shape or not (prior >= 0).all() or not np.isclose(prior.sum(), 1.0):
            raise ValueError(f"the saved prior must be a distribution over {self.grid.size} success rates")
        self.prior = prior.copy()


class EmpiricalBayesEstimator(GridPosterior):
    """An estimator with the binomial likelihood of discounted counts and a prior fitted to all prompts.

    Args:
        discount: see :class:`~knapsack_rl.estimation.protocol.Estimator`.
        grid_points: see :class:`GridPosterior`.
        iterations: see :class:`GridPosterior`.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, discount: float = 0.8, grid_points: int = 57, iterations: int = 40) -> None:
        super().__init__(grid_points, iterations)
        self.discount = check_discount(discount)

    def refit(self, population: Records) -> None:
        """Fit the prior to all prompts."""
        sample = sample_of(population)
        self.fit_prior(self.likelihood(sample))

    def likelihood(self, records: Records) -> FloatArray:
        """Return the (M, grid_points) binomial likelihood of the discounted counts."""
        return self.binomial_likelihood(records.successes, records.failures)

    def believe(self, records: Records, max_rollouts: int) -> Belief:
        """Return the posterior mean and expectations over the grid."""
        return self.belief_of(self.posterior(records), max_rollouts)

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of an equal estimator."""
        return {"discount": self.discount, "grid_points": self.grid.size, "iterations": self.iterations}

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the fitted prior."""
        return {"prior": self.prior.copy()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore the prior; ``ValueError`` if it is missing or does not match."""
        self.load_prior(state)


def sample_of(population: Records) -> Records:
    """Return at most ``REFIT_SAMPLE`` prompts, evenly spaced."""
    if len(population) <= REFIT_SAMPLE:
        return population
    return population.take(np.linspace(0, len(population) - 1, REFIT_SAMPLE).astype(np.int64))


def check_posterior(estimator: Estimator) -> GridPosterior:
    """Return an estimator that has a posterior on a grid.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(estimator, GridPosterior):
        raise ValueError(
            "advantage='posterior-mean' needs an estimator with a posterior on a grid ('bayes-filter', "
            f"'empirical-bayes'), got {type(estimator).__name__}"
        )
    return estimator


def check_top_up(estimator: Estimator) -> GridPosterior:
    """Return the estimator if it can allocate after a first share: a posterior on a grid, and a value that allows it.

    Raises:
        ValueError: it cannot.
    """
    if not isinstance(estimator, GridPosterior) or not isinstance(estimator.value, SequentialValue):
        raise ValueError(
            "allocating after a first share needs an estimator with a posterior on a grid ('bayes-filter', "
            "'empirical-bayes') and a value 'knapsack', 'nonzero-gradient', 'power-A-B' or 'likelihood-B', got "
            f"{type(estimator).__name__}"
            + (f" with {type(estimator.value).__name__}" if isinstance(estimator, GridPosterior) else "")
        )
    return estimator
