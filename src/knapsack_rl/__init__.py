"""Knapsack RL: spend a fixed rollout budget where it buys the most learning (Li et al., arXiv 2509.25849).

Importing this package imports numpy alone; training on TRL is in :mod:`knapsack_rl.trl`, on verl in
:mod:`knapsack_rl.verl`.
"""

from importlib.metadata import version as _version

from knapsack_rl.allocation import Allocation, allocate
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.balance import Partition, RolloutQueue, partition
from knapsack_rl.conformance import check_engine
from knapsack_rl.groups import GroupStatistics, group_advantages, group_statistics
from knapsack_rl.value import information_gain, nonzero_gradient_probability, value

__version__ = _version("knapsack-rl")

__all__ = [
    # the paper's equations
    "information_gain",
    "nonzero_gradient_probability",
    "value",
    # allocation
    "Allocation",
    "KnapsackAllocator",
    "allocate",
    # ragged groups
    "GroupStatistics",
    "group_advantages",
    "group_statistics",
    "check_engine",
    # rollout balancer
    "Partition",
    "RolloutQueue",
    "partition",
]
