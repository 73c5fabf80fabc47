"""The interface of an estimator: one method to write, the other parts optional with defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from knapsack_rl.allocation.belief import Belief
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.policies import BUDGET_UNITS, FIRST_GROUP
from knapsack_rl.allocation.value import ValueLike, make_value_function
from knapsack_rl.estimation.tracker import Records


class Estimator(Protocol):
    """Turns the records of prompts into beliefs. Derive from it: only :meth:`believe` must be written.

    Every other part is optional and has a default here: an estimator that keeps the tracker's counts undiscounted,
    learns nothing from other prompts and has the paper's value built in. What an estimator learns must be part of
    :meth:`state_dict`, and what it is made with part of :meth:`settings`, or a resumed run differs.
    ``KnapsackAllocator.top_up`` needs an estimator derived from :class:`knapsack_rl.estimation.bayes.GridPosterior`.
    """

    discount: float = 1.0
    """Optional: factor of a prompt's older counts at each new visit, in (0, 1]."""

    paper_rule: ClassVar[bool] = False
    """Optional: whether the mean is a point estimate to be allocated by the paper's rule."""

    fallback: bool = True
    """Optional, read where ``paper_rule`` is true: whether the paper's fallback applies."""

    evidence_size: int = 0
    """Optional: numbers per prompt that :meth:`absorb` makes and the tracker keeps beside its counts."""

    def believe(self, records: Records, max_rollouts: int) -> Belief:
        """Beliefs about the prompts of a batch, with ``max_rollouts`` columns of marginal values."""
        ...

    def absorb(self, records: Records, successes: IntArray, totals: IntArray) -> FloatArray:
        """(M, evidence_size) new evidence of M prompts just visited. Optional: none by default.

        Args:
            records: of the M prompts, before the visit.
            successes: (M,) successes of the visit.
            totals: (M,) rollouts of the visit, >= 1.
        """
        return np.zeros((len(records), self.evidence_size))

    def refit(self, population: Records) -> None:
        """Learn from all prompts seen; called at first observation, then about once an epoch. Optional."""
        return

    def use_value(self, value: ValueLike) -> None:
        """Maximise another value than the paper's from now on. Optional: refused by default.

        Raises:
            ValueError: the estimator has the paper's value built in, or the value is not usable.
        """
        raise ValueError(
            f"{type(self).__name__} has the paper's value built in, got value={value!r}; use 'bayes-filter', "
            "'empirical-bayes' or WindowEstimator(fallback=False)"
        )

    def settings(self) -> dict[str, Any]:
        """Keyword arguments that make an equal estimator; JSON values. Optional: none by default."""
        return {}

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays that hold what was learned. Optional: none by default."""
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
    if not 0.0 < discount <= 1.0:
        raise ValueError(f"discount must be in (0, 1], got {discount!r}")
    return float(discount)


def check_choices(estimator: Estimator, budget_unit: str, value: ValueLike, min_rollouts: int) -> None:
    """Refuse a unit or a value that the estimator or the bounds cannot serve.

    Raises:
        ValueError: the unit or the value is unknown or not usable, tokens meet a minimum below two, or the estimator
            has another value than this one built in.
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
            f"budget_unit='tokens' needs min_rollouts >= {FIRST_GROUP}, got {min_rollouts}: skipping weighs the value "
            "of looking again in rollouts"
        )
    if other_value:
        estimator.use_value(value)
