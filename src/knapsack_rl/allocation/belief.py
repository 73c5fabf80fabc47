"""Beliefs about a batch of prompts, from which an allocation is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from knapsack_rl.allocation.checks import FloatArray, IntArray

CHECK_ROLLOUTS = 2
"""Rollouts of a recheck, for a prompt that its value alone would skip: the fewest that can have a gradient."""


@dataclass(frozen=True, eq=False)
class Belief:
    """Beliefs about a batch of prompts.

    Attributes:
        mean: (M,) expected success rate; NaN where the estimator has no estimate.
        marginals: (M, K) expected marginal value of each further rollout.
        nonzero_gradient: maps (M,) counts to the (M,) predicted probability of a non-zero gradient.
        value_of_information: maps (K,) rows and the price of a rollout in value to the (K,) expected gain at later
            visits from the outcomes of ``CHECK_ROLLOUTS`` rollouts of these prompts, >= 0 up to rounding; None if the
            estimator cannot predict it.
    """

    mean: FloatArray
    marginals: FloatArray
    nonzero_gradient: Callable[[IntArray], FloatArray]
    value_of_information: Callable[[IntArray, float], FloatArray] | None = None
