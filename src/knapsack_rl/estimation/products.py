"""Matrix products that do not depend on the number of threads.

A BLAS library splits large products over its threads, and the split affects rounding; a different last bit can decide
a tie. So products are computed in blocks of rows that are too small to be split: OpenBLAS, which comes with numpy's
wheels, uses one thread below 2^18 multiplications (matrix by matrix) and 9216 entries (matrix by vector).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knapsack_rl.allocation.checks import FloatArray

MATRIX_WORK = 2**18
VECTOR_WORK = 9000


def product(a: NDArray[Any], b: NDArray[Any]) -> FloatArray:
    """Return ``a @ b`` for a matrix a and a matrix or vector b."""
    size, width = a.shape
    rows = VECTOR_WORK // max(width, 1) if b.ndim == 1 else MATRIX_WORK // max(width * b.shape[1], 1)
    rows = max(rows, 1)
    out, even = np.empty((size, *b.shape[1:])), size - size % rows
    # numpy multiplies a stack of blocks one block after the other.
    np.matmul(a[:even].reshape(-1, rows, width), b, out=out[:even].reshape(-1, rows, *b.shape[1:]))
    np.matmul(a[even:], b, out=out[even:])
    return out


def product_of_columns(a: NDArray[Any], x: NDArray[Any]) -> FloatArray:
    """Return ``a.T @ x`` for a matrix a and a vector x."""
    total = np.zeros(a.shape[1])
    for rows in _blocks(a.shape[0], VECTOR_WORK // max(a.shape[1], 1)):
        total += a[rows].T @ x[rows]
    return total


def dot(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Return ``x @ y`` for vectors, summed by numpy in one thread with small rounding errors."""
    return float((x * y).sum())


def _blocks(size: int, rows: int) -> Iterator[slice]:
    rows = max(rows, 1)
    return (slice(start, start + rows) for start in range(0, size, rows))
