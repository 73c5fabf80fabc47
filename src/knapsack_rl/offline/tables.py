"""CSV, JSON lines and parquet files, read into columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.ids import PromptId, refusal

Columns = dict[str, list[Any]]


def read_columns(path: str | Path) -> Columns:
    """Read a table by its file name: ``.csv``, ``.jsonl`` (or ``.json``, one object a line) or ``.parquet``.

    Returns:
        Column name to values; a key missing from a JSON object is ``None``. CSV values are strings.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the suffix is unknown, the file is malformed, or it holds no rows.
        ImportError: parquet needs pyarrow.
    """
    path = Path(path)
    if path.suffix not in READABLE:
        raise ValueError(f"{path}: the file name must end in {', '.join(READABLE)}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    columns = READABLE[path.suffix](path)
    if not columns or not next(iter(columns.values())):
        raise ValueError(f"{path} holds no rows")
    return columns


def _read_csv(path: Path) -> Columns:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            rows = [row for row in reader if row]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num} is not valid CSV: {error}") from error
    if len(set(header)) < len(header):
        raise ValueError(f"{path}: column names repeat: {', '.join(header)}")
    for row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{path}: a row has {len(row)} values, the header names {len(header)}: {','.join(row)[:80]}"
            )
    return {name: [row[k] for row in rows] for k, name in enumerate(header)}


def _read_json_lines(path: Path) -> Columns:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # broken, a number of 5,000 digits, or endless nesting
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}")
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> Columns:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f'{error}. Reading parquet needs: pip install "knapsack-rl[data]"') from error
    try:
        return parquet.read_table(path).to_pydict()
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, ValueError, OSError) as error:  # damaged data is an OSError without a number
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


READABLE: dict[str, Callable[[Path], Columns]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
}


def column(columns: Columns, name: str, path: str | Path) -> list[Any]:
    """Return a column by name.

    Raises:
        ValueError: the column does not exist; the message lists those that do.
    """
    if name not in columns:
        raise ValueError(f"{path} has no column {name!r}; its columns are {', '.join(columns)}")
    return columns[name]


def numbers(values: Sequence[Any], name: str) -> FloatArray:
    """Return values as (R,) float64; empty strings, ``None`` and "nan" become NaN.

    Raises:
        ValueError: a value is not a number; the message names its row.
    """
    parsed = np.empty(len(values))
    for row, value in enumerate(values):
        try:
            parsed[row] = np.nan if value in (None, "") else float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"column {name!r}, row {row + 1}: {value!r} is not a number") from error
    return parsed


def identities(values: Sequence[Any], name: str) -> list[PromptId]:
    """Return values as prompt ids.

    Raises:
        ValueError: a value is empty or cannot be a prompt id (see :mod:`knapsack_rl.ids`); the message names its row.
    """
    for row, value in enumerate(values, start=1):
        reason = "is empty; every row needs a prompt id" if value == "" or value is None else refusal(value)
        if reason:
            raise ValueError(f"column {name!r}, row {row} {reason}")
    return list(values)
