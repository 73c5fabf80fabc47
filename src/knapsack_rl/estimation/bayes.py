"""The Bayes filter: posteriors on a grid whose success rates walk, drift and jump between visits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knapsack_rl.allocation.belief import CHECK_ROLLOUTS, Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.estimation.grid import LARGEST_LOGIT, GridPosterior, sample_of
from knapsack_rl.estimation.products import product, product_of_columns
from knapsack_rl.estimation.tracker import Records

_Ages = tuple[FloatArray, NDArray[np.intp]]
"""(D,) distinct ages and (M,) index of each prompt's age among them: exponentials are computed once per age."""


class BayesFilterEstimator(GridPosterior):
    r"""A Bayes filter: success rates walk, drift and jump between visits, in amounts learned at every batch.

    For each prompt the tracker keeps the likelihood of all observations as a function of the *current* logit,
    L(g) = P(observations | logit now = g). With the prior pi of the population it gives the posterior pi L. A model of
    movement is a kernel T over the age of a visit: a drift, a walk with reflecting ends, and with probability
    1 - exp(-hazard age) a jump to any rate of the population. Then, by Bayes' rule in a population that stays pi,

        L(g) <- T(pi L)(g) / T(pi)(g)            time passes
        L(g) <- Binomial(successes | n, g) L(g)  a visit

    T is the average of a small set of models, weighted by how well they have predicted the outcomes: at every batch a
    weight is multiplied by the probability of the batch's outcomes under its model. Because the right model changes, a
    part of the weight is shared evenly before each batch, so any model is back within a batch or two: one without
    movement while rates stand still, a jump of all prompts when they collapse or another policy takes over. If
    histories predict nothing, all prompts are believed to be alike, and the allocation is even. No constant needs
    tuning.

    The walk's generator is diagonal in cosines, so a model's prediction is a damped sum of a few coefficients, and
    scoring all models costs little more than scoring the drifts.

    Args:
        grid_points: see :class:`GridPosterior`.
        iterations: see :class:`GridPosterior`.

    Attributes:
        weights: (variances, hazards, drifts) probability of each model.

    Raises:
        ValueError: a number is out of range.

    Source: the grid filter of hidden Markov models (Rabiner 1989); Bayesian weights by predictive likelihood (Dawid
    1984) that may switch (fixed share: Herbster & Warmuth 1998); the prior as in :class:`GridPosterior`.
    """

    discount: float = 0.8  # of the tracker's counts, used here for lengths and metrics, not for the estimate

    VARIANCES = np.array([1e-4, 0.01, 0.04, 0.16, 0.6, 2.4])
    """Of the walk, in squared logits per epoch."""
    HAZARDS = np.array([0.001, 0.03, 0.5, 1e9])
    """Of jumps, per epoch; with the last nothing is remembered."""
    DRIFTS = np.array([-0.4, -0.1, 0.0, 0.1, 0.4])
    """Logits per epoch."""
    SHARE, SHARE_VISITS = 0.02, 64
    """Weight shared before a batch of at least so many visits, and in proportion before a smaller one."""
    FLOOR = 1e-12
    """No history makes a rate impossible: smallest likelihood, relative to the largest."""
    WARM = 0.9
    """A refit starts from the last prior, with the rest flat, so that it converges over the epochs."""
    SMOOTHING = 0.1
    """Variance in squared logits by which a fitted prior is smoothed: the best fit to few prompts is a few spikes."""
    IN_USE = 16.0
    """The population is that of the prompts visited in so many newest epochs."""
    # The information of a visit helps a few later ones too; chosen on a development set, where 1 to 8 differ little.
    VISITS_SERVED = 3.0

    def __init__(self, grid_points: int = 57, iterations: int = 40) -> None:
        super().__init__(grid_points, iterations)
        self.evidence_size = grid_points
        # Each hazard is half as likely as the one below it; variances and drifts are all alike.
        by_hazard = 0.5 ** np.arange(self.HAZARDS.size)[:, None]
        self._first: FloatArray = np.tile(by_hazard, (self.VARIANCES.size, 1, self.DRIFTS.size))
        self._first /= self._first.sum()
        self.weights = self._first.copy()
        self._spacing = 2.0 * LARGEST_LOGIT / (grid_points - 1)
        point, wave = np.arange(grid_points)[:, None], np.arange(grid_points)
        self._cosines = np.cos(np.pi * (point + 0.5) * wave / grid_points) * np.sqrt(2.0 / grid_points)
        self._cosines[:, 0] /= np.sqrt(2.0)
        # Variance grows by 2 per unit of time in a walk that leaves its point to either side at rate 1.
        self._decay = (1.0 - np.cos(np.pi * wave / grid_points)) / self._spacing**2

    @property
    def variance(self) -> float:
        """Expected variance of the walk in squared logits per epoch."""
        return float((self.weights.sum(axis=(1, 2)) * self.VARIANCES).sum())

    @property
    def drift(self) -> float:
        """Expected drift in logits per epoch."""
        return float((self.weights.sum(axis=(0, 1)) * self.DRIFTS).sum())

    def absorb(self, records: Records, successes: IntArray, totals: IntArray) -> FloatArray:
        """Weigh the models by how well they predict the visits, then multiply the evidence by their likelihood."""
        visit = self.binomial_likelihood(successes, totals - successes)
        known = np.ones_like(visit)
        again = np.flatnonzero(records.visits)
        if again.size:
            returning = records if again.size == len(records) else records.take(again)
            posterior, ages = self._posterior_then(returning), _distinct(returning.age)
            self._weigh(self._scores(posterior, ages, visit[again], returning.prior), again.size)
            known[again] = self._likelihood_after(posterior, ages)
        evidence = known * visit
        return np.maximum(evidence / evidence.max(axis=1, keepdims=True), self.FLOOR)

    def _posterior_then(self, records: Records) -> FloatArray:
        """Return (M, grid_points) the posterior after the newest visit, before any time passed."""
        evidence = records.evidence.astype(np.float64)
        evidence[records.visits == 0] = 1.0
        return self.posterior_of(evidence)

    def _scores(
        self, posterior: FloatArray, ages: _Ages, visit: FloatArray, prior: FloatArray | None = None
    ) -> FloatArray:
        """Return the (variances, hazards, drifts) log probability of visits, up to a common constant.

        A prompt with a prior of its own has the posterior of the population times the ratio of the two priors, over
        their sum.

        Args:
            posterior: (M, grid_points) posterior after the visits before, with the prior of the population.
            ages: time since then.
            visit: (M, grid_points) likelihood of each visit.
            prior: (M, grid_points) of each prompt; by default that of the population.
        """
        distinct, which = ages
        damping = self._damping(distinct).transpose(1, 2, 0).take(which, axis=0)  # (M, grid_points, variances)
        stays = np.exp(-np.outer(self.HAZARDS, distinct))[:, which]
        drifted = [product(self._drifted(posterior, ages, drift), self._cosines) for drift in self.DRIFTS]
        predictions = np.stack(drifted, axis=1)  # (M, drifts, grid_points)

        def log_mean(weight: FloatArray) -> FloatArray:
            """Of a (M, grid_points) weight over the prediction of every model: (variances, hazards, drifts, M)."""
            waves = predictions * product(weight, self._cosines)[:, None]
            walked = np.matmul(waves, damping).T  # products too small for a BLAS library to divide over threads
            np.maximum(walked, self.FLOOR, out=walked)  # rounding may leave a tiny negative number
            alike = product(weight, self.prior)
            return np.log(walked[:, None] * stays[:, None] + alike * (1.0 - stays[:, None]))

        if prior is None:
            return log_mean(visit).sum(axis=-1)
        ratio = prior / self.prior
        return (log_mean(visit * ratio) - log_mean(ratio)).sum(axis=-1)

    def _weigh(self, scores: FloatArray, visits: int) -> None:
        """Share a part of the weights, then multiply them by the probability of the visits."""
        share = self.SHARE * min(visits / self.SHARE_VISITS, 1.0)
        weights = ((1.0 - share) * self.weights + share * self._first) * np.exp(scores - scores.max())
        self.weights = weights / weights.sum()

    def _likelihood_after(self, posterior: FloatArray, ages: _Ages) -> FloatArray:
        """Return the (M, grid_points) likelihood of all visits given the rate now, by all models together.

        Args:
            posterior: (M, grid_points) posterior after the newest visit.
            ages: time since then.
        """
        distinct, which = ages
        stays = product(np.exp(-np.outer(distinct, self.HAZARDS)), self.weights.sum(axis=2).T)
        damping = np.einsum("av,vak->ak", stays, self._damping(distinct))
        jumped = np.outer(1.0 - stays.sum(axis=1), self.prior)

        def moved(rows: FloatArray, which: NDArray[np.intp]) -> FloatArray:
            # The drift is the expected one: a mixture of small shifts differs from it only in variance.
            waves = product(self._drifted(rows, (distinct, which), self.drift), self._cosines)
            waves *= damping.take(which, axis=0)
            found = product(waves, self._cosines.T)
            np.maximum(found, self.FLOOR, out=found)  # rounding may leave a tiny negative number
            found += jumped.take(which, axis=0)
            return found

        population = moved(np.broadcast_to(self.prior, (distinct.size, self.grid.size)), np.arange(distinct.size))
        likelihood = moved(posterior, which)
        likelihood *= (1.0 / population).take(which, axis=0)
        return likelihood

    def walked(self, rows: NDArray[Any], variance: FloatArray) -> FloatArray:
        """Return (..., grid_points) functions of the logit, smoothed by a walk of (...) variances in squared logits.

        A dimension of rows that is 1 is taken for each variance.
        """
        distinct, which = np.unique(variance, return_inverse=True)
        waves = product(rows.reshape(-1, self.grid.size), self._cosines).reshape(rows.shape)
        damping = np.exp(-np.outer(distinct, self._decay)).take(which.reshape(variance.shape), axis=0)
        damped = waves * damping
        smooth = product(damped.reshape(-1, self.grid.size), self._cosines.T).reshape(damped.shape)
        return np.maximum(smooth, self.FLOOR, out=smooth)

    def _damping(self, ages: FloatArray) -> FloatArray:
        """Return (variances, ages, grid_points) factors of the cosines after a walk over each age."""
        return np.exp(-np.multiply.outer(np.outer(self.VARIANCES, ages), self._decay))

    def _drifted(self, rows: FloatArray, ages: _Ages, drift: float) -> FloatArray:
        """Return (M, grid_points) distributions after a drift over their ages; none leaves the grid.

        Mass between two points is divided between them.
        """
        distinct, which = ages
        cells, size = distinct * drift / self._spacing, self.grid.size
        if not cells.any():
            return rows
        whole = np.minimum(np.maximum(np.floor(cells), -size), size).astype(np.intp)
        room = int(np.abs(whole).max()) + 1
        padded = np.zeros((which.size, size + 2 * room))
        padded[:, room : room + size] = rows
        # Where the mass of each point, and of the one below the first, comes from.
        first = room - 1 - whole
        if first.min() == first.max():  # as often happens: no need to gather
            near_and_far = padded[:, first[0] : first[0] + size + 1]
        else:
            begins = first.take(which) + padded.shape[1] * np.arange(which.size)
            near_and_far = padded.take(begins[:, None] + np.arange(size + 1), mode="clip")  # the mode saves a copy
        near, far = near_and_far[:, 1:], near_and_far[:, :-1]
        moved = far - near
        moved *= np.clip(cells - whole, 0.0, 1.0)[which, None]
        moved += near
        # The rest of the mass has left the grid; a difference of equal sums may be a tiny negative number.
        moved[:, -1 if drift > 0.0 else 0] += np.maximum(1.0 - moved.sum(axis=1), 0.0)
        return moved

    def likelihood(self, records: Records) -> FloatArray:
        """Return the (M, grid_points) likelihood of all visits by success rate now; ones for an unseen prompt."""
        now = self._likelihood_after(self._posterior_then(records), _distinct(records.age))
        now[records.visits == 0] = 1.0
        return now

    def refit(self, population: Records) -> None:
        """Fit the prior to the current population."""
        in_use = np.flatnonzero((population.visits > 0) & (population.age <= self.IN_USE))
        if not in_use.size:
            return
        current = population if in_use.size == len(population) else population.take(in_use)
        likelihood = self.likelihood(sample_of(current))
        start = self.WARM * self.prior + (1.0 - self.WARM) / self.grid.size
        self.fit_prior(likelihood / likelihood.max(axis=1, keepdims=True), start)
        waves = product_of_columns(self._cosines, self.prior) * np.exp(-self.SMOOTHING * self._decay)
        smooth = np.maximum(product(self._cosines, waves), self.FLOOR)
        self.prior = smooth / smooth.sum()

    def believe(self, records: Records, max_rollouts: int) -> Belief:
        """Return the posterior mean, expectations over the grid, and the value of information."""
        posterior = self.posterior(records)
        belief = self.belief_of(posterior, max_rollouts)

        def value_of_information(rows: IntArray, price: float) -> FloatArray:
            return self._value_of_information(posterior[rows], price, max_rollouts)

        return replace(belief, value_of_information=value_of_information)

    def _value_of_information(self, posterior: FloatArray, price: float, max_rollouts: int) -> FloatArray:
        """Return the expected gain at the next visit from knowing the outcome, times the visits that it helps.

        At a visit a prompt earns max over n of E[V(n)] - price n, which is convex in the posterior, so knowing more
        never hurts. The posteriors compared are those an epoch from now, with each outcome and without.

        Source: value of information (Howard 1966), one step ahead (knowledge gradient, Frazier et al. 2008).
        """
        size = posterior.shape[0]
        net = np.cumsum(self._values[:, :max_rollouts], axis=1) - price * np.arange(1, max_rollouts + 1)

        def earned(at_check: FloatArray) -> FloatArray:
            later = self.posterior_of(self._likelihood_after(at_check, _distinct(np.ones(at_check.shape[0]))))
            return np.maximum(product(later, net).max(axis=1), 0.0)

        k = np.arange(CHECK_ROLLOUTS + 1)
        ways = np.array([comb(CHECK_ROLLOUTS, int(successes)) for successes in k])
        # (K+1, grid) probability of each outcome of the check
        outcome = ways[:, None] * self.grid ** k[:, None] * (1.0 - self.grid) ** (CHECK_ROLLOUTS - k[:, None])
        with_outcome = (posterior[:, None] * outcome).reshape(-1, self.grid.size)
        chance = with_outcome.sum(axis=1)
        gain = (chance * earned(with_outcome / chance[:, None])).reshape(size, -1).sum(axis=1) - earned(posterior)
        return self.VISITS_SERVED * gain

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of an equal estimator."""
        return {"grid_points": self.grid.size, "iterations": self.iterations}

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the prior and the weights of the models."""
        return {"prior": self.prior.copy(), "weights": self.weights.copy()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what was learned.

        Raises:
            ValueError: a part is missing, or is not a distribution of the right size.
        """
        weights = np.asarray(state.get("weights", ()), dtype=np.float64)
        if weights.shape != self.weights.shape or not (weights >= 0).all() or not np.isclose(weights.sum(), 1.0):
            raise ValueError(
                f"the saved weights of the Bayes filter must be a distribution of shape {self.weights.shape}, one "
                f"probability for each model of movement, got shape {weights.shape} with sum {weights.sum()}"
            )
        self.load_prior(state)
        self.weights = weights.copy()


def _distinct(ages: FloatArray) -> _Ages:
    """Return distinct ages, rounded to an eighth of an octave, and the index of each age among them.

    Prompts of a batch share the work for an age; a walk over an age that is off by 4 % is off by less than is known.
    """
    with np.errstate(divide="ignore"):
        rounded = np.exp2(np.round(8.0 * np.log2(ages)) / 8.0)
    return np.unique(rounded, return_inverse=True)
