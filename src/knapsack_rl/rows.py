"""Marginal values without a table: rows that are a sum of two geometric sequences.

The paper's marginal value g (p^n (1-p) + (1-p)^n p) is one: at a million prompts a table of it would take a gigabyte,
and its three numbers per prompt take 24 megabytes. The solver reads ratios and weights here, never a success rate.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from knapsack_rl.value import FloatArray, IntArray

EMPTY: FloatArray = np.empty(0)


class GeometricRows(NamedTuple):
    """Marginal values D[i, 0] = 0, D[i, n] = weight_i (first_i^(n-1) + second_i^(n-1)) for n >= 1.

    With weights >= 0 and ratios in [0, 1] no row ever rises from n = 1 on: the value is concave there.

    Attributes:
        weight: (M,) float64, >= 0; a negative one marks a row that is ``common`` instead.
        first: (M,) ratio of the first sequence, in [0, 1]; not read where the weight is negative.
        second: (M,) ratio of the second, likewise.
        common: (K,) one row of marginals, falling from its second entry on, that several rows may share; else empty.
            K must reach every upper bound of a row that uses it.
    """

    weight: FloatArray
    first: FloatArray
    second: FloatArray
    common: FloatArray = EMPTY

    def take(self, chosen: IntArray) -> GeometricRows:
        """The chosen rows: a mask or positions."""
        return GeometricRows(self.weight[chosen], self.first[chosen], self.second[chosen], self.common)

    def table(self, width: int) -> FloatArray:
        """(M, width) the same marginals written out."""
        from knapsack_rl import _kernels

        table = np.empty((self.weight.size, width))
        _kernels.fill_marginals(self.weight, self.first, self.second, table)
        shared = self.weight < 0.0
        if shared.any():
            table[shared] = self.common[:width]
        return table
