"""One step of the trainer as data: the rows of each prompt and their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.groups import GroupOutcomes
from knapsack_rl.ids import PromptId
from knapsack_rl.plan import Plan
from knapsack_rl.runs.samples import SampleStore
from knapsack_rl.success import total_reward


@dataclass
class Step:
    """One generation batch of all processes.

    Attributes:
        plan: its prompts and their rollouts.
        group_R: (R,) position of each row's prompt among the plan's.
        ragged: whether the rows differ from the stock trainer's.
        generated_R: (R,) place of each row in the order of generation, in which TRL logs; None where it is its own.
    """

    plan: Plan
    group_R: IntArray  # noqa: N815 - the suffix names the shape
    ragged: bool
    generated_R: IntArray | None = None  # noqa: N815


@dataclass
class Scored:
    """Rewards and completions of one generation batch.

    Attributes:
        matrix: (R, F) reward of each function for the rows of all processes, in rank order; NaN for none.
        lengths: (R,) tokens of their completions that the model generated.
        prompts: of this process's rows.
        completions: of this process's rows.
        answers: of this process's rows, from the column ``answer``.
    """

    matrix: FloatArray
    lengths: IntArray
    prompts: list[Any]
    completions: list[Any]
    answers: list[Any]

    @classmethod
    def joined(cls, parts: Sequence[Scored]) -> Scored:
        """Join several batches of one process."""
        return cls(
            matrix=np.concatenate([part.matrix for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            prompts=[prompt for part in parts for prompt in part.prompts],
            completions=[completion for part in parts for completion in part.completions],
            answers=[answer for part in parts for answer in part.answers],
        )

    @property
    def finite(self) -> FloatArray:
        """(R, F) rewards with NaN for infinite ones, which count as unscored."""
        return np.where(np.isinf(self.matrix), np.nan, self.matrix)

    def total(self, weights: FloatArray) -> FloatArray:
        """Return the (R,) training reward: the weighted sum, NaN where no function gave a reward."""
        return total_reward(self.finite * weights)

    def add_to(self, samples: SampleStore, prompts: list[PromptId], groups: GroupOutcomes, step: int) -> None:
        """Keep samples of the completions of the main process, whose rows come first.

        Args:
            samples: the store they are added to.
            prompts: (M,) of the step.
            groups: outcomes of all rows.
            step: number of the generation.
        """
        for row, answer in enumerate(self.answers):
            if groups.scored_R[row]:
                samples.add(
                    prompts[groups.group_R[row]],
                    self.prompts[row],
                    self.completions[row],
                    reward=float(groups.rewards_R[row]),
                    success=bool(groups.success_R[row]),
                    step=step,
                    answer=answer,
                )
