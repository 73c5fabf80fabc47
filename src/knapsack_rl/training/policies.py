"""From settings to the allocator of a run."""

from __future__ import annotations

from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.training.settings import TrainSettings


def make_allocator(settings: TrainSettings) -> KnapsackAllocator:
    """The allocator that the settings name; under uniform allocation it only watches."""
    return KnapsackAllocator(
        settings.estimator_name,
        settings.min_rollouts,
        settings.max_rollouts,
        value=settings.value,
        **settings.estimator_options,
    )
