"""Knapsack RL on TRL: change ``GRPOTrainer`` to :class:`KnapsackGRPOTrainer`.

The only change to GRPO is the size of the groups: the allocator divides each step's rollouts over its prompts, instead
of evenly, and advantages are normalised inside the resulting groups. Sampler, generation, loss, logging,
evaluation and checkpoints are TRL's own.

TRL's sampler delivers M prompts x G rows. Just before generation the rows of all processes are gathered, the
budget M x G is allocated afresh, and each process gets its slice of the expanded rows, as many as it brought. TRL then
generates and scores them; the advantages it computes by reshaping to (M, G) have the right shape but the wrong values,
and are replaced. Because it comes this late, the allocation uses every reward observed so far.
"""

try:
    import accelerate as _accelerate  # noqa: F401
    import datasets as _datasets  # noqa: F401
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
    import trl as _trl  # noqa: F401
except ImportError as error:
    raise ImportError(f'{error}. knapsack_rl.trl needs: pip install "knapsack-rl[trl]"') from error

from knapsack_rl.runs.files import ALLOCATION_LOG, STATE_FILE
from knapsack_rl.trl.config import KnapsackGRPOConfig
from knapsack_rl.trl.trainer import KnapsackGRPOTrainer
from knapsack_rl.trl.watching import WatchCallback

__all__ = ["ALLOCATION_LOG", "STATE_FILE", "KnapsackGRPOConfig", "KnapsackGRPOTrainer", "WatchCallback"]
