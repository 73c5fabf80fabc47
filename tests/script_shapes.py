"""A toy policy trained by GRPO on the rewards of typical scripts, whose outcome is learned, named or not used.

Every prompt has a chance of a right answer, in logits: its own part plus one that all prompts share. Marks of format
are learned by all prompts together. Advantages are those of GRPO on the sum of all rewards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import knapsack_rl as kr

MARKS = 5
DIFFICULTY_OF_TESTS = np.array([1.5, 0.7, 0.0, -0.7, -1.5])


def sigmoid(logits: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-logits))


def gsm8k_demo(marks, right, tests, rng):
    """TRL's GSM8K demo: four functions of format before the one of correctness."""
    tags = 0.125 * marks[:, :4].sum(axis=1) - 0.001 * rng.integers(0, 20, len(right)) * (marks[:, 3] == 0)
    soft, strict = 0.5 * marks[:, 0] * marks[:, 1], 0.5 * marks[:, :4].prod(axis=1)
    return np.stack([tags, soft, strict, 0.5 * np.maximum(right, marks[:, 4]), 2.0 * right], axis=1)


def notebook(marks, right, tests, rng):
    """Exact format 3.0, approximate format, the answer with partial credit and a penalty, numbers."""
    near = (rng.random(len(right)) < 0.3) * (1 - right)
    answer = np.where(marks[:, 0] == 0, 0.0, np.where(right > 0, 3.0, np.where(near > 0, 0.5, -1.5)))
    numbers = np.where(right > 0, 1.5, -0.5 * marks[:, 4])
    exact, approximate = 3.0 * marks[:, :3].prod(axis=1), 0.5 * (2 * marks[:, :3] - 1).sum(axis=1)
    return np.stack([exact, approximate, answer, numbers], axis=1)


def think_first(marks, right, tests, rng):
    return np.stack([marks[:, :2].prod(axis=1), right], axis=1)


def accuracy_first(marks, right, tests, rng):
    return think_first(marks, right, tests, rng)[:, ::-1]


def plus_and_minus(marks, right, tests, rng):
    """One function: +0.6 or -1 for the answer, and up to 0.4 for structure."""
    return (np.where(right > 0, 0.6, -1.0) + 0.4 * marks[:, :2].mean(axis=1))[:, None]


def share_of_tests(marks, right, tests, rng):
    return tests.mean(axis=1)[:, None]


SHAPES: dict[str, tuple[Callable[..., Any], int, float]] = {
    "gsm8k_demo": (gsm8k_demo, 4, 0.0),
    "notebook": (notebook, 3, 0.0),
    "think_first": (think_first, 1, 0.0),
    "accuracy_first": (accuracy_first, 0, 0.0),
    "plus_and_minus": (plus_and_minus, 0, 0.0),
    "share_of_tests": (share_of_tests, 0, 0.99),
}
"""The rewards, and the outcome that someone who knows the script would name: its function and its threshold."""


def train(shape: str, arm: str, seed: int, *, steps: int = 200, prompts: int = 384, batch: int = 48, mean: int = 8):
    """Train a policy; return its accuracy after each step, and the value of all counts over that of equal counts.

    The value is by true rates, at the policy of each step.

    Args:
        shape: key of ``SHAPES``.
        arm: "uniform", "default", or "named" with the right outcome.
        seed: of policy, data and sampling.
        steps: of training.
        prompts: in the data set.
        batch: prompts per step.
        mean: rollouts per prompt.
    """
    rewards, outcome, threshold = SHAPES[shape]
    rng, order = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    own, shared, marked = rng.normal(-3.0, 2.5, prompts), 0.0, rng.normal(-1.0, 0.7, MARKS)
    graded = shape == "share_of_tests"
    allocator = kr.KnapsackAllocator(success=threshold if arm == "named" else None)
    waiting: list[int] = []
    accuracy, value = [], []
    for _ in range(steps):
        if len(waiting) < batch:
            waiting = order.permutation(prompts).tolist()
        ids = [waiting.pop() for _ in range(batch)]
        counts = np.full(batch, mean) if arm == "uniform" else allocator.allocate(ids, batch * mean).counts
        group = np.repeat(np.arange(batch), counts)
        prompt = np.array(ids)[group]
        chance = sigmoid(own[prompt] + shared)
        chances = sigmoid((own[prompt] + shared)[:, None] + DIFFICULTY_OF_TESTS)
        tests = (rng.random((group.size, 5)) < chances).astype(float)
        right = tests.prod(axis=1) if graded else (rng.random(group.size) < chance).astype(float)
        marks = (rng.random((group.size, MARKS)) < sigmoid(marked)).astype(float)
        value.append([kr.value(n, sigmoid(own[ids] + shared)).sum() for n in (counts, np.full(batch, mean))])
        given = rewards(marks, right, tests, rng)
        if arm != "uniform":
            allocator.observe([ids[k] for k in group], given[:, outcome] if arm == "named" else given)
        advantage = kr.group_advantages(group, given.sum(axis=1))
        score = advantage * ((tests - chances).sum(axis=1) if graded else right - chance)
        own += 0.12 / mean * np.bincount(prompt, score, minlength=prompts)
        shared += 0.03 * score.mean()
        marked += 0.3 * (advantage[:, None] * (marks - sigmoid(marked))).mean(axis=0)
        logits = (own + shared)[:, None] + DIFFICULTY_OF_TESTS if graded else own + shared
        accuracy.append(float(sigmoid(logits).mean()))
    chosen, equal = np.sum(value, axis=0)
    return np.array(accuracy), chosen / equal
