"""A step of the lab in rounds: a rule of the field asks for its rollouts, and trains on those that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.accelerator.train import Settings, Trainer
from experiments.pool import ARMS
from experiments.rounds import Rounds, play
from experiments.rules import RULES
from knapsack_rl.allocation.checks import IntArray
from knapsack_rl.groups import GroupOutcomes
from knapsack_rl.ids import PromptId, numbered
from knapsack_rl.plan import Plan


def rule_of(settings: Settings, ids: Sequence[PromptId]) -> Rounds | None:
    """The rule of an arm, at its start; None if its steps are not in rounds.

    Args:
        settings: of the run.
        ids: training prompts.
    """
    make = RULES.get(ARMS[settings.arm].rule)
    return make(ids, *settings.size, settings.seed) if make else None


def step_in_rounds(trainer: Trainer, rule: Rounds, batch: Sequence[dict[str, Any]], number: int) -> None:
    """Generate what the rule asks for, and train on what it keeps; the allocator watches.

    Args:
        trainer: counts all rollouts and tokens, and the seconds of each part.
        rule: in the place of the allocation.
        batch: rows of the data that are next; the rule may take others.
        number: of the step.
    """
    allocator = trainer.session.allocator
    parts: list[Any] = []
    rewards: list[float] = []

    def generate(ids: list[PromptId], group_R: IntArray, groups: int) -> GroupOutcomes:
        sampled, scored = trainer.generate([trainer.row_of[prompt] for prompt in ids])
        parts.append(sampled)
        rewards.extend(scored)
        return allocator.outcomes_of(group_R, np.array(scored), groups)

    with trainer.timed("allocation"):
        ids, group_R = numbered(play(rule, [row["prompt_id"] for row in batch], generate))
        success_R = allocator.outcomes_of(group_R, np.array(rewards), len(ids)).success_R
        kept = rule.keep(ids, group_R, success_R.astype(np.int64))
        plan = Plan(ids, trainer.session.adopt(ids, np.bincount(group_R)))
    trainer.learn(plan, group_R, joined(parts, trainer.policy.padding), rewards, number, kept)


def joined(parts: Sequence[Any], padding: int) -> Any:
    """The rollouts of several rounds below each other.

    Args:
        parts: :class:`~experiments.accelerator.policy.Rollouts` of each round.
        padding: token that fills short ones up.
    """
    import torch
    from torch.nn import functional

    from experiments.accelerator.policy import Rollouts

    width = max(part.tokens.shape[1] for part in parts)
    tokens = [functional.pad(part.tokens, (0, width - part.tokens.shape[1]), value=padding) for part in parts]
    return Rollouts(torch.cat(tokens), torch.cat([part.lengths for part in parts]))
