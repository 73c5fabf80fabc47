"""Rows of marginal values: a table, or two geometric sequences per row.

The paper's marginal value g (p^n (1-p) + (1-p)^n p) is a sum of two geometric sequences: at a million prompts a table
of it would take a gigabyte, its three numbers per prompt take 24 megabytes. The solver reads weights and ratios here,
never a success rate.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray

EMPTY: FloatArray = np.empty(0)
NO_TABLE: FloatArray = np.empty((0, 0))


class Rows(NamedTuple):
    """Marginal values D[i, n] of rollout n+1 of M prompts, in one of two forms.

    Without weights, D is ``table``. With weights, D[i, 0] = 0 and D[i, n] = weight_i (first_i^(n-1) + second_i^(n-1))
    for n >= 1, which never rises from n = 1 on as long as weights are >= 0 and ratios in [0, 1]; a weight of -1,
    -2, ... marks a row that is ``table[0]``, ``table[1]``, ... instead.

    Attributes:
        weight: (M,) float64, or empty.
        first: (M,) ratio of the first sequence, in [0, 1]; not read where the weight is negative.
        second: (M,) ratio of the second, likewise.
        table: (M, K) float64, C-contiguous; or the rows that negative weights name; else empty.
    """

    weight: FloatArray = EMPTY
    first: FloatArray = EMPTY
    second: FloatArray = EMPTY
    table: FloatArray = NO_TABLE

    @property
    def closed_form(self) -> bool:
        """Whether the rows are geometric."""
        return self.weight.size > 0

    @property
    def prompts(self) -> int:
        """Number of rows."""
        return self.weight.size or self.table.shape[0]

    def take(self, chosen: IntArray | NDArray[np.bool_] | slice) -> Rows:
        """The chosen rows, by mask, positions or slice; at least one."""
        if not self.closed_form:
            return Rows(table=np.ascontiguousarray(self.table[chosen]))
        return Rows(self.weight[chosen], self.first[chosen], self.second[chosen], self.table)

    def as_table(self, width: int) -> FloatArray:
        """(M, width) the marginals written out."""
        from knapsack_rl.allocation._kernels import fill_marginals

        if not self.closed_form:
            return self.table[:, :width]
        table = np.empty((self.weight.size, width))
        fill_marginals(self.weight, self.first, self.second, table)
        other = self.weight < 0.0
        if other.any():
            table[other] = self.table[(-self.weight[other]).astype(np.int64) - 1, :width]
        return table

    def per_cost(self, costs: FloatArray) -> Rows:
        """Marginal value per unit of cost: every row divided by its own cost."""
        if not self.closed_form:
            return Rows(table=self.table / costs[:, None])
        other = np.flatnonzero(self.weight < 0.0)
        weight = self.weight / costs
        weight[other] = -1.0 - np.arange(other.size)
        table = self.table[(-self.weight[other]).astype(np.int64) - 1] / costs[other, None] if other.size else NO_TABLE
        return Rows(weight, self.first, self.second, np.ascontiguousarray(table))
