"""Replay: keep the rare successes of prompts that are hardly ever solved, and train on them again.

A group without a success has no gradient, though its prompt may have succeeded an epoch ago. Here the newest success
of a prompt whose group had few is kept with the log-probabilities it was sampled with. At a later visit without a
success it takes the place of one failure: the group's rewards differ again, and TRL's clipped loss weighs each token
of it by the ratio of its probability now to that at sampling,

    -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A),    r = exp(log pi_now - log pi_sampled).

The stored success has a positive advantage, so r counts up to 1 + eps_high and a success that the policy has moved
away from weighs little. The estimate of the success rate, the metrics and the log see what was sampled, not what was
replayed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.groups import GroupOutcomes
from knapsack_rl.ids import PromptId
from knapsack_rl.state import read_state, write_state
from knapsack_rl.trl.step import Step

REPLAY_FILE = "replay.npz"
RARE = 1 / 8
"""A success is kept if its prompt's rate was estimated at most this before the visit; above it is forgotten."""


@dataclass
class Success:
    """A stored success.

    Attributes:
        tokens: (T,) ids of the completion, its end included.
        log_probs: (T,) of the tokens when they were sampled.
        reward: its training reward.
        uses: how often it was mixed in.
    """

    tokens: IntArray
    log_probs: FloatArray
    reward: float
    uses: int = 0


class SuccessBuffer:
    """The newest rare success of each prompt.

    Args:
        max_uses: a success that was mixed in this often is dropped, >= 1.
    """

    def __init__(self, max_uses: int) -> None:
        if max_uses < 1:
            raise ValueError(f"max_uses must be at least 1, got {max_uses}")
        self.max_uses = max_uses
        self.entries: dict[PromptId, Success] = {}

    def review(self, prompt: PromptId, successes: int, scored: int, estimate: float) -> str:
        """Return what to do with a prompt after a visit: "store" a success, "use" the stored one, or "" for nothing.

        A prompt that succeeds more often than rarely is forgotten; it needs no help.

        Args:
            prompt: the prompt.
            successes: of the visit.
            scored: rollouts with a reward.
            estimate: success rate estimated before the visit; where NaN, the visit's own.
        """
        if successes == 0:
            return "use" if scored and prompt in self.entries else ""
        if (successes / scored if math.isnan(estimate) else estimate) <= RARE:
            return "store"
        self.entries.pop(prompt, None)
        return ""

    def use(self, prompt: PromptId) -> Success:
        """Return the stored success of a prompt; after its last use it is dropped."""
        found = self.entries[prompt]
        found.uses += 1
        if found.uses >= self.max_uses:
            del self.entries[prompt]
        return found

    def save(self, path: Path) -> None:
        """Write the buffer to one npz file."""
        stored = list(self.entries.values())
        header = {"max_uses": self.max_uses, "prompts": list(self.entries)}
        write_state(
            path,
            header,
            {
                "lengths": np.array([entry.tokens.size for entry in stored], dtype=np.int64),
                "tokens": np.concatenate([np.zeros(0, np.int64), *(entry.tokens for entry in stored)]),
                "log_probs": np.concatenate([np.zeros(0), *(entry.log_probs for entry in stored)]),
                "rewards": np.array([entry.reward for entry in stored], dtype=np.float64),
                "uses": np.array([entry.uses for entry in stored], dtype=np.int64),
            },
        )

    def load(self, path: Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged.
        """
        header, arrays = read_state(path)
        ends = np.cumsum(arrays["lengths"])[:-1]
        tokens, log_probs = (np.split(arrays[name], ends) for name in ("tokens", "log_probs"))
        self.entries = {
            prompt: Success(tokens[k], log_probs[k], float(arrays["rewards"][k]), int(arrays["uses"][k]))
            for k, prompt in enumerate(header["prompts"])
        }


def mix_in(
    buffer: SuccessBuffer,
    trainer: Any,
    step: Step,
    groups: GroupOutcomes,
    total: FloatArray,
    output: dict[str, Any],
) -> tuple[FloatArray, dict[str, float]]:
    """Replace failures by stored successes, and store new ones.

    Args:
        buffer: the stored successes.
        trainer: a ``KnapsackGRPOTrainer`` in one process, for log-probabilities under the current model.
        step: the prompts and their rows.
        groups: the outcomes.
        total: (R,) training rewards.
        output: TRL's batch of the same rows; completions, mask, old log-probabilities and number of tokens change.

    Returns:
        The (R,) training rewards with those of the successes mixed in, and metrics for the log.
    """
    estimates = step.plan.allocation.success_rates
    stores: list[tuple[PromptId, int]] = []
    replaced: dict[int, Success] = {}
    for group in np.unique(step.group_R).tolist():
        prompt, rows = step.plan.ids[group], np.flatnonzero(step.group_R == group)
        visit = (int(groups.successes[group]), int(groups.totals[group]))
        action = buffer.review(prompt, *visit, math.nan if estimates is None else float(estimates[group]))
        if action == "store":
            stores.append((prompt, int(rows[groups.success_R[rows]][0])))
        elif action == "use" and rows.size > 1:
            replaced[int(rows[0])] = buffer.use(prompt)
    if stores:
        _store(buffer, trainer, stores, total, output)
    if replaced:
        total = total.copy()
        for row, success in replaced.items():
            total[row] = success.reward
        _replace(trainer, replaced, output)
    return total, {"replay/stored": float(len(buffer.entries)), "replay/mixed_in": float(len(replaced))}


def _store(
    buffer: SuccessBuffer, trainer: Any, stores: list[tuple[PromptId, int]], total: FloatArray, output: dict[str, Any]
) -> None:
    index = torch.tensor([row for _, row in stores], device=output["completion_ids"].device)
    part = {name: output[name][index] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    log_probs = log_probs_now(trainer, part)
    for k, (prompt, row) in enumerate(stores):
        inside = part["completion_mask"][k].bool()
        buffer.entries[prompt] = Success(
            part["completion_ids"][k][inside].cpu().numpy().astype(np.int64),
            log_probs[k][inside].double().cpu().numpy(),
            float(total[row]),
        )


def _replace(trainer: Any, replaced: Mapping[int, Success], output: dict[str, Any]) -> None:
    ids, mask = output["completion_ids"], output["completion_mask"]
    width = max(ids.shape[1], *(success.tokens.size for success in replaced.values()))
    before = int(mask.sum())
    ids = pad_to(ids, width, trainer._tokenizer.pad_token_id, "right").clone()
    mask = pad_to(mask, width, 0, "right").clone()
    for row, success in replaced.items():
        size = success.tokens.size
        ids[row], mask[row] = trainer._tokenizer.pad_token_id, 0
        ids[row, :size] = torch.as_tensor(success.tokens, dtype=ids.dtype, device=ids.device)
        mask[row, :size] = 1
    output["completion_ids"], output["completion_mask"] = ids, mask
    old = output.get("old_per_token_logps")
    # Rows that were just sampled keep a ratio of one: their own log-probabilities, from before any update.
    old = log_probs_now(trainer, output) if old is None else pad_to(old, width, 0, "right").clone()
    for row, success in replaced.items():
        values = torch.as_tensor(success.log_probs, dtype=old.dtype, device=old.device)
        old[row] = 0
        old[row, : success.tokens.size] = values
    output["old_per_token_logps"] = old
    output["num_items_in_batch"] = output["num_items_in_batch"] + (int(mask.sum()) - before)


def log_probs_now(trainer: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the (R, T) log-probabilities of the completions' tokens under the current model, without gradient."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1], batch_size=512
        )
    return found[0].detach()


def pad_to(tensor: torch.Tensor, width: int, fill: float, side: str) -> torch.Tensor:
    """Return a (rows, tokens) tensor widened to ``width`` with ``fill`` on the left or right side."""
    missing = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (missing, 0) if side == "left" else (0, missing), value=fill)
