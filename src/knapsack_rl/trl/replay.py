"""Replay: keep the rare successes of prompts that are hardly ever solved, and train on them again.

A group without a success has no gradient, though its prompt may have succeeded an epoch ago. Here the newest success
of a prompt whose group had few is kept with the log-probabilities it was sampled with. At a later visit without a
success it takes the place of one failure: the group's rewards differ again, and TRL's clipped loss weighs each token
of it by the ratio of its probability now to that at sampling,

    -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A),    r = exp(log pi_now - log pi_sampled).

The stored success has a positive advantage, so r counts up to 1 + eps_high and a success that the policy has moved
away from weighs little. The estimate of the success rate, the metrics and the log see what was sampled, not what was
replayed.

A success keeps its own row of every tensor of TRL's batch that has a number per token: log-probabilities under the
reference for a KL term, the mask of a tool's tokens, vLLM's log-probabilities and correction. All of them move with
it, and it is only used where the batch has the same tensors and a row with the same prompt tokens.
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
from knapsack_rl.trl.identity import IMAGE_COLUMNS
from knapsack_rl.trl.step import Step

REPLAY_FILE = "replay.npz"
LOG_PROBS = "old_per_token_logps"
"""TRL's name of the log-probabilities at sampling; absent while they equal those of the update."""
COLUMNS = {
    LOG_PROBS: 0.0,
    "ref_per_token_logps": 0.0,
    "sampling_per_token_logps": 0.0,
    "importance_sampling_ratio": 1.0,
    "tool_mask": 1,
}
"""TRL's tensors with a number per token of a completion, or a single one, and the number that pads them."""
COMPLETION = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch")
"""TRL's other tensors in a batch of text."""
RARE = 1 / 8
"""A success is kept if its prompt's rate was estimated at most this before the visit; above it is forgotten."""


@dataclass
class Success:
    """A stored success.

    Attributes:
        tokens: (T,) ids of the completion, its end included.
        prompt: ids of its prompt.
        columns: its row of the tensors in ``COLUMNS`` that its batch had, each (T,) or (1,), and always the
            log-probabilities of the tokens when they were sampled.
        reward: its training reward.
        uses: how often it was mixed in.
    """

    tokens: IntArray
    prompt: IntArray
    columns: dict[str, FloatArray]
    reward: float
    uses: int = 0

    def fits(self, row: int, output: Mapping[str, Any]) -> bool:
        """Return whether it can take the place of a row: the same prompt, and the same tensors of the same shape."""
        prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()].cpu().numpy()
        if not np.array_equal(prompt, self.prompt) or self.columns.keys() != columns_of(output) | {LOG_PROBS}:
            return False
        width = output["completion_ids"].shape[1]
        return all(
            numbers.size == (self.tokens.size if output[name].shape[1] == width else 1)
            for name, numbers in self.columns.items()
            if name in output
        )


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
        lists: dict[str, list[Any]] = {
            "tokens": [entry.tokens for entry in stored],
            "prompts": [entry.prompt for entry in stored],
        } | {name: [entry.columns.get(name, np.zeros(0)) for entry in stored] for name in COLUMNS}
        arrays = {
            "rewards": np.array([entry.reward for entry in stored], dtype=np.float64),
            "uses": np.array([entry.uses for entry in stored], dtype=np.int64),
        }
        for name, rows in lists.items():
            kind = np.float64 if name in COLUMNS else np.int64
            arrays[name] = np.concatenate([np.zeros(0), *rows]).astype(kind)
            arrays[f"{name}/sizes"] = np.array([row.size for row in rows], dtype=np.int64)
        write_state(path, {"max_uses": self.max_uses, "prompts": list(self.entries)}, arrays)

    def load(self, path: Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged.
        """
        header, arrays = read_state(path)
        rows = {
            name: np.split(arrays[name], np.cumsum(arrays[f"{name}/sizes"])[:-1])
            for name in ("tokens", "prompts", *COLUMNS)
        }
        self.entries = {
            prompt: Success(
                rows["tokens"][k],
                rows["prompts"][k],
                {name: rows[name][k] for name in COLUMNS if rows[name][k].size},
                float(arrays["rewards"][k]),
                int(arrays["uses"][k]),
            )
            for k, prompt in enumerate(header["prompts"])
        }


def check_replay(trainer: Any) -> None:
    """Refuse replay where a success cannot be put back with all that belongs to it.

    Args:
        trainer: a ``KnapsackGRPOTrainer`` before its first step.

    Raises:
        ValueError: several processes, GDPO, a reference that changes, or prompts with images.
    """
    processes, aggregation = trainer.accelerator.num_processes, trainer._aggregation
    if processes > 1 or aggregation != "sum_then_normalize":
        raise ValueError(
            "replay needs one process and multi_objective_aggregation='sum_then_normalize', got "
            f"{processes} and {aggregation!r}; set replay=0"
        )
    if getattr(trainer.args, "sync_ref_model", False):
        raise ValueError(
            "replay keeps the log-probabilities of a success under the reference model, which sync_ref_model=True "
            "changes; set sync_ref_model=False or replay=0"
        )
    if found := set(IMAGE_COLUMNS) & set(getattr(trainer.train_dataset, "column_names", None) or ()):
        raise ValueError(f"replay works on prompts of text, got the column {min(found)!r}; set replay=0")


def columns_of(output: Mapping[str, Any]) -> set[str]:
    """Return the names of a batch's tensors that a success keeps its row of."""
    return {name for name in COLUMNS if output.get(name) is not None}


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
        output: TRL's batch of the same rows; its completions and what belongs to them change.

    Returns:
        The (R,) training rewards with those of the successes mixed in, and metrics for the log.
    """
    known = {*COLUMNS, *COMPLETION}
    unknown = sorted(name for name, value in output.items() if value is not None and name not in known)
    if unknown:
        trainer.session.warn_once(
            "replay",
            f"replay does nothing: TRL's batch has {', '.join(unknown)}, which cannot move with a stored completion; "
            "set replay=0",
        )
        return total, _figures(buffer, 0)
    estimates = step.plan.allocation.success_rates
    stores: list[tuple[PromptId, int]] = []
    replaced: dict[int, Success] = {}
    trained_on = output["completion_mask"].any(dim=1).cpu().numpy()  # TRL can blank truncated completions
    for group in np.unique(step.group_R).tolist():
        prompt, rows = step.plan.ids[group], np.flatnonzero(step.group_R == group)
        visit = (int(groups.successes[group]), int(groups.totals[group]))
        action = buffer.review(prompt, *visit, math.nan if estimates is None else float(estimates[group]))
        if action == "store":
            found = rows[groups.success_R[rows] & trained_on[rows]]
            stores += [(prompt, int(row)) for row in found[:1]]
        elif action == "use":
            place = _place(buffer.entries[prompt], rows, total, output)
            if place is not None:
                replaced[place] = buffer.use(prompt)
    if stores:
        _store(buffer, trainer, stores, total, output)
    if replaced:
        total = total.copy()
        for row, success in replaced.items():
            total[row] = success.reward
        _replace(trainer, replaced, output)
    return total, _figures(buffer, len(replaced))


def _place(success: Success, rows: IntArray, total: FloatArray, output: Mapping[str, Any]) -> int | None:
    """Return a row of a group that a success may replace, with a positive advantage then; None if there is none."""
    for row in rows.tolist():
        others = total[rows[rows != row]]
        others = others[~np.isnan(others)]
        if others.size and success.reward > others.mean() and success.fits(row, output):
            return row
    return None


def _figures(buffer: SuccessBuffer, mixed_in: int) -> dict[str, float]:
    return {"replay/stored": float(len(buffer.entries)), "replay/mixed_in": float(mixed_in)}


def _store(
    buffer: SuccessBuffer, trainer: Any, stores: list[tuple[PromptId, int]], total: FloatArray, output: dict[str, Any]
) -> None:
    index = torch.tensor([row for _, row in stores], device=output["completion_ids"].device)
    names = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"} | columns_of(output)
    part = {name: output[name][index] for name in names}
    if LOG_PROBS not in part:
        part[LOG_PROBS] = log_probs_now(trainer, part)
    for k, (prompt, row) in enumerate(stores):
        tokens = part["completion_ids"][k][part["completion_mask"][k].bool()]
        buffer.entries[prompt] = Success(
            tokens.cpu().numpy().astype(np.int64),
            part["prompt_ids"][k][part["prompt_mask"][k].bool()].cpu().numpy().astype(np.int64),
            {name: part[name][k][: tokens.numel()].double().cpu().numpy() for name in columns_of(part)},
            float(total[row]),
        )


def _replace(trainer: Any, replaced: Mapping[int, Success], output: dict[str, Any]) -> None:
    before, trained_on = output["completion_ids"].shape[1], int(loss_mask(output).sum())
    width = max(before, *(success.tokens.size for success in replaced.values()))
    tokens = {row: success.tokens for row, success in replaced.items()}
    present = {row: np.ones_like(ids) for row, ids in tokens.items()}
    output["completion_ids"] = put(output["completion_ids"], tokens, width, trainer._tokenizer.pad_token_id)
    output["completion_mask"] = put(output["completion_mask"], present, width, 0)
    if output.get(LOG_PROBS) is None:
        # Rows that were just sampled keep a ratio of one: their own log-probabilities, from before any update.
        output[LOG_PROBS] = log_probs_now(trainer, output)
    for name in columns_of(output):
        per_token = output[name].shape[1] in (before, width)
        columns = {row: success.columns[name] for row, success in replaced.items()}
        output[name] = put(output[name], columns, width if per_token else 1, COLUMNS[name])
    output["num_items_in_batch"] = output["num_items_in_batch"] + (int(loss_mask(output).sum()) - trained_on)


def put(tensor: torch.Tensor, rows: Mapping[int, np.ndarray], width: int, fill: float) -> torch.Tensor:
    """Return a copy of a (rows, tokens) tensor, widened to ``width`` with ``fill``, in which some rows are replaced."""
    found = pad_to(tensor, width, fill, "right").clone()
    for row, numbers in rows.items():
        found[row] = fill
        found[row, : numbers.size] = torch.as_tensor(numbers).to(found)
    return found


def loss_mask(output: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the (R, T) tokens of TRL's loss: those of completions without those of tools."""
    tools = output.get("tool_mask")
    return output["completion_mask"] if tools is None else output["completion_mask"] * tools


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
