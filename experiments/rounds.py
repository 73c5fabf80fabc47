"""Generation in rounds: each round depends on the outcomes before it, and a step may train on a part of its rollouts.

Rules that oversample, skip or stop early are written as a :class:`Rounds`; a loop generates what it asks for, counts
every rollout, and trains on the rows that the rule keeps. Advantages are those of whole groups, so a dropped row still
contributes to its group's mean. The TRL trainer (:mod:`experiments.trl_rounds`) and the lab
(:mod:`experiments.lab.rounds`) both go by :func:`play`. Nothing imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from knapsack_rl.allocation.checks import IntArray
from knapsack_rl.groups import GroupOutcomes
from knapsack_rl.ids import PromptId


class Rounds(Protocol):
    """A rule for what a step generates, round by round."""

    def start(self, prompts: list[PromptId]) -> None:
        """A step begins; the data loader drew these prompts."""
        ...

    def request(self) -> Mapping[PromptId, int]:
        """Rollouts to generate next, by prompt, each >= 1; empty once the step has what it wants."""
        ...

    def observe(self, prompts: list[PromptId], outcomes: GroupOutcomes) -> None:
        """A round is scored; groups are in the order of the prompts."""
        ...

    def keep(self, prompts: list[PromptId], group_R: IntArray, success_R: IntArray) -> IntArray:
        """Rows to train on, at least one.

        Args:
            prompts: (G,) of the step, in the order of their first round.
            group_R: (R,) group of each row of all rounds.
            success_R: (R,) 1 for a success, else 0.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON values on which later steps depend."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the values that :meth:`state_dict` returned."""
        ...


def play(
    rule: Rounds, drawn: Sequence[PromptId], generate: Callable[[list[PromptId], IntArray, int], GroupOutcomes]
) -> list[PromptId]:
    """Generate the rounds of a step.

    Args:
        rule: asks for the rollouts.
        drawn: prompts of the batch; one may be in it several times.
        generate: makes a rollout for each prompt of a list; given the (R,) group of each row and the number of groups,
            it returns their outcomes.

    Returns:
        The prompt of each row of all rounds.
    """
    rule.start(list(dict.fromkeys(drawn)))
    rows: list[PromptId] = []
    while wanted := rule.request():
        ids = [prompt for prompt, count in wanted.items() for _ in range(count)]
        group_R = np.repeat(np.arange(len(wanted)), list(wanted.values()))
        rule.observe(list(wanted), generate(ids, group_R, len(wanted)))
        rows += ids
    return rows
