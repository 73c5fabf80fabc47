"""TRL's batches of tensors: padded, joined, cut down to some rows."""

from __future__ import annotations

from typing import Any

import torch

from knapsack_rl.allocation.checks import IntArray

PADDING = {"prompt_ids": "left", "prompt_mask": "left"}
"""Sides of the padding of TRL's tensors; those not named are padded on the right."""


def concatenate(parts: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """One batch of several outputs of TRL: rows below each other, padded to the longest.

    Args:
        parts: outputs with 1-d tensors (a number per row), 2-d ones (per row and token) and ``num_items_in_batch``.
        pad_id: token that pads ids; everything else is padded with zeros.

    Raises:
        ValueError: an output holds something else, such as images.
    """
    merged: dict[str, Any] = {}
    for name, first in parts[0].items():
        tensors = [part[name] for part in parts]
        if name == "num_items_in_batch":
            merged[name] = sum(tensors[1:], start=tensors[0])
        elif isinstance(first, torch.Tensor) and first.dim() in (1, 2):
            if first.dim() == 2:
                fill = pad_id if name.endswith("_ids") else 0
                width = max(tensor.shape[1] for tensor in tensors)
                tensors = [pad_to(tensor, width, fill, PADDING.get(name, "right")) for tensor in tensors]
            merged[name] = torch.cat(tensors)
        else:
            raise ValueError(f"generation in rounds cannot join {name!r}: only text is supported")
    return merged


def pad_to(tensor: torch.Tensor, width: int, fill: float, side: str) -> torch.Tensor:
    """A (rows, tokens) tensor widened to ``width`` with ``fill`` on the left or right side."""
    missing = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (missing, 0) if side == "left" else (0, missing), value=fill)


def select(batch: dict[str, Any], rows: IntArray) -> dict[str, Any]:
    """The given rows of a batch, with the number of tokens that the loss divides by."""
    index = torch.as_tensor(rows, device=batch["completion_ids"].device)
    kept = {name: value if name == "num_items_in_batch" else value[index] for name, value in batch.items()}
    total = kept["completion_mask"].sum()
    kept["num_items_in_batch"] = total.to(batch["num_items_in_batch"].dtype)
    return kept
