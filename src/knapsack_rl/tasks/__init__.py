"""Data sets whose answers can be checked, the verifier, and the tiny base model that is trained on them.

:func:`is_correct` is the verifier of every data set with one right answer; the reward functions are its form for TRL.
``load_data`` in :mod:`knapsack_rl.tasks.registry` loads a data set by name.

Importing this package needs the standard library and numpy alone; torch and transformers are imported by whoever loads
the model.
"""

from knapsack_rl.tasks.arithmetic import (
    EOS_TOKEN,
    MAX_COMPLETION_TOKENS,
    PAD_TOKEN,
    PretrainSampler,
    base_model_path,
    make_splits,
)
from knapsack_rl.tasks.generated import Problem, Splits, to_rows
from knapsack_rl.tasks.verifier import accuracy_reward, is_correct, math_reward, number_reward

__all__ = [
    "is_correct",
    "accuracy_reward",
    "number_reward",
    "math_reward",
    "Problem",
    "Splits",
    "PretrainSampler",
    "make_splits",
    "to_rows",
    "base_model_path",
    "EOS_TOKEN",
    "PAD_TOKEN",
    "MAX_COMPLETION_TOKENS",
]
