"""GRPO's gradients of single prompts on the arithmetic model, and the gain of a step along them.

A group's gradient is a weighted sum of the gradients of its completions' log-probabilities ("scores"), so norms,
cosines and slopes of any number of groups follow from the inner products of the scores. Groups are drawn as training
draws them: the successes, which are all the same completion, from the binomial distribution of the exact success rate,
the failures from a pool of sampled ones.

The right answer of a prompt is one string, so the success rate is a number and not an estimate: the probability of the
answer's tokens and the end of the sequence. (The verifier also ignores padding tokens that a model may sample, whose
probability is left out.) Temperature 1 throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knapsack_rl.advantages import group_advantages
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.tasks import MAX_COMPLETION_TOKENS, is_correct

Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]
"""A prompt and a completion."""
GENERATED_ROWS = 4096
GRADIENTS_AT_ONCE = 32


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of one prompt.

    Attributes:
        prompt: its tokens.
        completions: R completions, each up to and with the end of the sequence, if it was reached.
        rewards: (R,) 1 for a right answer, 0 for a wrong one.
    """

    prompt: Tokens
    completions: list[Tokens]
    rewards: FloatArray

    def take(self, rows: Sequence[int]) -> Rollouts:
        """Some of the rollouts, as a group."""
        return Rollouts(self.prompt, [self.completions[r] for r in rows], self.rewards[list(rows)])


class ArithmeticModel:
    """A model with its tokenizer, its parameters as one vector.

    Args:
        folder: of the model.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), padding_side="left")
        # Plain attention: of the fused one torch cannot compute many gradients at once.
        loaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager")
        self.model: Any = loaded.eval()
        self.parameters = list(self.model.parameters())
        self.start = torch.nn.utils.parameters_to_vector(self.parameters).detach().clone()

    def pairs(self, rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
        """Each prompt with its right completion.

        Args:
            rows: with ``prompt`` and ``answer``.
        """
        prompts = self.tokenizer([row["prompt"] for row in rows])["input_ids"]
        answers = self.tokenizer([row["answer"] for row in rows])["input_ids"]
        end = self.tokenizer.eos_token_id
        return [(tuple(prompt), (*answer, end)) for prompt, answer in zip(prompts, answers, strict=True)]

    def log_probabilities(self, pairs: Sequence[Pair]) -> Tensor:
        """Log-probability (R,) of each completion given its prompt; differentiable."""
        ids, counted = self._padded(pairs)
        return _summed(self.model(input_ids=ids[:, :-1], use_cache=False).logits, ids, counted)

    def score_gradients(self, pairs: Sequence[Pair]) -> Tensor:
        """Gradient (R, parameters) of each completion's log-probability."""
        named = {name: parameter.detach() for name, parameter in self.model.named_parameters()}

        def log_probability(parameters: dict[str, Tensor], ids: Tensor, counted: Tensor) -> Tensor:
            inputs = (ids[None, :-1],)
            logits = torch.func.functional_call(self.model, parameters, inputs, {"use_cache": False}).logits
            return _summed(logits, ids[None], counted[None])[0]

        gradients = torch.func.vmap(torch.func.grad(log_probability), in_dims=(None, 0, 0))
        found = []
        for at in range(0, len(pairs), GRADIENTS_AT_ONCE):
            ids, counted = self._padded(pairs[at : at + GRADIENTS_AT_ONCE])
            by_name = gradients(named, ids, counted)
            found.append(torch.cat([by_name[name].reshape(ids.shape[0], -1) for name in named], dim=1))
        return torch.cat(found)

    def _padded(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Tokens (R, T), padded to the right, and a mask (R, T) of those of the completion."""
        # Attention is causal, so padding on the right needs no mask.
        longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
        ids = np.full((len(pairs), longest), self.tokenizer.pad_token_id)
        counted = np.zeros((len(pairs), longest), dtype=bool)
        for row, (prompt, completion) in enumerate(pairs):
            length = len(prompt) + len(completion)
            ids[row, :length] = prompt + completion
            counted[row, len(prompt) : length] = True
        return torch.from_numpy(ids), torch.from_numpy(counted)

    def success_rates(self, pairs: Sequence[Pair]) -> FloatArray:
        """Probability (P,) of the right completion of each prompt."""
        with torch.no_grad():
            return np.exp(self.log_probabilities(pairs).double().numpy())

    def gradient(self, objective: Tensor) -> Tensor:
        """Gradient of a number, as one vector."""
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(objective, self.parameters)])

    def move(self, step: Tensor | None) -> None:
        """Set the parameters to those of the start plus a step; None for the start."""
        place = self.start if step is None else self.start + step
        torch.nn.utils.vector_to_parameters(place, self.parameters)

    def sample(self, prompts: Sequence[Mapping[str, Any]], rollouts: int) -> list[Rollouts]:
        """Sample completions of each prompt and verify them.

        Args:
            prompts: rows with ``prompt`` and ``answer``.
            rollouts: R of each prompt.
        """
        repeated = [row["prompt"] for row in prompts for _ in range(rollouts)]
        completions: list[Tokens] = []
        for at in range(0, len(repeated), GENERATED_ROWS):
            inputs = self.tokenizer(
                repeated[at : at + GENERATED_ROWS], return_tensors="pt", padding=True, return_token_type_ids=False
            )
            with torch.no_grad():
                output = self.model.generate(
                    **inputs,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=MAX_COMPLETION_TOKENS,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            completions += [self._ended(row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
        found = []
        tokens_P = [prompt for prompt, _ in self.pairs(prompts)]
        for k, row in enumerate(prompts):
            mine = completions[k * rollouts : (k + 1) * rollouts]
            texts = self.tokenizer.batch_decode([list(tokens) for tokens in mine], skip_special_tokens=True)
            rewards = np.array([float(is_correct(text, row["answer"], "exact")) for text in texts])
            found.append(Rollouts(tokens_P[k], mine, rewards))
        return found

    def _ended(self, row: list[int]) -> Tokens:
        end = self.tokenizer.eos_token_id
        return tuple(row[: row.index(end) + 1] if end in row else row)


def _summed(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """Sum (R,) of log-probabilities of the counted tokens; logits are those of all tokens but the last."""
    found = torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
    return torch.where(counted[:, 1:], found, 0.0).sum(dim=1)


def policy_gradient(model: ArithmeticModel, groups: Sequence[Rollouts]) -> Tensor | None:
    """GRPO's gradient: the mean over all rollouts of advantage times the gradient of the log-probability.

    That of the first update on fresh rollouts, where the ratio is 1 and nothing is clipped; a sum over tokens, and an
    ascent direction. Advantages are those of :func:`knapsack_rl.advantages.group_advantages`.

    Args:
        model: at the parameters that made the rollouts.
        groups: one for each prompt.

    Returns:
        A vector as long as the parameters; None where all advantages are 0, and with them the gradient.
    """
    group_R = np.repeat(np.arange(len(groups)), [len(group.completions) for group in groups])
    advantages = group_advantages(group_R, np.concatenate([group.rewards for group in groups]))
    if not advantages.any():
        return None
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    weights: dict[Pair, float] = {}
    for pair, advantage in zip(pairs, advantages, strict=True):  # equal completions share one pass
        weights[pair] = weights.get(pair, 0.0) + float(advantage) / len(pairs)
    weight = torch.tensor(list(weights.values()), dtype=torch.float32)
    return model.gradient(weight @ model.log_probabilities(list(weights)))


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions that gradients of single prompts are compared with; vectors as long as the parameters.

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
            along: directions to compare with.
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
    """Advantages (size + 1,) of a success and of a failure in a group with k = 0..size successes; 0 where unmixed."""
    successes: IntArray = np.arange(size + 1)
    rewards = (np.arange(size) < successes[:, None]).astype(np.float64)  # a group a row, its successes first
    advantages = group_advantages(np.repeat(successes, size), rewards.ravel()).reshape(size + 1, size)
    return advantages[:, 0], advantages[:, -1]
