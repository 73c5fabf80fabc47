"""The value of a rollout budget: the paper's equations, and a protocol for other values.

Source: Li et al., *Knapsack RL*, arXiv 2509.25849. A prompt with success rate p that is given N rollouts
yields a non-zero GRPO gradient unless all its rewards are equal. The paper values the item (prompt, N) as the
probability of a non-zero gradient times the information gain p (1 - p)^2.

A value function maps rollouts N and a success rate p to V(N, p) with V(0, p) = 0. Its marginal values
D(n, p) = V(n+1, p) - V(n, p) go to the solver, which is greedy where they never rise and a dynamic program elsewhere.
:func:`make_value_function` accepts a name of ``VALUES``, ``"power-A-B"`` for the gain p^A (1-p)^B, ``"likelihood-B"``
for a likelihood with more weight on hard prompts, an import path ``"package.module:function"``, a function
``f(counts, success_rates)``, or an object with the methods of
:class:`ValueFunction`.

Arrays here are per prompt and broadcast like numpy's; success rates are probabilities in [0, 1].
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray, check_counts, check_success_rates


def nonzero_gradient_probability(counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
    """Return the probability that a group of N rollouts has both a success and a failure: 1 - p^N - (1-p)^N.

    It is 0 for fewer than two rollouts, which cannot differ. It is computed without cancellation, so small p keeps full
    relative precision.

    Args:
        counts: rollouts N per group, whole numbers >= 0; broadcasts with ``success_rates``.
        success_rates: p in [0, 1].

    Returns:
        Float64 array of the broadcast shape, in [0, 1].

    Raises:
        ValueError: a count is negative or fractional, or a rate is outside [0, 1].

    Source: paper, section 3 (P(non-zero gradient | N, p)).
    """
    n = check_counts(counts)
    p = check_success_rates(success_rates)
    rare = np.minimum(p, 1.0 - p)
    with np.errstate(divide="ignore", under="ignore"):
        some_rare = -np.expm1(n * np.log1p(-rare))  # 1 - (1 - rare)^N
        result = some_rare - rare**n
    return np.where(n >= 2, np.maximum(result, 0.0), 0.0)


def information_gain(success_rates: ArrayLike) -> FloatArray:
    """Return the information gain p (1-p)^2 of a prompt, which is largest at p = 1/3.

    It is the first-order change of the success probability after one gradient step on a softmax policy: the
    derivative p (1-p) times the remaining headroom (1-p).

    Raises:
        ValueError: a rate is outside [0, 1].

    Source: paper, section 3 (InfoGain).
    """
    return PowerGain(1.0, 2.0)(check_success_rates(success_rates))


def value(counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
    """Return the value V(N, p) = (1 - p^N - (1-p)^N) p (1-p)^2 of N rollouts of a prompt.

    Args:
        counts: rollouts N, whole numbers >= 0; broadcasts with ``success_rates``.
        success_rates: p in [0, 1].

    Raises:
        ValueError: see :func:`nonzero_gradient_probability`.

    Source: paper, equation of the knapsack objective (section 3).
    """
    return nonzero_gradient_probability(counts, success_rates) * information_gain(success_rates)


def marginal_values(success_rates: ArrayLike, max_rollouts: int) -> FloatArray:
    """Return the table of the paper's marginal values, D[i, n] = V(n+1, p_i) - V(n, p_i).

    Args:
        success_rates: (M,) p in [0, 1].
        max_rollouts: number of columns, >= 1.

    Returns:
        (M, max_rollouts) float64, see :class:`MixedOutcomes`.

    Raises:
        ValueError: a rate is outside [0, 1], or max_rollouts is below 1.
    """
    return KNAPSACK.marginals(success_rates, max_rollouts)


def rollouts_for_probability(success_rates: ArrayLike, probability: float = 0.9) -> FloatArray:
    """Return the rollouts needed for a non-zero gradient with probability a: ln(1-a) / ln(max(p, 1-p)).

    This is the paper's estimate, which considers only runs of the more common outcome: 229.1 for p = 0.01 and a = 0.9.

    Args:
        success_rates: p in [0, 1].
        probability: a in (0, 1).

    Returns:
        Float64 array, > 0; infinite where p is 0 or 1.

    Raises:
        ValueError: a rate or the probability is outside its range.

    Source: paper, section 3 (rollouts for a non-zero gradient) and its fallback rule.
    """
    p = check_success_rates(success_rates)
    if not 0.0 < probability < 1.0:
        raise ValueError(f"probability must be in (0, 1), got {probability!r}")
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(math.log1p(-probability) / np.log1p(-np.minimum(p, 1.0 - p)))


@runtime_checkable
class ValueFunction(Protocol):
    """A value function, with differences that lose no digits."""

    def values(self, counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
        """Return V(N, p), broadcasting; zero for N = 0."""
        ...

    def marginals(self, success_rates: ArrayLike, max_rollouts: int) -> FloatArray:
        """Return the (M, max_rollouts) table of D[i, n] = V(n+1, p_i) - V(n, p_i)."""
        ...


@runtime_checkable
class SequentialValue(ValueFunction, Protocol):
    """A value to which further rollouts of a group with both outcomes add nothing."""

    def marginals_after(self, success_rates: ArrayLike, more_rollouts: int, *, successes: bool) -> FloatArray:
        """Return the (M, more_rollouts) marginal values of a group with successes, or with failures, alone so far."""
        ...


@dataclass(frozen=True)
class MixedOutcomes:
    """A gain per prompt if the group has both outcomes: V = (1 - p^N - (1-p)^N) gain(p).

    The marginal value of rollout n+1, for n >= 1, is gain(p) [p^n (1-p) + (1-p)^n p]: a sum of two geometric
    sequences, which never rises. The first rollout has no value, because a group of one has no gradient.

    Attributes:
        gain: maps success rates in [0, 1] to numbers >= 0, elementwise.
    """

    gain: Callable[[FloatArray], FloatArray]

    def values(self, counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
        """Return V(N, p), broadcasting."""
        return nonzero_gradient_probability(counts, success_rates) * self.gain(check_success_rates(success_rates))

    def marginals(self, success_rates: ArrayLike, max_rollouts: int) -> FloatArray:
        """Return the (M, max_rollouts) table.

        Each column follows from the previous one by two multiplications, which rounding cannot make rise; nearly equal
        numbers are never subtracted.
        """
        p = check_success_rates(success_rates).ravel()
        table = np.zeros((p.size, max_rollouts))
        if max_rollouts > 1:
            start = self.gain(p) * p * (1.0 - p)
            table[:, 1:] = _geometric(start, p, max_rollouts - 1)
            table[:, 1:] += _geometric(start, 1.0 - p, max_rollouts - 1)
        return table

    def marginals_after(self, success_rates: ArrayLike, more_rollouts: int, *, successes: bool) -> FloatArray:
        """Return the (M, more_rollouts) marginal values of a group whose outcomes are all equal so far.

        The first outcome of the other kind gains all, so k more rollouts are worth gain(p) (1 - (1-p)^k) after
        failures alone, and gain(p) (1 - p^k) after successes alone.
        """
        p = check_success_rates(success_rates).ravel()
        other = 1.0 - p if successes else p
        return _geometric(self.gain(p) * other, 1.0 - other, more_rollouts)


@dataclass(frozen=True)
class PowerGain:
    """The gain p^a (1-p)^b of a group that has both outcomes.

    Attributes:
        success_power: a, a finite number >= 0.
        failure_power: b, likewise.
    """

    success_power: float
    failure_power: float

    def __call__(self, success_rates: FloatArray) -> FloatArray:
        """Return the gain of each success rate in [0, 1]."""
        return success_rates**self.success_power * (1.0 - success_rates) ** self.failure_power


_BELOW_ONE = float(np.nextafter(1.0, 0.0))


@dataclass(frozen=True)
class Likelihood:
    """The value for the likelihood of success: V(N, p) = p^-B (1 - (1-p)^N - p) for N >= 1, and V(0, p) = 0.

    With B = 0 it is the chance of at least one success, less that of a single rollout. With advantages
    (r - mean) / mean the expected gradient of a group is (1 - (1-p)^(N-1)) grad log p, and V is (1-p) times that
    factor. With B > 0 a step of log p is worth p^-B: what is maximised is U(p) = (1 - p^-B) / B in place of log p, to
    which U tends as B falls to 0. The time until a prompt is solved is about proportional to 1 / p, so that B says how
    much it counts that the hardest prompts are reached in the end, against how fast the others rise.

    The marginal value of rollout n+1 is p^(1-B) (1-p)^n for n >= 1, which never rises; that of the first is 0, because
    a group of one has no gradient.

    Attributes:
        power: B in [0, 1).

    Source: MaxRL, arXiv 2602.02710 (likelihood truncated at order N); derivation in ``docs/method.md``.
    """

    power: float = 0.0

    def values(self, counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
        """Return V(N, p) = p^-B (1-p) (1 - (1-p)^(N-1)), broadcasting, without cancellation at small p."""
        n, p = check_counts(counts), check_success_rates(success_rates)
        some_success = -np.expm1(np.maximum(n - 1, 0) * np.log1p(-np.minimum(p, _BELOW_ONE)))
        return np.where(p > 0.0, (1.0 - p) * some_success * np.where(p > 0.0, p, 1.0) ** -self.power, 0.0)

    def marginals(self, success_rates: ArrayLike, max_rollouts: int) -> FloatArray:
        """Return the (M, max_rollouts) table; each column follows from the previous one by a multiplication."""
        p = check_success_rates(success_rates).ravel()
        table = np.zeros((p.size, max_rollouts))
        if max_rollouts > 1:
            table[:, 1:] = _geometric(p ** (1.0 - self.power) * (1.0 - p), 1.0 - p, max_rollouts - 1)
        return table

    def marginals_after(self, success_rates: ArrayLike, more_rollouts: int, *, successes: bool) -> FloatArray:
        """Return the (M, more_rollouts) marginal values of a group whose outcomes are all equal so far.

        V(N, p) = p^-B (P(a success among N) - p) for N >= 1, so only the first success counts: k more rollouts are
        worth p^-B (1 - (1-p)^k) after failures alone, and nothing after a success.

        In detail: with s >= 1 successes among N rollouts the expected gradient of the group is 1 - s/N times that of
        the logit of p, which is (1-p) - (s/N - p): the part of the successes, less the deviation of the baseline s/N
        from p. In a group of fixed size this deviation has mean zero. More rollouts change it by -k (s/n - p) / (n+k)
        on average, which is regression to the mean. It is not counted, because groups chosen by it would bias the
        gradient; in this the value is an approximation.

        This is the only value that depends on the first success alone and that agrees with V: averaged over the
        outcomes of n rollouts, (1-p)^n p^-B (1 - (1-p)^k) = V(n+k, p) - V(n, p).
        """
        p = check_success_rates(success_rates).ravel()
        if successes:
            return np.zeros((p.size, more_rollouts))
        return _geometric(p ** (1.0 - self.power), 1.0 - p, more_rollouts)


@dataclass(frozen=True)
class CustomFunction:
    """A user's ``f(counts, success_rates)``, which broadcasts like numpy and is 0 for no rollouts."""

    function: Callable[..., ArrayLike]

    def values(self, counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
        """Return V(N, p), broadcasting.

        Raises:
            ValueError: the function returns another shape, NaN or infinity.
        """
        n, p = check_counts(counts), check_success_rates(success_rates)
        return _checked(self.function(n, p), n, p)

    def marginals(self, success_rates: ArrayLike, max_rollouts: int) -> FloatArray:
        """Return the (M, max_rollouts) differences of the function's values.

        Raises:
            ValueError: see :meth:`values`; or the function is not 0 for no rollouts.
        """
        p = check_success_rates(success_rates).ravel()
        return differences(self.values(np.arange(max_rollouts + 1), p[:, None]))


def differences(values: FloatArray) -> FloatArray:
    """Return the (M, K) marginal values of a table V[i, n], n = 0..K, whose first column must be 0.

    Raises:
        ValueError: the value of no rollouts is not 0 for some prompt.
    """
    if (values[:, 0] != 0.0).any():
        i = int(np.flatnonzero(values[:, 0])[0])
        raise ValueError(f"the value of no rollouts must be 0, got {values[i, 0]!r} for prompt {i}; subtract it")
    return np.diff(values, axis=1)


KNAPSACK = MixedOutcomes(PowerGain(1.0, 2.0))

VALUES: dict[str, ValueFunction] = {
    "knapsack": KNAPSACK,
    "nonzero-gradient": MixedOutcomes(PowerGain(0.0, 0.0)),
    "likelihood": Likelihood(),
}
"""``"knapsack"``: the paper's value. ``"nonzero-gradient"``: the probability of a non-zero gradient alone.
``"likelihood"``: the value that goes with advantages (r - mean) / mean."""

POWER_VALUE = "power-A-B"
"""Form of a name that stands for the gain p^A (1-p)^B, such as ``"power-0.5-2"``."""

LIKELIHOOD_VALUE = "likelihood-B"
"""Form of a name that stands for :class:`Likelihood` with this power, such as ``"likelihood-0.5"``."""

VALUE_FORMS = (*VALUES, LIKELIHOOD_VALUE, POWER_VALUE)
"""The names of values and their forms, for messages."""

ValueLike = str | ValueFunction | Callable[..., ArrayLike]


_NUMBER = r"(\d{1,3}(?:\.\d{1,9})?)"


def named_value(value: Any) -> ValueFunction | None:
    """Return the value function of a name of ``VALUES`` or of one of the forms with numbers, None for all else.

    The rows of its marginal values never rise from the second rollout on.

    Raises:
        ValueError: a name ``"power-..."`` does not have two plain numbers >= 0, or a name ``"likelihood-..."`` not one
            below 1.
    """
    if not isinstance(value, str):
        return None
    if value.startswith("power-"):
        powers = re.fullmatch(f"power-{_NUMBER}-{_NUMBER}", value, flags=re.ASCII)
        if powers is None:
            raise ValueError(
                f"value {value!r} must be {POWER_VALUE} with two plain numbers from 0 to 999, the powers of p and of "
                "1-p: 'power-0.5-2' is p^0.5 (1-p)^2, 'power-1-2' the paper's gain"
            )
        return MixedOutcomes(PowerGain(float(powers[1]), float(powers[2])))
    if value.startswith("likelihood-"):
        power = re.fullmatch(f"likelihood-{_NUMBER}", value, flags=re.ASCII)
        if power is None or float(power[1]) >= 1.0:
            raise ValueError(
                f"value {value!r} must be {LIKELIHOOD_VALUE} with a plain number from 0 to below 1, such as "
                "'likelihood-0.5': the larger, the more the hardest prompts get"
            )
        return Likelihood(float(power[1]))
    return VALUES.get(value)


def make_value_function(value: ValueLike) -> ValueFunction:
    """Return the value function of a name, import path, object or ``f(counts, success_rates)``, tried once.

    Raises:
        ValueError: the name is unknown, the import fails, or the function is not usable: not finite, not of the
            broadcast shape of its arguments, or not 0 for no rollouts.
    """
    named = named_value(value)
    if named is not None:
        return named
    found: Any = _imported(value) if isinstance(value, str) and ":" in value else value
    if not callable(found) and not isinstance(found, ValueFunction):
        raise ValueError(
            f"value must be one of {', '.join(VALUE_FORMS)}, an import path 'package.module:function', or a function "
            f"f(counts, success_rates), got {value!r}"
        )
    function = found if isinstance(found, ValueFunction) else CustomFunction(found)
    _try(function)
    return function


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"value {path!r} cannot be imported ({error}); give 'package.module:function' of a module on Python's "
            "search path"
        ) from error


def _try(function: ValueFunction) -> None:
    """Evaluate a value function once for a few counts and rates.

    Raises:
        ValueError: it fails, or its result is not usable.
    """
    n, p = np.arange(5), np.array([0.1, 0.5, 0.9])
    try:
        values, marginals = np.asarray(function.values(n, p[:, None])), np.asarray(function.marginals(p, 4))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the value function fails for counts {n} and success rates {p}: {error!r}") from error
    differences(_checked(values, n, p[:, None]))
    if marginals.shape != (3, 4) or not np.isfinite(marginals).all():
        raise ValueError(f"marginals of 3 prompts and 4 rollouts must be finite, of shape (3, 4), got {marginals!r}")


def _checked(values: ArrayLike, counts: NDArray[Any], success_rates: FloatArray) -> FloatArray:
    found = np.asarray(values, dtype=np.float64)
    shape = np.broadcast_shapes(counts.shape, success_rates.shape)
    if found.shape != shape or not np.isfinite(found).all():
        raise ValueError(
            f"the value function must return finite numbers of shape {shape} for counts of shape {counts.shape} and "
            f"success rates of shape {success_rates.shape}, got shape {found.shape}"
            + ("" if np.isfinite(found).all() else " with NaN or infinity")
        )
    return found


def _geometric(start: FloatArray, ratio: FloatArray, length: int) -> FloatArray:
    """Return the (M, length) sequences start, start * ratio, start * ratio * ratio, ..."""
    powers = np.empty((start.size, length))
    powers[:, 0], powers[:, 1:] = start, ratio[:, None]
    return np.multiply.accumulate(powers, axis=1, out=powers)
