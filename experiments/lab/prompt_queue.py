"""A queue of prompts: a fixed number of rollouts per step over a varying number of prompts.

Every step has the same rollouts, so a batch can only get more of the budget if fewer prompts share it. Here the prompts
of the data loader join a queue, and a step serves as many of them, in order, as its rollouts pay for at *one price for
all steps*: the marginal value of the last rollout if all known prompts shared the mean. Every step has exactly its
rollouts and every prompt gets its turn; prompts of little value pass quickly, valuable ones get more steps. The price
adapts a little to keep the queue at its usual length, so that no step runs out of prompts and no prompt waits long.

It was a part of the package until ``registrations/queue.md`` did not show that it helps.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.policies import allocate_expected
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.ids import PromptId
from knapsack_rl.plan import Plan
from knapsack_rl.session import Session

MOST_BATCHES = 3
"""Most batches of the data loader in the queue, which is also about the most steps that a prompt waits."""

USUAL_BATCHES = 1.5
"""Length of the queue, in batches of the data loader, at which the price is that of all prompts."""

CORRECTION = 0.5
"""Share by which the rollouts per prompt rise if the queue is a batch shorter, or fall if it is a batch longer."""

PRICE_SAMPLE = 1024
"""Most prompts that the price is computed from, evenly spaced in order of first observation."""


class PromptQueue:
    """Prompts that wait for their rollouts, first in, first out.

    Args:
        rollouts_per_prompt: mean rollouts of a prompt.
    """

    def __init__(self, rollouts_per_prompt: int) -> None:
        self.waiting: list[PromptId] = []
        self._mean = rollouts_per_prompt

    def push(self, prompts: Iterable[PromptId]) -> None:
        """Add prompts; one that is already waiting keeps its place."""
        self.waiting = list(dict.fromkeys([*self.waiting, *prompts]))

    def plan(self, session: Session, budget: int, batch: int) -> Plan:
        """Take the prompts of a step out of the queue, and return their rollouts.

        Args:
            session: of the run.
            budget: rollouts of the step, at least the mean.
            batch: prompts that join per step.
        """
        served = self.choose(session.allocator, budget, batch)
        self.waiting = self.waiting[len(served) :]
        return session.plan(served, budget // len(served), budget=budget)

    def choose(self, allocator: KnapsackAllocator, budget: int, batch: int) -> list[PromptId]:
        """Return the prompts that a step serves.

        Args:
            allocator: knows the prompts.
            budget: rollouts of the step.
            batch: prompts that join per step.
        """
        excess = len(self.waiting) / batch - USUAL_BATCHES
        price = self._price(allocator, self._mean * max(1.0 - CORRECTION * excess, 0.0))
        if price > 0.0:
            high = min(allocator.max_rollouts, budget + 1)  # more than the budget ends the step, however much more
            wanted = rollouts_at(allocator.belief(self.waiting, high).marginals, price, allocator.min_rollouts, high)
            served = int(np.searchsorted(np.cumsum(wanted), budget, side="right"))
        else:
            served = budget // self._mean  # nothing known, or nothing of value
        least = max(-(-budget // allocator.max_rollouts), len(self.waiting) - (MOST_BATCHES - 1) * batch, 1)
        served = min(max(served, least), max(budget // max(allocator.min_rollouts, 2), 1), len(self.waiting))
        return self.waiting[:served]

    def _price(self, allocator: KnapsackAllocator, mean: float) -> float:
        """Return the value of the last rollout if known prompts had this mean; 0 if none exceeds the minimum."""
        known = allocator.tracker.prompt_ids
        if not known:
            return 0.0
        sample = [known[i] for i in np.linspace(0, len(known) - 1, min(len(known), PRICE_SAMPLE)).astype(int)]
        least, most = max(allocator.min_rollouts, 2), allocator.max_rollouts
        budget = min(max(round(mean * len(sample)), least * len(sample) + 1), most * len(sample))
        marginals = allocator.belief(sample).marginals
        counts = allocate_expected(marginals, budget, least, most).counts
        bought = np.flatnonzero(counts > least)  # rollouts of the minimum have no price
        return float(marginals[bought, counts[bought] - 1].min(initial=np.inf)) if bought.size else 0.0


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
