"""Data sets with exact verifiers, and the tiny base model that is trained on them.

Importing this package needs the standard library alone; torch and transformers are imported by whoever
loads the model.
"""

from knapsack_rl.tasks.arithmetic import (
    EOS_TOKEN,
    MAX_COMPLETION_TOKENS,
    PAD_TOKEN,
    PretrainSampler,
    Problem,
    Splits,
    accuracy_reward,
    base_model_path,
    is_correct,
    make_splits,
    to_rows,
)
from knapsack_rl.tasks.gsm8k import gsm8k_reward
from knapsack_rl.tasks.matching import exact_match_reward
from knapsack_rl.tasks.math_answers import MathVerifier, math_reward

__all__ = [
    "Problem",
    "Splits",
    "PretrainSampler",
    "make_splits",
    "to_rows",
    "is_correct",
    "accuracy_reward",
    "exact_match_reward",
    "gsm8k_reward",
    "math_reward",
    "MathVerifier",
    "base_model_path",
    "EOS_TOKEN",
    "PAD_TOKEN",
    "MAX_COMPLETION_TOKENS",
]
