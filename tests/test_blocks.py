"""The greedy in blocks, and that of a table: against sorting all marginals of a written-out table."""

from __future__ import annotations

import itertools
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import knapsack_rl as kr
from cases import named_case
from knapsack_rl.allocation import blocks, solver
from knapsack_rl.allocation.value import KNAPSACK, marginal_values
from strategies import Batch, Knapsack, batches, concave_tables, no_deadline

SEED = 1965
EXTREME = [0.0, 5e-324, 1e-300, 1e-160, 1e-17, 1e-9, 0.001, 0.5, 0.999, 1 - 1e-9, 1 - 2**-52, 1 - 2**-53, 1.0]


def by_sorting(table: NDArray, budget: int, lower, upper, tier=None, priority=None) -> NDArray:
    """Every rollout that may be taken, sorted by the documented order; the first ones are taken."""
    prompts = len(table)
    lower, upper = np.broadcast_to(lower, prompts), np.broadcast_to(upper, prompts)
    tier = np.zeros(prompts, int) if tier is None else np.asarray(tier)
    priority = np.zeros(prompts) if priority is None else np.asarray(priority)
    row, n = np.nonzero((np.arange(table.shape[1]) >= lower[:, None]) & (np.arange(table.shape[1]) < upper[:, None]))
    order = np.lexsort((row, priority[row], n, tier[row], -table[row, n]))
    return lower + np.bincount(row[order[: budget - int(lower.sum())]], minlength=prompts)


def in_blocks(rates: NDArray, budget: int, lower, upper, tier=None, priority=None) -> NDArray:
    """The greedy in blocks for the paper's value of success rates."""
    prompts = rates.size
    return blocks.greedy_in_blocks(
        lambda rows, columns: KNAPSACK.marginals(rates[rows], columns),
        budget,
        np.broadcast_to(lower, prompts).astype(np.int64),
        np.broadcast_to(upper, prompts).astype(np.int64),
        np.zeros(prompts, np.int64) if tier is None else tier,
        np.zeros(prompts) if priority is None else priority,
    )


@no_deadline
@given(batches(max_prompts=9, cap=40))
def test_closed_form_rows_agree_with_sorting(batch: Batch) -> None:
    table = marginal_values(batch.rates, 40)
    expected = by_sorting(table, batch.budget, batch.lower, batch.upper, priority=batch.rates)
    assert in_blocks(*batch, priority=batch.rates).tolist() == expected.tolist()
    assert solver.solve(table, *batch[1:], priority=batch.rates).tolist() == expected.tolist()


def test_large_batches_agree_with_sorting(monkeypatch) -> None:
    """Rates in sixteenths make thousands of ties."""
    for prompts, steps, block in itertools.product([63, 64, 127, 128, 300, 2100, 5000], [0, 16], [2**10, 2**17]):
        with named_case(prompts=prompts, steps=steps, block=block):
            monkeypatch.setattr(blocks, "BLOCK", block)
            rng = np.random.default_rng(SEED + prompts)
            rates = rng.integers(0, steps + 1, prompts) / steps if steps else rng.beta(0.4, 0.4, prompts)
            table = marginal_values(rates, 40)
            tier, priority = rng.integers(0, 4, prompts), rng.integers(0, 5, prompts).astype(float)
            lower = rng.integers(1, 5, prompts)
            upper = lower + rng.integers(0, 36, prompts)
            for share in (0.0, 1e-3, 0.1, 0.5, 0.99, 1.0):
                budget = int(lower.sum() + share * (upper - lower).sum())
                expected = by_sorting(table, budget, lower, upper, tier, priority).tolist()
                assert solver.solve(table, budget, lower, upper, tier=tier, priority=priority).tolist() == expected
                assert in_blocks(rates, budget, lower, upper, tier, priority).tolist() == expected


@pytest.mark.parametrize("order", ["ascending", "descending", "periodic"])
def test_any_order_of_the_blocks(order: str) -> None:
    """The floor rises from block to block: sorted batches, and one where every 16th prompt alone has a value."""
    rates = np.sort(np.random.default_rng(SEED).beta(0.4, 0.4, 4096))
    if order == "descending":
        rates = rates[::-1].copy()
    elif order == "periodic":
        rates = np.where(np.arange(4096) % 16 == 0, 0.4, 1e-6)
    table = marginal_values(rates, 64)
    for budget in (2 * 4096 + 5, 8 * 4096, 60 * 4096):
        found = in_blocks(rates, budget, 2, 64, priority=rates)
        assert found.tolist() == by_sorting(table, budget, 2, 64, priority=rates).tolist()


def test_extreme_rates_with_caps_around_the_columns_of_a_round() -> None:
    for cap in [2, 32, 33, 34, 128, 257, 3000]:
        with named_case(cap=cap):
            table, rates = marginal_values(EXTREME, cap), np.array(EXTREME)
            for budget in {2 * 13, 2 * 13 + 1, 8 * 13, 13 * cap // 2, 13 * cap - 1, 13 * cap}:
                if not 2 * 13 <= budget <= 13 * cap:
                    continue
                found = in_blocks(rates, budget, 2, cap)
                assert found.tolist() == by_sorting(table, budget, 2, cap).tolist()
                value = sum(float(table[i, :n].sum()) for i, n in enumerate(found))
                assert kr.allocate(rates, budget, 2, cap).expected_value == pytest.approx(value, rel=1e-11)


@no_deadline
@given(concave_tables(max_prompts=6), st.integers(1, 40))
def test_any_falling_rows(instance: Knapsack, block: int) -> None:
    table = np.maximum(instance.marginals, 0.0)
    before, blocks.BLOCK = blocks.BLOCK, block
    found = blocks.greedy_in_blocks(
        lambda rows, columns: table[rows, :columns],
        instance.budget,
        instance.lower,
        instance.upper,
        np.zeros(len(table), np.int64),
        np.zeros(len(table)),
    )
    blocks.BLOCK = before
    assert found.tolist() == by_sorting(table, *instance[1:]).tolist()


def test_counts_around_a_block_follow_the_definition_in_fractions() -> None:
    """One marginal at a time in exact arithmetic, far from ties."""
    rates, budget = [0.01, 0.02, 0.995], 900

    def marginal(p: float, n: int) -> Fraction:
        p = Fraction(p)
        return p * (1 - p) ** 2 * (p**n * (1 - p) + (1 - p) ** n * p)

    counts = [2, 2, 2]
    gains = [marginal(p, 2) for p in rates]
    for _ in range(budget - 6):
        i = gains.index(max(gains))
        counts[i] += 1
        gains[i] = marginal(rates[i], counts[i])
    assert kr.allocate(rates, budget, max_rollouts=10**6).counts.tolist() == counts


def test_one_prompt_and_a_million_rollouts() -> None:
    for rate in EXTREME:
        assert kr.allocate([rate], 10**6, max_rollouts=10**6).counts.tolist() == [10**6]
    counts = kr.allocate([1e-6, 1 - 1e-6], 10**6, max_rollouts=10**6).counts
    assert counts.sum() == 10**6
    with pytest.raises(ValueError, match="budget must be at most 268435456 rollouts, got 1000000000; split"):
        kr.allocate([0.5, 0.2], 10**9, max_rollouts=10**9)


def test_equal_prompts_share_alike() -> None:
    for rate in EXTREME:
        with named_case(rate=rate):
            for prompts, budget in ((1000, 8003), (7, 7000 + 3)):
                counts = kr.allocate(np.full(prompts, rate), budget, max_rollouts=2000).counts
                assert counts.sum() == budget
                assert counts.max() - counts.min() <= 1
                assert (np.diff(counts) <= 0).all()  # what is left goes by position


def test_counts_move_with_their_prompts_at_scale() -> None:
    rng = np.random.default_rng(SEED)
    rates, order = rng.beta(0.4, 0.4, 3000), rng.permutation(3000)
    assert (kr.allocate(rates[order], 24_000).counts == kr.allocate(rates, 24_000).counts[order]).all()


def test_one_more_rollout_takes_none_away_in_closed_form() -> None:
    rates = np.concatenate([np.random.default_rng(SEED).beta(0.4, 0.4, 300), np.full(100, 0.25), EXTREME])
    before = kr.allocate(rates, 2 * rates.size, max_rollouts=200).counts
    for budget in [*range(2 * rates.size + 1, 2 * rates.size + 200), *range(5000, 5100)]:
        counts = kr.allocate(rates, budget, max_rollouts=200).counts
        assert (counts >= before).all()
        before = counts


def test_unseen_prompts_share_one_row() -> None:
    rng = np.random.default_rng(SEED)
    rates = rng.beta(0.4, 0.4, 500)
    rates[rng.random(500) < 0.3] = np.nan
    table = marginal_values(np.nan_to_num(rates), 50)
    table[np.isnan(rates)] = table[~np.isnan(rates)].mean(axis=0)
    for budget in (1000, 1500, 4000, 20_000):
        found = kr.allocate(rates, budget, max_rollouts=50)
        best = by_sorting(table, budget, 2, 50)
        assert found.expected_value == pytest.approx(
            sum(float(table[i, :n].sum()) for i, n in enumerate(best)), rel=1e-12
        )


def test_no_table_is_made_for_many_prompts() -> None:
    rates = np.random.default_rng(SEED).random(50_000)
    tracemalloc.start()
    kr.allocate(rates, 400_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000 * 8 * 32  # numbers per prompt, of which the budget takes 12; a table has 128


@pytest.mark.slow
def test_ten_thousand_instances_match_the_dynamic_program() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(10_000):
        prompts, width = int(rng.integers(1, 11)), int(rng.integers(2, 25))
        least = int(rng.integers(0, 3))
        pairs = np.sort(rng.integers(min(least, width), width + 1, (prompts, 2)), axis=1)
        lower, upper = pairs[:, 0], pairs[:, 1]
        budget = int(rng.integers(lower.sum(), upper.sum() + 1))
        rates = rng.beta(0.5, 0.5, prompts) if rng.random() < 0.7 else rng.integers(0, 9, prompts) / 8
        table = rng.normal(0.3, 1.0, (prompts, width)) if rng.random() < 0.3 else marginal_values(rates, width)
        exact = solver.solve(table, budget, lower, upper, method="dynamic-programming")
        found = solver.solve(table, budget, lower, upper)
        scale = np.abs(table).sum()
        best = sum(float(table[i, :n].sum()) for i, n in enumerate(exact))
        assert sum(float(table[i, :n].sum()) for i, n in enumerate(found)) == pytest.approx(
            best, rel=1e-12, abs=1e-15 * scale
        )
        if lower.min() >= 1:
            closed = kr.allocate(rates, budget, lower, upper)
            best = kr.allocate(rates, budget, lower, upper, method="dynamic-programming").expected_value
            assert closed.expected_value == pytest.approx(best, rel=1e-12, abs=1e-300)
