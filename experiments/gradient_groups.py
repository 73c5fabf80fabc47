"""GRPO's gradient of one prompt over many groups, from the gradients of its completions.

A group's gradient is a weighted sum of the gradients of its completions' log-probabilities ("scores"), so norms,
cosines and slopes of any number of groups follow from the inner products of the scores. Groups are drawn as training
draws them: the successes, which are all the same completion, from the binomial distribution of the exact success rate,
the failures from a pool of sampled ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.gradient_measure import ArithmeticModel, Pair, Rollouts
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.groups import group_advantages


@dataclass(frozen=True, eq=False)
class Directions:
    """What the gradients of single prompts are compared with; vectors as long as the parameters.

    Attributes:
        batch: GRPO's gradient of a large batch of other prompts.
        population: gradient of the mean success rate of other prompts.
    """

    batch: Tensor
    population: Tensor


@dataclass(frozen=True, eq=False)
class GroupGradients:
    """Gradients of G groups of one prompt, all of one size.

    Attributes:
        weights: (G, 1 + D) weight of the right completion's score and of each of the D wrong ones'.
        norm: (G,) length of the gradient.
        cosine: (G,) cosine to the gradient of the large batch, 0 where the gradient is.
        own: (G,) slope of the prompt's own success rate along the gradient.
        population: (G,) slope of the mean success rate of the other prompts.
    """

    weights: FloatArray
    norm: FloatArray
    cosine: FloatArray
    own: FloatArray
    population: FloatArray


class PromptScores:
    """Scores of one prompt's right completion and of its sampled wrong ones.

    Args:
        model: at the parameters that made the rollouts.
        right: the prompt with its right completion.
        rollouts: sampled ones, of which at least one failed.

    Raises:
        ValueError: no rollout failed.
    """

    def __init__(self, model: ArithmeticModel, right: Pair, rollouts: Rollouts) -> None:
        wrong: dict[Pair, int] = {}
        for completion, reward in zip(rollouts.completions, rollouts.rewards, strict=True):
            if not reward:
                pair = (rollouts.prompt, completion)
                wrong[pair] = wrong.get(pair, 0) + 1
        if not wrong:
            raise ValueError("no rollout failed: sample more, or leave the prompt out")
        self.rate = float(model.success_rates([right])[0])
        self.scores = model.score_gradients([right, *wrong])
        self.wrong = np.array(list(wrong.values())) / sum(wrong.values())
        self._inner = (self.scores @ self.scores.T).double().numpy()

    def groups(self, size: int, groups: int, along: Directions, rng: np.random.Generator) -> GroupGradients:
        """Draw groups.

        Args:
            size: rollouts of a group, >= 1.
            groups: how many.
            along: what to compare with.
            rng: source of randomness.
        """
        successes = rng.binomial(size, self.rate, groups)
        failures = rng.multinomial(size - successes, self.wrong)
        for_success, for_failure = advantages_of(size)
        weights = np.concatenate(
            [(for_success[successes] * successes)[:, None], for_failure[successes][:, None] * failures], axis=1
        )
        weights /= size
        norm = np.sqrt(np.maximum(np.einsum("gi,ij,gj->g", weights, self._inner, weights, optimize=True), 0.0))
        own = self._slopes(self.rate * self.scores[0])
        to_batch = weights @ self._slopes(along.batch) / float(along.batch.norm())
        cosine = np.divide(to_batch, norm, out=np.zeros(groups), where=norm > 0.0)
        return GroupGradients(weights, norm, cosine, weights @ own, weights @ self._slopes(along.population))

    def gradient(self, weights: FloatArray) -> Tensor:
        """The gradient of one group, as a vector."""
        return torch.from_numpy(weights).float() @ self.scores

    def _slopes(self, direction: Tensor) -> FloatArray:
        return (self.scores @ direction).double().numpy()


def advantages_of(size: int) -> tuple[FloatArray, FloatArray]:
    """(size + 1,) advantage of a success, and of a failure, in a group with k = 0..size successes; 0 where unmixed."""
    successes: IntArray = np.arange(size + 1)
    rewards = (np.arange(size) < successes[:, None]).astype(np.float64)  # a group a row, its successes first
    advantages = group_advantages(np.repeat(successes, size), rewards.ravel()).reshape(size + 1, size)
    return advantages[:, 0], advantages[:, -1]
