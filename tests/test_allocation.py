"""The allocation policy against integer programming, enumeration and the paper's rule written out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import knapsack_rl as kr
from cases import named_case
from knapsack_rl.allocation.degradation import feasible_bounds
from knapsack_rl.allocation.policies import allocate_expected
from knapsack_rl.allocation.value import marginal_values
from oracles import milp_optimum
from strategies import Batch, batches, no_deadline, success_rates

NAN = float("nan")


def value_table(rates, most: int) -> NDArray:
    """V(N, p) for N = 0..most, straight from the paper's formula."""
    p, n = np.reshape(rates, (-1, 1)), np.arange(most + 1)
    table = (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2
    table[:, 0] = 0.0
    return table


def total(values: NDArray, counts) -> float:
    return float(sum(values[i, n] for i, n in enumerate(counts)))


def check_feasible(allocation: kr.Allocation, batch: Batch) -> None:
    assert allocation.counts.dtype == np.int64
    assert allocation.counts.shape == batch.rates.shape
    assert allocation.counts.sum() == batch.budget
    assert (allocation.counts >= batch.lower).all()
    assert (allocation.counts <= batch.upper).all()
    assert not allocation.degraded


# --- feasibility and optimality ---


@no_deadline
@given(batches(allow_nan=True))
def test_sums_are_exact_and_bounds_hold(batch: Batch) -> None:
    check_feasible(kr.allocate(*batch), batch)


@no_deadline
@given(batches(allow_nan=True, least=0, cap=9, max_prompts=6))
def test_sums_are_exact_and_bounds_hold_when_prompts_may_be_skipped(batch: Batch) -> None:
    check_feasible(kr.allocate(*batch), batch)


@no_deadline
@given(batches(allow_nan=True, per_prompt=False))
def test_fallback_sums_are_exact_and_bounds_hold(batch: Batch) -> None:
    check_feasible(kr.allocate(*batch, fallback=True), batch)


@no_deadline
@given(batches(allow_nan=True, max_prompts=5))
def test_fallback_sums_are_exact_with_bounds_per_prompt(batch: Batch) -> None:
    check_feasible(kr.allocate(*batch, fallback=True), batch)


def test_fallback_when_another_prompts_minimum_leaves_less_than_the_uniform_budget() -> None:
    found = kr.allocate([NAN, 0.5], budget=32, min_rollouts=[2, 30], max_rollouts=128, fallback=True)
    assert found.counts.tolist() == [2, 30]


def test_optimum_matches_integer_programming() -> None:
    for seed in range(8):
        with named_case(seed=seed):
            rng = np.random.default_rng(seed)
            prompts, most = int(rng.integers(3, 11)), int(rng.integers(6, 21))
            rates = rng.beta(0.4, 0.4, prompts)
            least = seed % 3  # 0, 1 and 2: with 0 the problem is not concave
            budget = int(rng.integers(max(least, 1) * prompts, most * prompts))
            found = kr.allocate(rates, budget, least, most)
            values = value_table(rates, most)
            assert found.counts.sum() == budget
            assert total(values, found.counts) == pytest.approx(milp_optimum(values, budget, least, most), rel=1e-7)
            assert found.expected_value == pytest.approx(total(values, found.counts), rel=1e-12)


@no_deadline
@given(batches(max_prompts=3, least=0, cap=6), st.sampled_from(["auto", "dynamic-programming"]))
def test_small_batches_match_enumeration(batch: Batch, method) -> None:
    """Minima of 0 included. Mistake 1: the first rollout beyond the minimum is worth V(N_low+1) - V(N_low)."""
    lower, upper = np.broadcast_to(batch.lower, batch.rates.shape), np.broadcast_to(batch.upper, batch.rates.shape)
    values = value_table(batch.rates, int(upper.max()))
    ranges = [range(low, high + 1) for low, high in zip(lower, upper, strict=True)]
    best = max(total(values, counts) for counts in itertools.product(*ranges) if sum(counts) == batch.budget)
    found = kr.allocate(*batch, method=method)
    assert total(values, found.counts) == pytest.approx(best, rel=1e-12, abs=1e-14)


def test_rollouts_beyond_the_minimum_are_valued_by_their_gain_alone() -> None:
    """Mistake 1: taking the whole of V(3) as the gain of the third rollout shifts budget to large values."""
    worst = 0.0
    for rates in itertools.combinations([0.05, 0.2, 0.34, 0.5, 0.7, 0.9], 3):
        values = value_table(rates, 8)
        mistaken = values.copy()
        mistaken[:, 2] = 0.0
        choices = [c for c in itertools.product(range(2, 9), repeat=3) if sum(c) == 10]
        wrong = max(choices, key=lambda counts: total(mistaken, counts))
        best = max(total(values, counts) for counts in choices)
        worst = max(worst, 1 - total(values, wrong) / best)
        assert total(values, kr.allocate(rates, 10, 2, 8).counts) == pytest.approx(best, rel=1e-12)
    assert worst > 0.01  # the mistake would show in these cases


def test_skipping_is_chosen_where_it_pays() -> None:
    """Four rollouts for three prompts: leaving one of two prompts out is better than giving it one rollout."""
    counts = kr.allocate([0.3, 0.3, 0.999], 4, min_rollouts=0, max_rollouts=8).counts
    assert sorted(counts.tolist()) == [0, 0, 4] or counts.tolist() == [2, 2, 0]
    values = value_table([0.3, 0.3, 0.999], 4)
    assert total(values, counts) == pytest.approx(max(values[0, 4], 2 * values[0, 2]), rel=1e-12)


# --- order ---


@no_deadline
@given(batches(allow_nan=True), st.randoms(use_true_random=False), st.booleans())
def test_counts_do_not_depend_on_the_order_of_the_batch(batch: Batch, random, fallback: bool) -> None:
    """Prompts that agree in rate and bounds are interchangeable; any others move with their counts."""
    prompts = batch.rates.size
    lower, upper = np.broadcast_to(batch.lower, prompts), np.broadcast_to(batch.upper, prompts)
    if fallback:  # one pair of bounds, as in the paper
        lower, upper = np.full(prompts, lower.min()), np.full(prompts, upper.max())
    order = np.array(random.sample(range(prompts), prompts))

    def allocate(at: NDArray) -> list[tuple[float, ...]]:
        counts = kr.allocate(batch.rates[at], batch.budget, lower[at], upper[at], fallback=fallback).counts
        keys = np.nan_to_num(batch.rates[at], nan=2.0)
        return sorted(zip(keys.tolist(), lower[at].tolist(), upper[at].tolist(), counts.tolist(), strict=True))

    found, moved = allocate(np.arange(prompts)), allocate(order)
    if prompts == 1 or isinstance(batch.lower, int) or fallback:
        assert found == moved
    else:  # equal rates with unequal bounds share a place in the tie rule, so only totals per rate are fixed
        for key in {entry[0] for entry in found}:
            assert sum(e[-1] for e in found if e[0] == key) == sum(e[-1] for e in moved if e[0] == key)


def test_equal_marginal_values_go_to_fewer_rollouts_then_to_the_lower_rate() -> None:
    assert sorted(kr.allocate([0.4] * 3, 10, 2, 8).counts.tolist()) == [3, 3, 4]
    # Without value the tie goes within a class by position alone, and classes come in order.
    assert kr.allocate([1.0, 0.0, 1.0, 0.0], 11, 2, 8).counts.tolist() == [2, 4, 2, 3]


# --- unseen prompts (mistake 4) ---


@no_deadline
@given(
    st.lists(success_rates(), min_size=1, max_size=5),
    st.integers(1, 3),
    st.data(),
)
def test_unseen_prompts_are_valued_as_the_mean_of_the_others(seen, unseen: int, data: st.DataObject) -> None:
    rates = np.array([*seen, *[NAN] * unseen])
    budget = data.draw(st.integers(2 * rates.size, 10 * rates.size))
    found = kr.allocate(rates, budget, 2, 10)
    values = value_table(seen, 10)
    values = np.vstack([values, np.repeat(values.mean(axis=0, keepdims=True), unseen, axis=0)])
    # Concave rows: the best further rollouts, one at a time, are an optimum.
    counts = np.full(rates.size, 2)
    for _ in range(budget - counts.sum()):
        gains = [values[i, n + 1] - values[i, n] if n < 10 else -1.0 for i, n in enumerate(counts)]
        counts[int(np.argmax(gains))] += 1
    assert total(values, found.counts) == pytest.approx(total(values, counts), rel=1e-12, abs=1e-14)
    assert found.expected_value == pytest.approx(total(values, counts), rel=1e-12, abs=1e-14)


def test_unseen_prompts_are_not_treated_as_hopeless() -> None:
    """Mistake 4: with p = 0 in its place the unseen prompt would get the minimum."""
    unseen = kr.allocate([NAN, 0.3, 0.6], 24).counts
    hopeless = kr.allocate([0.0, 0.3, 0.6], 24).counts
    assert hopeless[0] == 2
    assert unseen[0] > 4
    fallback = kr.allocate([NAN, 0.3, 0.6], 24, fallback=True).counts
    assert fallback[0] == 8


@pytest.mark.parametrize("fallback", [False, True])
@no_deadline
@given(prompts=st.integers(1, 9), budget=st.integers(0, 60))
def test_all_unseen_is_uniform(fallback: bool, prompts: int, budget: int) -> None:
    budget += 2 * prompts
    counts = kr.allocate([NAN] * prompts, budget, fallback=fallback).counts
    assert counts.sum() == budget
    assert counts.max() - counts.min() <= 1


def test_rates_are_kept_in_the_result() -> None:
    found = kr.allocate([0.25, NAN], 8)
    assert found.success_rates is not None
    assert found.success_rates[0] == 0.25
    assert np.isnan(found.success_rates[1])


def test_expand_names_the_prompt_of_each_rollout() -> None:
    found = kr.allocate([0.5, 0.1, 1.0], 20)
    prompts = found.expand()
    assert prompts.shape == (20,)
    assert np.bincount(prompts, minlength=3).tolist() == found.counts.tolist()
    assert (np.diff(prompts) >= 0).all()


# --- budget without value ---


def test_leftover_goes_to_unsolved_then_unseen_then_solved() -> None:
    for budget in range(10, 26):
        with named_case(budget=budget):
            counts = kr.allocate([1.0, NAN, 0.0, 1.0, 0.0], budget, 2, 5).counts
            left, expected = budget - 10, {}
            for name, members in (("unsolved", 2), ("unseen", 1), ("solved", 2)):
                share = min(left, 3 * members)
                expected[name] = sorted([2 + (share + k) // members for k in range(members)])
                left -= share
            assert sorted(counts[[2, 4]].tolist()) == expected["unsolved"]
            assert counts[[1]].tolist() == expected["unseen"]
            assert sorted(counts[[0, 3]].tolist()) == expected["solved"]


def test_effective_prompts_are_filled_to_their_cap_first() -> None:
    found = kr.allocate([0.5, 0.0, 1.0, 0.0], 20, 2, 6)
    assert found.counts.tolist() == [6, 6, 2, 6]
    found = kr.allocate([0.5, 0.0, 1.0, 0.0], 18, 2, 6)
    assert found.counts.tolist() == [6, 5, 2, 5]
    assert "6 rollouts that no prompt values went to 2 unsolved prompts" in found.reason
    assert kr.allocate([0.5, 0.0], 8, 2, 6).reason == ""


def test_leftover_is_spread_evenly_whatever_the_method() -> None:
    """The one prompt with a value is at its cap; nine rollouts beyond the minima are left for two unsolved prompts."""
    for method, least in itertools.product(["auto", "dynamic-programming"], [0, 1, 2]):
        with named_case(method=method, least=least):
            counts = kr.allocate([0.0, 0.5, 0.0, 1.0], 3 * least + 4 + 9, least, [20, 4, 20, 20], method=method).counts
            assert counts[[1, 3]].tolist() == [4, least]
            assert sorted(counts[[0, 2]].tolist()) == [least + 4, least + 5]


# --- the paper's fallback rule, by hand ---


def paper_rule_by_hand(rates, budget: int, low: int, high: int) -> dict[str, list[int]]:
    """Counts per class, sorted; of the effective prompts only the total (their split is the knapsack's)."""
    names = ["unsolved", "solved", "unseen", "effective"]
    kind = ["unseen" if math.isnan(p) else "unsolved" if p == 0 else "solved" if p == 1 else "effective" for p in rates]
    counts = {name: [] for name in names}
    for name in ("unsolved", "solved"):
        counts[name] = [low] * kind.count(name)
    counts["unseen"] = [budget // len(rates)] * kind.count("unseen")
    available = budget - sum(sum(c) for c in counts.values())
    need = 0.0
    for p in rates:
        if 0 < p < 1:
            commoner = max(p, 1 - p)
            need += min(high, max(low, math.log(0.1) / math.log(commoner) if commoner < 1 else math.inf))
    effective = kind.count("effective")
    spend = min(available, math.ceil(need)) if effective else 0
    surplus = available - spend
    for name in ("unsolved", "solved"):
        members = counts[name]
        while surplus and members and min(members) < high:
            members[members.index(min(members))] += 1
            surplus -= 1
    more = min(surplus, effective * high - spend)
    surplus -= more
    while surplus:
        members = counts["unseen"]
        members[members.index(min(members))] += 1
        surplus -= 1
    counts["effective"] = [spend, more]
    return {name: sorted(c) if name != "effective" else c for name, c in counts.items()}


@no_deadline
@given(batches(allow_nan=True, per_prompt=False, least=1, cap=40, max_prompts=9))
def test_fallback_is_the_papers_rule(batch: Batch) -> None:
    rates, budget, low, high = batch
    expected = paper_rule_by_hand(rates.tolist(), budget, low, high)
    counts = kr.allocate(*batch, fallback=True).counts
    assert sorted(counts[rates == 0].tolist()) == expected["unsolved"]
    assert sorted(counts[rates == 1].tolist()) == expected["solved"]
    assert sorted(counts[np.isnan(rates)].tolist()) == expected["unseen"]
    effective = (rates > 0) & (rates < 1)
    spend, more = expected["effective"]
    assert counts[effective].sum() == spend + more
    if effective.any() and not more:  # the split is the knapsack's optimum for what they were given
        values = value_table(rates[effective], high)
        alone = kr.allocate(rates[effective], spend, low, high)
        assert total(values, counts[effective]) == pytest.approx(total(values, alone.counts), rel=1e-12, abs=1e-15)


def test_fallback_worked_example() -> None:
    """p = 0.5 needs 3.32 rollouts, p = 0.1 needs 21.85: 26 in all; 58 - 26 - 4 minima of 2 leave 24."""
    found = kr.allocate([0.5, 0.1, 0.0, 0.0, 1.0, 1.0], 58, fallback=True)
    assert found.counts[:2].sum() == 26
    assert found.counts[2:].tolist() == [14, 14, 2, 2]
    assert found.reason.startswith("fallback: 24 rollouts")
    assert "2 unsolved prompts" in found.reason
    without_unsolved = kr.allocate([0.5, 0.1, 1.0, 1.0], 50, fallback=True)
    assert without_unsolved.counts[:2].sum() == 26
    assert without_unsolved.counts[2:].tolist() == [12, 12]
    short = kr.allocate([0.5, 0.1, 0.0, 1.0], 20, fallback=True)
    assert short.counts.tolist() == [*kr.allocate([0.5, 0.1], 16).counts.tolist(), 2, 2]
    assert short.reason == ""


def test_no_surplus_no_unseen_is_the_plain_optimum() -> None:
    rates = [0.02, 0.05, 0.97, 0.0]
    assert kr.allocate(rates, 40, fallback=True).counts.tolist() == kr.allocate(rates, 40).counts.tolist()


# --- mistakes 2 and 3 ---


def test_bounds_may_be_left_out_and_every_prompt_may_be_effective() -> None:
    """Mistake 2: an unset N_up crashed; more budget than effective prompts need divided by zero."""
    for fallback in (False, True):
        counts = kr.allocate([0.5, 0.4, 0.6], 90, fallback=fallback).counts
        assert counts.sum() == 90
        assert counts.min() >= 2


def test_minima_above_the_budget_are_explained() -> None:
    with pytest.raises(ValueError, match=r"a budget of 7 .* 4 prompts.*at least 8.*at most 512.*\[8, 512\]"):
        kr.allocate([0.5, 0.4, 0.6, 0.1], 7)


def test_caps_hold_for_fallback_and_leftover() -> None:
    """Mistake 3: a cap of 16 gave 29, one of 8 gave 26."""
    for cap, rates in itertools.product(
        [8, 16], [[0.5, 0.0], [0.5, 0.0, 0.0, 1.0], [0.9, 1.0, 1.0], [NAN, 0.0, 0.4], [0.5] * 3]
    ):
        with named_case(cap=cap, rates=rates):
            for budget in range(2 * len(rates), cap * len(rates) + 1):
                for fallback in (False, True):
                    counts = kr.allocate(rates, budget, 2, cap, fallback=fallback).counts
                    assert counts.sum() == budget
                    assert counts.max() <= cap


def test_a_cap_far_above_the_budget_costs_nothing() -> None:
    """No prompt can get more than the budget, so a cap that means "no cap" must not exhaust memory."""
    for fallback in (False, True):
        expected = kr.allocate([0.3, 0.5, 0.0], 32, 2, 32, fallback=fallback).counts.tolist()
        assert kr.allocate([0.3, 0.5, 0.0], 32, 2, 10**12, fallback=fallback).counts.tolist() == expected


# --- errors ---


def test_errors_say_what_is_allowed() -> None:
    for arguments, message in [
        (([], 8), r"non-empty one-dimensional.*\(0,\)"),
        (([[0.5]], 8), r"one-dimensional.*\(1, 1\)"),
        ((0.5, 8), "one-dimensional"),
        (([0.5, 1.5], 8), r"success_rates\[1\].*1\.5.*\[0, 1\].*NaN marks an unseen prompt"),
        (([0.5, "x"], 8), "success_rates must be numbers"),
        (([0.5], 8.0), "budget must be a whole number >= 0, got 8.0"),
        (([0.5], -1), "budget must be a whole number >= 0, got -1"),
        (([0.5], True), "budget must be a whole number"),
        (([0.5], 8, 2.5), "min_rollouts must be a whole number >= 0.*2.5"),
        (([0.5], 8, -1), "min_rollouts must be a whole number >= 0.*-1"),
        (([0.5], 8, 9, 8), "min_rollouts 9 is above max_rollouts 8"),
        (([0.5], 9, 2, 8), r"budget of 9 .*\[2, 8\]"),
        (([0.5, 0.5], 9, [2, 2, 2], 8), r"min_rollouts .*one per prompt \(2\)"),
    ]:
        with named_case(arguments=arguments, message=message):
            for fallback in (False, True):
                with pytest.raises(ValueError, match=message):
                    kr.allocate(*arguments, fallback=fallback)


def test_the_method_is_passed_on() -> None:
    with pytest.raises(ValueError, match="method must be one of"):
        kr.allocate([0.5], 8, method="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="greedy needs a concave table"):
        kr.allocate([0.5], 8, 0, method="greedy")


# --- degradation ---


def test_feasible_batches_keep_their_bounds() -> None:
    for budget in range(8, 33):
        lower, upper, reason = feasible_bounds(budget, 2, 8, np.zeros((4, 8)), np.zeros(4))
        assert (lower.tolist(), upper.tolist(), reason) == ([2] * 4, [8] * 4, "")


def test_degradation_order() -> None:
    table = marginal_values([0.1, 0.9, 0.4, 0.0], 8)
    lower, upper, reason = feasible_bounds(15, 5, 8, table, np.zeros(4))  # 1. a lower minimum
    assert (lower.tolist(), upper.tolist()) == ([3] * 4, [8] * 4)
    assert "budget 15 is below 4 prompts x 5" in reason
    assert "min_rollouts lowered to 3" in reason
    lower, upper, reason = feasible_bounds(8, 5, 8, table, np.zeros(4))  # two still hold both outcomes
    assert lower.tolist() == [2] * 4
    lower, upper, reason = feasible_bounds(5, 2, 8, table, np.zeros(4))  # 2. the best pairs, one group of three
    assert lower.tolist() == [2, 0, 2, 0]
    assert upper.tolist() == [2, 0, 3, 0]
    assert "2 prompts served" in reason
    lower, upper, reason = feasible_bounds(35, 2, 8, table, np.zeros(4))  # 3. a higher maximum
    assert (lower.tolist(), upper.tolist()) == ([2] * 4, [9] * 4)
    assert "max_rollouts raised to 9" in reason


@no_deadline
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(0, 60), st.integers(0, 6), st.integers(2, 7))
def test_degraded_bounds_always_fit_the_budget(rates: list[float], budget: int, low: int, high: int) -> None:
    low = min(low, high)
    table = marginal_values(rates, high)
    lower, upper, reason = feasible_bounds(budget, low, high, table, np.zeros(len(rates)))
    assert (lower >= 0).all()
    assert (lower <= upper).all()
    assert lower.sum() <= budget <= upper.sum()
    found = allocate_expected(table, budget, low, high)
    assert found.counts.sum() == budget
    assert found.degraded == (not low * len(rates) <= budget <= high * len(rates)) == bool(reason)
    assert found.reason == reason
    if found.degraded and budget > 1 and low > 0:
        assert (found.counts != 1).all()  # a single rollout has no gradient


def test_pairs_go_to_the_prompts_that_gain_most() -> None:
    table = marginal_values([0.1, 0.9, 0.4, 0.0, 0.3], 8)
    found = allocate_expected(table, 4, 2, 8)
    pairs = kr.value(2, [0.1, 0.9, 0.4, 0.0, 0.3])
    assert set(np.flatnonzero(found.counts)) == set(np.argsort(-pairs)[:2])
    assert found.counts.max() == 2


def test_expected_values_beyond_the_table_count_as_nothing() -> None:
    found = allocate_expected(np.array([[0.0, 2.0], [0.0, 1.0]]), 10, 1, 5)
    assert found.counts.tolist() == [5, 5]
    found = allocate_expected(np.array([[0.0, 2.0], [0.0, 1.0]]), 11, 1, 5)
    assert sorted(found.counts.tolist()) == [5, 6]
    assert found.degraded


@no_deadline
@given(batches(max_prompts=6, cap=10, per_prompt=False))
def test_expected_allocation_of_known_rates_is_the_plain_optimum(batch: Batch) -> None:
    table = marginal_values(batch.rates, max(batch.upper, 2))
    found = allocate_expected(table, batch.budget, batch.lower, batch.upper, priority=batch.rates)
    values = value_table(batch.rates, batch.upper)
    plain = kr.allocate(*batch)
    assert total(values, found.counts) == pytest.approx(total(values, plain.counts), rel=1e-12, abs=1e-15)
    assert not found.degraded
    check_feasible(found, batch)


def test_priority_decides_who_is_served_in_a_degraded_batch() -> None:
    """Of equal prompts three are served, and which ones does not depend on the order of the batch."""
    table = np.repeat(marginal_values([0.3], 8), 7, axis=0)
    priority = np.array([5.0, 1.0, 6.0, 0.0, 3.0, 2.0, 4.0])
    served = {float(priority[i]) for i in np.flatnonzero(allocate_expected(table, 6, 2, 8, priority=priority).counts)}
    order = priority[::-1].copy()
    turned = {float(order[i]) for i in np.flatnonzero(allocate_expected(table, 6, 2, 8, priority=order).counts)}
    assert served == turned


def test_tables_with_negative_marginals_are_solved_exactly() -> None:
    """A rollout without value is better than one of negative value; such a table was certified optimal and was not."""
    rng = np.random.default_rng(0)
    beside_zeros = 0
    for case in range(600):
        prompts, width = int(rng.integers(1, 4)), int(rng.integers(2, 5))
        marginals = rng.integers(-3, 4, (prompts, width)) * (rng.random((prompts, width)) < 0.6)
        marginals[rng.random(prompts) < 0.3] = 0
        if case % 2:
            marginals = -np.sort(-marginals, axis=1)
        table = np.concatenate([np.zeros((prompts, 1)), np.cumsum(marginals, axis=1)], axis=1)
        low = int(rng.integers(0, 2))
        budget = int(rng.integers(low * prompts, width * prompts + 1))
        method: Any = ("auto", "dynamic-programming")[case % 3 == 0]
        found = kr.allocate(np.full(prompts, 0.5), budget, low, width, value=table, method=method)
        best = max(
            sum(table[i, n] for i, n in enumerate(counts))
            for counts in itertools.product(range(low, width + 1), repeat=prompts)
            if sum(counts) == budget
        )
        assert found.expected_value == pytest.approx(best, abs=1e-12), (case, table, budget, low, found)
        beside_zeros += bool((marginals < 0).any() and (marginals == 0).all(axis=1).any())
    assert beside_zeros > 100


def test_a_rate_whose_value_is_no_double_is_unsolved() -> None:
    """V is about p^2 = 1e-400: the prompt shares what is left with the unsolved one, and is not called effective."""
    found = kr.allocate([1e-200, 0.0, 1.0], 34)
    assert found.counts.tolist() == [16, 16, 2]
    assert found.reason == "28 rollouts that no prompt values went to 2 unsolved prompts"
    assert kr.allocate([1e-200, 0.5], 16).counts.tolist() == [2, 14]
    # The chance of a gradient is about 2 p and does not vanish; the paper's rule compares the rate with 0.
    assert kr.allocate([1e-200, 0.0], 16, value="nonzero-gradient").counts.tolist() == [14, 2]
    assert kr.allocate([1e-200, 0.0], 16, fallback=True).counts.tolist() == [14, 2]
