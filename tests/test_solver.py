"""The knapsack solver against enumeration, integer programming and a greedy written out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import knapsack_rl as kr
from cases import named_case
from knapsack_rl.allocation import solver
from knapsack_rl.allocation.value import marginal_values
from oracles import milp_optimum, values_of
from strategies import Knapsack, arbitrary_tables, concave_tables, no_deadline

SEED = 20250929


def value_at(marginals: NDArray, counts) -> float:
    return sum(float(row[:n].sum()) for row, n in zip(marginals, counts, strict=True))


def enumerate_best(marginals: NDArray, lower, upper) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Best total per budget; among equal totals the one whose last counts are smallest."""
    values = values_of(marginals)
    prompts = len(values)
    ranges = [np.arange(low, high + 1) for low, high in zip(lower, upper, strict=True)]
    # The last prompt varies slowest: the first of equal totals is the one wanted.
    counts = np.stack(np.meshgrid(*ranges[::-1], indexing="ij"), axis=-1).reshape(-1, prompts)[:, ::-1]
    totals = values[np.arange(prompts), counts].sum(axis=1)
    sums = counts.sum(axis=1)
    best = {}
    for budget in range(int(sums.min()), int(sums.max()) + 1):
        rows = np.flatnonzero(sums == budget)
        top = rows[np.argmax(totals[rows])]
        best[budget] = (float(totals[top]), tuple(counts[top].tolist()))
    return best


def greedy_by_hand(instance: Knapsack, tier, priority) -> list[int]:
    """One rollout at a time, in the order documented in the solver."""
    counts = [int(n) for n in instance.lower]
    for _ in range(instance.budget - sum(counts)):
        free = [i for i in range(len(counts)) if counts[i] < instance.upper[i]]
        best = min(free, key=lambda i: (-instance.marginals[i, counts[i]], tier[i], counts[i], priority[i], i))
        counts[best] += 1
    return counts


def random_bounds(rng: np.random.Generator, prompts: int, width: int, least: int = 0) -> tuple[NDArray, NDArray]:
    pairs = np.sort(rng.integers(least, width + 1, (prompts, 2)), axis=1)
    return pairs[:, 0], pairs[:, 1]


# --- optimality ---


@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("concave", [True, False])
def test_every_small_instance_is_optimal(prompts: int, concave: bool) -> None:
    """All bounds up to 5 (up to order, tables being random) and all budgets; whole numbers make ties common."""
    rng = np.random.default_rng(SEED + prompts)
    pairs = [(low, high) for low in range(6) for high in range(low, 6)]
    instances = 0
    for chosen in itertools.combinations_with_replacement(pairs, prompts):
        lower, upper = np.array(chosen).T
        table = rng.integers(-1, 5, (prompts, 5)).astype(float)
        if concave:
            table = -np.sort(-table, axis=1)
        for budget, (total, lexicographic) in enumerate_best(table, lower, upper).items():
            auto = solver.solve(table, budget, lower, upper)
            assert auto.sum() == budget
            assert (auto >= lower).all()
            assert (auto <= upper).all()
            assert value_at(table, auto) == total
            exact = solver.solve(table, budget, lower, upper, method="dynamic-programming")
            assert tuple(exact.tolist()) == lexicographic
            instances += 1
    assert instances > 20


def test_medium_instances_match_integer_programming() -> None:
    for seed in range(12):
        with named_case(seed=seed):
            rng = np.random.default_rng(SEED + seed)
            prompts, width = int(rng.integers(4, 13)), int(rng.integers(6, 25))
            table = rng.normal(0.3, 1.0, (prompts, width))
            if seed % 2:
                table = -np.sort(-table, axis=1)
            lower, upper = random_bounds(rng, prompts, width)
            budget = int(rng.integers(lower.sum(), upper.sum() + 1))
            counts = solver.solve(table, budget, lower, upper)
            optimum = milp_optimum(values_of(table), budget, lower, upper)
            assert value_at(table, counts) == pytest.approx(optimum, rel=1e-7, abs=1e-7)


def test_greedy_equals_dynamic_programming_on_concave_tables() -> None:
    rng = np.random.default_rng(SEED)
    for case in range(600):
        prompts, width = int(rng.integers(1, 13)), int(rng.integers(2, 33))
        least = 1
        if case % 3 == 0:
            table = marginal_values(rng.beta(0.5, 0.5, prompts), width)
        elif case % 3 == 1:
            table = -np.sort(-rng.normal(0.5, 1.0, (prompts, width)), axis=1)
            least = 0
        else:
            table = -np.sort(-rng.integers(0, 4, (prompts, width)).astype(float), axis=1)
            least = 0
        lower, upper = random_bounds(rng, prompts, width, least)
        budget = int(rng.integers(lower.sum(), upper.sum() + 1))
        greedy = solver.solve(table, budget, lower, upper, method="greedy")
        exact = solver.solve(table, budget, lower, upper, method="dynamic-programming")
        assert greedy.sum() == exact.sum() == budget
        assert (greedy >= lower).all()
        assert (greedy <= upper).all()
        # The dynamic program adds values, the greedy compares marginals: they agree up to rounding of the sums.
        assert value_at(table, greedy) == pytest.approx(value_at(table, exact), rel=1e-12, abs=1e-14)


@no_deadline
@given(arbitrary_tables())
def test_any_table_matches_enumeration(instance: Knapsack) -> None:
    best, lexicographic = enumerate_best(instance.marginals, instance.lower, instance.upper)[instance.budget]
    found = solver.solve(*instance, method="dynamic-programming")
    assert tuple(found.tolist()) == lexicographic
    assert value_at(instance.marginals, solver.solve(*instance)) == best


@no_deadline
@given(concave_tables(max_prompts=8, max_rollouts=14))
def test_budget_and_bounds_hold(instance: Knapsack) -> None:
    for method in ("auto", "greedy", "dynamic-programming"):
        counts = solver.solve(*instance, method=method)
        assert counts.dtype == np.int64
        assert counts.sum() == instance.budget
        assert (counts >= instance.lower).all()
        assert (counts <= instance.upper).all()


# --- order and ties ---


@st.composite
def with_tie_breaks(draw: st.DrawFn, tables: st.SearchStrategy[Knapsack]) -> tuple[Knapsack, list[int], list[int]]:
    instance = draw(tables)
    size = len(instance.lower)
    tier = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    return instance, tier, draw(st.permutations(range(size)))


@no_deadline
@given(with_tie_breaks(concave_tables(max_prompts=8, largest=3)), st.booleans())
def test_ties_go_by_the_documented_order(drawn, with_priority: bool) -> None:
    instance, tier, priority = drawn
    if not with_priority:
        priority = [0] * len(priority)
    found = solver.solve(*instance, method="greedy", tier=tier, priority=priority)
    assert found.tolist() == greedy_by_hand(instance, tier, priority)


def test_tie_rule_worked_example() -> None:
    level = np.ones((3, 4))
    assert solver.solve(level, 4, 0, 4).tolist() == [2, 1, 1]  # fewer rollouts, then position
    assert solver.solve(level, 4, 0, 4, priority=[3, 2, 1]).tolist() == [1, 1, 2]
    assert solver.solve(level, 5, 0, 4, tier=[1, 0, 1]).tolist() == [1, 4, 0]  # the tier comes before the count
    assert solver.solve(level, 3, [2, 0, 0], 4, priority=[0, 1, 1]).tolist() == [2, 1, 0]  # count before priority
    assert solver.solve(level, 5, 0, 4, method="dynamic-programming").tolist() == [4, 1, 0]
    assert solver.solve(level, 5, 0, 4, method="dynamic-programming", priority=[1, 0, 1]).tolist() == [1, 4, 0]
    assert solver.solve(level, 5, 0, 4, method="dynamic-programming", tier=[1, 1, 0]).tolist() == [1, 0, 4]


@no_deadline
@given(
    with_tie_breaks(st.one_of(concave_tables(max_prompts=7, largest=3), arbitrary_tables(max_prompts=5))),
    st.randoms(use_true_random=False),
    st.sampled_from(["auto", "dynamic-programming"]),
)
def test_counts_move_with_their_rows(drawn, random, method) -> None:
    (table, budget, lower, upper), tier, priority = drawn
    tier, priority = np.array(tier), np.array(priority)
    order = np.array(random.sample(range(len(lower)), len(lower)))
    found = solver.solve(table, budget, lower, upper, tier=tier, priority=priority, method=method)
    moved = solver.solve(
        table[order], budget, lower[order], upper[order], tier=tier[order], priority=priority[order], method=method
    )
    assert moved.tolist() == found[order].tolist()


@no_deadline
@given(
    concave_tables(max_prompts=4, largest=3),
    st.lists(st.integers(0, 3), min_size=2, max_size=9),
    st.integers(0, 40),
    st.randoms(use_true_random=False),
    st.sampled_from(["greedy", "dynamic-programming"]),
)
def test_identical_rows_are_interchangeable(instance: Knapsack, copies, budget: int, random, method) -> None:
    kind = np.array(copies) % len(instance.lower)
    lower, upper = instance.lower[kind], instance.upper[kind]
    budget = int(np.clip(budget, lower.sum(), upper.sum()))
    order = np.array(random.sample(range(kind.size), kind.size))

    def solve(kinds: NDArray) -> list[tuple[int, int]]:
        counts = solver.solve(
            instance.marginals[kinds],
            budget,
            instance.lower[kinds],
            instance.upper[kinds],
            priority=kinds,
            method=method,
        )
        return sorted(zip(kinds.tolist(), counts.tolist(), strict=True))

    assert solve(kind) == solve(kind[order])


@no_deadline
@given(with_tie_breaks(concave_tables(max_prompts=7, max_rollouts=9, largest=4)))
def test_one_more_rollout_takes_none_away(drawn) -> None:
    (table, _, lower, upper), tier, priority = drawn
    before = None
    for budget in range(int(lower.sum()), int(upper.sum()) + 1):
        counts = solver.solve(table, budget, lower, upper, method="greedy", tier=tier, priority=priority)
        if before is not None:
            assert sorted((counts - before).tolist()) == [0] * (len(counts) - 1) + [1]
        before = counts


def test_one_more_rollout_takes_none_away_at_scale() -> None:
    """With ties between prompts of equal rates."""
    rates = np.random.default_rng(SEED).integers(0, 17, 300) / 16
    table = marginal_values(rates, 128)
    before = np.full(300, 2)
    for budget in range(600, 6000, 173):
        counts = solver.solve(table, budget, 2, 128, priority=rates)
        assert counts.sum() == budget
        assert (counts >= before).all()
        before = counts


@no_deadline
@given(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(1, 9), st.data())
def test_a_table_of_zeros_spreads_evenly_tier_by_tier(tiers: list[int], cap: int, data: st.DataObject) -> None:
    low = data.draw(st.integers(0, cap))
    budget = data.draw(st.integers(low * len(tiers), cap * len(tiers)))
    counts = solver.solve(np.zeros((len(tiers), cap)), budget, low, cap, tier=tiers)
    left = budget - low * len(tiers)
    for tier in sorted(set(tiers)):
        members = counts[np.array(tiers) == tier]
        share = min(left, (cap - low) * members.size)
        assert members.sum() == low * members.size + share
        assert members.max() - members.min() <= 1
        left -= share


# --- extremes ---


@pytest.mark.parametrize("method", ["auto", "greedy", "dynamic-programming"])
def test_budgets_at_both_ends(method) -> None:
    table = marginal_values([0.3, 0.9, 0.0], 6)
    lower, upper = np.array([2, 1, 3]), np.array([6, 4, 3])
    assert solver.solve(table, 6, lower, upper, method=method).tolist() == [2, 1, 3]
    assert solver.solve(table, 13, lower, upper, method=method).tolist() == [6, 4, 3]


def test_one_prompt_takes_everything() -> None:
    for budget in range(2, 9):
        assert solver.solve(marginal_values([0.2], 8), budget, 2, 8).tolist() == [budget]


def test_equal_prompts_get_equal_budgets() -> None:
    for rate in [0.0, 1e-300, 0.07, 0.5, 1.0 - 1e-16, 1.0]:
        with named_case(rate=rate):
            counts = solver.solve(marginal_values([rate] * 7, 40), 7 * 9 + 3, 1, 40)
            assert sorted(counts.tolist()) == [9, 9, 9, 9, 10, 10, 10]


def test_groups_of_thousands() -> None:
    for budget in [6, 7, 500, 5_000, 9_000, 14_999, 15_000]:
        with named_case(budget=budget):
            table = marginal_values([0.001, 0.4, 0.9995], 5000)
            counts = solver.solve(table, budget, 2, 5000)
            assert counts.sum() == budget
            best = np.sort(table[:, 2:], axis=None)[::-1][: budget - 6].sum() + table[:, :2].sum()
            assert value_at(table, counts) == pytest.approx(best, rel=1e-12)
            taken = [table[i, n - 1] for i, n in enumerate(counts) if n > 2]
            left = [table[i, n] for i, n in enumerate(counts) if n < 5000]
            assert min(taken, default=np.inf) >= max(left, default=-np.inf)


def test_the_scale_of_the_values_does_not_matter() -> None:
    for scale in [1e-310, 1e-200, 1.0, 1e200, 1e300]:
        with named_case(scale=scale):
            rng = np.random.default_rng(SEED)
            table = -np.sort(-rng.integers(0, 1000, (40, 20)).astype(float), axis=1)
            reference = greedy_by_hand(Knapsack(table, 300, np.full(40, 1), np.full(40, 20)), [0] * 40, [0] * 40)
            for method in ("auto", "greedy"):
                assert solver.solve(table * scale, 300, 1, 20, method=method).tolist() == reference


def test_losses_are_taken_when_the_budget_must_be_spent() -> None:
    table = np.array([[5.0, -1.0, -4.0], [2.0, -2.0, -3.0]])
    assert solver.solve(table, 4, 0, 3).tolist() == [2, 2]
    assert solver.solve(table, 5, 0, 3, method="greedy").tolist() == [2, 3]


def test_no_prompts_and_no_room() -> None:
    assert solver.solve(np.zeros((0, 3)), 0, 2, 3).shape == (0,)
    assert solver.solve(np.ones((2, 1)), 0, 0, 0).tolist() == [0, 0]
    with pytest.raises(ValueError, match="a budget of 1"):
        solver.solve(np.zeros((0, 3)), 1, 2, 3)


# --- concavity ---


def test_auto_chooses_dynamic_programming_for_tables_that_are_not_concave() -> None:
    """Nothing for the first rollout, all for the second: a greedy choice one step at a time picks the level row."""
    table = np.array([[0.0, 10.0, 0.0], [1.0, 1.0, 1.0]])
    assert solver.solve(table, 2, 0, 3).tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"greedy needs a concave table.*dynamic-programming"):
        solver.solve(table, 2, 0, 3, method="greedy")


def test_concavity_is_needed_within_the_bounds_only() -> None:
    table = np.array([[0.0, 10.0, 4.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    assert solver.solve(table, 5, 1, 3, method="greedy").tolist() == [3, 2]
    for lower, upper in ((0, 3), (1, 4)):
        with pytest.raises(ValueError, match="concave"):
            solver.solve(table, 5, lower, upper, method="greedy")


def test_rounding_does_not_count_as_a_rise() -> None:
    level = np.array([[1.0, 1.0 + 1e-14, 1.0], [0.9, 0.8, 0.7]])
    assert solver.solve(level, 4, 0, 3, method="greedy").tolist() == [3, 1]
    with pytest.raises(ValueError, match="concave"):
        solver.solve(np.array([[1.0, 1.0 + 1e-9, 1.0]]), 2, 0, 3, method="greedy")


@no_deadline
@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=6), st.integers(2, 200))
def test_value_tables_are_concave_from_one_rollout_on(rates: list[float], width: int) -> None:
    counts = solver.solve(marginal_values(rates, width), len(rates) * 2, 1, width, method="greedy")
    assert counts.sum() == 2 * len(rates)


# --- tables, totals, errors ---


def test_total_value_is_the_sum_of_the_marginals_taken() -> None:
    table = np.array([[3.0, 2.0, 1.0], [5.0, -1.0, 0.5]])
    assert solver.total_value(table, np.array([2, 3])) == 9.5
    assert solver.total_value(table, np.array([0, 0])) == 0.0


def test_arguments_are_not_changed() -> None:
    table, lower, upper = np.arange(6.0, 0.0, -1.0).reshape(2, 3), np.array([1, 0]), np.array([3, 3])
    copies = table.copy(), lower.copy(), upper.copy()
    for method in ("greedy", "dynamic-programming"):
        solver.solve(table, 4, lower, upper, method=method)
    for now, then in zip((table, lower, upper), copies, strict=True):
        assert (now == then).all()


@pytest.mark.parametrize("order", ["F", "reversed", "float32", "list"])
def test_any_memory_layout_and_number_type(order: str) -> None:
    table = np.array([[4.0, 3.0, 1.0], [5.0, 2.0, 1.0]])
    shaped = {
        "F": np.asfortranarray(table),
        "reversed": table[:, ::-1].copy()[:, ::-1],
        "float32": table.astype(np.float32),
        "list": table.tolist(),
    }[order]
    assert solver.solve(shaped, 4, 0, 3).tolist() == solver.solve(table, 4, 0, 3).tolist() == [2, 2]


def test_the_feasible_range_is_named() -> None:
    for budget, fits in [(5, False), (6, True), (12, True), (13, False)]:
        with named_case(budget=budget, fits=fits):
            table = np.zeros((3, 4))
            if fits:
                assert solver.solve(table, budget, 2, 4).sum() == budget
                return
            with pytest.raises(ValueError, match=rf"budget of {budget} .*3 prompts.*at least 6.*at most 12.*\[6, 12\]"):
                solver.solve(table, budget, 2, 4)


def test_errors_say_what_is_allowed() -> None:
    for arguments, options, message in [
        ((np.zeros(3), 3, 0, 3), {}, r"marginals must be a table.*\(3,\)"),
        ((np.zeros((2, 3)), 4, 0, 4), {}, "max_rollouts 4 .*got 3"),
        ((np.zeros((2, 3)), 3.0, 0, 3), {}, "budget must be a whole number"),
        ((np.zeros((2, 3)), -1, 0, 3), {}, "budget must be a whole number >= 0, got -1"),
        ((np.zeros((2, 3)), 3, 2, 1), {}, "min_rollouts 2 is above max_rollouts 1"),
        ((np.zeros((2, 3)), 3, [0, 3], [3, 1]), {}, r"min_rollouts 3 is above max_rollouts 1 \(prompt 1\)"),
        ((np.zeros((2, 3)), 3, -1, 3), {}, "min_rollouts must be a whole number >= 0.*-1"),
        ((np.zeros((2, 3)), 3, 0.5, 3), {}, "min_rollouts must be a whole number"),
        ((np.zeros((2, 3)), 3, 2**63, 3), {}, "min_rollouts must be a whole number >= 0.*9223372036854775808"),
        ((np.zeros((2, 3)), 3, [0, 0, 0], 3), {}, r"min_rollouts .*one per prompt \(2\)"),
        ((np.zeros((2, 3)), 3, 0, None), {}, "max_rollouts must be a whole number"),
        ((np.zeros((2, 3)), 3, 0, 3), {"method": "simplex"}, "method must be one of auto, greedy.*'simplex'"),
        ((np.full((2, 3), np.nan), 3, 0, 3), {}, "finite"),
        ((np.array([[1.0, -np.inf]]), 2, 0, 2), {}, "finite"),
        ((np.zeros((2, 3)), 3, 0, 3), {"tier": [1]}, r"tier must hold one number per prompt \(2\)"),
        ((np.zeros((2, 3)), 3, 0, 3), {"priority": [0.0, np.nan]}, "priority .*no NaN"),
    ]:
        with named_case(arguments=arguments, options=options), pytest.raises(ValueError, match=message):
            solver.solve(*arguments, **options)


@pytest.mark.parametrize("method", ["auto", "greedy", "dynamic-programming"])
def test_entries_beyond_the_bounds_are_never_read(method) -> None:
    table = np.array([[2.0, 1.0, np.inf, -np.inf], [3.0, 0.5, np.nan, 7.0]])
    assert solver.solve(table, 2, 0, 2, method=method).tolist() == [1, 1]


def test_a_dynamic_program_beyond_memory_is_refused_and_the_way_out_works() -> None:
    rates = np.random.default_rng(0).random(10_000)
    with pytest.raises(ValueError, match=r"10000 x 80000; pass costs=np\.ones\(10000\)"):
        kr.allocate(rates, 80_000, min_rollouts=0)
    priced = kr.allocate(rates, 80_000, min_rollouts=0, costs=np.ones(10_000))
    assert priced.certificate is not None
    assert priced.counts.sum() == 80_000
    assert 0.0 <= priced.certificate.gap <= 1e-6 * priced.certificate.value
