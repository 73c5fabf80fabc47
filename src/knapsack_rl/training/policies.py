"""From settings to the allocator of a run, and to the rule of one that generates in rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.ids import PromptId
from knapsack_rl.training.rivals import Oversample, Sequential, Skip, Tokens
from knapsack_rl.training.settings import TrainSettings

if TYPE_CHECKING:
    from knapsack_rl.trl.rounds import Rounds


def make_rounds(settings: TrainSettings, ids: Sequence[PromptId], allocator: KnapsackAllocator) -> Rounds:
    """The rule of a run whose steps vary in their number of rollouts.

    Args:
        settings: of the run, with ``in_rounds``.
        ids: prompts of the data set.
        allocator: of the run.
    """
    prompts, rollouts = settings.prompts_per_step, settings.rollouts_per_prompt
    if settings.budget_unit == "tokens":
        return Tokens(allocator, rollouts)
    if settings.allocation == "sequential":
        return Sequential(rollouts)
    rule = {"oversample": Oversample, "skip": Skip}[settings.allocation]
    return rule(ids, prompts, rollouts, seed=settings.seed)


def make_allocator(settings: TrainSettings) -> KnapsackAllocator:
    """The allocator that the settings name; under uniform allocation it only watches."""
    return KnapsackAllocator(
        settings.estimator_name,
        settings.min_rollouts,
        settings.max_rollouts,
        budget_unit=settings.budget_unit,  # type: ignore[arg-type] # checked by the settings
        value=settings.value,
        **settings.estimator_options,
    )
