"""Knapsack RL: spend a fixed rollout budget where it yields the most learning (Li et al., arXiv 2509.25849).

Importing this package imports numpy only; training with TRL is in :mod:`knapsack_rl.trl`, with verl in
:mod:`knapsack_rl.verl`.
"""

from knapsack_rl.advantages import group_advantages
from knapsack_rl.allocation.costs import Certificate
from knapsack_rl.allocation.policies import Allocation, allocate
from knapsack_rl.allocation.value import information_gain, nonzero_gradient_probability, value
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.balance import RolloutQueue
from knapsack_rl.conformance import check_engine
from knapsack_rl.groups import GroupStatistics, group_statistics
from knapsack_rl.session import Session
from knapsack_rl.settings import AllocationSettings


def __getattr__(name: str) -> str:
    if name == "__version__":  # read when asked for: the standard library takes as long to import as numpy
        from importlib.metadata import version

        return version("knapsack-rl")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    # the paper's equations
    "information_gain",
    "nonzero_gradient_probability",
    "value",
    # allocation
    "Allocation",
    "Certificate",
    "KnapsackAllocator",
    "allocate",
    # one run of an engine
    "AllocationSettings",
    "Session",
    # ragged groups
    "GroupStatistics",
    "group_advantages",
    "group_statistics",
    "check_engine",
    # rollout balancer
    "RolloutQueue",
]
