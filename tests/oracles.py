"""Independent oracles and comparisons shared by test files."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp


def values_of(marginals: NDArray) -> NDArray:
    """(M, K + 1) values of n = 0..K rollouts from (M, K) marginal values."""
    return np.concatenate([np.zeros((len(marginals), 1)), np.cumsum(marginals, axis=1)], axis=1)


def milp_optimum(values: NDArray, budget: float, lower: Any, upper: Any, *, costs: Any = None) -> float:
    """The largest total of one count per prompt (binary variables), solved by HiGHS.

    Args:
        values: (M, K + 1) values of n = 0..K rollouts.
        budget: rollouts, all of which are spent; with costs, what must not be exceeded.
        lower: (M,) bounds, or one for all.
        upper: (M,) bounds, or one for all.
        costs: (M,) of a rollout.
    """
    prompts, width = values.shape
    counts = np.arange(width)
    allowed = (counts >= np.reshape(lower, (-1, 1))) & (counts <= np.reshape(upper, (-1, 1)))
    spent = np.outer(np.ones(prompts) if costs is None else costs, counts)
    scale = 1000 / np.abs(values).max()  # away from the solver's tolerances
    found = milp(
        -scale * values.ravel(),
        integrality=np.ones(values.size),
        bounds=Bounds(0, np.broadcast_to(allowed, values.shape).ravel().astype(float)),
        constraints=[
            LinearConstraint(np.kron(np.eye(prompts), np.ones(width)), 1, 1),
            LinearConstraint(spent.ravel()[None, :], budget if costs is None else -np.inf, budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert found.success, found.message
    return -float(found.fun) / scale


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare two states of an allocator, number by number."""
    assert one["header"] == other["header"]
    assert one["arrays"].keys() == other["arrays"].keys()
    for name, array in one["arrays"].items():
        np.testing.assert_array_equal(array, other["arrays"][name], err_msg=name)
