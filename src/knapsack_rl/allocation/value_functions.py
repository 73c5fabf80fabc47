"""What N rollouts of a prompt are worth: the paper's value and others, one protocol.

A value function maps rollouts N and a success rate p to V(N, p) with V(0, p) = 0. Its marginal values
D(n, p) = V(n+1, p) - V(n, p) go to the solver, which is greedy where they never rise and a dynamic program elsewhere.
Every named value here is concave from one rollout on. By name: ``VALUES``; by hand: any object with the methods of
:class:`ValueFunction`, a function ``f(counts, success_rates)``, or a table of values per prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray, check_counts, check_success_rates
from knapsack_rl.allocation.rows import Rows
from knapsack_rl.allocation.value import information_gain, nonzero_gradient_probability


@runtime_checkable
class ValueFunction(Protocol):
    """What allocation needs of a value: itself, and its differences without loss of digits."""

    def values(self, counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
        """V(N, p), broadcasting; zero for N = 0."""
        ...

    def marginals(self, success_rates: ArrayLike, max_rollouts: int) -> FloatArray:
        """(M, max_rollouts) table of D[i, n] = V(n+1, p_i) - V(n, p_i)."""
        ...


@dataclass(frozen=True)
class MixedOutcomes:
    """A gain per prompt if the group holds both outcomes: V = (1 - p^N - (1-p)^N) gain(p).

    Its marginal value gain(p) [p^n (1-p) + (1-p)^n p] is a sum of two geometric sequences, so that no table is needed
    at any number of prompts: see :meth:`rows`.

    Attributes:
        gain: maps success rates in [0, 1] to numbers >= 0, elementwise.
    """

    gain: Callable[[FloatArray], FloatArray]

    def values(self, counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
        """V(N, p), broadcasting."""
        return nonzero_gradient_probability(counts, success_rates) * self.gain(check_success_rates(success_rates))

    def rows(self, success_rates: FloatArray) -> Rows:
        """The marginal values in closed form; NaN rates give rows that must be replaced."""
        failure = 1.0 - success_rates
        return Rows(self.gain(success_rates) * success_rates * failure, success_rates, failure)

    def marginals(self, success_rates: ArrayLike, max_rollouts: int) -> FloatArray:
        """(M, max_rollouts) table; two multiplications per entry."""
        return self.rows(check_success_rates(success_rates).ravel()).as_table(max_rollouts)


class RewardVariance:
    """Expected reward variance within the group (divisor N): V = p (1-p) (N-1)/N.

    The sample variance with divisor N-1 is unbiased for p (1-p); with divisor N it is (N-1)/N of that. One rollout
    has none. D(n) = p (1-p) / (n (n+1)).
    """

    def values(self, counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
        """V(N, p), broadcasting."""
        n, p = check_counts(counts), check_success_rates(success_rates)
        return p * (1.0 - p) * (1.0 - 1.0 / np.maximum(n, 1))

    def marginals(self, success_rates: ArrayLike, max_rollouts: int) -> FloatArray:
        """(M, max_rollouts) table."""
        p = check_success_rates(success_rates).ravel()
        n = np.arange(1.0, max_rollouts)
        return _after_the_first((p * (1.0 - p))[:, None] / (n * (n + 1.0)))


class SignalToNoise:
    """Information gain times the share of it that a noisy gradient achieves: V = p (1-p)^2 x / (1+x).

    Here x = (N-1) p (1-p), the gradient's ratio of signal to noise.

    Derivation. Of one rollout with advantage a, the gradient contribution is a times its score. Over a group with the
    mean of the others as baseline, the part along the true gradient has mean s = p (1-p), the reward's variance:
    signal power s^2, the score's length being the unit. Advantages have variance s N/(N-1) and scores of different
    rollouts point in unrelated directions, so the mean over N rollouts carries noise of power s/(N-1). A step of
    length h along a gradient of signal power S and noise power E improves by h S - h^2 (S + E)/2, at best
    S/2 * S/(S + E): the share x/(1+x) of what a noiseless gradient gives, with x = S/E = (N-1) s. A group of one has
    x = 0. Larger groups are worth more because they are less noisy, without saturating once both outcomes are seen.
    D(n) = p (1-p)^2 s / [(1 + (n-1) s) (1 + n s)], which falls.
    """

    def values(self, counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
        """V(N, p), broadcasting."""
        n, p = check_counts(counts), check_success_rates(success_rates)
        ratio = np.maximum(n - 1, 0) * (p * (1.0 - p))
        return information_gain(p) * ratio / (1.0 + ratio)

    def marginals(self, success_rates: ArrayLike, max_rollouts: int) -> FloatArray:
        """(M, max_rollouts) table."""
        p = check_success_rates(success_rates).ravel()
        s = (p * (1.0 - p))[:, None]
        n = np.arange(1.0, max_rollouts)
        return _after_the_first(information_gain(p)[:, None] * s / ((1.0 + (n - 1.0) * s) * (1.0 + n * s)))


@dataclass(frozen=True)
class OwnFunction:
    """A user's ``f(counts, success_rates)``, which broadcasts like numpy and is 0 for no rollouts."""

    function: Callable[..., ArrayLike]

    def values(self, counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
        """V(N, p), broadcasting.

        Raises:
            ValueError: the function returns another shape, NaN or infinity.
        """
        n, p = check_counts(counts), check_success_rates(success_rates)
        found = np.asarray(self.function(n, p), dtype=np.float64)
        shape = np.broadcast_shapes(n.shape, p.shape)
        if found.shape != shape or not np.isfinite(found).all():
            raise ValueError(
                f"the value function must return finite numbers of shape {shape} for counts of shape {n.shape} and "
                f"success rates of shape {p.shape}, got shape {found.shape}"
                + ("" if np.isfinite(found).all() else " with NaN or infinity")
            )
        return found

    def marginals(self, success_rates: ArrayLike, max_rollouts: int) -> FloatArray:
        """(M, max_rollouts) differences of the function's values.

        Raises:
            ValueError: see :meth:`values`; or the function is not 0 for no rollouts.
        """
        p = check_success_rates(success_rates).ravel()
        return differences(self.values(np.arange(max_rollouts + 1), p[:, None]))


def _after_the_first(table: FloatArray) -> FloatArray:
    """The table with a first column of zeros: a single rollout is worth nothing."""
    return np.concatenate([np.zeros((table.shape[0], 1)), table], axis=1)


def differences(values: FloatArray) -> FloatArray:
    """(M, K) marginal values of a table V[i, n], n = 0..K, whose first column must be 0.

    Raises:
        ValueError: the value of no rollouts is not 0 for some prompt.
    """
    if (values[:, 0] != 0.0).any():
        i = int(np.flatnonzero(values[:, 0])[0])
        raise ValueError(f"the value of no rollouts must be 0, got {values[i, 0]!r} for prompt {i}; subtract it")
    return np.diff(values, axis=1)


def _no_gain(success_rates: FloatArray) -> FloatArray:
    return np.ones_like(success_rates)


def _information_gain(success_rates: FloatArray) -> FloatArray:
    return success_rates * (1.0 - success_rates) ** 2


@cache
def fitted_exponents() -> tuple[float, float]:
    """Exponents of p and of 1-p in the gain that was fitted to measured gradients.

    ``knapsack-rl experiment gradient-value`` writes them as ``gradient_value/fitted_value.json`` into the folder of its
    runs; ``experiments/data/fitted_value.json`` in this package is a copy. See
    :func:`experiments.gradient_fit.fit`.
    """
    text = (files("experiments") / "data" / "fitted_value.json").read_text(encoding="utf-8")
    found = json.loads(text)
    return float(found["success_exponent"]), float(found["failure_exponent"])


def _fitted_gain(success_rates: FloatArray) -> FloatArray:
    of_success, of_failure = fitted_exponents()
    return success_rates**of_success * (1.0 - success_rates) ** of_failure


KNAPSACK = MixedOutcomes(_information_gain)

VALUES: dict[str, ValueFunction] = {
    "knapsack": KNAPSACK,
    "nonzero-gradient": MixedOutcomes(_no_gain),
    "variance": RewardVariance(),
    "signal-to-noise": SignalToNoise(),
    "fitted": MixedOutcomes(_fitted_gain),
}
"""``"knapsack"``: the paper's value. ``"nonzero-gradient"``: the probability of a non-zero gradient alone.
``"variance"``: expected reward variance within the group. ``"signal-to-noise"``: see :class:`SignalToNoise`.
``"fitted"``: the paper's with another information gain, p^a (1-p)^b, fitted to measured gradients of the shipped
arithmetic model: see :func:`fitted_exponents`."""

ValueLike = str | ValueFunction | Callable[..., ArrayLike]


def make_value_function(value: ValueLike) -> ValueFunction:
    """The value function of a name, of an object with the methods of one, or of ``f(counts, success_rates)``.

    Raises:
        ValueError: the name is unknown, or ``value`` is something else.
    """
    if isinstance(value, str) and value in VALUES:
        return VALUES[value]
    if isinstance(value, ValueFunction):
        return value
    if callable(value):
        return OwnFunction(value)
    raise ValueError(f"value must be one of {', '.join(VALUES)}, a function f(counts, success_rates), got {value!r}")


def marginal_table(value: ValueLike, success_rates: ArrayLike, max_rollouts: int) -> NDArray[np.float64]:
    """(M, max_rollouts) marginal values for a vector of success rates, such as the grid of a posterior.

    With posterior weights W (prompts, grid points), ``W @ marginal_table(value, grid, K)`` is the expected marginal
    value per prompt; expectation keeps concavity.

    Raises:
        ValueError: a rate is outside [0, 1], or the value is not known or not usable.
    """
    return make_value_function(value).marginals(success_rates, max_rollouts)
