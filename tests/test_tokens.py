"""Budgets in tokens, and other values, through the allocator of a run."""

from __future__ import annotations

import itertools
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import named_case
from knapsack_rl import KnapsackAllocator, allocate
from knapsack_rl.allocation.policies import allocate_expected
from knapsack_rl.allocation.tokens import rounded
from knapsack_rl.allocation.value import VALUES, make_value_function
from knapsack_rl.estimation.lengths import LENGTH_SAMPLE, _Population, expected_lengths, expected_tokens, predict_work
from knapsack_rl.estimation.named import WindowEstimator
from knapsack_rl.estimation.tracker import Tracker
from strategies import no_deadline

GRID_ESTIMATORS = ("bayes-filter", "empirical-bayes")
VARIANCE = "experiments.values:reward_variance"


def observed(**settings: object) -> KnapsackAllocator:
    """Four prompts of very different rates and lengths; failures are three times as long."""
    allocator = KnapsackAllocator(**settings)  # type: ignore[arg-type]
    for name, successes, tokens in (("a", 1, 100), ("b", 4, 100), ("c", 4, 1000), ("d", 8, 100)):
        rewards = np.r_[np.ones(successes), np.zeros(8 - successes)]
        allocator.observe([name] * 8, rewards, np.where(rewards > 0, tokens, 3 * tokens) + np.arange(8))
    return allocator


def test_expected_cost_weighs_both_outcomes() -> None:
    """One prompt with constant lengths: nothing to shrink, so the cost is p 10 + (1-p) 50 written out."""
    tracker = Tracker()
    tracker.record(["a"], np.zeros(4, int), np.array([True, True, False, False]), np.array([10.0, 10.0, 50.0, 50.0]))
    for rate, cost in ((0.25, 40.0), (1.0, 10.0), (0.0, 50.0), (np.nan, 30.0)):
        found = expected_tokens(tracker.lengths(), np.array([0, -1]), np.array([rate, rate]))
        assert found is not None
        assert found == pytest.approx([cost, cost])


def test_lengths_of_one_outcome_are_used_for_the_other() -> None:
    tracker = Tracker()
    assert expected_tokens(tracker.lengths(), np.array([-1]), np.array([0.5])) is None
    tracker.record(["a"], np.zeros(2, int), np.zeros(2, bool), np.array([0.0, 0.0]))
    found = expected_tokens(tracker.lengths(), np.array([0]), np.array([0.9]))
    assert found is not None
    assert found.tolist() == [1.0]  # an empty answer counts as one token


def test_a_prompt_that_never_succeeded_has_the_populations_length_of_a_success() -> None:
    tracker = Tracker()
    outcomes, lengths = np.array([True, True, False, False]), np.array([10.0, 10.0, 90.0, 90.0])
    tracker.record(["a", "b"], np.array([0, 0, 1, 1]), outcomes, lengths)
    found = expected_tokens(tracker.lengths(), np.array([1]), np.array([0.5]))
    assert found is not None
    assert found == pytest.approx([50.0])


@no_deadline
@given(
    st.lists(st.tuples(st.floats(0.02, 0.98), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 60),
)
def test_expected_allocation_with_costs_is_within_its_gap(prompts: list[tuple[float, int]], budget: int) -> None:
    """By enumeration, wherever the budget pays for the minima; else it degrades and stays within the budget."""
    rates, costs = np.array([p for p, _ in prompts]), np.array([float(c) for _, c in prompts])
    table = VALUES["knapsack"].marginals(rates, 5)
    found = allocate_expected(table, budget, 2, 5, costs=costs)
    assert found.counts @ costs <= budget
    assert (found.counts != 1).all()
    assert found.degraded == (2 * costs.sum() > budget)
    if not found.degraded:
        values = np.c_[np.zeros(len(rates)), np.cumsum(table, axis=1)]
        best = max(
            sum(values[i, n] for i, n in enumerate(counts))
            for counts in product(range(2, 6), repeat=len(prompts))
            if np.dot(counts, costs) <= budget
        )
        assert found.certificate is not None
        assert found.certificate.gap <= table[:, 2].max()  # less than a rollout is worth
        assert best * (1 - 1e-12) <= found.certificate.upper_bound
        assert found.certificate.value == found.expected_value <= best * (1 + 1e-12)


def test_a_step_looks_at_a_sample_of_the_known_prompts(monkeypatch) -> None:
    """200,000 prompts of two kinds in turn: the sample must hold both, and the batch its own lengths."""
    known = 200_000
    lengths = np.where(np.arange(known) % 2, 1000.0, 100.0) + 10.0 * (np.arange(known) % 7)
    tracker = Tracker()
    tracker.record(range(known), np.repeat(np.arange(known), 2), np.tile([True, False], known), np.repeat(lengths, 2))
    rows, rates = np.array([-1, 0, 1, known - 1]), np.full(4, 0.5)
    counts, sizes = np.ones(known), []
    whole = predict_work(counts, lengths, lengths**2)

    def size(sums: tuple[np.ndarray, ...], real=_Population.of) -> _Population:
        sizes.append(sums[0].size)
        return real(sums)

    monkeypatch.setattr(_Population, "of", size)
    found, either = expected_tokens(tracker.lengths(), rows, rates), expected_lengths(tracker.lengths(), rows)
    assert found is not None
    assert sizes and max(sizes) <= LENGTH_SAMPLE
    assert found[0] == pytest.approx(lengths.mean(), rel=0.02) and either[0] == pytest.approx(lengths.mean(), rel=0.02)
    assert found[1:] == pytest.approx(whole[rows[1:]], rel=0.05)
    assert either[1:] == pytest.approx(lengths[rows[1:]], rel=1e-6)  # two equal lengths each: no noise


def test_lengths_known_of_a_few_among_many_prompts_are_found() -> None:
    tracker = Tracker()
    tracker.record(range(20_000), np.arange(20_000), np.ones(20_000, bool))
    assert expected_tokens(tracker.lengths(), np.array([0]), np.array([0.5])) is None
    tracker.record([19_999], np.zeros(1, int), np.ones(1, bool), np.array([70.0]))
    assert expected_tokens(tracker.lengths(), np.array([0, -1]), np.array([0.5, 0.5])) == pytest.approx([70.0, 70.0])


def test_tokens_buy_more_rollouts_of_the_cheaper_of_two_equal_prompts() -> None:
    allocator = observed(budget_unit="tokens")
    found = allocator.allocate(["b", "c"], 30_000)
    tokens = expected_tokens(allocator.tracker.lengths(), allocator.tracker.rows(["b", "c"]), found.success_rates)
    assert tokens is not None and tokens[0] < tokens[1] / 3
    assert found.counts[0] > found.counts[1] >= 2
    assert found.counts @ tokens <= 30_000
    assert found.certificate is not None and found.certificate.gap <= 2e-4 * found.expected_value
    assert allocator.metrics()["expected_tokens"] == pytest.approx(found.counts @ tokens)


def test_without_lengths_the_first_batch_is_small() -> None:
    allocator = KnapsackAllocator(budget_unit="tokens", min_rollouts=3)
    found = allocator.allocate(["a", "b"], 1000.0)
    assert found.counts.tolist() == [3, 3]
    assert "no length is known" in found.reason and not found.degraded


def test_no_budget_of_tokens_ends_a_run() -> None:
    for budget in [0, 1, 150, 2000, 10.0**9]:
        with named_case(budget=budget):
            allocator = observed(budget_unit="tokens", max_rollouts=16)
            found = allocator.allocate(["a", "b", "c", "new"], budget)
            assert found.counts.min() >= 0 and found.counts.max() <= 16
            if budget == 10.0**9:
                assert found.counts.tolist() == [16] * 4
                assert "stay unspent" in found.reason
            if budget == 2000:
                assert found.degraded and 0 < np.count_nonzero(found.counts) < 4
                assert allocator.metrics()["degraded_batches"] == 1


def test_impossible_budgets_of_tokens_are_refused() -> None:
    for budget in [-1, float("nan"), float("inf"), True, "many"]:
        with named_case(budget=budget), pytest.raises(ValueError, match="finite number of tokens"):
            observed(budget_unit="tokens").allocate(["a"], budget)  # type: ignore[arg-type]


def test_a_posterior_expects_the_chosen_value() -> None:
    """Against the definition: sum over the grid of posterior times V(n+1, p) - V(n, p)."""
    for estimator, name in itertools.product(GRID_ESTIMATORS, [*VALUES, VARIANCE]):
        with named_case(estimator=estimator, name=name):
            allocator = observed(estimator=estimator, value=name)
            ids = ["a", "b", "c", "new"]
            grid_estimator = allocator.estimator
            posterior = grid_estimator.posterior(allocator.tracker.lookup(ids))  # type: ignore[attr-defined]
            values = make_value_function(name).values(np.arange(10)[:, None], grid_estimator.grid)  # type: ignore[attr-defined]
            expected = posterior @ np.diff(values, axis=0).T
            assert np.allclose(allocator.belief(ids).marginals[:, :9], expected, rtol=1e-9, atol=1e-12)
            assert allocator.allocate(ids, 40).counts.sum() == 40


def test_values_by_name_function_and_object_agree() -> None:
    def variance(counts: np.ndarray, rates: np.ndarray) -> np.ndarray:
        return rates * (1 - rates) * (1 - 1 / np.maximum(counts, 1))

    found = [
        observed(value=value).allocate(["a", "b", "c", "d"], 50).counts.tolist()
        for value in (VARIANCE, variance, make_value_function(VARIANCE))
    ]
    assert found[0] == found[1] == found[2] != observed().allocate(["a", "b", "c", "d"], 50).counts.tolist()


def test_the_window_accepts_another_value_without_its_fallback() -> None:
    window = WindowEstimator(window=8, fallback=False)
    found = observed(estimator=window, value=VARIANCE).allocate(["a", "b", "d"], 30)
    assert found.counts.tolist() == allocate([1 / 8, 1 / 2, 1.0], 30, value=VARIANCE).counts.tolist()


def test_settings_that_cannot_work_are_refused() -> None:
    for settings, message in [
        ({"budget_unit": "seconds"}, "rollouts, tokens, got 'seconds'"),
        ({"value": "fame"}, "got 'fame'"),
        ({"estimator": "window", "value": VARIANCE}, "fallback=False"),
        ({"estimator": "window", "budget_unit": "tokens"}, "fallback=False"),
        ({"estimator": "beta", "value": VARIANCE}, "BetaEstimator has the closed forms of knapsack, .* alone"),
        ({"budget_unit": "tokens", "min_rollouts": 0}, "min_rollouts >= 2, got 0"),
    ]:
        with named_case(settings=settings, message=message), pytest.raises(ValueError, match=message):
            KnapsackAllocator(**settings)  # type: ignore[arg-type]


def test_unit_and_value_are_saved(tmp_path: Path) -> None:
    allocator = observed(budget_unit="tokens", value=VARIANCE)
    allocator.save(tmp_path / "state.npz")
    with pytest.raises(ValueError, match=r"pass it again as value="):  # no file may name code to run
        KnapsackAllocator.load(tmp_path / "state.npz")
    twin = KnapsackAllocator.load(tmp_path / "state.npz", value=VARIANCE)
    ids = ["a", "b", "c", "new"]
    assert (twin.budget_unit, twin.value) == ("tokens", VARIANCE)
    assert twin.allocate(ids, 20_000).counts.tolist() == allocator.allocate(ids, 20_000).counts.tolist()


def test_a_value_function_must_be_given_again(tmp_path: Path) -> None:
    def own(counts: np.ndarray, rates: np.ndarray) -> np.ndarray:
        return rates * np.sqrt(counts)

    observed(value=own).save(tmp_path / "state.npz")
    with pytest.raises(ValueError, match="pass it again as value="):
        KnapsackAllocator.load(tmp_path / "state.npz")
    assert KnapsackAllocator.load(tmp_path / "state.npz", value=own).value is own


@no_deadline
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=8).map(np.array),
    multiple=st.integers(1, 7),
    low=st.integers(0, 3),
)
def test_rounding_reaches_a_multiple_and_respects_the_minimum(counts, multiple, low) -> None:
    marginals = np.tile(0.5 ** np.arange(6), (counts.size, 1)) * np.arange(1, counts.size + 1)[:, None]
    found = rounded(counts, multiple, low, marginals)
    assert found.sum() % multiple == 0
    assert abs(int(found.sum()) - int(counts.sum())) < multiple
    if counts.any():
        assert ((found == 0) == (counts == 0)).all()
        assert (found >= np.minimum(counts, max(low, 2))).all()
    # What goes is worth the least, what comes is worth the most, as far as the minimum lets them.
    value = np.pad(marginals, ((0, 0), (0, 20)))
    fewer, more = np.flatnonzero(found < counts), np.flatnonzero(found > counts)
    assert not (fewer.size and more.size)
    for i in fewer:
        for j in np.flatnonzero((found > np.minimum(counts, max(low, 2))) & (found == counts)):
            assert value[i, found[i]] <= value[j, counts[j] - 1]
