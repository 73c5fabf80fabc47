"""What counts as a success when nothing is named: levels, scales, sums, and six shapes of scripts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import knapsack_rl as kr
from knapsack_rl.success import LearnedSuccess, told_apart
from script_shapes import SHAPES, train


def groups_of(size: int, groups: int) -> np.ndarray:
    return np.repeat(np.arange(groups), size)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 3.5), (0.1, 0.7), (-2.0, -1.0), (0.0, 1e-3), (-1e6, 1e6)]
)
def test_rewards_of_two_levels_allocate_as_zero_and_one_do_with_a_threshold(low, high):
    learned, plain = kr.KnapsackAllocator(), kr.KnapsackAllocator(success=0.5)
    rng = np.random.default_rng(0)
    rates = rng.beta(0.7, 1.0, 40)
    rates[0], rates[1] = 0.0, 1.0
    ids = list(range(40))
    for _ in range(6):
        counts = plain.allocate(ids, 320).counts
        assert learned.allocate(ids, 320).counts.tolist() == counts.tolist()
        rows = np.repeat(ids, counts)
        good = rng.random(rows.size) < rates[rows]
        plain.observe(rows.tolist(), good.astype(float))
        learned.observe(rows.tolist(), np.where(good, high, low))
    assert learned.metrics() | {"allocation_seconds": 0, "outcome_per_prompt": 0} == plain.metrics() | {
        "allocation_seconds": 0,
        "outcome_per_prompt": 0,
    }


def test_a_rare_success_counts_however_rare_it_is():
    rule = LearnedSuccess()
    rewards = np.zeros((64 * 128, 1))
    rewards[5] = 1.0
    rule.learn(groups_of(128, 64), rewards)
    assert rule.successes(rewards).sum() == 1


def test_the_function_that_tells_prompts_apart_decides_wherever_it_stands():
    rng = np.random.default_rng(1)
    group = groups_of(8, 96)
    right = (rng.random(group.size) < np.repeat(rng.beta(0.3, 1.5, 96), 8)).astype(float)
    form = (rng.random(group.size) < 0.5).astype(float)
    for parts, wanted in ((np.stack([form, right], 1), 1), (np.stack([right, form], 1), 0)):
        rule = LearnedSuccess()
        rule.learn(group, parts)
        assert rule.order[0] == wanted
        np.testing.assert_array_equal(rule.successes(parts), right > 0)


def test_where_the_deciding_function_gives_no_reward_the_next_best_decides():
    rng = np.random.default_rng(2)
    group = groups_of(8, 96)
    right = (rng.random(group.size) < np.repeat(rng.beta(0.5, 0.5, 96), 8)).astype(float)
    code, text = group % 2 == 0, group % 2 == 1
    parts = np.stack([np.where(code, right, np.nan), np.where(text, right, np.nan)], 1)
    rule = LearnedSuccess()
    rule.learn(group, parts)
    np.testing.assert_array_equal(rule.successes(parts), right > 0)


def test_one_absurd_reward_does_not_hide_all_others():
    rng = np.random.default_rng(3)
    group = groups_of(8, 400)
    rewards = (rng.random(group.size) < np.repeat(rng.beta(1, 1, 400), 8)).astype(float)
    rewards[17], rewards[99] = 1e6, -1e6
    rule = LearnedSuccess()
    rule.learn(group, rewards[:, None])
    assert 0.0 < rule.deciding.cutoff < 1.0


@pytest.mark.parametrize("size", [2, 7])
def test_told_apart_is_the_covariance_between_prompts(size):
    """Against its definition with known rates; noise inside groups adds nothing, whatever their size."""
    prompts = 20_000
    rng = np.random.default_rng(size)
    rates = rng.choice([0.1, 0.3, 0.8], prompts)
    good = rng.random(prompts * size) < np.repeat(rates, size)
    found = told_apart(good, 2.0 * good, np.arange(0, good.size, size))
    mean = rates.mean()
    assert found == pytest.approx(2.0 * rates.var() / (mean * (1 - mean)) ** 0.5, abs=0.02)


def test_a_format_of_all_alike_scores_nothing_and_a_difference_between_prompts_does():
    starts = np.arange(0, 64, 8)
    by_prompt = np.repeat(np.arange(8) % 2 == 0, 8)
    alternating = np.arange(64) % 2 == 0
    # 8 groups against 32 that say 0.05 of the variance 0.25; alternating ones add nothing
    assert told_apart(by_prompt, by_prompt.astype(float), starts) == pytest.approx((8 * 0.25 + 32 * 0.0125) / 40 / 0.5)
    assert told_apart(alternating, alternating.astype(float), starts) == pytest.approx(32 * 0.0125 / 40 / 0.5)
    assert told_apart(np.ones(64, bool), by_prompt.astype(float), starts) == 0.0


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4))
def test_the_rule_survives_any_rewards_and_its_state_continues_it(seed, parts, batches):
    rng = np.random.default_rng(seed)
    levels = rng.normal(size=(parts, rng.integers(1, 6))).round(2)
    rule = LearnedSuccess()
    for _ in range(batches):
        group = rng.integers(0, 12, 60)
        rows = np.stack([rng.choice(column, 60) for column in levels], axis=1)
        rows[rng.random(rows.shape) < 0.2] = np.nan
        copy = LearnedSuccess()
        copy.load_state_dict(rule.state_dict())
        for one in (rule, copy):
            one.learn(group, rows)
        np.testing.assert_array_equal(rule.successes(rows), copy.successes(rows))
        assert not rule.successes(rows)[np.isnan(rows).all(axis=1)].any()
        assert sorted(rule.order) == list(range(parts))
        assert 0.0 <= rule.differ_anyway <= 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"parts": np.zeros((0, 4))},
        {"parts": np.full((1, 4), np.inf)},
        {"order": np.array([1])},
        {"rows": np.zeros((3, 1))},
        {"group": np.array([3.5])},
        {"differ_anyway": np.array([2.0])},
    ],
)
def test_a_damaged_state_is_refused(change):
    rule = LearnedSuccess()
    with pytest.raises(ValueError, match="the saved success rule must hold"):
        rule.load_state_dict(rule.state_dict() | change)


def test_graded_rewards_of_a_group_may_differ_without_a_success_and_the_prediction_knows():
    rng = np.random.default_rng(5)
    allocator = kr.KnapsackAllocator()
    ids = list(range(64))
    predicted, realised = [], []
    for step in range(30):
        counts = allocator.allocate(ids, 512).counts
        rows = np.repeat(ids, counts)
        right = rng.random(rows.size) < (rows % 8) / 8
        allocator.observe(rows.tolist(), np.stack([2.0 * right, 0.3 * (rng.random(rows.size) < 0.5)], axis=1))
        if step >= 10:
            numbers = allocator.metrics()
            predicted.append(numbers["predicted_nonzero_gradient"])
            realised.append(numbers["realised_nonzero_gradient"])
    assert np.mean(predicted) == pytest.approx(np.mean(realised), abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_settings_a_script_gains_what_it_gains_with_its_outcome_named(shape):
    """Final accuracy of a toy policy in points, and value by its true rates: never below uniform, as good as named."""
    runs = {arm: [train(shape, arm, seed) for seed in (1, 2)] for arm in ("uniform", "default", "named")}
    end = {arm: np.mean([100 * accuracy[-1] for accuracy, _ in found]) for arm, found in runs.items()}
    assert end["default"] >= end["uniform"] + 2.0
    assert end["default"] >= end["named"] - 1.5
    if shape != "share_of_tests":  # which has a rate per test, and no single value
        assert np.mean([value for _, value in runs["default"]]) >= 1.0
