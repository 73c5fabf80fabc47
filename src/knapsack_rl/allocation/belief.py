"""The knowledge of a batch of prompts that an allocation works from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from knapsack_rl.allocation.checks import FloatArray, IntArray

CHECK_ROLLOUTS = 2
"""Rollouts of a look at a prompt that its value alone would skip: the fewest that can have a gradient."""


@dataclass(frozen=True, eq=False)
class Belief:
    """What is known of a batch of prompts.

    Attributes:
        mean: (M,) expected success rate; NaN where the estimator has no estimate.
        marginals: (M, K) expected marginal value of each further rollout.
        nonzero_gradient: maps (M,) counts to the (M,) predicted probability of a non-zero gradient.
        value_of_information: maps (K,) rows and the value that a rollout costs to the (K,) gain at later visits from
            the outcomes of ``CHECK_ROLLOUTS`` rollouts of these prompts, >= 0 up to rounding; None from an estimator
            that cannot foresee.
    """

    mean: FloatArray
    marginals: FloatArray
    nonzero_gradient: Callable[[IntArray], FloatArray]
    value_of_information: Callable[[IntArray, float], FloatArray] | None = None
