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

    Every call uses the same random numbers and leaves the generator of the training as it was, so evaluating more often
    changes nothing. Processes that train together share the work; all of them must call this, and all get the same
    result.

    Args:
        model: a causal language model; its training mode is restored.
        tokenizer: with left padding.
        rows: prompts with their answers.
        reward: TRL reward function; a reward above 0 is a success.
        samples: answers per prompt, >= 1.
        temperature: > 0.
        max_new_tokens: tokens of the longest answer.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=_devices(model)):
            torch.manual_seed(EVALUATION_SEED + _place()[0])
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
    rank, processes = _place()
    # Every process gets the same number of rows, or one would wait for the others; the last rows may be repeated.
    places = range(rank, rank + processes * -(-len(rows) // processes), processes)
    mine = [rows[place % len(rows)] for place in places]
    counted = sum(place < len(rows) for place in places)
    for start in range(0, len(mine), BATCH):
        batch = mine[start : start + BATCH]
        tokens = _tokens(tokenizer, [row["prompt"] for row in batch]).to(device)
        with torch.no_grad():
            output = model.generate(
                **tokens, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **options
            )
        texts = tokenizer.batch_decode(output[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        columns = {name: [row[name] for row in batch] for name in batch[0] if name != "prompt"}
        rewards = reward(prompts=[row["prompt"] for row in batch], completions=texts, **columns)
        successes += sum(score > 0 for score in rewards[: max(counted - start, 0)])
    if processes > 1:
        total = torch.tensor(successes, device=device)
        torch.distributed.all_reduce(total)
        successes = int(total)
    return successes / len(rows)


def _place() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that train together."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _tokens(tokenizer: Any, prompts: Sequence[Any]) -> Any:
    """Return padded tokens of prompts, which are texts or lists of chat messages."""
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
    if isinstance(prompts[0], str):
        return tokenizer(prompts, return_token_type_ids=False, **options)
    return tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        tokenizer_kwargs={"return_token_type_ids": False},
        **options,
    )
