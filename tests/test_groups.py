"""Ragged groups: outcomes and statistics against loops over the groups."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import knapsack_rl as kr
from cases import named_case
from group_loops import alike, members_of
from knapsack_rl.groups import DIFFICULTY_CLASSES, difficulty_class, group_outcomes, successes_of, transition_matrix
from strategies import Rollouts, no_deadline, ragged_groups

NAN = float("nan")


def class_by_rate(successes: int, total: int) -> str:
    """The paper's classes; whole numbers, so 0.2 and 0.8 are met exactly."""
    if successes == total:
        return "extremely easy"
    if successes == 0:
        return "extremely hard"
    if 10 * successes >= 8 * total:
        return "easy"
    return "hard" if 10 * successes <= 2 * total else "medium"


@no_deadline
@given(ragged_groups(allow_nan=True), st.sampled_from([0.0, 0.5, -1.0]))
def test_statistics_match_loops(rollouts: Rollouts, threshold: float) -> None:
    per_group = [
        [r for r in rollouts.rewards[rows].tolist() if not math.isnan(r)]
        for rows in members_of(rollouts.groups).values()
    ]
    scored = [own for own in per_group if own]
    found = kr.group_statistics(*rollouts, success=threshold)
    assert found.prompts == len(scored)
    assert found.rollouts == sum(map(len, scored))
    if not scored:
        assert math.isnan(found.effective_gradient_ratio)
        assert math.isnan(found.effective_prompt_ratio)
        assert math.isnan(found.covered_by_success)
        assert (found.smallest_group, found.largest_group) == (0, 0)
        return
    varied = [own for own in scored if not alike(own)]
    good = [sum(r > threshold for r in own) for own in scored]
    sizes = [len(own) for own in scored]
    pairs = list(zip(good, sizes, strict=True))
    classes = [class_by_rate(*pair) for pair in pairs]
    count = len(scored)
    assert found.effective_gradient_ratio == pytest.approx(sum(map(len, varied)) / found.rollouts)
    assert found.effective_prompt_ratio == pytest.approx(len(varied) / count)
    assert found.covered_by_success == pytest.approx(sum(g > 0 for g in good) / count)
    assert found.covered_by_failure == pytest.approx(sum(g < n for g, n in pairs) / count)
    assert found.all_correct == pytest.approx(sum(g == n for g, n in pairs) / count)
    assert found.all_wrong == pytest.approx(sum(g == 0 for g in good) / count)
    assert found.class_shares == pytest.approx([classes.count(name) / count for name in DIFFICULTY_CLASSES])
    assert (found.smallest_group, found.largest_group) == (min(sizes), max(sizes))


def test_worked_statistics() -> None:
    groups = ["a"] * 2 + ["b"] * 6 + ["c"] * 2
    found = kr.group_statistics(groups, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert found.effective_gradient_ratio == 0.6
    assert found.effective_prompt_ratio == pytest.approx(1 / 3)
    assert found.class_shares == pytest.approx((1 / 3, 0, 0, 1 / 3, 1 / 3))
    flat = found.as_dict()
    assert flat["effective_gradient_ratio"] == 0.6
    assert flat["class/extremely_easy"] == pytest.approx(1 / 3)
    assert all(isinstance(number, float) for number in flat.values())
    assert "class_shares" not in flat


@no_deadline
@given(ragged_groups(allow_nan=True))
def test_outcomes_come_in_order_of_first_appearance(rollouts: Rollouts) -> None:
    members = members_of(rollouts.groups)
    found = group_outcomes(*rollouts)
    assert found.first_row.tolist() == [rows[0] for rows in members.values()]
    assert rollouts.groups[found.first_row][found.group_R].tolist() == rollouts.groups.tolist()
    for index, rows in enumerate(members.values()):
        own = [r for r in rollouts.rewards[rows].tolist() if not math.isnan(r)]
        assert found.totals[index] == len(own)
        assert found.successes[index] == sum(r > 0 for r in own)
        if own:
            assert found.mean_reward[index] == pytest.approx(math.fsum(own) / len(own), abs=1e-12)
        else:
            assert math.isnan(found.mean_reward[index])
            assert not found.effective[index]


def test_an_empty_batch_has_no_statistics() -> None:
    found = kr.group_statistics(np.array([], dtype=np.int64), [])
    assert (found.rollouts, found.prompts) == (0, 0)
    assert math.isnan(found.effective_gradient_ratio)
    assert kr.group_advantages(np.array([], dtype=np.int64), []).shape == (0,)


# --- success rule ---


def test_success_threshold_and_function() -> None:
    rewards = np.array([-1.0, 0.0, 0.4, 0.5, 1.0, NAN])
    assert successes_of(rewards, 0.0).tolist() == [False, False, True, True, True, False]
    assert successes_of(rewards, 0.5).tolist() == [False, False, False, False, True, False]
    assert successes_of(rewards, lambda r: r >= 0.5).tolist() == [False, False, False, True, True, False]
    assert not successes_of(rewards, lambda r: ~(r < 5))[5]  # NaN is never a success, whatever the function says
    for bad in (NAN, np.inf):
        with pytest.raises(ValueError, match="success rule must be a finite threshold"):
            successes_of(rewards, bad)
    with pytest.raises(ValueError, match=r"success function returned shape \(\).*\(6,\)"):
        successes_of(rewards, lambda r: True)


# --- difficulty ---


def test_class_borders() -> None:
    for total in range(1, 61):
        with named_case(total=total):
            successes = np.arange(total + 1)
            found = difficulty_class(successes, np.full(total + 1, total))
            assert [DIFFICULTY_CLASSES[k] for k in found] == [class_by_rate(int(good), total) for good in successes]


def test_worked_class_borders() -> None:
    names = [DIFFICULTY_CLASSES[k] for k in difficulty_class([10, 9, 8, 7, 3, 2, 1, 0], [10] * 8)]
    assert names == ["extremely easy", "easy", "easy", "medium", "medium", "hard", "hard", "extremely hard"]
    assert difficulty_class([0], [0]).tolist() == [-1]


@pytest.mark.parametrize(("successes", "totals"), [([3], [2]), ([-1], [2]), ([1, 1], [2])])
def test_impossible_counts_are_refused(successes, totals) -> None:
    with pytest.raises(ValueError, match="successes must lie between 0 and totals"):
        difficulty_class(successes, totals)


@no_deadline
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 4)), max_size=40))
def test_transitions_match_a_loop(pairs: list[tuple[int, int]]) -> None:
    expected = np.zeros((5, 5), dtype=int)
    for first, last in pairs:
        if first >= 0 and last >= 0:
            expected[first, last] += 1
    found = transition_matrix([first for first, _ in pairs], [last for _, last in pairs])
    assert found.shape == (5, 5)
    assert found.tolist() == expected.tolist()


def test_transition_errors() -> None:
    with pytest.raises(ValueError, match=r"same shape.*\(2,\).*\(1,\)"):
        transition_matrix([0, 1], [0])
    for bad in (5, -2):
        with pytest.raises(ValueError, match="between -1 and 4"):
            transition_matrix([bad], [0])
        with pytest.raises(ValueError, match="between -1 and 4"):
            transition_matrix([0], [bad])


# --- errors ---


def test_invalid_rows_are_refused() -> None:
    for function, (groups, rewards, message) in itertools.product(
        [kr.group_advantages, kr.group_statistics],
        [
            ([0, 0, 1], [1.0, 0.0], r"equally long.*\(3,\).*\(2,\)"),
            ([[0, 1]], [[1.0, 0.0]], "one-dimensional"),
            ([0.0, 1.0], [1.0, 0.0], r"group_of_rollout\[0\] is 0.0"),
            ([0, 0, 0], [1.0, np.inf, 0.0], r"rewards\[1\] is inf"),
            ([0, 0], [1.0, -np.inf], r"rewards\[1\] is -inf"),
            ([0, 0], ["good", "bad"], "rewards must be numbers"),
            ([None, "a"], [1.0, 0.0], r"group_of_rollout\[0\] is None"),
        ],
    ):
        with named_case(function=function, groups=groups, rewards=rewards), pytest.raises(ValueError, match=message):
            function(groups, rewards)


def test_ids_of_different_types_are_not_merged() -> None:
    """Mistake 6: 7 and "7" are different prompts; two lone rollouts have no advantage."""
    try:
        found = kr.group_advantages([7, "7"], [0.0, 1.0])
    except ValueError:
        return
    assert found.tolist() == [0.0, 0.0]
