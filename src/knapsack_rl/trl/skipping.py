"""Leave rows without a gradient out of the updates, exactly.

Without a KL term and an entropy term, TRL's loss of a micro-batch is a sum over its rows,

    L = sum_i A_i f_i / Z,    f_i a function of the row's tokens and the sign of its advantage A_i > 0 or < 0,

so a row with A_i = 0, or with no token in the loss, costs a forward and a backward pass and adds nothing. Only the
normaliser Z knows of it: the rows of the micro-batch, its tokens, or the tokens of the whole generation. Here the
remaining rows of an update are put together anew, and each advantage is multiplied by Z' / Z, the normaliser of its new
micro-batch over that of its old one. TRL's loss is called as it is, with fewer rows, and its gradient is that of all
rows. The order of rows inside an update is free, so rows of similar length go together, and padding is cut.

Every process keeps as many rows in as many micro-batches as the one with the most, because TRL gathers metrics by row
and gradients are averaged in step; a process with fewer fills up with its shortest rows without a gradient. The
micro-batches left over come first and are empty: the last one of an update, in which gradients are averaged, never is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType

from knapsack_rl.trl.replay import COLUMNS, COMPLETION, loss_mask

Batch = dict[str, Any]

NORMALISERS = {
    **dict.fromkeys(("grpo", "sapo", "dr_grpo", "luspo"), "rows"),
    "bnpo": "tokens",
    **dict.fromkeys(("dapo", "cispo", "vespo"), "generation"),
}
"""For each of TRL's losses, the sum over its rows is divided by the rows or tokens of the micro-batch, or by a number
that belongs to the generation."""
OF_PROMPT = ("prompt_ids", "prompt_mask")
OF_COMPLETION = ("completion_ids", "completion_mask", *COLUMNS)
EMPTY: Batch = {}
"""A micro-batch without rows."""


def why_inexact(trainer: Any) -> str | None:
    """Return why rows with advantage 0 have a gradient or change that of others, None if they do not.

    Args:
        trainer: a ``GRPOTrainer``.
    """
    args = trainer.args
    reasons = {
        f"the KL term of beta={args.beta} has a gradient in every row": args.beta != 0.0,
        "the entropy term has a gradient in every row": args.entropy_coef != 0.0 or args.use_adaptive_entropy,
        "the quantile of top_entropy_quantile is that of all rows": args.top_entropy_quantile < 1.0,
        "the router's auxiliary loss has a gradient in every row": trainer.aux_loss_enabled,
        "use_liger_kernel=True may compute another loss": getattr(args, "use_liger_kernel", False),
        f"loss_type={args.loss_type!r} is not known here": args.loss_type not in NORMALISERS,
    }
    return next((reason for reason, found in reasons.items() if found), None)


@dataclass(frozen=True)
class Skipping:
    """How the micro-batches of one generation are put together anew.

    Attributes:
        normaliser: "rows", "tokens" or "generation", see ``NORMALISERS``.
        group: consecutive micro-batches that always belong to one update and one generation.
        multiple: prompts and completions are padded to a multiple of so many tokens.
        cut: sides on which padding may be cut: "left" of prompts, "right" of completions.
        in_step: whether every micro-batch needs a forward pass, because the processes share the weights.
    """

    normaliser: str
    group: int
    multiple: int = 1
    cut: tuple[str, ...] = ("left", "right")
    in_step: bool = False

    @classmethod
    def of(cls, trainer: Any) -> Skipping:
        """Return what fits the configuration of a ``GRPOTrainer``, for which :func:`why_inexact` returns None."""
        args = trainer.args
        return cls(
            NORMALISERS[args.loss_type],
            math.gcd(args.gradient_accumulation_steps, args.steps_per_generation),
            args.pad_to_multiple_of or 1,
            _sides(trainer),
            trainer.accelerator.distributed_type not in (DistributedType.NO, *_REPLICATED),
        )

    def regroup(
        self, batches: Sequence[Batch], most: Callable[[list[int]], list[int]]
    ) -> tuple[list[Batch] | None, float]:
        """Return the micro-batches of a generation without the rows that have no gradient.

        Args:
            batches: of TRL, with equally many rows each; they are not changed.
            most: takes whole numbers and returns, for each, the largest among all processes.

        Returns:
            As many micro-batches, some of them empty, and the share of rows that is left out; None and 0 if a process
            has :func:`unknown_tensors`.
        """
        size = self.group
        groups = [_joined(batches[k : k + size]) for k in range(0, len(batches), size)]
        useful = [has_gradient(whole) for whole, _ in groups]
        fewest = size if self.in_step else 1
        *kept, unknown = most([*(max(int(rows.sum()), fewest) for rows in useful), len(unknown_tensors(batches[0]))])
        if unknown:
            return None, 0.0
        found: list[Batch] = []
        for (whole, slot_R), useful_R, rows in zip(groups, useful, kept, strict=True):
            found += self._regroup(whole, slot_R, useful_R, rows)
        return found, 1.0 - sum(kept) / sum(rows.numel() for rows in useful)

    def _regroup(self, whole: Batch, slot_R: torch.Tensor, useful_R: torch.Tensor, rows: int) -> list[Batch]:
        """Divide the given number of rows, those with a gradient first, over the last micro-batches of a group."""
        size, per_batch = self.group, slot_R.numel() // self.group
        length_R = whole["prompt_mask"].sum(1) + whole["completion_mask"].sum(1)
        first = torch.argsort(length_R + (~useful_R) * (int(length_R.max()) + 1), stable=True)[:rows]
        ordered = first[torch.argsort(length_R[first], stable=True)]
        before = self._normalisers([_rows(whole, slot_R == slot) for slot in range(size)])
        full = size if self.in_step else math.ceil(rows / per_batch)
        found = [EMPTY] * (size - full)
        for chosen in torch.tensor_split(ordered, full):
            batch = self._without_padding(_rows(whole, chosen))
            (after,) = self._normalisers([batch])
            factor_R = after / before[slot_R[chosen]]
            advantages = batch["advantages"]
            factor_R = factor_R.to(advantages.dtype).reshape(-1, *[1] * (advantages.dim() - 1))
            found.append(batch | {"advantages": advantages * factor_R})
        return found

    def _normalisers(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Return the number by which TRL divides the sum over the rows of each micro-batch, up to a constant."""
        device = batches[0]["advantages"].device
        if self.normaliser == "rows":
            return torch.tensor([batch["advantages"].shape[0] for batch in batches], device=device).double()
        if self.normaliser == "tokens":
            return torch.stack([loss_mask(batch).sum().clamp(min=1) for batch in batches]).double()
        return torch.ones(len(batches), dtype=torch.float64, device=device)

    def _without_padding(self, batch: Batch) -> Batch:
        """Return the micro-batch without the columns that are padding in all of its rows."""
        found = dict(batch)
        for names, side in ((OF_PROMPT, "left"), (OF_COMPLETION, "right")):
            if side not in self.cut:
                continue
            used = batch[names[1]].any(0).nonzero().flatten()
            width = batch[names[1]].shape[1]
            needed = 1 if not used.numel() else width - int(used[0]) if side == "left" else int(used[-1]) + 1
            needed = min(width, math.ceil(needed / self.multiple) * self.multiple)
            for name in names:
                if found.get(name) is not None:
                    found[name] = found[name][:, width - needed :] if side == "left" else found[name][:, :needed]
        return found


_REPLICATED = tuple(kind for kind in DistributedType if kind.name.startswith("MULTI_"))
"""Processes with a copy of the weights each: they meet in the last backward pass of an update only."""


def _sides(trainer: Any) -> tuple[str, ...]:
    """Return the sides on which padding can be cut without a change of the loss."""
    config = trainer.model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(config, "rope_parameters", None) or {}
    if "dynamic" in str(rope) or "longrope" in str(rope):  # the rotation depends on the width
        return ()
    # Before TRL 1.12 this loss is a mean over the padding too.
    padded = trainer.args.loss_type == "luspo" and trainer.args.importance_sampling_level == "token"
    # TRL counts positions from the left edge, padding included: only rotations depend on their difference alone.
    return (*(("left",) if rope else ()), *(() if padded else ("right",)))


def unknown_tensors(batch: Mapping[str, Any]) -> list[str]:
    """Return the names in a batch of what is not known to have one entry per row, such as the tensors of images."""
    known = {*COLUMNS, *COMPLETION}
    return sorted(name for name, value in batch.items() if value is not None and name not in known)


def has_gradient(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return which rows have a gradient (R,): an advantage, and a token in the loss."""
    advantages = batch["advantages"].reshape(batch["advantages"].shape[0], -1)
    return advantages.ne(0).any(1) & loss_mask(batch).bool().any(1)


def _joined(batches: Sequence[Batch]) -> tuple[Batch, torch.Tensor]:
    """Return the rows of several micro-batches as one, and (R,) the position of each row's among them."""
    sizes = torch.tensor([batch["advantages"].shape[0] for batch in batches])
    slot_R = torch.repeat_interleave(torch.arange(len(batches)), sizes).to(batches[0]["advantages"].device)
    whole = {
        name: torch.cat([batch[name] for batch in batches]) if torch.is_tensor(value) and value.dim() else value
        for name, value in batches[0].items()
    }
    return whole, slot_R


def _rows(batch: Batch, index: torch.Tensor) -> Batch:
    return {name: value[index] if torch.is_tensor(value) and value.dim() else value for name, value in batch.items()}
