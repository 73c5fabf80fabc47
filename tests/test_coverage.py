"""Skipping prompts: feasibility and value against enumeration, and that no prompt starves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import knapsack_rl as kr
from knapsack_rl.allocation.coverage import LONGEST_SKIP, price_of_rollout, serve_or_skip
from knapsack_rl.allocation.value import marginal_values

CASES = 400


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_feasible_and_within_a_group_of_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(CASES):
        prompts, cap = int(rng.integers(1, 5)), int(rng.integers(2, 7))
        budget = int(rng.integers(0, prompts * cap + 1))
        rates = rng.choice([0.0, 1.0, 0.3, 0.5, 0.05, 0.9, rng.random()], prompts)
        marginals = marginal_values(rates, cap)
        counts = serve_or_skip(marginals, budget, cap, rates)
        assert counts.sum() == budget
        assert (counts >= 0).all() and (counts <= cap).all()
        assert not (counts == 1).any() or budget == 1 or cap == 2
        values = np.concatenate([np.zeros((prompts, 1)), np.cumsum(marginals, axis=1)], axis=1)
        best = max(
            sum(values[i, n] for i, n in enumerate(choice))
            for choice in itertools.product(range(cap + 1), repeat=prompts)
            if sum(choice) == budget
        )
        found = values[np.arange(prompts), counts].sum()
        assert best - values[:, min(3, cap)].max() - 1e-12 <= found <= best + 1e-12


def test_price_is_the_value_of_the_last_rollout() -> None:
    marginals = marginal_values([0.5, 0.1, 0.9], 8)
    assert price_of_rollout(marginals, np.array([4, 0, 2])) == min(marginals[0, 3], marginals[2, 1] / 2)
    assert price_of_rollout(marginals, np.array([0, 0, 0])) == 0.0


def test_solved_prompts_are_skipped_and_checked_again() -> None:
    """No prompt waits longer than the longest skip plus the epoch in which it is noticed."""
    allocator = kr.KnapsackAllocator(min_rollouts=0)
    rng = np.random.default_rng(0)
    rates = np.concatenate([np.full(24, 0.9999), np.full(8, 0.4)])
    ids = list(range(32))
    waited, longest, skipped = np.zeros(32), 0.0, 0
    for _ in range(60):
        counts = allocator.allocate(ids, budget=128).counts
        assert counts.sum() == 128 and not (counts == 1).any()
        waited = np.where(counts > 0, 0, waited + 1)
        longest, skipped = max(longest, waited.max()), skipped + int((counts == 0).sum())
        of_rollout = np.repeat(ids, counts)
        allocator.observe(of_rollout.tolist(), (rng.random(128) < rates[of_rollout]).astype(float))
    assert skipped > 0.5 * 60 * 24  # most visits of solved prompts cost nothing
    # Age counts visits of all prompts; while most are skipped an epoch of visits takes several steps.
    assert longest <= 8 * LONGEST_SKIP
