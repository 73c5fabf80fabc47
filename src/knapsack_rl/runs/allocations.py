"""The allocation log, ``allocations.jsonl``: one JSON line per step, written by every engine and read back here.

A row lists the step's prompts and, per prompt, what it was given and what came of it (:data:`PER_PROMPT`), with
``step``, ``reason`` and ``seconds`` for the step as a whole. A *visit* is one prompt in one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.policies import Allocation
from knapsack_rl.groups import BoolArray, GroupOutcomes, difficulty_class
from knapsack_rl.ids import PromptId, check_prompt_ids
from knapsack_rl.runs.files import by_step, finite_or_none, read_rows

PER_PROMPT = ("counts", "arrived", "successes", "scored", "effective", "estimate", "predicted")
"""Lists of a row with one entry per prompt: rollouts planned, arrived, successful and scored, whether rewards differed,
estimated success rate and predicted probability of a non-zero gradient (null where unknown)."""


@dataclass(frozen=True, eq=False)
class Visits:
    """One entry per prompt and step, ordered by step (all arrays have length V).

    Attributes:
        step: index of the row.
        prompt: index into the distinct prompt ids.
        counts: rollouts planned.
        arrived: rollouts that came back, fewer where an engine lost some.
        successes: rollouts that succeeded.
        scored: rollouts with a valid reward.
        effective: whether the group's rewards differed, so that it carried a gradient.
        estimate: success rate estimated before the step, NaN for an unseen prompt.
        predicted: predicted probability of a non-zero gradient, NaN where none was predicted.
        notes: remarks on how the log was read.
    """

    step: IntArray
    prompt: IntArray
    counts: IntArray
    arrived: IntArray
    successes: IntArray
    scored: IntArray
    effective: BoolArray
    estimate: FloatArray
    predicted: FloatArray
    notes: tuple[str, ...] = ()

    @cached_property
    def difficulty(self) -> IntArray:
        """Index into ``DIFFICULTY_CLASSES`` by the rate observed in the visit, -1 where nothing was scored."""
        return difficulty_class(self.successes, self.scored)


def allocation_row(
    step: int, prompt_ids: list[PromptId], allocation: Allocation, groups: GroupOutcomes, seconds: float
) -> dict[str, Any]:
    """Return one row of the log.

    Args:
        step: number of the step, from 1.
        prompt_ids: (M,) prompts of the step.
        allocation: their rollouts, with estimates and predictions where there are any.
        groups: outcomes, by position among the prompts.
        seconds: time that the allocation took.
    """
    unknown = np.full(len(prompt_ids), np.nan)
    estimate = unknown if allocation.success_rates is None else allocation.success_rates
    predicted = unknown if allocation.nonzero_gradient is None else allocation.nonzero_gradient
    return {
        "step": step,
        "prompt_ids": prompt_ids,
        "counts": allocation.counts.tolist(),
        "arrived": np.bincount(groups.group_R, minlength=len(prompt_ids)).tolist(),
        "successes": groups.successes.tolist(),
        "scored": groups.totals.tolist(),
        "effective": groups.effective.tolist(),
        "estimate": [finite_or_none(rate) for rate in estimate],
        "predicted": [finite_or_none(chance) for chance in predicted],
        "reason": allocation.reason,
        "seconds": seconds,
    }


def read_visits(path: Path) -> tuple[list[dict[str, Any]], tuple[PromptId, ...], Visits]:
    """Return the rows of an allocation log by step, the distinct prompt ids by first visit, and all visits.

    Where a step was logged more than once (after a resume), the later row counts, which a note says.

    Raises:
        ValueError: the file's content does not follow the schema.
    """
    logged = read_rows(path)
    rows = by_step(logged)
    for row in rows:
        _check_row(row, path)
    index: dict[PromptId, int] = {}
    names = check_prompt_ids([name for row in rows for name in row["prompt_ids"]], f"{path}: prompt_ids")
    prompt = [index.setdefault(name, len(index)) for name in names]
    sizes = [len(row["prompt_ids"]) for row in rows]

    def column(key: str, dtype: Any) -> Any:
        try:
            return np.array([value for row in rows for value in row[key]], dtype=dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {key} must hold numbers: {error}") from error

    visits = Visits(
        step=np.repeat(np.arange(len(rows), dtype=np.int64), sizes),
        prompt=np.array(prompt, dtype=np.int64),
        counts=column("counts", np.int64),
        arrived=column("arrived", np.int64),
        successes=column("successes", np.int64),
        scored=column("scored", np.int64),
        effective=column("effective", np.bool_),
        estimate=column("estimate", np.float64),  # null becomes NaN
        predicted=column("predicted", np.float64),
        notes=_resume_notes(len(logged) - len(rows)),
    )
    return rows, tuple(index), visits


def _resume_notes(superseded: int) -> tuple[str, ...]:
    if not superseded:
        return ()
    rows = "1 row was" if superseded == 1 else f"{superseded} rows were"
    return (f"steps were logged again after a resume: the later rows count, and {rows} left out",)


def _check_row(row: Mapping[str, Any], path: Path) -> None:
    """Check that a row holds lists of equal length.

    Raises:
        ValueError: a list is missing or has another length than ``prompt_ids``.
    """
    where = f"{path}, step {row['step']}"
    missing = [key for key in ("prompt_ids", *PER_PROMPT) if not isinstance(row.get(key), list)]
    if missing:
        raise ValueError(f"{where}: expected lists under {', '.join(missing)}")
    for key in PER_PROMPT:
        if len(row[key]) != len(row["prompt_ids"]):
            raise ValueError(f"{where}: {key} has {len(row[key])} entries for {len(row['prompt_ids'])} prompt_ids")
