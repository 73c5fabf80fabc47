"""What the allocator needs of an estimator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from knapsack_rl.allocation.belief import Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.estimation.tracker import Records


class Estimator(Protocol):
    """What the allocator needs of an estimator."""

    discount: float
    """What a prompt's older counts are multiplied by at each new visit, in (0, 1]."""

    paper_rule: ClassVar[bool]
    """Whether the mean is a point estimate to be allocated by the paper's rule with its fallback."""

    evidence_size: int
    """Numbers per prompt that :meth:`absorb` makes and the tracker keeps beside its counts; 0 for none."""

    def absorb(self, records: Records, successes: IntArray, totals: IntArray) -> FloatArray:
        """(M, evidence_size) new evidence of M prompts just visited, from their records before this visit.

        Args:
            records: of the M prompts, before the visit.
            successes: (M,) successes of the visit.
            totals: (M,) rollouts of the visit, >= 1.
        """
        ...

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


class CountsOnly:
    """For an estimator that needs nothing but the tracker's counts."""

    evidence_size: int = 0

    def absorb(self, records: Records, successes: IntArray, totals: IntArray) -> FloatArray:
        """No evidence beside the counts."""
        return np.zeros((len(records), 0))


def check_discount(discount: float) -> float:
    """Return the discount, or raise ``ValueError`` if it is not in (0, 1]."""
    if not 0.0 < discount <= 1.0:
        raise ValueError(f"discount must be in (0, 1], got {discount!r}")
    return float(discount)
