"""The tracker's part of a state: every column is checked before anything of it is used; older versions are converted.

Versions and what they lack: 1 has no clock and no evidence, 1 and 2 did not tell lengths apart by outcome.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from knapsack_rl.ids import PromptId, check_prompt_ids

State = Mapping[str, np.ndarray]


def columns_of(
    state: State, types: Mapping[str, Any], evidence_size: int, *, copy: bool
) -> tuple[dict[PromptId, int], dict[str, np.ndarray]]:
    """The row of each id, and the columns and the evidence, in the form of this version.

    Args:
        state: arrays by name, of any version.
        types: columns of one number per prompt, with their types.
        evidence_size: numbers per prompt that the estimator keeps.
        copy: whether to copy the arrays.

    Raises:
        ValueError: a column is missing, has the wrong length or type or impossible numbers, or ids repeat.
    """
    state = _up_to_date(state)
    missing = {"prompt_ids", "evidence", *types} - set(state)
    if missing:
        raise ValueError(f"the tracker state lacks {sorted(missing)}; it is not one of this version")
    row_of = _parse_ids(state["prompt_ids"])
    size = len(row_of)
    columns = {}
    for column, dtype in types.items():
        array = np.asarray(state[column])
        _check_form(column, array, (size,), dtype)
        # NaN fails the comparison; recent outcomes are bits, of which every pattern is possible.
        if array.size and not (array.min() >= 0 and array.max() < np.inf):
            raise ValueError(f"column {column} of the tracker state must hold finite numbers >= 0")
        columns[column] = array.copy() if copy else array
    evidence = np.asarray(state["evidence"])
    _check_form("evidence", evidence, (size, evidence_size), np.float32)
    if evidence.size and not np.isfinite([evidence.min(), evidence.max()]).all():
        raise ValueError("evidence of the tracker state must hold finite numbers")
    clock = int(columns["visits"].sum())
    if columns["last_visit"].max(initial=0) > clock:
        raise ValueError(f"the tracker state has a last_visit after its {clock} visits")
    return row_of, columns | {"evidence": evidence.copy() if copy else evidence}


def _check_form(column: str, array: np.ndarray, shape: tuple[int, ...], dtype: Any) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"column {column} of the tracker state has shape {array.shape} and type {array.dtype}, expected {shape} of "
            f"{np.dtype(dtype)}"
        )


def _parse_ids(array: np.ndarray) -> dict[PromptId, int]:
    try:
        ids = json.loads(np.asarray(array, dtype=np.uint8).tobytes())
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the tracker state's prompt ids are no JSON: {error}") from error
    if not isinstance(ids, list):
        raise ValueError(f"the tracker state's prompt ids must be a list, got {type(ids).__name__}")
    checked = check_prompt_ids(ids)
    row_of = dict(zip(checked, range(len(checked)), strict=True))
    if len(row_of) != len(checked):
        raise ValueError("the tracker state's prompt ids are not distinct")
    return row_of


def _up_to_date(state: State) -> State:
    """The columns that an older version lacks, made from those that it has; a foreign state is left as it is."""
    if "last_visit" not in state and _are_numbers(state, ("visits",)):  # visits of before count as just now
        visits = np.asarray(state["visits"])
        now = np.full(visits.shape, visits.sum(), np.int64)
        state = {"last_visit": now, "evidence": np.zeros((visits.size, 0), np.float32), **state}
    moments = ("count", "sum", "squares")
    if _are_numbers(state, ("successes", "failures", *(f"length_{moment}" for moment in moments))):
        split = dict(state)
        # By the success rate: both outcomes get the same mean length.
        good, bad = np.asarray(state["successes"], np.float64), np.asarray(state["failures"], np.float64)
        share = np.divide(good, good + bad, out=np.zeros_like(good), where=good + bad > 0)
        for moment in moments:
            sums = np.asarray(split.pop(f"length_{moment}"))
            split |= {f"success_length_{moment}": sums * share, f"failure_length_{moment}": sums * (1.0 - share)}
        return split
    return state


def _are_numbers(state: State, names: tuple[str, ...]) -> bool:
    arrays = [np.asarray(state[name]) for name in names if name in state]
    return len(arrays) == len(names) and all(a.dtype.kind in "iuf" and a.shape == arrays[0].shape for a in arrays)
