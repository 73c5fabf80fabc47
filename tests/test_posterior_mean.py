"""What is expected of a rollout by the rest of its group, and advantages against that."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import knapsack_rl as kr
from knapsack_rl.estimation.grid import EmpiricalBayesEstimator
from knapsack_rl.groups import group_outcomes
from strategies import no_deadline

IDS = ["never", "rarely", "often", "always", "new"]
HISTORY = {"never": [0] * 12, "rarely": [0] * 11 + [1], "often": [0, 1, 1] * 4, "always": [1] * 12}


def informed(estimator: str = "bayes-filter", **settings: Any) -> kr.KnapsackAllocator:
    """An allocator with a history of all prompts but the new one."""
    allocator = kr.KnapsackAllocator(estimator, success=0.5, **settings)
    for _ in range(2):
        allocator.observe(
            [name for name, seen in HISTORY.items() for _ in seen],
            [outcome for seen in HISTORY.values() for outcome in seen],
        )
    return allocator


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[list[str], list[float]]:
    """Groups of one rollout and more, in any order, some of them unscored."""
    ids = draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=12))
    rewards = draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, float("nan")]), min_size=len(ids), max_size=len(ids)))
    return ids, rewards


def expected_of(allocator: kr.KnapsackAllocator, ids: list[str], rewards: list[float]) -> np.ndarray:
    groups = group_outcomes(ids, rewards, 0.5)
    return groups.by_outcome(allocator.expected_outcomes(list(dict.fromkeys(ids)), groups))


@no_deadline
@given(rollouts(), st.sampled_from(["bayes-filter", "empirical-bayes", "with features"]))
def test_recording_returns_what_was_expected_before(given: tuple[list[str], list[float]], name: str) -> None:
    ids, rewards = given
    distinct, groups = list(dict.fromkeys(ids)), group_outcomes(ids, rewards, 0.5)
    quiet, telling = (informed("bayes-filter" if name == "with features" else name) for _ in range(2))
    for allocator in (quiet, telling) if name == "with features" else ():
        allocator.note_features(IDS, {"topic": ["a", "b", "a", "b", "a"]})
        allocator.observe(["never", "often"] * 2, [0, 1, 0, 1])
    before = quiet.expected_outcomes(distinct, groups)
    assert quiet.record(distinct, groups) is None
    found = telling.record(distinct, groups, expected=True)
    scored = groups.totals > 0
    np.testing.assert_allclose(found[scored], before[scored], rtol=1e-12)
    assert (found[~scored] == 0.5).all()
    assert not telling.failures
    for one, other in zip(*(a.state_dict()["arrays"].items() for a in (quiet, telling)), strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])


ALLOCATORS = {name: informed(name) for name in ("bayes-filter", "empirical-bayes")}


@no_deadline
@given(rollouts(), st.sampled_from(list(ALLOCATORS)), st.data())
def test_what_is_expected_of_a_rollout_does_not_depend_on_it(
    given: tuple[list[str], list[float]], name: str, data: st.DataObject
) -> None:
    """This makes it a baseline without bias. It rises with the other successes of the group and with no other group."""
    ids, rewards = given
    before = expected_of(ALLOCATORS[name], ids, rewards)
    assert ((before > 0) & (before < 1)).all()
    row = data.draw(st.integers(0, len(ids) - 1))
    if np.isnan(rewards[row]):
        return
    flipped = [1.0 - r if k == row else r for k, r in enumerate(rewards)]
    after = expected_of(ALLOCATORS[name], ids, flipped)
    assert after[row] == pytest.approx(before[row], rel=1e-9)
    for k, other in enumerate(ids):
        if np.isnan(rewards[k]):
            continue
        if other != ids[row]:
            assert after[k] == pytest.approx(before[k], rel=1e-9)
        elif k != row:
            assert (after[k] > before[k]) == (flipped[row] == 1.0)


def test_it_is_the_posterior_mean_of_an_estimator_that_saw_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without forgetting and refitting, observing all rollouts but one and asking for the mean gives the same."""
    monkeypatch.setattr("knapsack_rl.estimation.tracker.Tracker.refit_due", lambda *_: False)
    allocator = informed("empirical-bayes", discount=1.0)
    ids = ["rarely", "often", "rarely", "new", "rarely", "never"]
    rewards = [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    found = expected_of(allocator, ids, rewards)
    for row in range(len(ids)):
        other = copy.deepcopy(allocator)
        rest = [k for k in range(len(ids)) if k != row]
        other.observe([ids[k] for k in rest], [rewards[k] for k in rest])
        assert found[row] == pytest.approx(other.belief([ids[row]]).mean[0], rel=1e-9)


def test_by_hand_on_a_grid_of_three_rates() -> None:
    estimator = EmpiricalBayesEstimator(grid_points=3, discount=1.0)
    allocator = kr.KnapsackAllocator(estimator, success=0.5)
    low, middle, high = estimator.grid
    found = expected_of(allocator, ["a", "a", "b"], [1.0, 0.0, 1.0])
    flat = (low + middle + high) / 3
    after_success = (low**2 + middle**2 + high**2) / (low + middle + high)
    failing = 1 - estimator.grid
    after_failure = (failing * estimator.grid).sum() / failing.sum()
    assert found.tolist() == pytest.approx([after_failure, after_success, flat])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("rate", [0.02, 0.3, 0.97])
def test_the_gradient_has_no_bias(size: int, rate: float) -> None:
    """Over all outcomes of a group: the expected score is that of outcomes over what is expected of the rest."""
    allocator = ALLOCATORS["bayes-filter"]
    found = wanted = 0.0
    for outcomes in itertools.product([0.0, 1.0], repeat=size):
        chance = np.prod([rate if outcome else 1 - rate for outcome in outcomes])
        expected = expected_of(allocator, ["often"] * size, list(outcomes))
        advantages = kr.group_advantages(
            ["often"] * size, outcomes, advantage="posterior-mean", baseline=expected, weighting="rollout"
        )
        score = np.where(np.array(outcomes) == 1.0, 1 / rate, -1 / (1 - rate))  # d log p(outcome) / d rate
        found += chance * (advantages * score).sum()
        wanted += chance * (np.array(outcomes) * score / np.maximum(expected, 0.05)).sum()
    assert found == pytest.approx(wanted, rel=1e-9)


def test_an_estimator_without_a_posterior_is_refused() -> None:
    with pytest.raises(ValueError, match=r"posterior on a grid.*got BetaEstimator"):
        expected_of(kr.KnapsackAllocator("beta", success=0.5), ["a"], [1.0])
