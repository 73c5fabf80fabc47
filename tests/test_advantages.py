"""Advantages of ragged groups against loops over the groups."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import knapsack_rl as kr
from cases import named_case
from group_loops import alike, members_of
from knapsack_rl.advantages import prompt_weights
from strategies import Rollouts, no_deadline, ragged_groups

NAN = float("nan")


def deviation_of(rewards: list[float]) -> float:
    mean = math.fsum(rewards) / len(rewards)
    return math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) if len(rewards) > 1 else 0.0


def advantages_by_loop(rollouts: Rollouts, scale: str, weighting: str, epsilon: float) -> list[float]:
    groups, rewards = rollouts
    members = members_of(groups)
    scored = [r for r in rewards.tolist() if not math.isnan(r)]
    advantages = [0.0] * len(rewards)
    for rows in members.values():
        known = [row for row in rows if not math.isnan(rewards[row])]
        own = [float(rewards[row]) for row in known]
        if len(own) < 2 or alike(own):
            continue
        divisor = {"group": deviation_of(own) + epsilon, "batch": deviation_of(scored) + epsilon, "none": 1.0}[scale]
        for row, reward in zip(known, own, strict=True):
            advantages[row] = (reward - math.fsum(own) / len(own)) / divisor
            if weighting == "prompt":
                advantages[row] *= len(rewards) / (len(members) * len(rows))
    return advantages


def over_mean_by_loop(groups: np.ndarray, rewards: list[float], weighting: str) -> list[float]:
    """A = (r - mean) / mean of the scored rollouts of a group, 0 in a group without spread."""
    advantages = [0.0] * len(rewards)
    members = members_of(groups)
    for rows in members.values():
        known = [row for row in rows if not math.isnan(rewards[row])]
        own = [rewards[row] for row in known]
        if len(own) < 2 or alike(own):
            continue
        mean = math.fsum(own) / len(own)
        for row, reward in zip(known, own, strict=True):
            weight = 1.0 if weighting == "rollout" else len(rewards) / (len(members) * len(rows))
            advantages[row] = (reward / mean - 1.0) * weight
    return advantages


EXPECTED: dict[str, Any] = {"advantage": "posterior-mean", "baseline": [0.5, 0.5]}


@no_deadline
@given(ragged_groups(allow_nan=True), st.sampled_from(["auto", "rollout", "prompt"]))
def test_advantages_over_the_mean_match_a_loop(rollouts: Rollouts, weighting) -> None:
    """Of rewards >= 0 as they are, and of any rewards as outcomes of 0 and 1."""
    groups, rewards = rollouts
    above = np.abs(rewards)
    found = kr.group_advantages(groups, above, advantage="group-mean", weighting=weighting)
    np.testing.assert_allclose(found, over_mean_by_loop(groups, above.tolist(), weighting), rtol=1e-9, atol=1e-9)
    outcomes = [r if math.isnan(r) else float(r > 0.5) for r in rewards.tolist()]
    found = kr.group_advantages(groups, rewards, advantage="group-mean", weighting=weighting, success=0.5)
    np.testing.assert_allclose(found, over_mean_by_loop(groups, outcomes, weighting), rtol=1e-12, atol=1e-12)
    largest = max(map(len, members_of(groups).values()))
    assert np.abs(kr.group_advantages(groups, above, advantage="group-mean", weighting="rollout")).max() < largest


def test_worked_advantages_over_the_mean() -> None:
    groups, rewards = ["a"] * 4 + ["b"] * 2 + ["c"] * 2 + ["d"], [1, 0, 0, 0, 1, 0, 0, 0, 1]
    found = kr.group_advantages(groups, rewards, advantage="group-mean", weighting="rollout")
    assert found.tolist() == [3, -1, -1, -1, 1, -1, 0, 0, 0]
    weighted = kr.group_advantages(groups, rewards, advantage="group-mean")
    assert weighted.tolist() == pytest.approx([3 * 9 / 16, *[-9 / 16] * 3, 9 / 8, -9 / 8, 0, 0, 0])
    signs = kr.group_advantages(groups, [2 * r - 1 for r in rewards], advantage="group-mean", success=0.0)
    assert (signs == weighted).all()
    assert (kr.group_advantages(groups, rewards, advantage="group-std") == kr.group_advantages(groups, rewards)).all()


def test_worked_advantages_over_the_posterior_mean() -> None:
    """Surprises have a gradient, also in a group of one or of equal outcomes; what was as good as certain has none."""
    groups, rewards = ["a"] * 3 + ["b"] * 2 + ["c"], [1, 0, 0, 0, 1, math.nan]
    baseline = [0.25, 0.5, 0.02, 0.95, 0.01, 0.5]
    found = kr.group_advantages(groups, rewards, weighting="rollout", **EXPECTED | {"baseline": baseline})
    assert found.tolist() == pytest.approx([0.75 / 0.25, -0.5 / 0.5, 0, -1 / 0.95, 1 / 0.05, 0])
    weighted = kr.group_advantages(groups, rewards, **EXPECTED | {"baseline": baseline})
    assert weighted.tolist() == pytest.approx([*(found[:3] * 6 / 9), *(found[3:5] * 6 / 6), 0])
    signs = [2 * r - 1 for r in rewards]
    assert (kr.group_advantages(groups, signs, success=0.0, **EXPECTED | {"baseline": baseline}) == weighted).all()


def test_advantages_that_cannot_be_are_refused() -> None:
    for settings, rewards, message in [
        ({"advantage": "group-mean"}, [-1.0, 1.0], r"rewards >= 0, got -1\.0; pass success"),
        ({"advantage": "group-mean", "scale": "batch"}, [0.0, 1.0], "contradicts scale='batch'"),
        ({"advantage": "group-std", "scale": "none"}, [0.0, 1.0], "contradicts scale='none'"),
        ({"advantage": "mean"}, [0.0, 1.0], "must be one of group-std, group-mean, posterior-mean, or None.*'mean'"),
        ({"success": 0.5}, [0.0, 1.0], "success is for advantage='group-mean' or 'posterior-mean', got advantage=None"),
        ({"advantage": "posterior-mean"}, [0.0, 1.0], "'posterior-mean' and baseline go together"),
        ({"baseline": [0.5, 0.5]}, [0.0, 1.0], "'posterior-mean' and baseline go together, got advantage=None"),
        (EXPECTED | {"baseline": [0.5]}, [0.0, 1.0], "a number in .0, 1. for each of 2 rollouts"),
        (EXPECTED | {"baseline": [0.5, 1.5]}, [0.0, 1.0], "a number in .0, 1. for each of 2 rollouts"),
        (EXPECTED | {"baseline": [0.5, math.nan]}, [0.0, 1.0], "a number in .0, 1. for each of 2 rollouts"),
        (EXPECTED, [0.0, 2.0], r"outcomes in \[0, 1\], got rewards from 0\.0 to 2\.0; pass success"),
    ]:
        with named_case(settings=settings), pytest.raises(ValueError, match=message):
            kr.group_advantages([0, 0], rewards, **settings)  # type: ignore[arg-type]


@no_deadline
@given(
    ragged_groups(allow_nan=True),
    st.sampled_from(["group", "batch", "none"]),
    st.sampled_from(["rollout", "prompt"]),
    st.sampled_from([1e-4, 0.0, 0.5]),
)
def test_advantages_match_a_loop_over_groups(rollouts: Rollouts, scale, weighting, epsilon: float) -> None:
    found = kr.group_advantages(*rollouts, scale=scale, weighting=weighting, epsilon=epsilon)
    assert found.dtype == np.float64
    expected = advantages_by_loop(rollouts, scale, weighting, epsilon)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_advantages_match_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat(np.arange(40), rng.integers(2, 30, 40)))
    rewards = rng.normal(size=groups.size) + groups
    found = kr.group_advantages(groups, rewards)
    for group in range(40):
        own = torch.tensor(rewards[groups == group], dtype=torch.float64)
        expected = (own - own.mean()) / (own.std(unbiased=True) + 1e-4)
        np.testing.assert_allclose(found[groups == group], expected.numpy(), rtol=1e-10, atol=1e-12)


def test_worked_advantages() -> None:
    found = kr.group_advantages(["a", "b", "a", "a", "b"], [1, 5, 0, 0, 7], epsilon=0.0)
    spread = math.sqrt(1 / 3)
    np.testing.assert_allclose(
        found, [2 / 3 / spread, -1 / math.sqrt(2), -1 / 3 / spread, -1 / 3 / spread, 1 / math.sqrt(2)], rtol=1e-12
    )
    unscaled = kr.group_advantages(["a", "b", "a", "a", "b"], [1, 5, 0, 0, 7], scale="none")
    np.testing.assert_allclose(unscaled, [2 / 3, -1, -1 / 3, -1 / 3, 1], rtol=1e-12)


@no_deadline
@given(ragged_groups(allow_nan=True), st.randoms(use_true_random=False))
def test_rows_may_come_in_any_order(rollouts: Rollouts, random) -> None:
    order = np.array(random.sample(range(rollouts.rewards.size), rollouts.rewards.size))
    for scale in ("group", "batch", "none"):
        found = kr.group_advantages(*rollouts, scale=scale, weighting="prompt")
        moved = kr.group_advantages(rollouts.groups[order], rollouts.rewards[order], scale=scale, weighting="prompt")
        np.testing.assert_allclose(moved, found[order], rtol=1e-9, atol=1e-12)


@no_deadline
@given(ragged_groups())
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(rollouts: Rollouts) -> None:
    found = kr.group_advantages(*rollouts)
    for rows in members_of(rollouts.groups).values():
        assert abs(found[rows].sum()) < 1e-9
        by_reward = np.argsort(rollouts.rewards[rows], kind="stable")
        assert (np.diff(found[rows][by_reward]) >= -1e-12).all()


def test_groups_of_one_have_no_advantage() -> None:
    """Mistake 10: the raw reward of a lone rollout is not an advantage."""
    for scale, weighting, epsilon in itertools.product(["group", "batch", "none"], ["rollout", "prompt"], [1e-4, 0.0]):
        with named_case(scale=scale, weighting=weighting, epsilon=epsilon):
            found = kr.group_advantages(
                [0, 1, 1, 2], [5.0, 0.0, 1.0, -3.0], scale=scale, weighting=weighting, epsilon=epsilon
            )
            assert found[0] == found[3] == 0.0
            assert found[2] > 0.0
            assert kr.group_advantages([4], [1.0], scale=scale, weighting=weighting, epsilon=epsilon).tolist() == [0.0]
            # One scored rollout beside unscored ones is a group of one, too.
            found = kr.group_advantages([0, 0, 0], [NAN, 2.0, NAN], scale=scale, weighting=weighting, epsilon=epsilon)
            assert found.tolist() == [0.0, 0.0, 0.0]


def test_rewards_equal_within_rounding_give_advantages_of_exactly_zero() -> None:
    for scale, epsilon, rewards in itertools.product(
        ["group", "batch", "none"],
        [1e-4, 0.0],
        [
            [0.1 + 0.2, 0.3],
            [1.0, 1.0 + 1e-12, 1.0 - 1e-12],
            [-0.7, -0.1 * 7, -(0.1 + 0.6)],
            [1e9 + 1e-4, 1e9],
            [sum([0.1] * 10), 1.0],
            [0.0, 0.0, -0.0],
            [2.0, 2.0],
        ],
    ):
        with named_case(scale=scale, epsilon=epsilon, rewards=rewards):
            found = kr.group_advantages([0] * len(rewards) + [1, 1], [*rewards, 0.0, 1.0], scale=scale, epsilon=epsilon)
            assert found[: len(rewards)].tolist() == [0.0] * len(rewards)
            assert (found[len(rewards) :] != 0).all()
            assert kr.group_statistics([0] * len(rewards), rewards).effective_gradient_ratio == 0.0


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_rounding_of_the_type_of_the_rewards_is_no_signal(name: str) -> None:
    """Sums of the same shares in another order, made by torch in that type, and a residue of a sum that is zero."""
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.25, 0.7], dtype=dtype)
    for _ in range(50):
        some = shares[torch.randperm(6, generator=torch.Generator().manual_seed(3))[:4]]
        forward, backward = sum(some, start=some[0] * 0), sum(some.flip(0), start=some[0] * 0)
        residue = shares[0] + shares[1] - shares[2]
        rewards = torch.stack([forward, backward, residue, residue * 0, shares[0] * 0, shares[0] * 10])
        for one in (rewards, rewards.tolist() if dtype is torch.float64 else [*rewards]):
            assert kr.group_advantages([0, 0, 1, 1, 2, 2], one)[:4].tolist() == [0.0] * 4
            assert kr.group_statistics([0, 0, 1, 1, 2, 2], one).effective_prompt_ratio == 1 / 3


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_true_differences_in_short_types_count(name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    step = max(4 * torch.finfo(dtype).eps, 4e-6)
    rewards = torch.tensor([1.0, 1.0 - step, step, 0.0, 0.0, 1.0], dtype=dtype)
    assert (kr.group_advantages([0, 0, 1, 1, 2, 2], rewards) != 0).all()
    outlier = torch.tensor([0.0, 0.1, 0.0, 60000.0], dtype=dtype)  # does not hide the differences of others
    assert (kr.group_advantages([0, 0, 1, 1], outlier) != 0).all()


def test_tensors_of_any_kind_are_numbers() -> None:
    """Case 10: bfloat16, which numpy does not have, and rewards that require a gradient."""
    torch = pytest.importorskip("torch")
    groups, plain = [0, 0, 1, 1], [1.0, 0.5, 0.0, 2.0]
    expected = kr.group_advantages(groups, plain)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for tensor in (torch.tensor(plain, dtype=dtype), torch.tensor(plain, dtype=dtype, requires_grad=True)):
            for one in (tensor, [*tensor], tuple(tensor)):
                assert kr.group_advantages(groups, one).tolist() == expected.tolist()
                assert kr.group_statistics(groups, one) == kr.group_statistics(groups, plain)
    whole = torch.tensor([1, 0, 0, 1])
    for one in (whole, whole.bool(), whole.numpy(), whole.to(torch.uint8)):
        assert kr.group_advantages(groups, one).tolist() == kr.group_advantages(groups, [1.0, 0.0, 0.0, 1.0]).tolist()
    assert kr.group_advantages(groups, np.array(plain, np.float16)).tolist() == expected.tolist()
    unscored = kr.group_advantages(groups, [1.0, 0.5, None, 2.0])
    assert unscored.tolist() == kr.group_advantages(groups, [1.0, 0.5, NAN, 2.0]).tolist()


def test_what_is_no_number_is_named_with_its_type() -> None:
    torch = pytest.importorskip("torch")
    for rewards, message in [
        (np.array([1 + 2j, 0]), "type complex128 does not hold real numbers"),
        (torch.tensor([1 + 2j, 0]), "type complex64 does not hold real numbers"),
        (["1.0", "0.0"], "type <U3 does not hold numbers"),
        (np.array(["2026-01-01", "2026-01-02"], dtype="datetime64[D]"), r"type datetime64\[D\] does not hold"),
        ([object(), 1.0], "rewards must be numbers"),
        (None, "equally long"),
    ]:
        with named_case(rewards=rewards), pytest.raises(ValueError, match=message):
            kr.group_advantages([0, 0], rewards)


def test_small_true_differences_count() -> None:
    found = kr.group_advantages([0, 0], [1.0, 1.0 + 1e-5], epsilon=0.0)
    np.testing.assert_allclose(found, [-math.sqrt(0.5), math.sqrt(0.5)], rtol=1e-6)
    assert (kr.group_advantages([0, 0], [0.0, 1e-9], epsilon=0.0) != 0).all()


def test_unscored_rollouts_are_left_out() -> None:
    with_gap = kr.group_advantages([0, 0, 0, 1, 1, 1], [1.0, NAN, 0.0, NAN, NAN, NAN])
    without = kr.group_advantages([0, 0], [1.0, 0.0])
    assert with_gap[[0, 2]].tolist() == without.tolist()
    assert with_gap[[1, 3, 4, 5]].tolist() == [0.0] * 4


def test_ragged_groups_of_the_right_total_are_not_mixed() -> None:
    """Mistake 11: sizes 3, 5, 4 and 4 have the total of 4 x 4, and reshape(-1, 4) would mix prompts silently."""
    sizes = [3, 5, 4, 4]
    groups = np.repeat(np.arange(4), sizes)
    rewards = np.array([1, 0, 1, *[0] * 5, *[1] * 4, 0, 1, 0, 1], dtype=float)
    found = kr.group_advantages(groups, rewards, epsilon=0.0)
    assert found[3:12].tolist() == [0.0] * 9
    squares = rewards.reshape(-1, 4)
    mixed = ((squares - squares.mean(1, keepdims=True)) / (squares.std(1, ddof=1, keepdims=True) + 1e-4)).ravel()
    assert mixed[3] != 0.0  # the advantage that reshaping would give the all-wrong prompt
    np.testing.assert_allclose(found[:3], [math.sqrt(1 / 3), -2 * math.sqrt(1 / 3), math.sqrt(1 / 3)], rtol=1e-12)


@no_deadline
@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.sampled_from(["batch", "none"]))
def test_prompt_weighting_makes_every_prompt_weigh_the_same(sizes: list[int], scale) -> None:
    """The weights R / (G N_i) sum to R / G in every group, which is the uniform group size."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    weights = prompt_weights(groups)
    np.testing.assert_allclose(np.bincount(groups, weights=np.abs(weights)), groups.size / len(sizes), rtol=1e-12)
    rewards = (np.arange(groups.size) % 2).astype(float)
    plain = kr.group_advantages(groups, rewards, scale=scale)
    weighted = kr.group_advantages(groups, rewards, scale=scale, weighting="prompt")
    np.testing.assert_allclose(weighted, plain * weights, rtol=1e-12)


def test_prompt_weighting_equalises_a_large_and_a_small_prompt() -> None:
    groups = np.repeat([0, 1], [92, 2])
    rewards = np.tile([0.0, 1.0], 47)
    pull = {}
    for weighting in ("rollout", "prompt"):
        advantages = np.abs(kr.group_advantages(groups, rewards, scale="none", weighting=weighting))
        pull[weighting] = np.bincount(groups, weights=advantages)
    assert pull["rollout"][0] == pytest.approx(46 * pull["rollout"][1])
    assert pull["prompt"][0] == pytest.approx(pull["prompt"][1])


def test_the_weighting_changes_by_request_only() -> None:
    """Mistake 9: the default is the paper's, per rollout, and uniform groups do not depend on it."""
    parameters = inspect.signature(kr.group_advantages).parameters
    assert parameters["weighting"].default == "auto"
    assert parameters["advantage"].default is None
    ragged, mixed = np.repeat([0, 1], [6, 2]), np.array([1.0, 0, 0, 0, 0, 0, 1, 0])
    for scale in ("group", "batch", "none"):
        by_rollout = kr.group_advantages(ragged, mixed, scale=scale, weighting="rollout")
        assert (kr.group_advantages(ragged, mixed, scale=scale) == by_rollout).all()
    assert parameters["scale"].default == "group"
    assert parameters["epsilon"].default == 1e-4
    groups, rewards = np.repeat(np.arange(5), 4), np.random.default_rng(1).random(20)
    plain = kr.group_advantages(groups, rewards)
    np.testing.assert_allclose(kr.group_advantages(groups, rewards, weighting="prompt"), plain, rtol=1e-14)


def test_arguments_are_not_changed() -> None:
    groups, rewards = np.array([1, 1, 0]), np.array([1.0, 0.0, NAN])
    kr.group_advantages(groups, rewards, weighting="prompt")
    kr.group_statistics(groups, rewards)
    assert groups.tolist() == [1, 1, 0]
    assert rewards[:2].tolist() == [1.0, 0.0]


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="scale must be 'group', 'batch' or 'none', got 'std'"):
        kr.group_advantages([0, 0], [0.0, 1.0], scale="std")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weighting must be 'auto', 'rollout' or 'prompt', got 'token'"):
        kr.group_advantages([0, 0], [0.0, 1.0], weighting="token")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epsilon"):
        kr.group_advantages([0, 0], [0.0, 1.0], epsilon=-1.0)
