"""Knapsack RL on verl: a few overrides on the command line of stock verl 0.9.1.

verl's v1 trainer asks an agent-loop manager to generate for a batch of prompts and a replay buffer for the finished
groups. Its configuration can name both, and the plug-in needs nothing else:

* :class:`KnapsackAgentLoopManager` sets the number of rollouts of each prompt of a training batch;
* :func:`KnapsackReplayBuffer` observes the rewards of the groups that verl samples, and adds the metrics;
* with it comes an advantage estimator of verl's registry, :mod:`knapsack_rl.verl.advantages`;
* :class:`KnapsackCheckpoint` writes the allocator's state into verl's checkpoints.

All three live in verl's task runner, one process, and share one :class:`~knapsack_rl.verl.session.VerlSession`.
The id of a prompt, which other processes need too, travels with the prompt through verl's transfer queue.

``knapsack-rl verl-args`` prints the overrides.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from knapsack_rl.runs.files import ALLOCATION_LOG, STATE_FILE

if TYPE_CHECKING:
    from knapsack_rl.verl.checkpoint import KnapsackCheckpoint
    from knapsack_rl.verl.manager import KnapsackAgentLoopManager
    from knapsack_rl.verl.replay_buffer import KnapsackReplayBuffer

__all__ = ["ALLOCATION_LOG", "STATE_FILE", "KnapsackAgentLoopManager", "KnapsackCheckpoint", "KnapsackReplayBuffer"]

_HOME = {
    "KnapsackAgentLoopManager": "manager",
    "KnapsackCheckpoint": "checkpoint",
    "KnapsackReplayBuffer": "replay_buffer",
}


def __getattr__(name: str) -> Any:
    """Load the classes when verl asks for them, so that a launch line can be checked on machines without verl."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import tensordict as _tensordict  # noqa: F401
        import transfer_queue as _transfer_queue  # noqa: F401
        import verl as _verl  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{error}. knapsack_rl.verl needs: pip install "knapsack-rl[verl]", in an environment without TRL, whose '
            "transformers is too new for verl"
        ) from error
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
