"""The batch that the data loader drew, over all processes: which prompts it holds, and rows on their way.

Prompts are gathered once per group, by key. A row stays in its process unless the allocation needs it in another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knapsack_rl.allocation.checks import IntArray
from knapsack_rl.ids import PromptId
from knapsack_rl.trl.identity import Block, BrokenGroupError, Identity, Row

Gather = Callable[[list[Any]], list[Any]]
"""Joins the lists of all processes, in order of rank."""


@dataclass
class Drawn:
    """The groups of a batch.

    Attributes:
        keys: (B,) prompt of each group.
        rows: a row of each prompt that this process holds.
        holders: processes that hold a row of each prompt.
        features: (B,) values of each group's prompt by name of the column.
    """

    keys: list[PromptId]
    rows: dict[PromptId, Row]
    holders: dict[PromptId, list[int]]
    features: dict[str, list[Any]]

    def bring(
        self, prompts: Sequence[PromptId], group_R: IntArray, rank: int, processes: int, gather: Gather
    ) -> list[Row]:
        """Return the rows of this process's share, after those that other processes hold have come.

        Args:
            prompts: (M,) prompts of the step.
            group_R: (R,) position of each rollout's prompt among them, R a multiple of the processes.
            rank: of this process.
            processes: their number.
            gather: joins lists; called only if a row has to move.
        """
        shares = np.split(group_R, processes)
        needed = [{prompts[group] for group in np.unique(share)} for share in shares]
        moving = {
            prompt: holders[0]
            for prompt, holders in self.holders.items()
            if any(prompt in wanted for process, wanted in enumerate(needed) if process not in holders)
        }
        arrived = dict(self.rows)
        if moving:
            sent = [(prompt, self.rows[prompt]) for prompt, holder in moving.items() if holder == rank]
            arrived |= dict(gather(sent))
        return [dict(arrived[prompts[group]]) for group in shares[rank]]


def draw(
    rows: list[Row],
    size: int,
    identity: Identity,
    *,
    rank: int,
    processes: int,
    gather: Gather,
    warn: Callable[[str], None],
) -> Drawn:
    """Return the groups of the batch of which this process drew rows.

    Args:
        rows: of this process, as many as in every other one.
        size: rows of a group.
        identity: tells prompts apart.
        rank: of this process.
        processes: their number.
        gather: joins lists; not called for one process.
        warn: takes a warning about an id.

    Raises:
        BrokenGroupError: a group holds several prompts; raised on all processes, as is the following.
        ValueError: a prompt cannot be identified.
    """
    fault: Exception | None = None
    mine: list[Block] = []
    try:
        mine = identity.blocks(rows, size, rank * len(rows))
    except ValueError as error:
        fault = error
    parts = [(rank, mine, fault and str(fault), isinstance(fault, BrokenGroupError))]
    if processes > 1:
        parts = gather(parts)
    for _, _, message, broken in parts:
        if message is not None:
            raise (BrokenGroupError if broken else ValueError)(message)
    blocks = [block for _, theirs, _, _ in parts for block in theirs]
    keys = identity.settle(blocks, size, warn)
    if any(key is None for key in keys):
        raise ValueError(f"rows have no id in column {identity.id_column!r}")
    features_of = {block.number: block.features for block in blocks}
    columns = {name: [features_of[k][at] for k in range(len(keys))] for at, name in enumerate(identity.features)}
    found = Drawn([key for key in keys if key is not None], {}, {}, columns)
    for holder, theirs, _, _ in parts:
        for block in theirs:
            key = found.keys[block.number]
            if holder not in found.holders.setdefault(key, []):
                found.holders[key].append(holder)
            if holder == rank:
                found.rows.setdefault(key, rows[block.start])
    return found
