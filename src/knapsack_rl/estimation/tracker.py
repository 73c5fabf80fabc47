"""Observations of every prompt, in columns with one row per prompt, keyed by a stable id.

The history kept per prompt is bounded, so memory and files are linear in the number of prompts, however long the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from math import exp
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.ids import PromptId, check_prompt_ids, other_type

RECENT = 64
"""Newest outcomes kept per prompt, one bit each."""

LARGEST_TOTAL = 2**40
"""Most rollouts of one prompt in a saved state, so that totals over all prompts do not overflow."""

Outcome = Literal["success", "failure"]
OUTCOMES: tuple[Outcome, Outcome] = ("success", "failure")
LengthSums = tuple[FloatArray, FloatArray, FloatArray]
"""Count, sum and sum of squares of the lengths of each prompt."""

MOMENTS = ("count", "sum", "squares")
"""Sums of lengths, kept separately for successes and failures because failures are longer."""


@dataclass
class Records:
    """Columns of observations, one entry per prompt. All zero for a prompt never seen.

    Attributes:
        successes: discounted number of successes.
        failures: discounted number of failures.
        rollouts: total rollouts scored, undiscounted.
        visits: batches in which the prompt was scored.
        recent: newest outcomes as bits, the newest lowest, 1 for a success; ``min(rollouts, RECENT)`` are valid.
        newest_successes: successes of the newest visit.
        newest_total: rollouts of the newest visit.
        success_length_count: discounted number of successes of known length.
        success_length_sum: discounted sum of their lengths, in tokens.
        success_length_squares: discounted sum of their squared lengths.
        failure_length_count: discounted number of failures of known length.
        failure_length_sum: discounted sum of their lengths, in tokens.
        failure_length_squares: discounted sum of their squared lengths.
        last_visit: number of the batch of the newest visit, counted from 1.
        skips: batches since then in which the prompt was given no rollout.
        evidence: (P, E) numbers that the estimator keeps about past visits beside the counts; E may be 0.
        age: time from the rollouts of the newest visit to those of the next batch, in epochs; derived, not stored. An
            epoch is the number of batches that usually pass between two visits of a prompt.
        prior: (P, grid) distribution of each prompt's success rate by what prompts like it say, see
            :mod:`knapsack_rl.estimation.shared`; derived, not stored. None where prompts share only the population.
    """

    successes: FloatArray
    failures: FloatArray
    rollouts: IntArray
    visits: IntArray
    recent: NDArray[np.uint64]
    newest_successes: IntArray
    newest_total: IntArray
    success_length_count: FloatArray
    success_length_sum: FloatArray
    success_length_squares: FloatArray
    failure_length_count: FloatArray
    failure_length_sum: FloatArray
    failure_length_squares: FloatArray
    last_visit: IntArray
    skips: IntArray
    evidence: NDArray[np.float32]
    age: FloatArray
    prior: FloatArray | None = None

    @classmethod
    def empty(cls, size: int, evidence_size: int = 0) -> Records:
        """Return records of ``size`` prompts never seen."""
        columns: dict[str, Any] = {column: np.zeros(size, dtype) for column, dtype in COLUMNS.items()}
        return cls(**columns, evidence=np.zeros((size, evidence_size), np.float32), age=np.zeros(size))

    def take(self, rows: IntArray) -> Records:
        """Return the records of the given rows; row -1 is a prompt never seen."""
        if not len(self):
            return Records.empty(rows.size, self.evidence.shape[1])
        # The mode is the fastest; it gives -1 the values of row 0, which are replaced below.
        taken = {
            column: getattr(self, column).take(rows, axis=0, mode="clip") for column in (*COLUMNS, "evidence", "age")
        }
        unseen = rows < 0
        if unseen.any():
            for values in taken.values():
                values[unseen] = 0
        return Records(**taken, prior=None if self.prior is None else self.prior[rows])

    def lengths_of(self, outcome: Outcome) -> LengthSums:
        """Return count, sum and sum of squares of the lengths of rollouts with this outcome."""
        return tuple(getattr(self, f"{outcome}_length_{moment}") for moment in MOMENTS)

    @property
    def length_count(self) -> FloatArray:
        """Discounted number of rollouts of known length, whatever their outcome."""
        return self.success_length_count + self.failure_length_count

    @property
    def length_sum(self) -> FloatArray:
        """Discounted sum of all lengths."""
        return self.success_length_sum + self.failure_length_sum

    @property
    def length_squares(self) -> FloatArray:
        """Discounted sum of all squared lengths."""
        return self.success_length_squares + self.failure_length_squares

    def __len__(self) -> int:
        return self.successes.size


_TYPES = {"FloatArray": np.float64, "IntArray": np.int64, "NDArray[np.uint64]": np.uint64}
COLUMNS: dict[str, Any] = {
    column.name: _TYPES[str(column.type)]
    for column in fields(Records)
    if column.name not in ("evidence", "age", "prior")
}
"""The stored columns of one number per prompt, with their types."""

EPOCHS_REMEMBERED = 2.0
"""The usual time between two visits of a prompt is that of about so many newest epochs."""


class Tracker:
    """Per-prompt records keyed by a stable id (``str`` or ``int``; ``7`` and ``"7"`` are different prompts).

    Args:
        evidence_size: numbers that the estimator keeps per prompt, see the protocol ``Estimator``.
    """

    def __init__(self, evidence_size: int = 0) -> None:
        self._row_of: dict[PromptId, int] = {}
        self._records = Records.empty(0, evidence_size)
        self._clock = 0  # batches recorded
        self._revisits = np.zeros(2)  # weight of remembered revisits, and the weighted sum of the logs of their times

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, prompt_id: object) -> bool:
        return prompt_id in self._row_of

    @property
    def prompt_ids(self) -> list[PromptId]:
        """Ids of all prompts seen, in order of first observation, which is the order of :meth:`records`."""
        return list(self._row_of)

    def records(self) -> Records:
        """Return the records of all prompts seen, as views that must not be written to."""
        size = len(self)
        columns = {column: getattr(self._records, column)[:size] for column in (*COLUMNS, "evidence")}
        return Records(**columns, age=self._age(columns["last_visit"]))

    def lengths(self) -> dict[Outcome, LengthSums]:
        """Return :meth:`Records.lengths_of` of all prompts seen, by outcome, as views that must not be written to."""
        size = len(self)
        sums = ((outcome, self._records.lengths_of(outcome)) for outcome in OUTCOMES)
        return {outcome: (n[:size], total[:size], squares[:size]) for outcome, (n, total, squares) in sums}

    @property
    def clock(self) -> int:
        """Batches recorded."""
        return self._clock

    @property
    def epoch(self) -> float:
        """Batches that usually pass between two visits of a prompt: the geometric mean; all batches before a revisit.

        Only prompts that come back count, so knowing many that do not changes nothing.
        """
        weight, logs = self._revisits.tolist()
        return exp(logs / weight) if weight else float(max(self._clock, 1))

    def refit_due(self, batches: int, prompts: int) -> bool:
        """Return whether a refit is due: after the first batch, when the known prompts have doubled, and once an epoch.

        Args:
            batches: that were recorded at the last refit.
            prompts: that were known then.
        """
        return len(self) >= 2 * prompts or self.clock - batches >= self.epoch

    def _age(self, last_visit: IntArray) -> FloatArray:
        return (self._clock + 1 - last_visit) / self.epoch

    def rows(self, prompt_ids: Iterable[PromptId]) -> IntArray:
        """Return the row of each prompt, -1 for one never seen."""
        return np.fromiter(map(self._row_of.get, prompt_ids, repeat(-1)), np.int64)

    def twin(self, prompt_ids: list[PromptId]) -> tuple[PromptId, PromptId] | None:
        """Return the first new id that is known under the other type, with that known id, or None."""
        for row in np.flatnonzero(self.rows(prompt_ids) < 0):
            new = prompt_ids[row]
            known = other_type(new)
            if known is not None and known in self:
                return new, known
        return None

    def lookup(self, prompt_ids: Iterable[PromptId]) -> Records:
        """Return the records of the given prompts in their order; zeros for a prompt never seen."""
        rows = self.rows(prompt_ids)
        found = self._records.take(rows)
        found.age = np.where(rows >= 0, self._age(found.last_visit), 0.0)
        return found

    def record(
        self,
        prompt_ids: Sequence[PromptId],
        prompt_of_rollout: IntArray,
        successes: NDArray[np.bool_],
        lengths: FloatArray | None = None,
        *,
        discount: float = 1.0,
        evidence: FloatArray | None = None,
    ) -> None:
        """Record one visit of each prompt.

        Args:
            prompt_ids: the P distinct prompts visited.
            prompt_of_rollout: (R,) index into ``prompt_ids``, in the order in which rollouts were scored.
            successes: (R,) whether each rollout succeeded.
            lengths: (R,) tokens of each rollout, if known.
            discount: factor of older counts of these prompts, in (0, 1]: the policy has changed since.
            evidence: (P, E) the estimator's new evidence about these prompts.
        """
        rows_P = self._rows_or_new(prompt_ids)
        size = len(prompt_ids)
        store = self._records
        total = np.bincount(prompt_of_rollout, minlength=size)
        good = np.bincount(prompt_of_rollout[successes], minlength=size)

        for column, amount in (("successes", good), ("failures", total - good)):
            counts = getattr(store, column)
            counts[rows_P] = counts[rows_P] * discount + amount
        store.newest_successes[rows_P], store.newest_total[rows_P] = good, total
        store.rollouts[rows_P] += total
        self._clock += 1
        self._count_revisits(self._clock - store.last_visit[rows_P][store.visits[rows_P] > 0])
        store.visits[rows_P] += 1
        store.last_visit[rows_P] = self._clock
        store.skips[rows_P] = 0
        if evidence is not None:
            store.evidence[rows_P] = evidence
        store.recent[rows_P] = _shift_in(store.recent[rows_P], prompt_of_rollout, successes, total)
        if lengths is not None:
            for outcome, chosen in (("success", successes), ("failure", ~successes)):
                of, tokens = prompt_of_rollout[chosen], lengths[chosen]
                for moment, weights in zip(MOMENTS, (np.ones_like(tokens), tokens, tokens**2), strict=True):
                    sums = getattr(store, f"{outcome}_length_{moment}")
                    sums[rows_P] = sums[rows_P] * discount + np.bincount(of, weights=weights, minlength=size)

    def _count_revisits(self, times: IntArray) -> None:
        """Remember the batches that passed since the last visits of prompts that came back."""
        self._revisits *= exp(-1.0 / (EPOCHS_REMEMBERED * self.epoch))
        self._revisits += times.size, np.log(times).sum()

    def skip(self, prompt_ids: Iterable[PromptId]) -> None:
        """Note that these prompts were in a batch and are given no rollout; prompts never seen are left out."""
        rows = self.rows(prompt_ids)
        self._records.skips[rows[rows >= 0]] += 1

    def _rows_or_new(self, prompt_ids: Sequence[PromptId]) -> IntArray:
        row_of = self._row_of
        for prompt_id in prompt_ids:
            row_of.setdefault(prompt_id, len(row_of))
        capacity = len(self._records)
        if len(row_of) > capacity:
            grown = np.full(max(2 * capacity, len(row_of)), -1, dtype=np.int64)
            grown[:capacity] = np.arange(capacity)
            self._records = self._records.take(grown)
        return self.rows(prompt_ids)

    def state_dict(self, *, copy: bool = True) -> dict[str, np.ndarray]:
        """Return columns and ids as arrays; ids are UTF-8 JSON in a byte array, so they keep their types.

        Without ``copy`` the arrays change with the tracker.
        """
        ids = np.frombuffer(json.dumps(self.prompt_ids).encode(), dtype=np.uint8)
        records = self.records()
        columns = {column: getattr(records, column) for column in (*COLUMNS, "evidence")}
        columns |= {"clock": np.array([self._clock]), "revisits": self._revisits}
        return {"prompt_ids": ids} | {name: array.copy() if copy else array for name, array in columns.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray], *, copy: bool = True) -> None:
        """Replace everything by a saved state; without ``copy`` the tracker uses its arrays.

        Raises:
            ValueError: a column is missing, has the wrong length or type, or ids repeat.
        """
        row_of, columns = _columns_of(state, COLUMNS, self._records.evidence.shape[1], copy=copy)
        clock, revisits = _time_of(state, columns)
        self._row_of, self._clock, self._revisits = row_of, clock, revisits
        self._records = Records(**columns, age=np.zeros(len(row_of)))


def _shift_in(
    recent: NDArray[np.uint64], prompt_of_rollout: IntArray, successes: NDArray[np.bool_], total: IntArray
) -> NDArray[np.uint64]:
    """Push the outcomes of a visit into the bits of each prompt, the newest into the lowest bit."""
    order = np.argsort(prompt_of_rollout, kind="stable")
    ends = np.cumsum(total)
    age = np.repeat(ends, total) - 1 - np.arange(order.size)  # 0 for the newest rollout of its prompt
    kept = (age < RECENT) & successes[order]
    bits = np.zeros(total.size, np.uint64)
    np.bitwise_or.at(bits, prompt_of_rollout[order][kept], np.uint64(1) << age[kept].astype(np.uint64))
    # numpy leaves a shift by the full width undefined: those prompts have no older bit left.
    shift = np.minimum(total, RECENT - 1).astype(np.uint64)
    return np.where(total >= RECENT, np.uint64(0), recent << shift) | bits


def _columns_of(
    state: Mapping[str, np.ndarray], types: Mapping[str, Any], evidence_size: int, *, copy: bool
) -> tuple[dict[PromptId, int], dict[str, np.ndarray]]:
    """Return the row of each id, and the columns with the evidence, after all checks.

    Args:
        state: arrays by name.
        types: columns of one number per prompt, with their types.
        evidence_size: numbers that the estimator keeps per prompt.
        copy: whether to copy the arrays.

    Raises:
        ValueError: a column is missing, has the wrong length or type or impossible numbers, or ids repeat.
    """
    missing = {"prompt_ids", "evidence", "clock", "revisits", *types} - set(state)
    if missing:
        raise ValueError(f"the tracker state lacks {sorted(missing)}; it belongs to another version")
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
    _check_possible(columns)
    return row_of, columns | {"evidence": evidence.copy() if copy else evidence}


def _check_possible(columns: Mapping[str, np.ndarray]) -> None:
    """Refuse numbers of a prompt that contradict each other.

    Raises:
        ValueError: they do; names what should hold, and the row.
    """
    newest, good = columns["newest_total"], columns["newest_successes"]
    rollouts, visits = columns["rollouts"], columns["visits"]
    counted = columns["successes"] + columns["failures"]
    bits = np.minimum(rollouts, RECENT).astype(np.uint64)  # numpy leaves a shift by the full width undefined
    rules = {
        "1 <= visits": visits >= 1,
        "visits <= rollouts": visits <= rollouts,
        f"rollouts <= {LARGEST_TOTAL}": rollouts <= LARGEST_TOTAL,
        "newest_successes <= newest_total": good <= newest,
        "1 <= newest_total <= rollouts": (newest >= 1) & (newest <= rollouts),
        "newest_successes <= successes": good <= columns["successes"],
        "newest failures <= failures": newest - good <= columns["failures"],
        "successes + failures <= rollouts": counted <= rollouts * (1.0 + 1e-9),
        "recent has a bit per rollout": (rollouts >= RECENT) | (columns["recent"] >> bits % RECENT == 0),
    }
    for rule, holds in rules.items():
        if not holds.all():
            row = int(np.flatnonzero(~holds)[0])
            raise ValueError(f"the tracker state has impossible numbers: {rule} must hold, row {row} breaks it")


def _time_of(state: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> tuple[int, FloatArray]:
    """Return the clock, and weight and logs of revisits, after all checks.

    Raises:
        ValueError: they have the wrong form, or contradict each other or the columns.
    """
    clocks, revisits = np.asarray(state["clock"]), np.asarray(state["revisits"])
    _check_form("clock", clocks, (1,), np.int64)
    _check_form("revisits", revisits, (2,), np.float64)
    clock = int(clocks[0])
    newest = max(int(columns[name].max(initial=0)) for name in ("last_visit", "visits"))
    if clock < newest:
        raise ValueError(f"the tracker state has a last_visit or visits of {newest} after its {clock} batches")
    weight, logs = revisits.tolist()
    if not (0.0 <= weight < np.inf and 0.0 <= logs <= 1.0001 * weight * np.log(max(clock, 1))):
        raise ValueError(
            f"revisits of the tracker state must be a weight >= 0 and its logs of 1 to {clock} batches, got {weight} "
            f"and {logs}"
        )
    return clock, revisits.copy()


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
        raise ValueError(f"the tracker state's prompt ids are not JSON: {error}") from error
    if not isinstance(ids, list):
        raise ValueError(f"the tracker state's prompt ids must be a list, got {type(ids).__name__}")
    checked = check_prompt_ids(ids)
    row_of = dict(zip(checked, range(len(checked)), strict=True))
    if len(row_of) != len(checked):
        raise ValueError("the tracker state's prompt ids are not distinct")
    return row_of
