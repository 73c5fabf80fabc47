"""The interface of an estimator: one required method; all other parts are optional and have defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from knapsack_rl.allocation.belief import Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.tokens import BUDGET_UNITS, FIRST_GROUP
from knapsack_rl.allocation.value import ValueLike, make_value_function
from knapsack_rl.estimation.tracker import RECENT, Records


class Estimator(Protocol):
    """Turns records of prompts into beliefs. Derive from it; only :meth:`believe` is required.

    All other parts are optional. Their defaults make an estimator that keeps the tracker's counts undiscounted, learns
    nothing from other prompts and has the paper's value built in. :meth:`state_dict` must return all that an estimator
    learns, and :meth:`settings` its arguments, or a resumed run differs. ``KnapsackAllocator.top_up`` needs an
    estimator derived from :class:`knapsack_rl.estimation.grid.GridPosterior`.
    """

    discount: float = 1.0
    """Optional: factor of a prompt's older counts at each new visit, in (0, 1]."""

    paper_rule: ClassVar[bool] = False
    """Optional: whether the mean is a point estimate, to allocate by the paper's rule."""

    fallback: bool = True
    """Optional, used if ``paper_rule`` is true: whether the paper's fallback applies."""

    evidence_size: int = 0
    """Optional: numbers per prompt that :meth:`absorb` returns and the tracker keeps beside its counts."""

    def believe(self, records: Records, max_rollouts: int) -> Belief:
        """Return beliefs about the prompts of a batch, with ``max_rollouts`` columns of marginal values."""
        ...

    def absorb(self, records: Records, successes: IntArray, totals: IntArray) -> FloatArray:
        """Return (M, evidence_size) new evidence about M prompts just visited. Optional: none by default.

        Args:
            records: records of the M prompts before the visit.
            successes: (M,) successes of the visit.
            totals: (M,) rollouts of the visit, >= 1.
        """
        return np.zeros((len(records), self.evidence_size))

    def refit(self, population: Records) -> None:
        """Learn from all prompts seen; called after the first observation, then about once an epoch. Optional."""
        return

    def use_value(self, value: ValueLike) -> None:
        """Maximise a value other than the paper's from now on. Optional: refused by default.

        Raises:
            ValueError: the estimator has the paper's value built in, or the value is not usable.
        """
        raise ValueError(
            f"{type(self).__name__} has the paper's value built in, got value={value!r}; use 'bayes-filter', "
            "'empirical-bayes' or WindowEstimator(fallback=False)"
        )

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of an equal estimator, JSON values. Optional: none by default."""
        return {}

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return arrays with all that was learned. Optional: none by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what was learned. Optional."""
        return


PARTS = (
    "discount", "paper_rule", "fallback", "evidence_size",
    "believe", "absorb", "refit", "use_value", "settings", "state_dict", "load_state_dict",
)  # fmt: skip
"""Attributes and methods of an estimator."""


def check_estimator(estimator: Any) -> Estimator:
    """Return an estimator object if it has all parts.

    Raises:
        ValueError: it lacks some, or its discount is outside (0, 1].
    """
    missing = [part for part in PARTS if not hasattr(estimator, part)]
    if missing:
        raise ValueError(
            f"estimator {type(estimator).__name__} lacks {', '.join(missing)}; derive it from "
            "knapsack_rl.estimation.protocol.Estimator, which has defaults for all parts but believe"
        )
    check_discount(estimator.discount)
    return estimator


def finite_belief(estimator: Estimator, records: Records, max_rollouts: int) -> Belief:
    """Return the estimator's belief.

    Raises:
        ArithmeticError: a marginal value is not finite.
    """
    belief = estimator.believe(records, max_rollouts)
    if not np.isfinite(belief.marginals).all():
        raise ArithmeticError("the estimator returned marginal values that are not finite")
    return belief


def finite_evidence(estimator: Estimator, records: Records, successes: IntArray, totals: IntArray) -> FloatArray:
    """Return the estimator's new evidence after a visit.

    Raises:
        ArithmeticError: it has the wrong shape or is not finite.
    """
    evidence = estimator.absorb(records, successes, totals)
    if evidence.shape != records.evidence.shape or not np.isfinite(evidence).all():
        raise ArithmeticError(
            f"the estimator returned evidence of shape {evidence.shape}, expected finite numbers of shape "
            f"{records.evidence.shape}"
        )
    return evidence


def check_discount(discount: float) -> float:
    """Return the discount, or raise ``ValueError`` if it is not in (0, 1]."""
    if not isinstance(discount, (int, float)) or not 0.0 < discount <= 1.0:
        raise ValueError(f"discount must be in (0, 1], got {discount!r}")
    return float(discount)


def check_choices(
    estimator: Estimator, budget_unit: str, value: ValueLike, min_rollouts: int, max_rollouts: int
) -> None:
    """Refuse a unit or a value that the estimator or the bounds do not support.

    Raises:
        ValueError: the unit or the value is unknown or not usable, tokens are combined with a minimum below two, or the
            estimator has another value built in; or the value fails at a rate that the estimator may assume.
    """
    if budget_unit not in BUDGET_UNITS:
        raise ValueError(f"budget_unit must be one of {', '.join(BUDGET_UNITS)}, got {budget_unit!r}")
    make_value_function(value)
    other_value = not (isinstance(value, str) and value == "knapsack")
    if estimator.paper_rule and estimator.fallback and (other_value or budget_unit != "rollouts"):
        raise ValueError(
            f"the paper's fallback rule counts rollouts and is for value='knapsack', got budget_unit={budget_unit!r} "
            f"and value={value!r}; use WindowEstimator(fallback=False) or another estimator"
        )
    if budget_unit == "tokens" and min_rollouts < FIRST_GROUP:
        raise ValueError(
            f"budget_unit='tokens' needs min_rollouts >= {FIRST_GROUP}, got {min_rollouts}: skipping prompts is "
            "supported for budgets of rollouts only"
        )
    if other_value:
        estimator.use_value(value)
        _try_value(estimator, min(max_rollouts, MOST_TRIED))


MOST_TRIED = 1024
"""Most rollouts for which a value is tried at construction."""


def _try_value(estimator: Estimator, max_rollouts: int) -> None:
    """Let the estimator believe once about three prompts: never seen, always failing, always succeeding.

    Raises:
        ValueError: the value fails at one of the rates that it is asked about.
    """
    records = Records.empty(3, estimator.evidence_size)
    records.rollouts[1:], records.newest_total[1:], records.newest_successes[2] = RECENT, RECENT, RECENT
    records.failures[1], records.successes[2] = RECENT, RECENT
    records.recent[2] = ~np.uint64(0)
    try:
        finite_belief(estimator, records, max_rollouts)
    except Exception as error:
        raise ValueError(f"the value cannot be used with {type(estimator).__name__}: {error}") from error
