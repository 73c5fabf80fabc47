"""What an allocation needs to know of each prompt."""

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
        mean: (M,) expected success rate; NaN where the estimator says nothing of the prompt.
        marginals: (M, K) expected marginal value of each further rollout.
        nonzero_gradient: maps (M,) counts to the (M,) predicted probability of a non-zero gradient.
        worth_of_check: maps (K,) rows and the value that a rollout costs to the (K,) value of what
            ``CHECK_ROLLOUTS`` rollouts of these prompts would tell for later visits, >= 0 up to rounding; None from
            an estimator that cannot foresee.
    """

    mean: FloatArray
    marginals: FloatArray
    nonzero_gradient: Callable[[IntArray], FloatArray]
    worth_of_check: Callable[[IntArray, float], FloatArray] | None = None
