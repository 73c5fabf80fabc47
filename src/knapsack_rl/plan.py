"""The plan of one step: its prompts and their rollouts, before they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.degradation import uniform_counts
from knapsack_rl.allocation.policies import Allocation
from knapsack_rl.ids import PromptId


@dataclass(frozen=True, eq=False)
class Plan:
    """The rollouts of one step.

    Attributes:
        ids: (M,) distinct prompts of the step.
        allocation: their rollouts, with estimates and predictions.
        seconds: time that the allocation took.
        identified: whether the ids name prompts; otherwise they only number the groups, and nothing is learned.
    """

    ids: list[PromptId]
    allocation: Allocation
    seconds: float = 0.0
    identified: bool = True

    @property
    def counts(self) -> IntArray:
        """(M,) rollouts of each distinct prompt."""
        return self.allocation.counts

    def expand(self) -> IntArray:
        """Return the (R,) position of each rollout's prompt among the plan's; the rollouts of a prompt are adjacent."""
        return self.allocation.expand()

    def rows_of(self, ids: Sequence[PromptId]) -> IntArray:
        """Return the (B,) rollouts of each row of the batch; a prompt in several rows divides its rollouts over them.

        No row gets a single rollout unless its prompt has only one: a group of one has no gradient.

        Args:
            ids: (B,) prompt of each row, all of them in the plan.
        """
        count_of = dict(zip(self.ids, self.counts.tolist(), strict=True))
        rows: dict[PromptId, list[int]] = {}
        for row, prompt_id in enumerate(ids):
            rows.setdefault(prompt_id, []).append(row)
        counts = np.zeros(len(ids), dtype=np.int64)
        for prompt_id, places in rows.items():
            served = places[: max(count_of[prompt_id] // 2, 1)]
            counts[served] = uniform_counts(len(served), count_of[prompt_id])
        return counts

    def groups_of(
        self, prompt_R: IntArray | None = None, lengths_R: ArrayLike | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Return (G,) estimated success rates and mean lengths of the groups; of those with rollouts, if given.

        Args:
            prompt_R: (R,) position of each rollout's prompt among the plan's.
            lengths_R: (R,) tokens of each; all mean lengths are NaN without.
        """
        unknown = np.full(len(self.ids), np.nan)
        rates = unknown if self.allocation.success_rates is None else self.allocation.success_rates
        if prompt_R is None:
            return rates, unknown
        sizes = np.bincount(prompt_R, minlength=len(self.ids))
        there = sizes > 0
        if lengths_R is None:
            return rates[there], unknown[there]
        tokens = np.bincount(prompt_R, np.asarray(lengths_R, np.float64), len(self.ids))
        return rates[there], tokens[there] / sizes[there]


def checked_counts(found: Allocation, prompts: int, rollouts: int | None) -> IntArray:
    """Return the counts of an allocator, which may be one of the user's.

    Args:
        found: its answer.
        prompts: that it was asked about.
        rollouts: to which the counts must sum; None for a budget in tokens.

    Raises:
        ArithmeticError: the counts are not what was asked for.
    """
    counts = np.asarray(found.counts)
    if counts.shape != (prompts,) or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise ArithmeticError(f"the allocator gave {counts}, expected {prompts} whole numbers >= 0")
    if rollouts is not None and counts.sum() != rollouts:
        raise ArithmeticError(f"the allocator gave {counts}, which sum to {counts.sum()} and not to {rollouts}")
    return counts
