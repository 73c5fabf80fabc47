"""From reward counts to what is known of each prompt's success rate.

An estimator turns :class:`~knapsack_rl.tracker.Records` into a :class:`Belief`: a mean success rate and expected
marginal values per prompt. To add one, write a class with the methods of :class:`Estimator` and name it in
``ESTIMATORS``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from knapsack_rl.tracker import RECENT, Records
from knapsack_rl.value import (
    FloatArray,
    IntArray,
    check_whole,
    marginal_values,
    nonzero_gradient_probability,
)


@dataclass(frozen=True, eq=False)
class Belief:
    """What is known of a batch of prompts.

    Attributes:
        mean: (M,) expected success rate; NaN where the estimator says nothing of the prompt.
        marginals: (M, K) expected marginal value of each further rollout.
        nonzero_gradient: maps (M,) counts to the (M,) predicted probability of a non-zero gradient.
    """

    mean: FloatArray
    marginals: FloatArray
    nonzero_gradient: Callable[[IntArray], FloatArray]


class Estimator(Protocol):
    """What the allocator needs of an estimator."""

    discount: float
    """What a prompt's older counts are multiplied by at each new visit, in (0, 1]."""

    paper_rule: ClassVar[bool]
    """Whether the mean is a point estimate to be allocated by the paper's rule with its fallback."""

    def refit(self, population: Records) -> None:
        """Learn from all prompts seen; called at first observation, then about once an epoch."""
        ...

    def believe(self, records: Records, max_rollouts: int) -> Belief:
        """What is known of the prompts of a batch, with ``max_rollouts`` columns of marginal values."""
        ...

    def settings(self) -> dict[str, Any]:
        """Keyword arguments that make an equal estimator; JSON values."""
        ...

    def state_dict(self) -> dict[str, np.ndarray]:
        """What was learned."""
        ...

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what was learned."""
        ...


_ANY_RATE = np.linspace(0.01, 0.99, 99)


class WindowEstimator:
    """The paper's rule: a mean of recent rewards, taken for the truth.

    If the newest visit gave at least ``window`` rewards, their mean; else the mean of the newest ``window`` rewards
    across visits. Below ``minimum`` rewards in all the prompt counts as unseen and gets the uniform budget. Allocation
    is by the paper's rule with its fallback.

    Args:
        window: rewards, 1 to 64.
        minimum: rewards, >= 1.
        fallback: whether the paper's fallback applies; without it the plain knapsack takes the means for the truth.

    Raises:
        ValueError: a number is out of range.

    Source: the authors' status tracker (arXiv 2509.25849).
    """

    paper_rule: ClassVar[bool] = True
    discount: float = 1.0

    def __init__(self, window: int = 16, minimum: int = 8, fallback: bool = True) -> None:
        self.window = check_whole("window", window, minimum=1)
        self.minimum = check_whole("minimum", minimum, minimum=1)
        if not isinstance(fallback, bool):
            raise ValueError(f"fallback must be true or false, got {fallback!r}")
        self.fallback = fallback
        if window > RECENT:
            raise ValueError(f"window must be at most {RECENT}, the outcomes kept per prompt, got {window}")

    def refit(self, population: Records) -> None:
        """A window learns nothing from other prompts."""

    def believe(self, records: Records, max_rollouts: int) -> Belief:
        """Point estimates; NaN means too few rewards, and such a prompt is valued as if every rate were as likely."""
        length = np.minimum(records.rollouts, self.window)
        mask = np.uint64(2**self.window - 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            windowed = np.bitwise_count(records.recent & mask) / length
            newest = records.newest_successes / records.newest_total
        mean = np.where(records.newest_total >= self.window, newest, windowed)
        mean = np.where(records.rollouts >= self.minimum, mean, np.nan)
        known = np.where(np.isnan(mean), 0.5, mean)

        def nonzero_gradient(counts: IntArray) -> FloatArray:
            return np.where(np.isnan(mean), np.nan, nonzero_gradient_probability(counts, known))

        marginals = marginal_values(known, max_rollouts)
        marginals[np.isnan(mean)] = marginal_values(_ANY_RATE, max_rollouts).mean(axis=0)
        return Belief(mean, marginals, nonzero_gradient)

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of an equal estimator."""
        settings = {"window": self.window, "minimum": self.minimum}
        # Named only when off, so that states saved before it existed still belong to an equal estimator.
        return settings if self.fallback else settings | {"fallback": False}

    def state_dict(self) -> dict[str, np.ndarray]:
        """Nothing is learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Nothing to restore."""


class BetaEstimator:
    """A discounted Beta posterior per prompt, with expected values in closed form.

    With p ~ Beta(a, b): E[D(N)] = [B(a+N+1, b+3) + B(a+2, b+N+2)] / B(a, b), B the Beta function, and
    P(non-zero gradient | N) = 1 - [B(a+N, b) + B(a, b+N)] / B(a, b).

    Args:
        prior_successes: pseudo-count a of the prior, > 0.
        prior_failures: pseudo-count b of the prior, > 0.
        discount: see :class:`Estimator`.

    Raises:
        ValueError: a number is out of range.
    """

    paper_rule: ClassVar[bool] = False

    def __init__(self, prior_successes: float = 0.5, prior_failures: float = 0.5, discount: float = 0.8) -> None:
        for name, number in (("prior_successes", prior_successes), ("prior_failures", prior_failures)):
            if not 0.0 < number < np.inf:
                raise ValueError(f"{name} must be a positive number, got {number!r}")
        self.prior_successes, self.prior_failures = float(prior_successes), float(prior_failures)
        self.discount = _check_discount(discount)

    def refit(self, population: Records) -> None:
        """The prior is given, not learned."""

    def believe(self, records: Records, max_rollouts: int) -> Belief:
        """Posterior mean and closed-form expectations."""
        a, b = self.prior_successes + records.successes, self.prior_failures + records.failures
        n = np.arange(1, max_rollouts)
        total = a + b
        # E[p^2 (1-p)^3] starts both series; each step multiplies by a ratio of Beta functions.
        start = a * (a + 1) * b * (b + 1) * (b + 2)
        start = start / (total * (total + 1) * (total + 2) * (total + 3) * (total + 4))
        table = np.zeros((a.size, max_rollouts))
        if max_rollouts > 1:
            falling = total[:, None] + n[:-1] + 4
            by_p = np.cumprod((a[:, None] + n[:-1] + 1) / falling, axis=1)
            by_q = np.cumprod((b[:, None] + n[:-1] + 2) / falling, axis=1)
            table[:, 1] = 2 * start
            table[:, 2:] = start[:, None] * (by_p + by_q)

        def nonzero_gradient(counts: IntArray) -> FloatArray:
            steps = np.arange(max(int(counts.max(initial=0)), 1))
            ratio_p = np.cumprod((a[:, None] + steps) / (total[:, None] + steps), axis=1)
            ratio_q = np.cumprod((b[:, None] + steps) / (total[:, None] + steps), axis=1)
            at = np.maximum(counts - 1, 0)[:, None]
            same = np.take_along_axis(ratio_p, at, 1)[:, 0] + np.take_along_axis(ratio_q, at, 1)[:, 0]
            return np.where(counts >= 2, 1.0 - same, 0.0)

        return Belief(a / total, table, nonzero_gradient)

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of an equal estimator."""
        return {
            "prior_successes": self.prior_successes,
            "prior_failures": self.prior_failures,
            "discount": self.discount,
        }

    def state_dict(self) -> dict[str, np.ndarray]:
        """Nothing is learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Nothing to restore."""


class EmpiricalBayesEstimator:
    """A posterior on a grid of success rates whose prior is the population of prompts itself.

    The mixing distribution over the grid is the nonparametric maximum-likelihood estimate from all prompts'
    discounted counts, fitted by EM. A prompt's posterior is prior times binomial likelihood; unseen, unsolved and
    solved prompts need no rule of their own. Allocation is by posterior-expected marginal value.

    Args:
        discount: see :class:`Estimator`.
        grid_points: success rates in the grid, >= 3, evenly spaced in logits from -7 to 7 (0.0009 to 0.9991).
        iterations: EM steps of a refit, >= 1.

    Raises:
        ValueError: a number is out of range.

    Source: Robbins 1950; Kiefer & Wolfowitz 1956; Laird 1978 (EM); Koenker & Mizera 2014.
    """

    paper_rule: ClassVar[bool] = False

    def __init__(self, discount: float = 0.8, grid_points: int = 57, iterations: int = 40) -> None:
        self.discount = _check_discount(discount)
        self.iterations = check_whole("iterations", iterations, minimum=1)
        logits = np.linspace(-7.0, 7.0, check_whole("grid_points", grid_points, minimum=3))
        self.grid = 1.0 / (1.0 + np.exp(-logits))
        self.prior = np.full(grid_points, 1.0 / grid_points)
        self._values: FloatArray = np.empty((grid_points, 0))

    def refit(self, population: Records) -> None:
        """Fit the prior to all prompts by EM, from a flat start.

        One prompt's weight of a flat prior is added, so that no rate becomes impossible.
        """
        likelihood = self._likelihood(population)
        size = self.grid.size
        weights = np.full(size, 1.0 / size)
        for _ in range(self.iterations):
            responsibility = weights * (likelihood.T @ (1.0 / (likelihood @ weights)))
            weights = (responsibility + 1.0 / size) / (len(population) + 1.0)
        self.prior = weights

    def posterior(self, records: Records) -> FloatArray:
        """(M, grid_points) probability of each success rate of the grid, rows sum to 1."""
        joint = self._likelihood(records) * self.prior
        return joint / joint.sum(axis=1, keepdims=True)

    def believe(self, records: Records, max_rollouts: int) -> Belief:
        """Posterior mean and expectations over the grid."""
        if self._values.shape[1] < max_rollouts:
            self._values = marginal_values(self.grid, max_rollouts)
        posterior = self.posterior(records)

        def nonzero_gradient(counts: IntArray) -> FloatArray:
            return np.sum(posterior * nonzero_gradient_probability(counts[:, None], self.grid), axis=1)

        return Belief(posterior @ self.grid, posterior @ self._values[:, :max_rollouts], nonzero_gradient)

    def _likelihood(self, records: Records) -> FloatArray:
        """(M, grid_points) binomial likelihood up to a factor per row, whose largest entry is 1."""
        log = np.outer(records.successes, np.log(self.grid)) + np.outer(records.failures, np.log1p(-self.grid))
        return np.exp(log - log.max(axis=1, keepdims=True))

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of an equal estimator."""
        return {"discount": self.discount, "grid_points": self.grid.size, "iterations": self.iterations}

    def state_dict(self) -> dict[str, np.ndarray]:
        """The fitted prior."""
        return {"prior": self.prior.copy()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore the prior.

        Raises:
            ValueError: the prior is missing, does not fit the grid or is no distribution.
        """
        prior = np.asarray(state.get("prior", ()), dtype=np.float64)
        if prior.shape != self.grid.shape or not (prior >= 0).all() or not np.isclose(prior.sum(), 1.0):
            raise ValueError(f"the saved prior must be a distribution over {self.grid.size} success rates")
        self.prior = prior.copy()


def _check_discount(discount: float) -> float:
    if not 0.0 < discount <= 1.0:
        raise ValueError(f"discount must be in (0, 1], got {discount!r}")
    return float(discount)


ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "window": WindowEstimator,
    "beta": BetaEstimator,
    "empirical-bayes": EmpiricalBayesEstimator,
}


def make_estimator(name: str, **settings: Any) -> Estimator:
    """Estimator by name.

    Raises:
        ValueError: the name is unknown or a setting is out of range.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")
    allowed = inspect.signature(ESTIMATORS[name]).parameters
    unknown = sorted(set(settings) - set(allowed))
    if unknown:
        raise ValueError(f"estimator {name!r} has no setting {', '.join(unknown)}; it has {', '.join(allowed)}")
    return ESTIMATORS[name](**settings)
