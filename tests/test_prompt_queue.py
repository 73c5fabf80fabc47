"""The queue of prompts: every prompt gets its turn, every step its rollouts, and all steps one price."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from experiments.lab.prompt_queue import MOST_BATCHES, PromptQueue, rollouts_at
from knapsack_rl import AllocationSettings, KnapsackAllocator, Session, allocate, value
from knapsack_rl.allocation.value import marginal_values
from strategies import no_deadline


def informed(rates, rollouts=4000):
    """An allocator that knows the rates of prompts 0, 1, ... as well as counts can show."""
    allocator = KnapsackAllocator("beta")
    for prompt_id, p in enumerate(rates):
        good = round(p * rollouts)
        allocator.observe([prompt_id] * rollouts, [1.0] * good + [0.0] * (rollouts - good))
    return allocator


@no_deadline
@given(
    rates=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    price=st.floats(1e-9, 0.2),
    low=st.integers(0, 4),
    high=st.integers(4, 20),
)
def test_rollouts_at_a_price_are_those_that_pay(rates, price, low, high):
    counts = rollouts_at(marginal_values(rates, 32), price, low, high)
    for p, n in zip(rates, counts, strict=True):
        assert low <= n <= high
        gains = marginal_values([p], 32)[0]
        if low < n:
            assert n == 2 or gains[n - 1] >= price
        if n < high and n >= 2:
            assert gains[n] < price


@no_deadline
@given(seed=st.integers(0, 2**32 - 1), known=st.booleans())
def test_every_prompt_gets_its_turn_in_order_and_every_step_its_rollouts(seed, known):
    rng = np.random.default_rng(seed)
    batch, mean, steps = int(rng.integers(1, 8)), int(rng.integers(2, 9)), 12
    allocator = informed(rng.beta(0.4, 0.4, batch * steps), 20) if known else KnapsackAllocator("beta")
    queue = PromptQueue(mean)
    order = []
    for step in range(steps):
        queue.push(range(step * batch, (step + 1) * batch))
        served, counts = serve(queue, allocator, batch * mean, batch)
        order += served
        assert counts.sum() == batch * mean
        assert len(served) == len(counts) >= 1
        allocator.observe(np.repeat(served, counts).tolist(), rng.integers(0, 2, batch * mean))
        if mean >= 2 * MOST_BATCHES:  # the minimum of two leaves room to serve so many
            assert len(queue.waiting) <= MOST_BATCHES * batch
    assert order == list(range(len(order)))
    assert order + queue.waiting == list(range(steps * batch))


def serve(queue, allocator, budget, batch):
    plan = queue.plan(Session(AllocationSettings(), allocator), budget, batch)
    return plan.ids, plan.counts


def test_one_price_beats_one_budget_per_batch_and_is_close_to_one_budget_for_all():
    """Batches differ: half of them hold hardly anything of value."""
    rng = np.random.default_rng(0)
    batches = [np.where(rng.random(16) < 0.5, 0.995, 0.003) if b % 2 else rng.uniform(0.1, 0.6, 16) for b in range(24)]
    rates = np.concatenate(batches)
    allocator, queue = informed(rates), PromptQueue(8)
    counts = np.zeros(rates.size, int)
    for b in range(24):
        queue.push(range(16 * b, 16 * b + 16))
        served, given = serve(queue, allocator, 128, 16)
        counts[served] = given
    assert counts.sum() == 24 * 128
    assert (counts > 0).sum() >= rates.size - MOST_BATCHES * 16  # the last ones still wait
    per_batch = np.concatenate([allocate(batch, 128).counts for batch in batches])
    at_once = allocate(rates, 24 * 128).counts
    queued, even, best = (value(chosen, rates).sum() for chosen in (counts, per_batch, at_once))
    assert even + 0.7 * (best - even) < queued


def test_nothing_known_serves_the_batch():
    queue = PromptQueue(4)
    queue.push("abc")
    served, counts = serve(queue, KnapsackAllocator(), 12, 3)
    assert served == ["a", "b", "c"] and counts.tolist() == [4, 4, 4]


def test_a_prompt_that_waits_keeps_its_place():
    queue = PromptQueue(4)
    queue.push("ab")
    queue.push("ca")
    assert queue.waiting == ["a", "b", "c"]
