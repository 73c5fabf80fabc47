"""Budget over batches, against enumeration of all counts of small epochs."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import knapsack_rl as kr
from knapsack_rl import KnapsackAllocator, plan_epoch
from strategies import no_deadline, success_rates


@no_deadline
@given(
    st.lists(st.lists(success_rates(), min_size=1, max_size=2), min_size=1, max_size=2),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.3, 1.0, math.inf]),
    st.integers(0, 24),
)
def test_the_plan_is_the_best_there_is(batches: list[list[float]], block: int, slack: float, budget: int) -> None:
    rates = [np.array(batch) for batch in batches]
    sizes = [len(batch) for batch in batches]
    share = [budget * size / sum(sizes) for size in sizes]
    best = -1.0
    for counts in product(range(2, 6), repeat=sum(sizes)):
        parts = np.split(np.array(counts), np.cumsum(sizes)[:-1])
        totals = [int(part.sum()) for part in parts]
        within = all(abs(t - s) <= slack * s + 1e-9 for t, s in zip(totals, share, strict=True))
        if sum(totals) == budget and within and all(total % block == 0 for total in totals):
            best = max(best, sum(kr.value(n, p).sum() for n, p in zip(parts, rates, strict=True)))
    if best < 0.0:
        with pytest.raises(ValueError, match=r"no totals fit|no multiple"):
            plan_epoch(batches, budget, 2, 5, rows_multiple=block, slack=slack)
        return
    plan = plan_epoch(batches, budget, 2, 5, rows_multiple=block, slack=slack)
    totals = [int(counts.sum()) for counts in plan]
    assert sum(totals) == budget
    assert all(total % block == 0 for total in totals)
    assert all(abs(t - s) <= slack * s + 1e-9 for t, s in zip(totals, share, strict=True))
    assert all(((counts >= 2) & (counts <= 5)).all() for counts in plan)
    reached = sum(kr.value(n, p).sum() for n, p in zip(plan, rates, strict=True))
    assert reached == pytest.approx(best, rel=1e-9, abs=1e-15)


def test_without_a_limit_it_is_the_knapsack_over_all_prompts() -> None:
    rates = np.random.default_rng(4).uniform(0.02, 0.98, 60)
    plan = plan_epoch(np.split(rates, 4), 480, slack=math.inf)
    joint = kr.allocate(rates, 480)
    assert np.concatenate(plan).tolist() == joint.counts.tolist()


def test_beliefs_of_an_allocator_are_taken_as_they_are() -> None:
    allocator = KnapsackAllocator()
    for k in range(8):
        allocator.observe([k] * 8, [1.0] * k + [0.0] * (8 - k))
    batches = [[0, 7], [3, 4], ["new", 5]]
    plan = plan_epoch([allocator.belief(batch) for batch in batches], 48, rows_multiple=2, slack=0.5)
    assert [int(counts.sum()) % 2 for counts in plan] == [0, 0, 0]
    assert sum(int(counts.sum()) for counts in plan) == 48


def test_an_unseen_prompt_is_worth_the_mean_of_the_epoch() -> None:
    rates = [np.array([0.3, np.nan]), np.array([0.7, 0.1])]
    known = np.array([0.3, 0.7, 0.1])
    plan = np.concatenate(plan_epoch(rates, 24, 2, 12, slack=math.inf))
    values = kr.value(np.arange(13)[:, None], known).T
    table = np.vstack([values[0], values.mean(axis=0), values[1], values[2]])
    best = max(table[range(4), counts].sum() for counts in product(range(2, 13), repeat=4) if sum(counts) == 24)
    assert table[range(4), plan].sum() == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 8), "at least one batch"),
        (([[]], 8), "batch 0 is empty"),
        (([[0.5], [[0.5]]], 8), "batch 1 must hold"),
        (([[0.5]], 8, 0), "min_rollouts"),
        (([[0.5]], 1), "no totals fit"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_epoch(*arguments)


def test_a_value_that_rises_and_a_negative_slack_are_refused() -> None:
    with pytest.raises(ValueError, match="not concave"):
        plan_epoch([[0.5]], 8, value=lambda n, p: (n >= 6) * p)
    with pytest.raises(ValueError, match="slack must be"):
        plan_epoch([[0.5]], 8, slack=-0.1)
