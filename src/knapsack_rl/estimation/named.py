"""The estimators of success rates, by name.

An estimator turns :class:`~knapsack_rl.estimation.tracker.Records` into a
:class:`~knapsack_rl.allocation.belief.Belief`: a mean success rate and expected marginal values per prompt. To add one,
derive a class from :class:`~knapsack_rl.estimation.protocol.Estimator` and name it in ``ESTIMATORS``.
Those on a grid of success rates are in :mod:`knapsack_rl.estimation.grid` and :mod:`knapsack_rl.estimation.bayes`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from knapsack_rl.allocation.belief import Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray, check_whole
from knapsack_rl.allocation.value import (
    VALUE_FORMS,
    Likelihood,
    MixedOutcomes,
    PowerGain,
    ValueLike,
    make_value_function,
    nonzero_gradient_probability,
)
from knapsack_rl.estimation.bayes import BayesFilterEstimator
from knapsack_rl.estimation.grid import EmpiricalBayesEstimator, GridPosterior
from knapsack_rl.estimation.protocol import Estimator, check_discount
from knapsack_rl.estimation.tracker import RECENT, Records

_ANY_RATE = np.linspace(0.01, 0.99, 99)


class WindowEstimator(Estimator):
    """The paper's rule: a mean of recent rewards, treated as the true rate.

    The estimate is the mean of the rewards of the newest visit if there are at least ``window`` of them, otherwise of
    the newest ``window`` rewards across visits. With fewer than ``minimum`` rewards in all, the prompt counts as unseen
    and gets the uniform budget. Allocation is by the paper's rule with its fallback.

    Args:
        window: rewards, 1 to 64.
        minimum: rewards, >= 1.
        fallback: whether the paper's fallback applies; without it the plain knapsack treats the means as true rates.

    Raises:
        ValueError: a number is out of range.

    Source: the authors' status tracker (arXiv 2509.25849).
    """

    paper_rule: ClassVar[bool] = True

    def __init__(self, window: int = 16, minimum: int = 8, fallback: bool = True) -> None:
        self.window = check_whole("window", window, minimum=1)
        self.minimum = check_whole("minimum", minimum, minimum=1)
        if not isinstance(fallback, bool):
            raise ValueError(f"fallback must be true or false, got {fallback!r}")
        self.fallback = fallback
        if window > RECENT:
            raise ValueError(f"window must be at most {RECENT}, the outcomes kept per prompt, got {window}")
        self.use_value("knapsack")

    def use_value(self, value: ValueLike) -> None:
        """Maximise another value from now on; only without the paper's fallback.

        Raises:
            ValueError: the value is unknown.
        """
        self.value = make_value_function(value)

    def believe(self, records: Records, max_rollouts: int) -> Belief:
        """Return point estimates; NaN marks too few rewards, and such a prompt is valued by the mean over all rates."""
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

        marginals = self.value.marginals(known, max_rollouts)
        marginals[np.isnan(mean)] = self.value.marginals(_ANY_RATE, max_rollouts).mean(axis=0)
        return Belief(mean, marginals, nonzero_gradient)

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of an equal estimator."""
        return {"window": self.window, "minimum": self.minimum, "fallback": self.fallback}


class BetaEstimator(Estimator):
    """An estimator with a discounted Beta posterior per prompt and expected values in closed form.

    With p ~ Beta(a, b) and B the Beta function, P(non-zero gradient | N) = 1 - [B(a+N, b) + B(a, b+N)] / B(a, b), and

        gain p^c (1-p)^d:     E[D(N)] = [B(a+c+N, b+d+1) + B(a+c+1, b+d+N)] / B(a, b)
        ``"likelihood-C"``:   E[D(N)] = B(a+1-C, b+N) / B(a, b)

    Args:
        prior_successes: pseudo-count a of the prior, > 0.
        prior_failures: pseudo-count b of the prior, > 0.
        discount: see :class:`~knapsack_rl.estimation.protocol.Estimator`.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, prior_successes: float = 0.5, prior_failures: float = 0.5, discount: float = 0.8) -> None:
        for name, number in (("prior_successes", prior_successes), ("prior_failures", prior_failures)):
            if not isinstance(number, (int, float)) or not 0.0 < number < np.inf:
                raise ValueError(f"{name} must be a positive number, got {number!r}")
        self.prior_successes, self.prior_failures = float(prior_successes), float(prior_failures)
        self.discount = check_discount(discount)
        self.use_value("knapsack")

    def use_value(self, value: ValueLike) -> None:
        """Maximise another value from now on, one with a closed form.

        Raises:
            ValueError: the value is unknown, or has no closed form.
        """
        function = make_value_function(value)
        if not isinstance(getattr(function, "gain", function), (PowerGain, Likelihood)):
            raise ValueError(
                f"BetaEstimator has the closed forms of {', '.join(VALUE_FORMS)} alone, got value={value!r}; use "
                "'bayes-filter', 'empirical-bayes' or WindowEstimator(fallback=False)"
            )
        self.value = function

    def believe(self, records: Records, max_rollouts: int) -> Belief:
        """Return the posterior mean and closed-form expectations."""
        a, b = self.prior_successes + records.successes, self.prior_failures + records.failures
        total = a + b
        table = self._expected_marginals(a, b, max_rollouts)

        def nonzero_gradient(counts: IntArray) -> FloatArray:
            steps = np.arange(max(int(counts.max(initial=0)), 1))
            ratio_p = np.cumprod((a[:, None] + steps) / (total[:, None] + steps), axis=1)
            ratio_q = np.cumprod((b[:, None] + steps) / (total[:, None] + steps), axis=1)
            at = np.maximum(counts - 1, 0)[:, None]
            same = np.take_along_axis(ratio_p, at, 1)[:, 0] + np.take_along_axis(ratio_q, at, 1)[:, 0]
            return np.where(counts >= 2, 1.0 - same, 0.0)

        return Belief(a / total, table, nonzero_gradient)

    def _expected_marginals(self, a: FloatArray, b: FloatArray, max_rollouts: int) -> FloatArray:
        """Return the (M, max_rollouts) table of E[D(N)]; each step multiplies by a ratio of Beta functions."""
        table = np.zeros((a.size, max_rollouts))
        if max_rollouts < 2:
            return table
        if isinstance(self.value, MixedOutcomes):
            gain: Any = self.value.gain
            c, d = gain.success_power + 1.0, gain.failure_power + 1.0
        else:
            assert isinstance(self.value, Likelihood)
            c, d = 1.0 - self.value.power, 1.0
        # E[p^c (1-p)^d] starts the series of powers of p and that of powers of 1-p.
        start = _rising(a, c) * _rising(b, d) / _rising(a + b, c + d)
        more = np.arange(max_rollouts - 2)
        falling = (a + b + c + d)[:, None] + more
        series = np.cumprod(((b + d)[:, None] + more) / falling, axis=1)
        first = start
        if isinstance(self.value, MixedOutcomes):
            first, series = 2 * start, series + np.cumprod(((a + c)[:, None] + more) / falling, axis=1)
        table[:, 1], table[:, 2:] = first, start[:, None] * series
        return table

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of an equal estimator."""
        return {
            "prior_successes": self.prior_successes,
            "prior_failures": self.prior_failures,
            "discount": self.discount,
        }


def _rising(start: FloatArray, steps: float) -> FloatArray:
    """Return the rising factorial Gamma(start + steps) / Gamma(start), exact but for rounding at whole steps.

    Args:
        start: (M,) > 0.
        steps: >= 0.
    """
    whole = int(steps)
    found, place = np.ones_like(start), start
    if steps > whole:
        found = np.array([math.exp(math.lgamma(x + steps - whole) - math.lgamma(x)) for x in start.tolist()])
        place = start + (steps - whole)
    for k in range(whole):
        found = found * (place + k)
    return found


ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "window": WindowEstimator,
    "beta": BetaEstimator,
    "empirical-bayes": EmpiricalBayesEstimator,
    "bayes-filter": BayesFilterEstimator,
}


WITH_POSTERIOR = tuple(
    name for name, kind in ESTIMATORS.items() if isinstance(kind, type) and issubclass(kind, GridPosterior)
)
"""Those that give a whole posterior, not its mean alone."""


def make_estimator(name: str, **settings: Any) -> Estimator:
    """Make an estimator by name.

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
