"""Values of N rollouts that lost to the paper's in training, as plain functions ``f(counts, success_rates)``.

A configuration names them by import path, such as ``value="experiments.values:reward_variance"``. All broadcast like
numpy, are 0 for no rollouts and concave from one rollout on.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.allocation.value import information_gain, nonzero_gradient_probability

FITTED_VALUE = Path(__file__).parent / "data" / "fitted_value.json"
"""A copy of what the experiment ``gradient-value`` writes, see :func:`experiments.gradient_fit.fit`."""


def reward_variance(counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
    """Expected variance of the rewards of a group (divisor N): V = p (1-p) (N-1)/N.

    The sample variance with divisor N-1 is unbiased for p (1-p); with divisor N it is (N-1)/N of that. One rollout has
    none. D(n) = p (1-p) / (n (n+1)).
    """
    n, p = np.asarray(counts), np.asarray(success_rates)
    return p * (1.0 - p) * (1.0 - 1.0 / np.maximum(n, 1))


def signal_to_noise(counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
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
    n, p = np.asarray(counts), np.asarray(success_rates)
    ratio = np.maximum(n - 1, 0) * (p * (1.0 - p))
    return information_gain(p) * ratio / (1.0 + ratio)


def fitted(counts: ArrayLike, success_rates: ArrayLike) -> FloatArray:
    """The paper's value with another information gain, p^a (1-p)^b, fitted to measured gradients."""
    of_success, of_failure = fitted_exponents()
    p = np.asarray(success_rates)
    return nonzero_gradient_probability(counts, p) * p**of_success * (1.0 - p) ** of_failure


@cache
def fitted_exponents() -> tuple[float, float]:
    """Exponents of p and of 1-p in :func:`fitted`."""
    found = json.loads(FITTED_VALUE.read_text(encoding="utf-8"))
    return float(found["success_exponent"]), float(found["failure_exponent"])
