"""Rows of a data set compared in Arrow: nothing is decoded, and no value becomes a Python object."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from knapsack_rl.allocation.checks import IntArray
from knapsack_rl.groups import BoolArray

COMPARED_BYTES = 2**26
"""Bytes of rows compared at a time."""


def first_difference(table: Any, one: IntArray, other: IntArray) -> tuple[int, str] | None:
    """Return the first pair of rows that differ and the column in which they do, or None.

    Args:
        table: of a data set, ``datasets.table.Table``.
        one: (N,) row numbers.
        other: (N,) row numbers to compare them with.
    """
    size = max(min(COMPARED_BYTES * table.num_rows // max(table.nbytes, 1), 10_000), 1)
    for start in range(0, one.size, size):
        left, right = (rows_of(table, rows[start : start + size]) for rows in (one, other))
        for name in table.column_names:
            different = np.flatnonzero(~equal_values(left[name].combine_chunks(), right[name].combine_chunks()))
            if different.size:
                return start + int(different[0]), name
    return None


def rows_of(table: Any, rows: IntArray) -> pa.Table:
    """Return rows of a data set's table, taken chunk by chunk: ``take`` on the table would copy whole columns."""
    chunks = table.to_batches()
    start = np.cumsum([0, *(chunk.num_rows for chunk in chunks)])
    chunk_of_row = np.searchsorted(start, rows, side="right") - 1
    order = np.argsort(chunk_of_row, kind="stable")
    parts = [
        chunks[chunk].take(pa.array(rows[order][chunk_of_row[order] == chunk] - start[chunk]))
        for chunk in np.unique(chunk_of_row)
    ]
    return pa.Table.from_batches(parts, chunks[0].schema).combine_chunks().take(pa.array(np.argsort(order)))


def equal_values(one: pa.Array, other: pa.Array) -> BoolArray:
    """Return (N,) whether two arrays of one type hold the same values; a null equals a null, a NaN a NaN."""
    if isinstance(one, pa.ExtensionArray):
        return equal_values(one.storage, other.storage)
    if isinstance(one, pa.DictionaryArray):
        return equal_values(one.dictionary_decode(), other.dictionary_decode())
    there, there_too = (np.asarray(array.is_valid()) for array in (one, other))
    if isinstance(one, pa.StructArray):
        equal = np.ones(len(one), dtype=np.bool_)
        for part, other_part in zip(one.flatten(), other.flatten(), strict=True):
            equal &= equal_values(part, other_part)
    elif isinstance(one, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        equal = _equal_lists(one, other)
    else:
        equal = _equal_scalars(one, other)
    return (there == there_too) & (equal | ~there)


def _equal_scalars(one: pa.Array, other: pa.Array) -> BoolArray:
    try:
        equal = np.asarray(pc.fill_null(pc.equal(one, other), False))
    except pa.ArrowNotImplementedError:  # Arrow compares all common types, but not nulls and views of lists
        return np.array([a == b for a, b in zip(one.to_pylist(), other.to_pylist(), strict=True)], dtype=np.bool_)
    if pa.types.is_floating(one.type):
        equal |= np.asarray(pc.fill_null(pc.and_(pc.is_nan(one), pc.is_nan(other)), False))
    return equal


def _equal_lists(one: pa.Array, other: pa.Array) -> BoolArray:
    length, other_length = (np.asarray(pc.fill_null(pc.list_value_length(array), 0)) for array in (one, other))
    equal = length == other_length
    parts = (array.filter(pa.array(equal)).flatten() for array in (one, other))
    list_of_value = np.repeat(np.flatnonzero(equal), length[equal])
    return equal & (np.bincount(list_of_value[~equal_values(*parts)], minlength=equal.size) == 0)
