"""Marginal values of a batch whose success rates are known, as a table or block by block."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation import solver
from knapsack_rl.allocation.blocks import BLOCK, greedy_in_blocks
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.value import Likelihood, MixedOutcomes, ValueLike, differences, make_value_function


class Marginals:
    """Marginal values of a batch; an unseen prompt has the mean of the others, or the value at p = 0 without others.

    Args:
        value: see :func:`knapsack_rl.allocate`.
        rates: (M,) success rates, NaN for an unseen prompt.
        width: maximum rollouts of a prompt.
    """

    def __init__(self, value: ValueLike | ArrayLike, rates: FloatArray, width: int) -> None:
        self._width, self._unseen = max(width, 2), np.isnan(rates)
        self._rates = np.where(self._unseen, 0.0, rates)
        self._mean: FloatArray | None = None  # of the rows of seen prompts, where there are unseen ones
        self._table: FloatArray | None = None
        if isinstance(value, (np.ndarray, list, tuple)):
            self._table = _given_table(value, rates.size)
            self._falling = False
            return
        self._function = make_value_function(value)  # type: ignore[arg-type]
        self._falling = isinstance(self._function, (MixedOutcomes, Likelihood))  # from the second rollout on
        if self._unseen.any() and not self._unseen.all():
            self._mean = self._mean_of_seen()

    def table(self) -> FloatArray:
        """Return the whole (M, K) table."""
        if self._table is None:
            self._table = self._rows(slice(None), self._width)
        return self._table

    def _rows(self, rows: IntArray | slice, width: int) -> FloatArray:
        table = self._function.marginals(self._rates[rows], width)
        if self._mean is not None:
            table[self._unseen[rows]] = self._mean[:width]
        return table

    def _mean_of_seen(self) -> FloatArray:
        """Return the (width,) mean of the rows of seen prompts, added in order."""
        seen, total = self._rates[~self._unseen], np.zeros((1, self._width))
        size = max(BLOCK // self._width, 1)
        for at in range(0, seen.size, size):
            block = self._function.marginals(seen[at : at + size], self._width)
            total = np.concatenate([total, block]).sum(axis=0, keepdims=True)
        return total[0] / seen.size

    def valued(self) -> NDArray[np.bool_]:
        """Return (M,) whether it matters for the value how many rollouts the prompt gets.

        It does if a marginal value is not 0, and for every prompt if one is negative: a rollout without value is then
        better.
        """
        # Rows that fall from the second entry on have their largest one there.
        table = self._rows(slice(None), 2) if self._falling else self.table()
        return (table != 0.0).any(axis=1) | (table < 0.0).any()

    def concave(self, lower: IntArray, upper: IntArray) -> bool:
        """Return whether no row rises within the bounds."""
        return bool(lower.min() >= 1) if self._falling else solver.concave_table(self.table(), lower, upper)[1]

    def solve(
        self,
        chosen: NDArray[np.bool_],
        budget: int,
        lower: IntArray,
        upper: IntArray,
        tier: IntArray,
        priority: FloatArray,
        method: solver.Method,
    ) -> IntArray:
        """Solve the knapsack over the chosen prompts, which all other arguments are about."""
        if self._falling and lower.min(initial=1) >= 1 and method != "dynamic-programming":
            everyone = np.flatnonzero(chosen)

            def marginals(rows: IntArray, columns: int) -> FloatArray:
                return self._rows(everyone[rows], columns)

            return greedy_in_blocks(marginals, budget, lower, upper, tier, priority)
        if self._falling:
            solver.check_states(lower.size, budget)  # before the table is made
            method = method if method == "greedy" else "dynamic-programming"
        return solver.solve_checked(self.table()[chosen], budget, lower, upper, tier, priority, method)

    def total(self, counts: IntArray) -> float:
        """Return the value of an allocation."""
        if not self._falling:
            return solver.total_value(self.table(), counts)
        values = self._function.values(counts, self._rates)
        if self._mean is not None:
            values[self._unseen] = np.append(0.0, np.cumsum(self._mean))[counts[self._unseen]]
        return float(values.sum())


def _given_table(value: ArrayLike, prompts: int) -> FloatArray:
    """Return the marginal values of a table of values V[i, n], n = 0..K."""
    values = np.asarray(value, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != prompts or values.shape[1] < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"a table of values must be finite, of shape ({prompts}, K + 1) with K >= 1, got shape {values.shape}"
        )
    return differences(values)
