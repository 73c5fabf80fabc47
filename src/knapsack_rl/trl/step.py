"""One step of the trainer as data: which rows are which prompt, what they were given, and the row of its log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.policies import Allocation
from knapsack_rl.groups import SuccessRule, group_outcomes, successes_of
from knapsack_rl.ids import PromptId
from knapsack_rl.runs.files import finite_or_none
from knapsack_rl.runs.samples import SampleStore
from knapsack_rl.trl.identity import prompt_key


@dataclass
class Step:
    """One generation batch of all processes.

    Attributes:
        prompts: of the step.
        allocation: their rollouts.
        group_R: (R,) position among the prompts of each row.
        ragged: whether the rows are others than the stock trainer's.
        seconds: that the allocation took.
    """

    prompts: list[PromptId]
    allocation: Allocation
    group_R: IntArray  # noqa: N815 - the suffix tells the shape
    ragged: bool
    seconds: float

    def ids(self) -> list[PromptId]:
        """(R,) the prompt of each row."""
        return [self.prompts[group] for group in self.group_R]

    def record(self, outcome: FloatArray, success: SuccessRule) -> dict[str, Any]:
        """What ``allocations.jsonl`` tells of the step, but for its number.

        Args:
            outcome: (R,) the reward that tells success.
            success: the allocator's rule.
        """
        groups = group_outcomes(self.group_R, outcome, success)
        place = self.group_R[groups.first_row]  # groups stand in order of first appearance, skipped prompts have none

        def per_prompt(of_group: np.ndarray) -> list[Any]:
            values = np.zeros(len(self.prompts), of_group.dtype)
            values[place] = of_group
            return values.tolist()

        return {
            "prompt_ids": self.prompts,
            "counts": self.allocation.counts.tolist(),
            "successes": per_prompt(groups.successes),
            "scored": per_prompt(groups.totals),
            "effective": per_prompt(groups.effective),
            "estimate": _as_json(self.allocation.success_rates),
            "predicted": _as_json(self.allocation.nonzero_gradient),
            "reason": self.allocation.reason,
            "seconds": self.seconds,
        }


@dataclass
class Scored:
    """What the reward functions gave one generation batch.

    Attributes:
        matrix: (R, functions) rewards of the rows of all processes, in rank order; NaN for none.
        lengths: (R,) tokens of their completions.
        prompts: those of this process, one per row.
        completions: of this process.
        answers: of this process, from a column of that name.
    """

    matrix: FloatArray
    lengths: IntArray
    prompts: list[Any]
    completions: list[Any]
    answers: list[Any]

    @classmethod
    def joined(cls, parts: Sequence[Scored]) -> Scored:
        """Several batches of one process as one."""
        return cls(
            matrix=np.concatenate([part.matrix for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            prompts=[prompt for part in parts for prompt in part.prompts],
            completions=[completion for part in parts for completion in part.completions],
            answers=[answer for part in parts for answer in part.answers],
        )

    @property
    def finite(self) -> FloatArray:
        """(R, functions) rewards with NaN for infinite ones, which count as unscored."""
        return np.where(np.isinf(self.matrix), np.nan, self.matrix)

    def outcome(self, function: int | None) -> FloatArray:
        """(R,) the reward that tells success: that of a function, or of the first that scored the rollout."""
        matrix = self.finite
        if function is not None:
            return matrix[:, function]
        return matrix[np.arange(matrix.shape[0]), (~np.isnan(matrix)).argmax(axis=1)]

    def total(self, weights: FloatArray) -> FloatArray:
        """(R,) the reward that trains: the weighted sum, NaN where no function gave a reward."""
        matrix = self.finite
        return np.where(np.isnan(matrix).all(axis=1), np.nan, np.nansum(matrix * weights, axis=1))

    def add_to(
        self, samples: SampleStore, ids: list[PromptId], outcome: FloatArray, success: SuccessRule, step: int
    ) -> None:
        """Let the main process, which has the first rows, keep samples of its completions.

        Args:
            samples: where they are kept.
            ids: (R,) the prompt of each row.
            outcome: (R,) the reward that tells success.
            success: the allocator's rule.
            step: number of the generation.
        """
        verdicts = successes_of(outcome, success)
        for row, answer in enumerate(self.answers):
            if not np.isnan(outcome[row]):
                samples.add(
                    ids[row],
                    self.prompts[row],
                    self.completions[row],
                    reward=float(outcome[row]),
                    success=bool(verdicts[row]),
                    step=step,
                    answer=answer,
                )


def keys_of_blocks(rows: list[dict[str, Any]], size: int, id_column: str) -> list[PromptId]:
    """The prompt of each block of ``size`` rows, as TRL's sampler draws them.

    Raises:
        ValueError: a block holds several prompts.
    """
    keys = []
    for at in range(0, len(rows), size):
        first, *others = rows[at : at + size]
        key = prompt_key(first, id_column)
        for row in others:
            if row.get("prompt") != first.get("prompt") or prompt_key(row, id_column) != key:
                raise ValueError(
                    f"rows of different prompts stand in one block of num_generations={size} (prompt {key!r}): the "
                    "data loader broke a group. With an IterableDataset, make every process read whole groups"
                )
        keys.append(key)
    return keys


def rows_by_prompt(keys: list[PromptId], rows: list[dict[str, Any]]) -> dict[PromptId, dict[str, Any]]:
    """The first row of each prompt.

    Args:
        keys: (N,) prompt of each row.
        rows: (N,) of the data set.

    Raises:
        ValueError: rows of one id hold different prompts.
    """
    found: dict[PromptId, dict[str, Any]] = {}
    for key, row in zip(keys, rows, strict=True):
        if found.setdefault(key, row).get("prompt") != row.get("prompt"):
            raise ValueError(f"id {key!r} names different prompts in one batch; make ids unique over all sources")
    return found


def _as_json(numbers: FloatArray | None) -> list[float | None]:
    return [] if numbers is None else [finite_or_none(number) for number in numbers]
