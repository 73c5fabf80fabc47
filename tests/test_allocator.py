"""The stateful allocator: observations, states, metrics, and that it never ends a run."""

from __future__ import annotations

import doctest
import importlib
import io
import itertools
import json
import logging
import math
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import knapsack_rl as kr
from cases import named_case
from knapsack_rl import state as statefile
from knapsack_rl.allocation.coverage import allocate_with_skips
from knapsack_rl.allocation.policies import allocate_estimated, allocate_expected
from knapsack_rl.allocation.tokens import allocate_tokens
from knapsack_rl.estimation.lengths import expected_tokens, predict_work
from knapsack_rl.estimation.named import ESTIMATORS, BetaEstimator, WindowEstimator
from knapsack_rl.estimation.tracker import COLUMNS
from knapsack_rl.ids import in_id_order, stable_order
from oracles import assert_same_state
from strategies import no_deadline

NAN = float("nan")
IDS = ["a", "b", 7, "7", "é"]
NAMES = list(ESTIMATORS)


def trained(estimator: str = "empirical-bayes", steps: int = 4, **settings) -> kr.KnapsackAllocator:
    """An allocator that has seen a few batches of five prompts."""
    allocator = kr.KnapsackAllocator(estimator, **settings)
    rng = np.random.default_rng(1)
    rates = np.array([0.05, 0.3, 0.5, 0.9, 1.0])
    for _ in range(steps):
        prompts = allocator.allocate(IDS, 50).expand()
        rewards = (rng.random(prompts.size) < rates[prompts]).astype(float)
        allocator.observe([IDS[i] for i in prompts], rewards, rng.integers(10, 2000, prompts.size))
    return allocator


def counts_of(allocator: kr.KnapsackAllocator, ids=(*IDS, "new"), budget: int = 70) -> list[int]:
    return allocator.allocate(ids, budget).counts.tolist()


# --- allocate ---


@pytest.mark.parametrize("name", NAMES)
@no_deadline
@given(
    batches=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8, unique=True), min_size=1, max_size=4),
    budget=st.integers(0, 120),
    low=st.integers(0, 4),
    high=st.integers(4, 20),
    seed=st.integers(0, 9),
)
def test_any_batch_gets_its_budget_exactly(name, batches, budget: int, low: int, high: int, seed: int) -> None:
    allocator = kr.KnapsackAllocator(name, low, high)
    rng = np.random.default_rng(seed)
    for ids in batches:
        found = allocator.allocate(ids, budget)
        assert found.counts.sum() == budget
        fits = low * len(ids) <= budget <= high * len(ids)
        assert found.degraded != fits
        if fits:
            assert found.counts.min() >= low
            assert found.counts.max() <= high
        prompts = found.expand()
        allocator.observe([ids[i] for i in prompts], rng.integers(0, 2, prompts.size))


def test_nothing_known_is_uniform() -> None:
    for name in NAMES:
        with named_case(name=name):
            allocator = kr.KnapsackAllocator(name)
            assert counts_of(allocator, ["a", "b", "c", "d"], 32) == [8] * 4
            assert sorted(counts_of(allocator, ["a", "b", "c", "d"], 34)) == [8, 8, 9, 9]


@pytest.mark.parametrize("name", ["beta", "empirical-bayes", "bayes-filter"])
def test_counts_follow_the_prompts_not_their_order(name: str) -> None:
    allocator = trained(name)
    ids = [*IDS, "new", "newer", 99]
    by_id = dict(zip(ids, counts_of(allocator, ids, 67), strict=True))
    turned = ids[::-1]
    assert dict(zip(turned, counts_of(allocator, turned, 67), strict=True)) == by_id


@pytest.mark.parametrize("settings", [{}, {"estimator": "window"}, {"budget_unit": "tokens"}, {"min_rollouts": 0}])
@no_deadline
@given(rates=st.lists(st.sampled_from([0, 2, 4, 8]), min_size=2, max_size=9), budget=st.integers(3, 90), data=st.data())
def test_allocations_do_not_depend_on_the_order_of_the_batch(settings, rates, budget: int, data) -> None:
    """Prompts with equal records tie; rounding to a multiple and the paper's rule break ties too."""
    both = kr.KnapsackAllocator(**settings), kr.KnapsackAllocator(**settings)  # an allocation counts skips
    for allocator in both:
        for k, successes in enumerate(rates):
            allocator.observe([k] * 8, [1] * successes + [0] * (8 - successes), [100 + 37 * (k // 3)] * 8)
    tokens = settings.get("budget_unit") == "tokens"
    options = {"multiple": 4} if tokens else {}
    ids = [*range(len(rates)), "new", "newer"]
    turned = data.draw(st.permutations(ids))
    one, other = (
        allocator.allocate(batch, budget * (100 if tokens else 1), **options)
        for allocator, batch in zip(both, (ids, turned), strict=True)
    )
    place = [ids.index(prompt) for prompt in turned]
    for name in ("counts", "success_rates", "nonzero_gradient"):
        np.testing.assert_array_equal(getattr(one, name)[place], getattr(other, name), err_msg=name)
    assert (one.expected_value, one.reason) == (other.expected_value, other.reason)
    assert not any(allocator.failures for allocator in both)


def test_ids_of_equal_checksums_have_an_order() -> None:
    one, other = "plumless", "buckeroo"  # a well-known pair
    assert zlib.crc32(one.encode()) == zlib.crc32(other.encode())
    first = [ids[in_id_order(ids, stable_order(ids))[0]] for ids in ([one, other], [other, one])]
    assert first == [other, other]


def columns_used(allocator: kr.KnapsackAllocator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many columns of marginal values the estimator is asked for."""
    asked: list[int] = []
    for name in ("believe", "believe_after"):
        if real := getattr(allocator.estimator, name, None):

            def spy(*arguments, real=real):
                asked.append(arguments[-1])
                return real(*arguments)

            monkeypatch.setattr(allocator.estimator, name, spy)
    return asked


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("low", [0, 1, 2])
def test_a_maximum_far_above_the_budget_changes_nothing_and_costs_nothing(name: str, low: int, monkeypatch) -> None:
    """Against the whole table, of 4096 columns; a few prompts share a budget of up to 1500."""
    whole, huge = (trained(name, min_rollouts=low, max_rollouts=most) for most in (4096, 10**7))
    asked = columns_used(huge, monkeypatch)
    for ids, budget in ((IDS, 30), (IDS, 700), (IDS[:2], 1500), (IDS[:1], 400), ([*IDS, "new"], 9), (IDS, 3), (IDS, 1)):
        with named_case(ids=ids, budget=budget):
            known = huge.tracker.lookup(ids)
            found = huge.allocate(ids, budget)
            belief, order = whole.belief(ids), stable_order(ids)
            if name == "window":
                expected = allocate_estimated(belief.mean, belief.marginals, budget, low, 4096, priority=order)
            elif low:
                expected = allocate_expected(belief.marginals, budget, low, 4096, priority=order)
            else:
                skips = np.where(known.visits > 0, known.skips, np.inf)
                expected = allocate_with_skips(belief, skips, budget, 4096, order)
            assert found.counts.tolist() == expected.counts.tolist()
            assert found.expected_value == pytest.approx(expected.expected_value, rel=1e-12)
            assert found.reason == expected.reason
            assert max(asked) <= max(128, 4 * found.counts.max())
            asked.clear()
    assert not huge.failures


def test_a_maximum_far_above_the_budget_with_tokens_top_ups_and_other_values(monkeypatch) -> None:
    def seen(most: int, **settings) -> kr.KnapsackAllocator:
        allocator = kr.KnapsackAllocator(max_rollouts=most, budget_unit="tokens", **settings)
        for _ in range(3):
            outcomes = np.arange(2 * len(IDS)) % 3 == 0
            allocator.observe(IDS * 2, outcomes, [50 + 10 * k for k in range(2 * len(IDS))])
        return allocator

    whole, huge = seen(4096), seen(10**7)
    asked = columns_used(huge, monkeypatch)
    for budget in (300.0, 5_000.0, 60_000.0):
        belief = whole.belief(IDS)
        tokens = expected_tokens(whole.tracker.lengths(), whole.tracker.rows(IDS), belief.mean)
        expected = allocate_tokens(belief, tokens, budget, 2, 4096, stable_order(IDS), 8)
        found = huge.allocate(IDS, budget, multiple=8)
        assert found.counts.tolist() == expected.counts.tolist()
        assert max(asked) <= max(128, 4 * found.counts.max())
        asked.clear()
    so_far, successes = [2] * (len(IDS) - 1) + [0], [0, 1, 2, 0, 0, 0][: len(IDS)]
    for budget in (5, 100, 2000):
        more, same = (a.top_up(IDS, so_far, successes, budget).counts for a in (huge, whole))
        assert more.tolist() == same.tolist()
        assert max(asked) <= max(128, 4 * more.max())
        asked.clear()

    def steps(counts, rates):  # rises at 300 rollouts
        return (np.asarray(counts) >= 300) * rates

    found = trained("bayes-filter", min_rollouts=1, max_rollouts=10**7, value=steps).allocate(IDS[:2], 303)
    assert found.counts.max() >= 300
    rising = seen(10**7, value=steps)
    assert rising.allocate(IDS[:2], 60_000).counts.max() >= 300
    assert not huge.failures and not rising.failures


def test_counts_of_a_degraded_batch_follow_the_prompts() -> None:
    allocator = kr.KnapsackAllocator()
    ids = list("abcdefgh")
    by_id = dict(zip(ids, counts_of(allocator, ids, 6), strict=True))
    assert dict(zip(ids[::-1], counts_of(allocator, ids[::-1], 6), strict=True)) == by_id


@pytest.mark.parametrize("name", ["beta", "empirical-bayes", "bayes-filter"])
def test_allocation_is_the_optimum_of_the_belief(name: str) -> None:
    allocator = trained(name, max_rollouts=30)
    belief = allocator.belief(IDS)
    expected = allocate_expected(belief.marginals, 80, 2, 30, priority=stable_order(IDS))
    found = allocator.allocate(IDS, 80)
    assert found.counts.tolist() == expected.counts.tolist()
    assert found.expected_value == pytest.approx(expected.expected_value)
    np.testing.assert_allclose(found.success_rates, belief.mean)
    np.testing.assert_allclose(found.nonzero_gradient, belief.nonzero_gradient(found.counts))


def test_the_window_estimator_allocates_by_the_papers_rule() -> None:
    allocator = trained("window", max_rollouts=30)
    rates = allocator.belief([*IDS, "new"]).mean
    assert np.isnan(rates[-1])
    assert not np.isnan(rates[:-1]).any()
    expected = kr.allocate(rates, 80, 2, 30, fallback=True)
    found = allocator.allocate([*IDS, "new"], 80)
    assert found.counts.tolist() == expected.counts.tolist()
    assert found.reason == expected.reason
    assert found.counts[-1] == 80 // 6  # mistake 4: unseen is not p = 0


def test_a_prompt_is_found_again_by_its_id() -> None:
    """Mistake 6: if ids did not match, allocation would stay uniform forever."""
    allocator = trained()
    assert len(set(counts_of(allocator, IDS, 50))) > 1
    assert len(set(counts_of(allocator, ["fresh-1", "fresh-2", "fresh-3"], 30))) == 1
    assert allocator.metrics()["prompts_seen"] == len(IDS)


def test_seven_and_seven_are_different_prompts() -> None:
    allocator = kr.KnapsackAllocator("beta")
    allocator.observe([7] * 8 + ["7"] * 8, [1] * 8 + [0] * 8)
    solved, unsolved = allocator.belief([7, "7"]).mean
    assert solved > 0.9
    assert unsolved < 0.1
    assert allocator.belief([np.int64(7), np.str_("7")]).mean.tolist() == [solved, unsolved]


def test_ids_of_other_types_are_refused() -> None:
    for bad in [None, 1.5, True, np.float64(3.0), ("a",)]:
        with named_case(bad=bad):
            allocator = kr.KnapsackAllocator()
            with pytest.raises(ValueError, match=r"prompt_ids\[1\]"):
                allocator.allocate(["a", bad], 8)
            with pytest.raises(ValueError, match=r"prompt_ids\[1\]"):
                allocator.observe(["a", bad], [1, 0])
            assert allocator.metrics()["prompts_seen"] == 0


def test_duplicates_in_a_batch_are_refused() -> None:
    for ids in (["a", "b", "a"], [1, np.int64(1)]):
        with pytest.raises(ValueError, match="appears twice in the batch"):
            kr.KnapsackAllocator().allocate(ids, 16)
    kr.KnapsackAllocator().allocate([1, "1"], 16)


def test_invalid_batches_are_refused() -> None:
    for ids, budget, message in [
        ([], 8, "prompt_ids is empty"),
        (["a"], -1, "budget must be a whole number >= 0, got -1"),
        (["a"], 8.0, "budget must be a whole number >= 0, got 8.0"),
        (["a"], None, "budget must be a whole number"),
    ]:
        with named_case(ids=ids, budget=budget, message=message), pytest.raises(ValueError, match=message):
            kr.KnapsackAllocator().allocate(ids, budget)


# --- degradation ---


def test_an_infeasible_batch_degrades_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Mistake 2: a run does not end because minima exceed the budget."""
    allocator = trained(min_rollouts=4, max_rollouts=10)
    with caplog.at_level(logging.DEBUG):
        assert not allocator.allocate(IDS, 50).degraded
        assert not caplog.records
        lowered = allocator.allocate(IDS, 16)
        raised = allocator.allocate(IDS, 57)
        pairs = allocator.allocate(IDS, 7)
        nothing = allocator.allocate(IDS, 0)
    assert (lowered.counts.sum(), lowered.counts.min()) == (16, 3)
    assert "min_rollouts lowered to 3" in lowered.reason
    assert (raised.counts.sum(), raised.counts.max()) == (57, 12)
    assert "max_rollouts raised to 12" in raised.reason
    assert sorted(pairs.counts.tolist()) == [0, 0, 2, 2, 3]
    assert nothing.counts.tolist() == [0] * 5
    assert allocator.metrics()["degraded_batches"] == 4
    warnings = [record for record in caplog.records if record.name.startswith("knapsack_rl")]
    assert len(warnings) == 1
    assert warnings[0].levelno == logging.WARNING
    assert lowered.reason in warnings[0].getMessage()


def test_every_estimator_survives_infeasible_batches() -> None:
    for name, budget in itertools.product(NAMES, [0, 1, 2, 3, 5, 9, 61, 100]):
        with named_case(name=name, budget=budget):
            found = trained(name, max_rollouts=10).allocate([*IDS, "new"], budget)
            assert found.counts.sum() == budget
            assert found.degraded


def test_an_unseen_prompt_is_not_the_last_to_be_served_in_a_degraded_batch() -> None:
    """Mistake 4 again: the paper's rule has no estimate of an unseen prompt, which is not an estimate of 0."""
    allocator = kr.KnapsackAllocator("window")
    allocator.observe(["hopeless"] * 16, [0] * 16)
    assert allocator.allocate(["hopeless", "new"], 2).counts.tolist() == [0, 2]


# --- observe ---


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_rewards_of_minus_one_and_one(low: float) -> None:
    """Mistake 5: {-1, 1} means the same as {0, 1}."""
    allocator = kr.KnapsackAllocator("beta")
    allocator.observe(["a"] * 4, [1.0, low, low, 1.0])
    records = allocator.tracker.records()
    assert (records.successes[0], records.failures[0]) == (2.0, 2.0)


def test_graded_rewards_with_a_threshold() -> None:
    rewards = [0.1, 0.49, 0.5, 0.51, 7.0, -3.0]
    allocator = kr.KnapsackAllocator(success=0.5)
    allocator.observe(["a"] * 6, rewards)
    assert allocator.tracker.records().successes[0] == 2.0
    assert allocator.metrics()["outcome_per_prompt"] == pytest.approx(sum(rewards) / 6)


def test_success_function() -> None:
    allocator = kr.KnapsackAllocator(success=lambda r: (r > 0.2) & (r < 0.8))
    allocator.observe(["a"] * 4, [0.1, 0.5, 0.7, 1.0])
    assert allocator.tracker.records().successes[0] == 2.0


def test_a_success_function_that_cannot_work_is_refused_before_the_run() -> None:
    for wrong in (lambda r: True, lambda r: r / "2", lambda r: r[:1] > 0):
        with pytest.raises(ValueError, match=r"the success function failed on the rewards \[0, 1\]"):
            kr.KnapsackAllocator(success=wrong)


def test_a_wrong_success_function_records_nothing() -> None:
    allocator = kr.KnapsackAllocator(success=lambda r: r > 0 if r[-1] == 1.0 else True)
    before = allocator.state_dict()
    with pytest.raises(ValueError, match="success function returned shape"):
        allocator.observe(["a", "a"], [1.0, 0.0])
    assert_same_state(allocator.state_dict(), before)


@pytest.mark.parametrize("threshold", [NAN, float("inf"), "0.5"])
def test_a_threshold_that_cannot_work_is_refused_before_the_run(threshold) -> None:
    with pytest.raises(ValueError, match="success"):
        kr.KnapsackAllocator(success=threshold)


def test_unscored_rollouts_are_counted_and_left_out() -> None:
    allocator = kr.KnapsackAllocator("beta")
    allocator.observe(["a", "b", "a", "c"], [1.0, NAN, NAN, 0.0], [5, 6, 7, 8])
    records = allocator.tracker.lookup(["a", "b", "c"])
    assert records.rollouts.tolist() == [1, 0, 1]
    assert records.length_sum.tolist() == [5.0, 0.0, 8.0]
    assert allocator.metrics()["unscored_rollouts"] == 2
    assert allocator.metrics()["prompts_seen"] == 2
    assert allocator.metrics()["rollouts"] == 2
    allocator.observe(["b"], [NAN])
    assert allocator.metrics()["unscored_rollouts"] == 3
    assert math.isnan(allocator.metrics()["effective_gradient_ratio"])


def test_tensors_and_none_are_observed() -> None:
    """None is unscored like NaN; bfloat16 and a gradient change nothing; lengths may be tensors too."""
    torch = pytest.importorskip("torch")
    ids, rewards, lengths = ["a", "a", "b", "b"], [1.0, 0.0, NAN, 1.0], [3.0, 4.0, 5.0, 6.0]
    plain = trained()
    plain.observe(ids, rewards, lengths)
    for same in (
        [1.0, 0.0, None, 1.0],
        torch.tensor(rewards, dtype=torch.bfloat16),
        torch.tensor(rewards, requires_grad=True),
        [torch.tensor(reward, requires_grad=True) for reward in rewards],
    ):
        allocator = trained()
        allocator.observe(ids, same, torch.tensor(lengths, dtype=torch.bfloat16, requires_grad=True))
        assert_same_state(allocator.state_dict(), plain.state_dict())
    nothing = trained()
    before = nothing.state_dict()
    nothing.observe(["a", "new"], [None, None])
    assert nothing.metrics()["unscored_rollouts"] == 2
    assert nothing.state_dict()["header"] == before["header"] | {"unscored_rollouts": 2}


def test_refused_observations_leave_no_trace() -> None:
    for ids, rewards, lengths, message in [
        (["a", "new"], [1.0, math.inf], None, r"rewards\[1\] is inf"),
        (["a", "new"], [-math.inf, 0.0], None, r"rewards\[0\] is -inf"),
        (["a", "new"], [1.0], None, "equally long"),
        (["a", "new"], ["x", 1.0], None, "rewards must be numbers"),
        (["a", "new"], [1.0, 0.0], [3], "lengths must be 2 numbers from 0"),
        (["a", "new"], [1.0, 0.0], [3, -1], "lengths must be 2 numbers from 0"),
        (["a", "new"], [1.0, 0.0], [3, 1e10], r"numbers from 0 to 1e\+09"),
        (["a", "new"], [1.0, NAN], [3, NAN], "lengths must be 2 numbers from 0"),
        (["a", None], [1.0, 0.0], None, "prompt_ids"),
        (None, [1.0, 0.0], None, "prompt_ids must be a sequence of ids, got None"),
        (["a", "new"], None, None, "equally long"),
        (["a", "new"], ["1", "0"], None, "type <U1 does not hold numbers"),
        (["a", "new"], [1.0, 0.0], [3, None], "lengths must be 2 numbers from 0"),
        (["a", "new"], [1.0, 0.0], [3, "many"], "lengths must be 2 numbers from 0"),
    ]:
        with named_case(ids=ids, rewards=rewards, lengths=lengths, message=message):
            allocator = trained()
            before, metrics = allocator.state_dict(), allocator.metrics()
            with pytest.raises(ValueError, match=message):
                allocator.observe(ids, rewards, lengths)
            assert_same_state(allocator.state_dict(), before)
            assert allocator.metrics() == metrics


def test_observing_nothing_changes_nothing() -> None:
    allocator = trained()
    before = allocator.state_dict()
    allocator.observe([], [])
    assert_same_state(allocator.state_dict(), before)


@no_deadline
@given(st.randoms(use_true_random=False))
def test_rows_of_different_prompts_may_be_mixed(random) -> None:
    """Only the order within a prompt matters (which outcomes are the newest)."""
    rows = [(prompt, float((prompt * k) % 3 == 0), 10.0 * k) for prompt in range(4) for k in range(prompt + 2)]
    queues = {prompt: [row for row in rows if row[0] == prompt] for prompt in range(4)}
    mixed = []
    while any(queues.values()):
        mixed.append(queues[random.choice([p for p, queue in queues.items() if queue])].pop(0))
    one, other = kr.KnapsackAllocator(), kr.KnapsackAllocator()
    one.observe(*zip(*rows, strict=True))
    other.observe(*zip(*mixed, strict=True))
    order = np.array(other.tracker.rows(one.tracker.prompt_ids))
    for column in (*COLUMNS, "evidence", "age"):
        values, others = getattr(one.tracker.records(), column), getattr(other.tracker.records(), column)
        np.testing.assert_array_equal(values, others[order])


def test_older_counts_are_discounted_by_the_estimators_setting() -> None:
    allocator = kr.KnapsackAllocator("beta", discount=0.5)
    allocator.observe(["a"] * 4, [1, 1, 1, 1])
    allocator.observe(["a"] * 2, [0, 0])
    records = allocator.tracker.records()
    assert (records.successes[0], records.failures[0]) == (2.0, 2.0)
    assert allocator.belief(["a"]).mean[0] == pytest.approx(0.5)


def test_the_prior_is_fitted_at_once_and_refitted_once_an_epoch() -> None:
    allocator = kr.KnapsackAllocator()
    priors: list[NDArray] = []
    flat = allocator.estimator.state_dict()["prior"]
    for step in range(6):  # batches of two out of four prompts: an epoch is two steps
        ids = ["a", "b"] if step % 2 == 0 else ["c", "d"]
        allocator.observe(np.repeat(ids, 4).tolist(), [1, 1, 1, 1, 0, 0, 0, step % 2])
        priors.append(allocator.estimator.state_dict()["prior"])
    changed = [not np.array_equal(a, b) for a, b in zip([flat, *priors], priors, strict=False)]
    assert changed == [True, True, False, True, False, True]


# --- metrics ---


def test_metrics_of_an_allocation() -> None:
    allocator = trained("beta")
    found = allocator.allocate(IDS, 60)
    metrics = allocator.metrics()
    assert metrics["budget"] == 60
    assert metrics["budget_min"] == found.counts.min()
    assert metrics["budget_max"] == found.counts.max()
    assert metrics["expected_value"] == pytest.approx(found.expected_value)
    assert found.success_rates is not None
    assert metrics["estimated_success_rate"] == pytest.approx(found.success_rates.mean())
    assert metrics["fallback"] == 0.0
    assert metrics["allocation_seconds"] >= 0.0
    shares = {name: share for name, share in metrics.items() if name.startswith("budget_share/")}
    names = ["0", "1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65+"]
    assert list(shares) == [f"budget_share/{name}" for name in names]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(isinstance(number, float) for number in metrics.values())


def test_the_budget_histogram_counts_prompts() -> None:
    allocator = kr.KnapsackAllocator()
    counts = [0, 1, 2, 3, 4, 8, 9, 64, 65, 500]
    allocator.adopt(list(range(10)), counts)
    metrics = allocator.metrics()
    expected = {"0": 1, "1": 1, "2": 1, "3-4": 2, "5-8": 1, "9-16": 1, "17-32": 0, "33-64": 1, "65+": 2}
    for name, prompts in expected.items():
        assert metrics[f"budget_share/{name}"] == pytest.approx(prompts / 10)
    assert metrics["budget"] == sum(counts)


def test_metrics_of_outcomes() -> None:
    allocator = trained("beta")
    ids = ["a"] * 2 + ["b"] * 6 + ["x"] * 2
    rewards = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    allocator.observe(ids, rewards)
    metrics = allocator.metrics()
    for name, number in kr.group_statistics(ids, rewards).as_dict().items():
        assert metrics[name] == number
    assert metrics["outcome_per_prompt"] == pytest.approx((1 + 1 / 6 + 0) / 3)
    assert metrics["prompts_seen"] == 6
    assert {"degraded_batches", "unscored_rollouts"} <= metrics.keys()


def test_the_fallback_is_reported() -> None:
    allocator = kr.KnapsackAllocator("window")
    allocator.observe(["a"] * 8 + ["b"] * 8, [0] * 8 + [0, 1] * 4)
    found = allocator.allocate(["a", "b"], 32)
    assert found.reason.startswith("fallback")
    assert allocator.metrics()["fallback"] == 1.0
    allocator.allocate(["b"], 2)
    assert allocator.metrics()["fallback"] == 0.0


def test_predicted_against_realised() -> None:
    allocator = kr.KnapsackAllocator("beta")
    allocator.observe(["a"] * 8 + ["b"] * 8, [0, 1] * 4 + [1] * 8)
    found = allocator.allocate(["a", "b"], 16)
    assert found.nonzero_gradient is not None
    predicted = dict(zip(["a", "b"], found.nonzero_gradient.tolist(), strict=True))
    allocator.observe(["a", "a", "b", "b", "stranger"], [1, 0, 1, 1, 1])
    metrics = allocator.metrics()
    assert metrics["predicted_nonzero_gradient"] == pytest.approx((predicted["a"] + predicted["b"]) / 2)
    assert metrics["realised_nonzero_gradient"] == 0.5
    assert metrics["brier_score"] == pytest.approx(((1 - predicted["a"]) ** 2 + predicted["b"] ** 2) / 2)
    allocator.observe(["a"], [1])  # a prediction is about one batch
    assert "brier_score" not in allocator.metrics()


def test_predictions_come_true_on_a_calibrated_population() -> None:
    rng = np.random.default_rng(8)
    rates = rng.beta(0.5, 0.5, 2000)
    allocator = kr.KnapsackAllocator("beta", discount=1.0)  # the prior is the truth here
    ids = list(range(2000))
    for _ in range(3):
        prompts = allocator.allocate(ids, 16_000).expand()
        allocator.observe(prompts.tolist(), (rng.random(prompts.size) < rates[prompts]).astype(float))
        metrics = allocator.metrics()
        assert abs(metrics["predicted_nonzero_gradient"] - metrics["realised_nonzero_gradient"]) < 0.04


def test_adopted_counts_are_predicted_for() -> None:
    allocator = trained("beta")
    state = allocator.state_dict()
    found = allocator.adopt(IDS, [8, 4, 0, 1, 200])
    assert found.counts.tolist() == [8, 4, 0, 1, 200]
    belief = allocator.belief(IDS)
    np.testing.assert_allclose(found.nonzero_gradient, belief.nonzero_gradient(found.counts))
    wide = allocator.estimator.believe(allocator.tracker.lookup(IDS), 200).marginals
    expected = sum(wide[i, :n].sum() for i, n in enumerate(found.counts))
    assert found.expected_value == pytest.approx(expected)
    assert_same_state(allocator.state_dict(), state)
    for bad in ([8], [8, 4, 0, 1, -1], [1.5] * 5):
        with pytest.raises(ValueError, match="counts must"):
            allocator.adopt(IDS, bad)


def test_predicted_lengths() -> None:
    allocator = kr.KnapsackAllocator("beta", discount=1.0)
    assert allocator.predicted_lengths(["a", "b"]).tolist() == [1.0, 1.0]
    lengths = {"a": [100.0, 120.0, 80.0], "b": [1000.0, 900.0], "c": [500.0, 520.0, 505.0, 495.0]}
    ids = [prompt_id for prompt_id, own in lengths.items() for _ in own]
    allocator.observe(ids, [1.0] * len(ids), [n for own in lengths.values() for n in own])
    sums = [sum(own) for own in lengths.values()]
    squares = [sum(n * n for n in own) for own in lengths.values()]
    expected = predict_work([3, 2, 4, 0], [*sums, 0], [*squares, 0])
    found = allocator.predicted_lengths(["c", "unseen", "a", "b"])
    np.testing.assert_allclose(found, expected[[2, 3, 0, 1]], rtol=1e-12)
    assert found[2] < found[0] < found[3]
    assert found[2] < found[1] < found[3]


# --- settings ---


def test_settings_that_cannot_work_are_refused_before_the_run() -> None:
    for arguments, settings, message in [
        (("bayes",), {}, "estimator must be one of window, beta, empirical-bayes, bayes-filter, got 'bayes'"),
        (("beta", -1), {}, "min_rollouts must be a whole number from 0 to 65536, got -1"),
        (("beta", 2.0), {}, "min_rollouts must be a whole number"),
        (("beta", 2, 1), {}, "max_rollouts must be a whole number >= 2, got 1"),
        (("beta", 2, None), {}, "max_rollouts must be a whole number"),
        (("beta", 9, 8), {}, "min_rollouts 9 is above max_rollouts 8"),
        (("beta",), {"discount": 0.0}, "discount"),
        (("beta",), {"discuont": 0.5}, "discuont"),
        (("window",), {"discount": 0.5}, "discount"),
        ((BetaEstimator(),), {"discount": 0.5}, "'discount'.*estimator object itself"),
    ]:
        with named_case(arguments=arguments, settings=settings), pytest.raises(ValueError, match=message):
            kr.KnapsackAllocator(*arguments, **settings)


def test_a_value_that_fails_anywhere_is_refused_before_the_run() -> None:
    """Case 13: f(0, p) != 0, also at rates that few prompts have; numbers that are not finite; more than shapes."""
    for value, message in [
        (lambda n, p: n * p + p, "the value of no rollouts must be 0"),
        (lambda n, p: n * p + 1e-18, "the value of no rollouts must be 0"),
        (lambda n, p: n * p + (p < 0.005), "the value of no rollouts must be 0"),
        (lambda n, p: n * p + (p > 0.995), "the value of no rollouts must be 0"),
        (lambda n, p: np.where(n < 100, n * p, np.nan), "must return finite numbers"),
        (lambda n, p: 1 / 0, "the value function fails"),
    ]:
        for estimator in ("bayes-filter", "empirical-bayes", WindowEstimator(fallback=False)):
            with named_case(message=message, estimator=estimator), pytest.raises(ValueError, match=message):
                kr.KnapsackAllocator(estimator, value=value)
    kr.KnapsackAllocator(value=lambda n, p: np.where(n == 0, -0.0, n * np.log1p(p)))  # a zero of either sign


def test_the_estimator_may_be_an_object() -> None:
    one, other = kr.KnapsackAllocator(BetaEstimator(1.0, 2.0, 0.9)), kr.KnapsackAllocator("beta", discount=0.9)
    for allocator in (one, other):
        allocator.observe(["a"] * 4, [1, 0, 0, 0])
    assert one.belief(["a"]).mean[0] == pytest.approx(2 / 7)
    assert other.belief(["a"]).mean[0] == pytest.approx(1.5 / 5)


# --- state ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("through", ["state_dict", "file"])
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, through: str, tmp_path: Path) -> None:
    """Mistake 7: nothing of the recorded steps is lost, to the last bit."""
    allocator = trained(name, min_rollouts=1, max_rollouts=40, success=0.25)
    allocator.allocate(IDS, 3)  # degraded
    allocator.observe(["a", "b"], [NAN, 1.0])
    assert allocator.metrics()["degraded_batches"] == allocator.metrics()["unscored_rollouts"] == 1
    if through == "file":
        allocator.save(tmp_path / "state.npz")
        twin = kr.KnapsackAllocator.load(tmp_path / "state.npz")
        assert (twin.min_rollouts, twin.max_rollouts, twin.success) == (1, 40, 0.25)
    else:
        twin = kr.KnapsackAllocator(name, 1, 40, success=0.25)
        twin.load_state_dict(allocator.state_dict())
    assert_same_state(twin.state_dict(), allocator.state_dict())
    rng = np.random.default_rng(3)
    ids = [*IDS, "new", "newer"]
    for _ in range(6):
        one, other = allocator.allocate(ids, 90), twin.allocate(ids, 90)
        assert one.counts.tolist() == other.counts.tolist()
        assert one.expected_value == other.expected_value
        rewards = rng.random(90)
        for each in (allocator, twin):
            each.observe([ids[i] for i in one.expand()], rewards, 100 * rewards)
        assert_same_state(twin.state_dict(), allocator.state_dict())
        drop = {"allocation_seconds"}
        assert {k: v for k, v in twin.metrics().items() if k not in drop} == pytest.approx(
            {k: v for k, v in allocator.metrics().items() if k not in drop}, nan_ok=True
        )
    assert twin.predicted_lengths(ids).tolist() == allocator.predicted_lengths(ids).tolist()


def test_a_fresh_allocator_can_be_saved(tmp_path: Path) -> None:
    kr.KnapsackAllocator().save(tmp_path / "state.npz")
    twin = kr.KnapsackAllocator.load(tmp_path / "state.npz")
    assert counts_of(twin, ["a", "b"], 8) == [4, 4]


def test_a_state_is_a_snapshot() -> None:
    allocator = trained()
    state = allocator.state_dict()
    header, arrays = json.dumps(state["header"]), {name: array.copy() for name, array in state["arrays"].items()}
    allocator.observe(["a", "z"], [1, 0])
    assert json.dumps(state["header"]) == header
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, state["arrays"][name])


def test_the_file_does_not_grow_with_the_length_of_the_run(tmp_path: Path) -> None:
    """Mistake 7: state is linear in prompts, not in history."""
    sizes = []
    for steps in (2, 40):
        trained(steps=steps).save(tmp_path / "state.npz")
        sizes.append((tmp_path / "state.npz").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 16  # digits of counters in the header


def test_no_pickle_is_written_or_read(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    trained().save(path)
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files:
            assert archive[name].dtype.kind in "iuf"
    with pytest.raises(ValueError):
        statefile.write_state(path, {}, {"objects": np.array([{}, None], dtype=object)})
    assert kr.KnapsackAllocator.load(path).metrics()["prompts_seen"] == len(IDS)

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trap"),))

    np.savez(tmp_path / "bad.npz", header=np.array([Trap()], dtype=object))
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Trap()))
    for bad in ("bad.npz", "bad.pkl"):
        with pytest.raises(ValueError, match="not a readable allocator state"):
            kr.KnapsackAllocator.load(tmp_path / bad)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("stage", ["arrays", "fsync", "rename"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(stage: str, error, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "state.npz"
    allocator = trained()
    allocator.save(path)
    old = path.read_bytes()
    allocator.observe(["z"] * 4, [0, 1, 0, 1])

    def fail(*arguments, **_):
        if stage == "arrays":
            arguments[0].writestr("half", b"half a file")
        raise error

    target = {"arrays": (statefile, "_write_array"), "fsync": (os, "fsync"), "rename": (Path, "replace")}[stage]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(type(error)):
            allocator.save(path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.npz"]
    allocator.save(path)
    assert path.read_bytes() != old
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.npz"]


def test_a_missing_folder_or_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trained().save(tmp_path / "nowhere" / "state.npz")
    with pytest.raises(FileNotFoundError):
        kr.KnapsackAllocator.load(tmp_path / "nothing.npz")


def test_any_file_name_is_used_unchanged(tmp_path: Path) -> None:
    """No suffix is added, so a saved file is found again."""
    path = tmp_path / "checkpoint-12.state"
    trained().save(str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    kr.KnapsackAllocator.load(str(path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "state.npz"
    trained().save(path)
    return path.read_bytes()


def test_truncated_files_are_refused_and_left_alone(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    for size in sorted({0, 1, 3, 4, 10, *range(0, len(saved), 137), len(saved) - 1}):
        path.write_bytes(saved[:size])
        with pytest.raises(ValueError, match="not a readable allocator state"):
            kr.KnapsackAllocator.load(path)
        assert path.read_bytes() == saved[:size]


def test_damaged_bytes_are_refused_or_do_not_matter(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    path.write_bytes(saved)
    whole = kr.KnapsackAllocator.load(path).state_dict()
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.choice(len(saved), 400, replace=False):
        damaged = bytearray(saved)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            found = kr.KnapsackAllocator.load(path)
        except ValueError:
            refused += 1
        else:
            assert_same_state(found.state_dict(), whole)
    assert refused > 200


@pytest.mark.parametrize("content", ["text", "zip", "npy", "npz", "empty-npz", "list-header", "json", "pickle"])
def test_foreign_files_are_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    buffer = io.BytesIO()
    if content == "npy":
        np.save(buffer, np.arange(4))
    elif content == "npz":
        np.savez(buffer, weights=np.arange(4.0))
    elif content == "empty-npz":
        np.savez(buffer)
    elif content == "list-header":
        np.savez(buffer, header=np.frombuffer(b"[1, 2]", dtype=np.uint8))
    elif content == "json":
        np.savez(buffer, header=np.frombuffer(b'{"format": "something else"}', dtype=np.uint8))
    elif content == "pickle":
        pickle.dump({"header": {}}, buffer)
    else:
        buffer.write(b"PK\x03\x04 not really" if content == "zip" else b"hello\n")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"(no|not an?) .*allocator state"):
        kr.KnapsackAllocator.load(path)
    assert path.read_bytes() == buffer.getvalue()


def test_a_folder_is_not_a_state(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        kr.KnapsackAllocator.load(tmp_path)


def newer(state: dict) -> dict:
    state["header"]["version"] = 99
    state["header"]["settings"] = {**state["header"]["settings"], "drift": 0.25}
    return state


def test_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    """A newer version may have settings that this one does not."""
    path = tmp_path / "state.npz"
    state = newer(trained().state_dict())
    statefile.write_state(path, state["header"], state["arrays"])
    old = path.read_bytes()
    with pytest.raises(ValueError, match=r"version 99.*reads version 5"):
        kr.KnapsackAllocator.load(path)
    assert path.read_bytes() == old


def without(name: str):
    def change(state: dict) -> dict:
        part = "header" if name in state["header"] else "arrays"
        del state[part][name]
        return state

    return change


def with_array(name: str, array) -> object:
    return lambda state: {**state, "arrays": {**state["arrays"], name: array}}


def test_a_wrong_state_is_refused_and_changes_nothing() -> None:
    for change, message in [
        (newer, "version 99.*reads version 5"),
        (lambda state: {**state, "header": {"format": "other"}}, "format is 'other'"),
        (lambda state: {**state, "header": {}}, "format is None"),
        (lambda _: trained("beta").state_dict(), "estimator .*'beta'.*'empirical-bayes'"),
        (lambda _: trained(discount=0.5).state_dict(), r"0\.5.*0\.8"),
        (without("version"), "version"),
        (without("estimator"), "estimator"),
        (without("settings"), "settings"),
        (without("batches_at_refit"), "batches_at_refit"),
        (without("unscored_rollouts"), "unscored_rollouts"),
        (without("estimator.prior"), "prior"),
        (without("tracker.recent"), "recent"),
        (with_array("estimator.prior", np.ones(3)), "prior"),
        (with_array("tracker.visits", np.zeros(2, dtype=np.int64)), "visits"),
    ]:
        with named_case(change=change, message=message):
            allocator = trained(steps=2)
            before, metrics, counts = allocator.state_dict(), allocator.metrics(), counts_of(allocator)
            state = change(trained(steps=6).state_dict())
            metrics = allocator.metrics()
            with pytest.raises(ValueError, match=message):
                allocator.load_state_dict(state)
            assert_same_state(allocator.state_dict(), before)
            assert allocator.metrics() == metrics
            assert counts_of(allocator) == counts


def test_a_state_of_other_settings_is_refused() -> None:
    for name, setting, other in (
        ("window", "fallback", False),
        ("beta", "discount", 0.5),
        ("bayes-filter", "iterations", 7),
    ):
        state = trained(name).state_dict()
        kr.KnapsackAllocator(name).load_state_dict(state)
        with pytest.raises(ValueError, match="use the same one"):
            kr.KnapsackAllocator(name, **{setting: other}).load_state_dict(state)


def test_a_success_function_is_passed_again(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    allocator = trained(success=lambda r: r > 0.5)
    allocator.save(path)
    with pytest.raises(ValueError, match=r"success=\.\.\."):
        kr.KnapsackAllocator.load(path)
    twin = kr.KnapsackAllocator.load(path, success=lambda r: r > 0.5)
    assert_same_state(twin.state_dict(), allocator.state_dict())
    trained(success=0.0).save(path)
    assert kr.KnapsackAllocator.load(path, success=0.75).success == 0.75


def test_an_estimator_object_is_passed_again(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    allocator = kr.KnapsackAllocator(BetaEstimator(1.0, 1.0))
    allocator.observe(["a"] * 4, [1, 0, 0, 0])
    allocator.save(path)
    with pytest.raises(ValueError, match=r"estimator=\.\.\."):
        kr.KnapsackAllocator.load(path)
    with pytest.raises(ValueError, match="use the same one"):
        kr.KnapsackAllocator.load(path, estimator=BetaEstimator(2.0, 1.0))
    twin = kr.KnapsackAllocator.load(path, estimator=BetaEstimator(1.0, 1.0))
    assert twin.belief(["a"]).mean.tolist() == allocator.belief(["a"]).mean.tolist()


# --- the package ---


def test_importing_the_package_imports_numpy_only() -> None:
    heavy = ["torch", "transformers", "trl", "ray", "matplotlib", "pandas", "numba", "scipy", "datasets"]
    code = f"import sys, knapsack_rl; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(("module", "examples"), [("allocation.policies", 1), ("allocator", 5)])
def test_examples_in_docstrings(module: str, examples: int) -> None:
    results = doctest.testmod(importlib.import_module(f"knapsack_rl.{module}"))
    assert results.failed == 0
    assert results.attempted >= examples
