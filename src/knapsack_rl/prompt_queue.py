"""A queue of prompts: a fixed number of rollouts per step over a varying number of prompts.

Engines make the same number of rollouts in every step, so a batch can only get more of the budget if fewer prompts
share it. Here the prompts of the data loader join a queue, and a step serves as many of them, in order, as its rollouts
pay for at *one price for all steps*: the marginal value of the last rollout if all known prompts shared the mean.
Every step has exactly its rollouts and every prompt gets its turn; prompts of little value pass quickly, valuable ones
get more steps. The price adapts a little to keep the queue at its usual length, so that no step runs out of prompts and
no prompt waits long.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.degradation import reachable_maximum
from knapsack_rl.allocation.policies import allocate_expected
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.ids import PromptId
from knapsack_rl.session import Plan, Session

MOST_BATCHES = 3
"""Most batches of the data loader in the queue, which is also about the most steps that a prompt waits."""

USUAL_BATCHES = 1.5
"""Length of the queue, in batches of the data loader, at which the price is that of all prompts."""

CORRECTION = 0.5
"""Share by which the rollouts per prompt rise if the queue is a batch shorter, or fall if it is a batch longer."""

PRICE_SAMPLE = 1024
"""Most prompts that the price is computed from, evenly spaced in order of first observation."""


class PromptQueue:
    """Rows of prompts that wait for their rollouts, first in, first out.

    Args:
        rollouts_per_prompt: mean rollouts of a prompt.
    """

    def __init__(self, rollouts_per_prompt: int) -> None:
        self.rows: dict[PromptId, dict[str, Any]] = {}
        self._mean = rollouts_per_prompt

    def push(self, rows: Mapping[PromptId, dict[str, Any]]) -> None:
        """Add prompts to the queue; one that is already waiting keeps its place.

        Raises:
            ValueError: a row cannot be written to a checkpoint.
        """
        for prompt_id, row in rows.items():
            try:
                json.dumps([prompt_id, row], allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"prompt {prompt_id!r} cannot wait, its row is not JSON ({error}); use queue_prompts=False or "
                    "drop the column"
                ) from error
            self.rows.setdefault(prompt_id, row)

    def plan(self, session: Session, budget: int, batch: int) -> Plan:
        """Return the rollouts of a step over the prompts that it serves; they stay in the queue until removed.

        Where choosing fails, the oldest prompts are served, with the mean on average.

        Args:
            session: of the run.
            budget: rollouts of the step, at least the mean.
            batch: prompts that join per step.
        """
        chosen = session.survive("queue", lambda: self.choose(session.allocator, budget, batch))
        served = chosen or list(self.rows)[: budget // self._mean]
        return session.plan(served, budget // len(served), budget=budget)

    def choose(self, allocator: KnapsackAllocator, budget: int, batch: int) -> list[PromptId]:
        """Return the prompts that a step serves; they stay in the queue until removed.

        Args:
            allocator: knows the prompts.
            budget: rollouts of the step.
            batch: prompts that join per step.
        """
        waiting = list(self.rows)
        excess = len(waiting) / batch - USUAL_BATCHES
        price = self._price(allocator, self._mean * max(1.0 - CORRECTION * excess, 0.0))
        if price > 0.0:
            high = min(allocator.max_rollouts, budget + 1)  # more than the budget ends the step, however much more
            wanted = rollouts_at(allocator.belief(waiting, high).marginals, price, allocator.min_rollouts, high)
            served = int(np.searchsorted(np.cumsum(wanted), budget, side="right"))
        else:
            served = budget // self._mean  # nothing known, or nothing of value
        least = max(-(-budget // allocator.max_rollouts), len(waiting) - (MOST_BATCHES - 1) * batch, 1)
        served = min(max(served, least), max(budget // max(allocator.min_rollouts, 2), 1), len(waiting))
        return waiting[:served]

    def serve(self, served: list[PromptId]) -> dict[PromptId, dict[str, Any]]:
        """Take prompts out of the queue; return their rows."""
        return {prompt_id: self.rows.pop(prompt_id) for prompt_id in served}

    def _price(self, allocator: KnapsackAllocator, mean: float) -> float:
        """Return the value of the last rollout if known prompts had this mean; 0 if none exceeds the minimum."""
        known = allocator.tracker.prompt_ids
        if not known:
            return 0.0
        sample = [known[i] for i in np.linspace(0, len(known) - 1, min(len(known), PRICE_SAMPLE)).astype(int)]
        least, most = max(allocator.min_rollouts, 2), allocator.max_rollouts
        budget = min(max(round(mean * len(sample)), least * len(sample) + 1), most * len(sample))
        found, belief = allocator.believe_and_decide(
            allocator.records_of(sample),
            lambda belief, high: allocate_expected(belief.marginals, budget, least, high),
            lambda: reachable_maximum(budget, len(sample), least, most),
        )
        bought = np.flatnonzero(found.counts > least)  # rollouts of the minimum have no price
        return float(belief.marginals[bought, found.counts[bought] - 1].min(initial=np.inf)) if bought.size else 0.0

    def save(self, path: Path) -> None:
        """Write the queue as JSON; :meth:`load` reads it."""
        path.write_text(json.dumps(list(self.rows.items()), allow_nan=False), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Restore a queue.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            self.rows = {prompt_id: dict(row) for prompt_id, row in json.loads(path.read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} does not hold a queue of prompts: {error}") from error


def rollouts_at(marginals: FloatArray, price: float, min_rollouts: int, max_rollouts: int) -> IntArray:
    """Return the (M,) rollouts that are worth their price, within the bounds.

    Args:
        marginals: (M, K) D[i, n], falling from n = 1 on; the first rollout has no value without a second.
        price: > 0, the least value of a rollout.
        min_rollouts: N_low.
        max_rollouts: N_up.
    """
    further = (marginals[:, 1:max_rollouts] >= price).sum(axis=1)
    return np.clip(np.where(further > 0, further + 1, 0), min_rollouts, max_rollouts)
