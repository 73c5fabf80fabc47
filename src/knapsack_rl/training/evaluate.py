"""Accuracy of a model on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

EVALUATION_SEED = 1234
BATCH = 512


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy in [0, 1].

    Attributes:
        sampled: mean success of answers sampled at the training temperature.
        greedy: success of the most likely answers.
    """

    sampled: float
    greedy: float


def held_out_accuracy(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    reward: Callable[..., list[float]],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
) -> Accuracy:
    """Generate ``samples`` answers per prompt, and one greedy answer, and score them.

    The same random numbers are used at every call and the training's generator is left as it was, so evaluating more
    often changes nothing.

    Args:
        model: a causal language model; its training mode is restored.
        tokenizer: with left padding.
        rows: prompts with their answers.
        reward: TRL reward function; a reward above 0 is a success.
        samples: answers per prompt, >= 1.
        temperature: > 0.
        max_new_tokens: longest answer.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=_devices(model)):
            torch.manual_seed(EVALUATION_SEED)
            repeated = [row for row in rows for _ in range(samples)]
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            sampled = _success_rate(model, tokenizer, repeated, reward, max_new_tokens, options)
            greedy = _success_rate(model, tokenizer, rows, reward, max_new_tokens, {"do_sample": False})
    finally:
        model.train(was_training)
    return Accuracy(sampled, greedy)


def _devices(model: nn.Module) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []


def _success_rate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    reward: Callable[..., list[float]],
    max_new_tokens: int,
    options: dict[str, Any],
) -> float:
    device = next(model.parameters()).device
    successes = 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        tokens = tokenizer(
            [row["prompt"] for row in batch], return_tensors="pt", padding=True, return_token_type_ids=False
        ).to(device)
        with torch.no_grad():
            output = model.generate(
                **tokens, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **options
            )
        texts = tokenizer.batch_decode(output[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        rewards = reward(completions=texts, answer=[row["answer"] for row in batch])
        successes += sum(score > 0 for score in rewards)
    return successes / len(rows)
