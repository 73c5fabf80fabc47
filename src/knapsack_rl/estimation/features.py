"""Features of prompts, as codes: texts are categories, numbers are divided into bins.

A code stands for all prompts that are alike in a column. Codes are given in the order in which values appear, and
their number is bounded, so memory and files stay small whatever the columns hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.ids import PromptId, check_prompt_ids

MOST_COLUMNS = 16
"""Columns of features."""

MOST_VALUES = 4096
"""Codes of a column; values that appear later share one."""

MOST_BINS = 16
"""Bins of a column of numbers, divided at quantiles of the first batch that has any; whole numbers of a range no larger
than this are levels, with one bin each."""

LONGEST_TEXT = 200
"""Characters of a text that are looked at."""

MISSING, OTHER = 0, 1
"""Codes of values that are None or NaN, and of those for which there is no code left."""

JOINT = "all columns together"
"""Name of the column whose values are the combinations of all others."""


@dataclass
class Column:
    """Codes of the values of one column.

    The first values that are not missing decide whether it is one of numbers.

    Attributes:
        name: of the column.
        edges: (E,) ascending borders of the bins of a column of numbers; None for texts.
        code_of: code of each value (text, or number of the bin), from 2.
    """

    name: str
    edges: FloatArray | None = None
    code_of: dict[str | int, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of codes, those without a value included."""
        return len(self.code_of) + 2

    def codes(self, values: Sequence[Any]) -> list[int]:
        """Return the code of each value.

        Raises:
            ValueError: a column of numbers holds something else.
        """
        missing = [_missing(value) for value in values]
        given = [value for value, absent in zip(values, missing, strict=True) if not absent]
        if (
            not self.code_of
            and given
            and all(isinstance(value, Real) and not isinstance(value, bool) for value in given)
        ):
            self.edges = _edges(_numbers(self.name, given))
        known: list[Any] = [str(value)[:LONGEST_TEXT] for value in given]
        if self.edges is not None:
            known = np.searchsorted(self.edges, _numbers(self.name, given), side="right").tolist()
        found = map(self._code, known)
        return [MISSING if absent else next(found) for absent in missing]

    def _code(self, value: str | int) -> int:
        if value not in self.code_of and self.size >= MOST_VALUES:
            return OTHER
        return self.code_of.setdefault(value, self.size)


class Features:
    """The codes of all prompts whose features were given.

    Attributes:
        columns: in order of name; the last one is :data:`JOINT` if there are several others.
    """

    def __init__(self) -> None:
        self.columns: list[Column] = []
        self._codes_of: dict[PromptId, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._codes_of)

    @property
    def names(self) -> list[str]:
        """Names of the columns that were given."""
        return [column.name for column in self.columns if column.name != JOINT]

    def note(self, ids: Sequence[PromptId], features: Mapping[str, ArrayLike]) -> None:
        """Keep the features of prompts, in place of those given before.

        Args:
            ids: M prompts.
            features: M values by name of the column; the first batch decides on the columns.

        Raises:
            ValueError: there is no column or too many, names or lengths differ from what they should be, or a column
                of numbers holds something else.
        """
        if not isinstance(features, Mapping):
            raise ValueError(f"features must map names to columns of {len(ids)} values, got {type(features).__name__}")
        values = {str(name): _listed(name, column, len(ids)) for name, column in features.items()}
        columns = self.columns or _columns(list(values))
        names = [column.name for column in columns if column.name != JOINT]
        if sorted(values) != names:
            raise ValueError(f"features must have the columns of the first batch, {names}, got {sorted(values)}")
        codes = [column.codes(values[column.name]) for column in columns[: len(names)]]
        if len(names) > 1:
            codes.append(columns[-1].codes([",".join(map(str, row)) for row in zip(*codes, strict=True)]))
        self.columns = columns
        self._codes_of.update(zip(ids, zip(*codes, strict=True), strict=True))

    def codes(self, ids: Sequence[PromptId]) -> IntArray:
        """Return the (M, columns) codes of prompts, -1 for one without features."""
        unknown = (-1,) * len(self.columns)
        rows = [self._codes_of.get(prompt_id, unknown) for prompt_id in ids]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.columns))

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return columns and codes as arrays."""
        columns = [
            {
                "name": column.name,
                "edges": None if column.edges is None else column.edges.tolist(),
                "values": list(column.code_of),
            }
            for column in self.columns
        ]
        text = json.dumps({"columns": columns, "prompt_ids": list(self._codes_of)})
        return {"features": np.frombuffer(text.encode(), np.uint8), "codes": self.codes(list(self._codes_of))}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore columns and codes.

        Raises:
            ValueError: the state is damaged.
        """
        try:
            found = json.loads(np.asarray(state["features"], dtype=np.uint8).tobytes())
            columns = [_column(**one) for one in found["columns"]]
            ids = check_prompt_ids(found["prompt_ids"])
            codes = np.asarray(state["codes"])
            sizes = np.array([column.size for column in columns], dtype=np.int64)
            if codes.dtype != np.int64 or codes.shape != (len(ids), len(columns)) or len(set(ids)) < len(ids):
                raise ValueError("ids and codes do not match")
            if (codes < 0).any() or (codes >= sizes).any():
                raise ValueError("a code does not belong to a value")
        except (KeyError, TypeError, AttributeError, RecursionError, ValueError, OverflowError) as error:
            raise ValueError(f"the saved features of prompts are damaged: {error!r}") from error
        self.columns = columns
        self._codes_of = dict(zip(ids, map(tuple, codes.tolist()), strict=True))


def _column(name: str, edges: list[float] | None, values: list[str | int]) -> Column:
    borders = None if edges is None else np.array(edges, dtype=np.float64)
    if borders is not None and (borders.ndim != 1 or not np.isfinite(borders).all() or (np.diff(borders) <= 0).any()):
        raise ValueError(f"borders of bins must ascend, got {edges!r}")
    if len(values) + 2 > MOST_VALUES or len(set(values)) < len(values):
        raise ValueError(f"column {name!r} has too many values, or one twice")
    return Column(str(name), borders, dict(zip(values, range(2, len(values) + 2), strict=True)))


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, (float, np.floating)) and bool(np.isnan(value)))


def _listed(name: object, column: ArrayLike, size: int) -> list[Any]:
    values: Any = column
    if hasattr(values, "tolist"):  # arrays, tensors, series
        values = values.tolist()
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"feature {name!r} must be a list of {size} values, one per prompt, got {values!r}")
    values = list(values)
    if len(values) != size:
        raise ValueError(f"feature {name!r} must hold one value per prompt ({size}), got {len(values)}")
    return values


def _columns(names: list[str]) -> list[Column]:
    if not 0 < len(names) <= MOST_COLUMNS or JOINT in names:
        raise ValueError(f"features must be 1 to {MOST_COLUMNS} named columns, none of them {JOINT!r}, got {names}")
    columns = [Column(name) for name in sorted(names)]
    return columns if len(columns) == 1 else [*columns, Column(JOINT)]


def _edges(numbers: FloatArray) -> FloatArray:
    """Return borders between the values of a column of numbers."""
    finite = numbers[np.isfinite(numbers)]
    distinct = np.unique(finite)
    if distinct.size and (finite == np.round(finite)).all() and distinct[-1] - distinct[0] <= MOST_BINS:
        # Levels, of which the first batch may lack some: one bin each, and room for more.
        return np.unique(np.arange(distinct[0] - MOST_BINS, distinct[-1] + MOST_BINS) + 0.5)
    if distinct.size > MOST_BINS:
        return np.unique(np.quantile(finite, np.arange(1, MOST_BINS) / MOST_BINS, method="higher"))
    return np.unique(distinct[1:] / 2 + distinct[:-1] / 2)


def _numbers(name: str, values: Sequence[Any]) -> FloatArray:
    try:
        return np.array([float(value) for value in values], dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"feature {name!r} holds numbers; {error}; give numbers or None") from error
