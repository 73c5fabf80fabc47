"""Posteriors on a grid of success rates, with a prior learned from the population of prompts.

In both estimators of this module the posterior of a prompt is *prior times likelihood* on a grid that is evenly spaced
in logits. The prior is the nonparametric maximum-likelihood estimate from all prompts, so unseen, unsolved and solved
prompts need no special rule. The estimators differ in how evidence ages while the policy changes:
:class:`EmpiricalBayesEstimator` discounts old counts by a constant; :class:`BayesFilterEstimator` lets the likelihood
of old counts diffuse and drift, by amounts that it learns from how well it predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knapsack_rl.allocation.belief import CHECK_ROLLOUTS, Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray, check_whole
from knapsack_rl.allocation.value import MixedOutcomes, ValueLike, make_value_function, nonzero_gradient_probability
from knapsack_rl.estimation.products import product, product_of_columns
from knapsack_rl.estimation.protocol import Estimator, check_discount
from knapsack_rl.estimation.tracker import Records

LARGEST_LOGIT = 7.0
"""The grid spans success rates from 0.0009 to 0.9991."""

MOST_GRID_POINTS, MOST_ITERATIONS = 1025, 10_000
"""Limits of settings, which may come from the header of a state file: tables grow with the square of the grid."""

REFIT_SAMPLE = 20_000
"""Most prompts used in a refit, evenly spaced in order of first observation; more only take more time."""

_Move = tuple[NDArray[np.intp], FloatArray]
"""(M, grid_points + 1) places that the points of shifted rows lie between, and (M, 1) how far on the way."""

_Ages = tuple[FloatArray, NDArray[np.intp]]
"""(D,) distinct ages and (M,) index of each prompt's age among them: exponentials are computed once per age."""


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

    def fit_prior(self, likelihood: FloatArray) -> None:
        """Fit the prior to (M, grid_points) likelihoods by EM, from a flat start.

        A flat prior with the weight of one prompt is added, so that every rate stays possible.
        """
        size = self.grid.size
        weights = np.full(size, 1.0 / size)
        for _ in range(self.iterations):
            responsibility = weights * product_of_columns(likelihood, 1.0 / product(likelihood, weights))
            weights = (responsibility + 1.0 / size) / (likelihood.shape[0] + 1.0)
        self.prior = weights

    def posterior_of(self, likelihood: FloatArray) -> FloatArray:
        """Return the (M, grid_points) probability of each success rate of the grid; rows sum to 1."""
        joint = likelihood * self.prior
        return joint / joint.sum(axis=1, keepdims=True)

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

    def posterior(self, records: Records) -> FloatArray:
        """Return the (M, grid_points) probability of each success rate of the grid; rows sum to 1."""
        raise NotImplementedError

    def believe_after(self, records: Records, counts: IntArray, successes: IntArray, more_rollouts: int) -> Belief:
        """Return the belief after a first share of outcomes: gains of further rollouts, and predictions.

        With a value of mixed outcomes, a group that has both outcomes gains nothing from more rollouts. For a group
        with equal outcomes the updated posterior gives the value of k more:

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
            ValueError: the value does not depend on mixed outcomes alone.

        Source: Haldane 1945 (inverse sampling and its bias); Berger & Wolpert 1988 (stopping rules and likelihood).
        """
        check_mixed_outcomes(self)
        posterior = self.posterior(records) * self.binomial_likelihood(successes, counts - successes)
        posterior /= posterior.sum(axis=1, keepdims=True)
        p, q, k = self.grid, 1.0 - self.grid, np.arange(more_rollouts)
        gain = self.value.gain(p)[:, None]  # type: ignore[attr-defined]
        empty = counts == 0
        all_failures, all_successes = ~empty & (successes == 0), ~empty & (successes == counts)
        marginals = np.zeros((counts.size, more_rollouts))
        for groups, on_grid in (
            (all_failures, gain * p[:, None] * q[:, None] ** k),
            (all_successes, gain * q[:, None] * p[:, None] ** k),
            (empty, self.value.marginals(p, more_rollouts)),
        ):
            marginals[groups] = product(posterior[groups], on_grid)

        def nonzero_gradient(more: IntArray) -> FloatArray:
            failing, succeeding = q ** more[:, None], p ** more[:, None]
            still_equal = (empty | all_failures)[:, None] * failing + (empty | all_successes)[:, None] * succeeding
            chance = np.einsum("mg,mg->m", posterior, np.maximum(1.0 - still_equal, 0.0))
            return np.where(empty | all_failures | all_successes, chance, 1.0)

        return Belief(product(posterior, p), marginals, nonzero_gradient)

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
        sample = _sample(population)
        self.fit_prior(self.binomial_likelihood(sample.successes, sample.failures))

    def posterior(self, records: Records) -> FloatArray:
        """Return the (M, grid_points) probability of each success rate of the grid; rows sum to 1."""
        return self.posterior_of(self.binomial_likelihood(records.successes, records.failures))

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


class BayesFilterEstimator(GridPosterior):
    r"""A Bayes filter: success rates walk in logits between visits, by a step and a drift learned from the data.

    For each prompt the tracker keeps the likelihood of all observations as a function of the *current* rate,
    L(g) = P(observations | logit now = g). Between visits it is blurred by a random walk and shifted by the drift; a
    visit multiplies it by its binomial likelihood:

        L_new(g) = Binomial(successes | n, g) * (drift . walk(age) L_old)(g).

    For a population spread evenly over the logits, the walk with reflecting ends is the same in reversed time, and L is
    exact; for other populations it is an approximation (the exact recursion, which weighs by the prior at each step,
    takes twice the time and captured no more of the gain). The posterior is L times a prior of the *current*
    population, refitted from all L. So old evidence fades as it becomes outdated, and evidence about common movement is
    shared between prompts.

    The walk is the continuous-time walk on the points of the grid with reflecting ends. Its generator is diagonal in
    cosines, so two small matrix products give the exact result for any age. Once an epoch, variance and drift per epoch
    move to those neighbouring values (half to double the variance, drift one step up or down) that would have predicted
    the visits of the epoch best. No constant needs tuning.

    Args:
        grid_points: see :class:`GridPosterior`.
        iterations: see :class:`GridPosterior`.

    Attributes:
        variance: variance of the walk in squared logits per epoch; learned.
        drift: drift in logits per epoch; learned.

    Raises:
        ValueError: a number is out of range.

    Source: the grid filter of hidden Markov models (Rabiner 1989) with parameters chosen by one-step predictive
    likelihood (Dawid 1984); the prior as in :class:`GridPosterior`.
    """

    discount: float = 0.8  # of the tracker's counts, used here for lengths and metrics, not for the estimate

    START_VARIANCE = 0.09
    VARIANCE_RANGE = (1e-6, 25.0)
    VARIANCE_FACTORS = np.array([0.5, 0.5**0.5, 1.0, 2**0.5, 2.0])
    DRIFT_STEPS = np.array([-0.05, 0.0, 0.05])
    DRIFT_LIMIT = 1.0
    # The information of a visit helps a few later ones too; chosen on a development set, where 1 to 8 differ little.
    VISITS_SERVED = 3.0
    # No history makes a rate impossible, because the rate of a prompt may jump.
    FLOOR = 1e-12

    def __init__(self, grid_points: int = 57, iterations: int = 40) -> None:
        super().__init__(grid_points, iterations)
        self.evidence_size = grid_points
        self.variance, self.drift = self.START_VARIANCE, 0.0
        self._scores_of_variance = np.zeros(self.VARIANCE_FACTORS.size)
        self._scores_of_drift = np.zeros(self.DRIFT_STEPS.size)
        self._spacing = 2.0 * LARGEST_LOGIT / (grid_points - 1)
        point, wave = np.arange(grid_points)[:, None], np.arange(grid_points)
        self._cosines = np.cos(np.pi * (point + 0.5) * wave / grid_points) * np.sqrt(2.0 / grid_points)
        self._cosines[:, 0] /= np.sqrt(2.0)
        # Variance grows by 2 per unit of time in a walk that leaves its point to either side at rate 1.
        self._decay = (1.0 - np.cos(np.pi * wave / grid_points)) / self._spacing**2

    def absorb(self, records: Records, successes: IntArray, totals: IntArray) -> FloatArray:
        """Multiply the evidence by the likelihood of a visit, and score the neighbouring variances and drifts."""
        visit = self.binomial_likelihood(successes, totals - successes)
        again = np.flatnonzero(records.visits)
        known = np.ones_like(visit)
        if again.size:
            known[again] = self._score(records if again.size == len(records) else records.take(again), visit[again])
        evidence = known * visit
        return np.maximum(evidence / evidence.max(axis=1, keepdims=True), self.FLOOR)

    def _score(self, records: Records, visit: FloatArray) -> FloatArray:
        """Add the log predictive probability of the visits under each candidate; return :meth:`_likelihood`."""
        waves = product(records.evidence, self._cosines)
        hit, ages = visit * self.prior, _distinct(records.age)
        moves = [self._move(ages, self.drift + step) for step in self.DRIFT_STEPS]
        unchanged = moves[int(np.flatnonzero(self.DRIFT_STEPS == 0.0)[0])]
        for k, factor in enumerate(self.VARIANCE_FACTORS):
            walked = self._walk(waves, ages, self.variance * factor)
            if factor != 1.0:
                self._scores_of_variance[k] += self._log_score(walked, unchanged, hit)[0]
                continue
            for j, step in enumerate(self.DRIFT_STEPS):
                score, shifted = self._log_score(walked, moves[j], hit)
                self._scores_of_drift[j] += score
                if step == 0.0:
                    self._scores_of_variance[k] += score
                    now = shifted
        return now

    def _log_score(self, walked: FloatArray, drifted: _Move, hit: FloatArray) -> tuple[float, FloatArray]:
        """Return the log probability of visits after a drift, up to a common constant, and the likelihood."""
        shifted = _shifted(walked, drifted)
        return float(np.log(np.einsum("mg,mg->m", shifted, hit) / product(shifted, self.prior)).sum()), shifted

    def _likelihood(self, records: Records) -> FloatArray:
        """Return the (M, grid_points) likelihood of all visits given the current rate; ones for an unseen prompt."""
        ages = _distinct(records.age)
        now = _shifted(
            self._walk(product(records.evidence, self._cosines), ages, self.variance), self._move(ages, self.drift)
        )
        now[records.visits == 0] = 1.0
        return now

    def _walk(self, waves: FloatArray, ages: _Ages, variance: float) -> FloatArray:
        """Apply the walk over their ages to rows given by their cosine coefficients."""
        distinct, which = ages
        damping = np.exp(np.outer(-variance * distinct, self._decay))[which]
        damping *= waves
        walked = product(damping, self._cosines.T)
        return np.maximum(walked, self.FLOOR, out=walked)  # rounding may leave a tiny negative number

    def _move(self, ages: _Ages, drift: float) -> _Move:
        """Return where the points of each row come from after a drift over their ages."""
        distinct, which = ages
        cells, size = distinct * drift / self._spacing, self.grid.size
        whole = np.floor(cells)
        source = np.arange(-1, size) - whole.astype(np.intp)[:, None]  # for the point below the first, and all points
        source = np.minimum(np.maximum(source, 0), size - 1).take(which, axis=0)
        source += size * np.arange(which.size)[:, None]
        return source, (cells - whole)[which, None]

    def refit(self, population: Records) -> None:
        """Move variance and drift to their best neighbours, then fit the prior to the current population."""
        if self._scores_of_variance.any():
            moved = self.variance * _best(self.VARIANCE_FACTORS, self._scores_of_variance, 1.0)
            self.variance = min(max(moved, self.VARIANCE_RANGE[0]), self.VARIANCE_RANGE[1])
            drifted = self.drift + _best(self.DRIFT_STEPS, self._scores_of_drift, 0.0)
            self.drift = min(max(drifted, -self.DRIFT_LIMIT), self.DRIFT_LIMIT)
            self._scores_of_variance[:] = 0.0
            self._scores_of_drift[:] = 0.0
        likelihood = self._likelihood(_sample(population))
        self.fit_prior(likelihood / likelihood.max(axis=1, keepdims=True))

    def posterior(self, records: Records) -> FloatArray:
        """Return the (M, grid_points) probability of each success rate of the grid; rows sum to 1."""
        return self.posterior_of(self._likelihood(records))

    def believe(self, records: Records, max_rollouts: int) -> Belief:
        """Return the posterior mean, expectations over the grid, and the value of information."""
        likelihood = self._likelihood(records)
        belief = self.belief_of(self.posterior_of(likelihood), max_rollouts)

        def value_of_information(rows: IntArray, price: float) -> FloatArray:
            return self._value_of_information(likelihood[rows], price, max_rollouts)

        return replace(belief, value_of_information=value_of_information)

    def _value_of_information(self, likelihood: FloatArray, price: float, max_rollouts: int) -> FloatArray:
        """Return the expected gain at the next visit from knowing the outcome, times the visits that it helps.

        At a visit a prompt earns max over n of E[V(n)] - price n, which is convex in the posterior, so knowing more
        never hurts. The posteriors compared are those an epoch from now, with each outcome and without.

        Source: value of information (Howard 1966), one step ahead (knowledge gradient, Frazier et al. 2008).
        """
        size = likelihood.shape[0]
        net = np.cumsum(self._values[:, :max_rollouts], axis=1) - price * np.arange(1, max_rollouts + 1)

        def earned(at_check: FloatArray) -> FloatArray:
            an_epoch = _distinct(np.ones(at_check.shape[0]))
            walked = self._walk(product(at_check, self._cosines), an_epoch, self.variance)
            later = self.posterior_of(_shifted(walked, self._move(an_epoch, self.drift)))
            return np.maximum(product(later, net).max(axis=1), 0.0)

        k = np.arange(CHECK_ROLLOUTS + 1)
        ways = np.array([comb(CHECK_ROLLOUTS, int(successes)) for successes in k])
        # (K+1, grid) probability of each outcome of the check
        outcome = ways[:, None] * self.grid ** k[:, None] * (1.0 - self.grid) ** (CHECK_ROLLOUTS - k[:, None])
        chance = product(self.posterior_of(likelihood), outcome.T)
        with_outcome = earned((likelihood[:, None] * outcome).reshape(-1, self.grid.size)).reshape(size, -1)
        gain = np.einsum("mk,mk->m", chance, with_outcome) - earned(likelihood)
        return self.VISITS_SERVED * gain

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of an equal estimator."""
        return {"grid_points": self.grid.size, "iterations": self.iterations}

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the prior, variance and drift, and the scores of the current epoch."""
        return {
            "prior": self.prior.copy(),
            "walk": np.array([self.variance, self.drift]),
            "scores_of_variance": self._scores_of_variance.copy(),
            "scores_of_drift": self._scores_of_drift.copy(),
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what was learned.

        Raises:
            ValueError: a part is missing, not finite or of the wrong size.
        """
        parts = {}
        for name, size in (
            ("walk", 2),
            ("scores_of_variance", self._scores_of_variance.size),
            ("scores_of_drift", self._scores_of_drift.size),
        ):
            parts[name] = np.asarray(state.get(name, ()), dtype=np.float64)
            if parts[name].shape != (size,) or not np.isfinite(parts[name]).all():
                raise ValueError(f"the saved {name} of the Bayes filter must be {size} finite numbers")
        variance, drift = parts["walk"].tolist()
        if not self.VARIANCE_RANGE[0] <= variance <= self.VARIANCE_RANGE[1] or abs(drift) > self.DRIFT_LIMIT:
            raise ValueError(
                f"the saved walk must have a variance in {list(self.VARIANCE_RANGE)} and a drift within "
                f"{self.DRIFT_LIMIT}, got {variance} and {drift}"
            )
        self.load_prior(state)
        self.variance, self.drift = variance, drift
        self._scores_of_variance = parts["scores_of_variance"].copy()
        self._scores_of_drift = parts["scores_of_drift"].copy()


def _shifted(rows: FloatArray, move: _Move) -> FloatArray:
    """Shift each row up, linear between points and constant beyond the ends."""
    source, part = move
    moved = rows.take(source, mode="clip")  # all are in range: the mode saves a copy
    near, far = moved[:, 1:], moved[:, :-1]
    return near + part * (far - near)


def _best(candidates: FloatArray, scores: FloatArray, current: float) -> float:
    """Return the candidate with the highest score, the current one among equals."""
    best = scores == scores.max()
    return current if best[candidates == current].any() else float(candidates[np.argmax(best)])


def _distinct(ages: FloatArray) -> _Ages:
    """Return distinct ages and the index of each age among them; prompts of one earlier batch share their age."""
    return np.unique(ages, return_inverse=True)


def _sample(population: Records) -> Records:
    """Return at most ``REFIT_SAMPLE`` prompts, evenly spaced."""
    if len(population) <= REFIT_SAMPLE:
        return population
    return population.take(np.linspace(0, len(population) - 1, REFIT_SAMPLE).astype(np.int64))


def check_mixed_outcomes(estimator: Estimator) -> GridPosterior:
    """Return the estimator if it has a posterior on a grid and a value of mixed outcomes.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(estimator, GridPosterior) or not isinstance(estimator.value, MixedOutcomes):
        raise ValueError(
            "top_up needs an estimator with a posterior on a grid ('bayes-filter', 'empirical-bayes') and the value "
            f"'knapsack', 'nonzero-gradient' or 'power-A-B', got {type(estimator).__name__}"
            + (f" with {type(estimator.value).__name__}" if isinstance(estimator, GridPosterior) else "")
        )
    return estimator
