"""Rules that generate in rounds, without a model: their requests and the rollouts they keep."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from experiments.rules import RULES, Conformal, Oversample, PilotCommit, Sequential, Skip
from knapsack_rl.groups import group_outcomes


def play(rule, success, batch=()):
    """One step: (rounds asked for, prompts, groups, successes); ``success(prompt, k)`` is outcome k of a prompt."""
    rule.start(list(batch))
    rounds, ids, outcomes, seen = [], [], [], Counter()
    while wanted := rule.request():
        rounds.append(dict(wanted))
        fresh = []
        for prompt, count in wanted.items():
            fresh += [success(prompt, seen[prompt] + k) for k in range(count)]
            seen[prompt] += count
        group_R = np.repeat(np.arange(len(wanted)), list(wanted.values()))
        rule.observe(list(wanted), group_outcomes(group_R, np.array(fresh, dtype=float), 0.0))
        ids += [prompt for prompt, count in wanted.items() for _ in range(count)]
        outcomes += fresh
    prompts = list(dict.fromkeys(ids))
    group_R = np.array([prompts.index(prompt) for prompt in ids])
    return rounds, prompts, group_R, np.array(outcomes, dtype=np.int64)


def kept(rule, prompts, group_R, success_R):
    """Successes and failures kept, by prompt."""
    rows = rule.keep(prompts, group_R, success_R)
    assert len(set(rows.tolist())) == rows.size
    return Counter((prompts[group_R[row]], int(success_R[row])) for row in rows)


IDS = list(range(40))


def mixed_if(condition):
    """Outcomes alternate where the condition holds, else all fail."""
    return lambda prompt, k: int(condition(prompt) and k % 2 == 0)


def test_oversampling_draws_batches_until_enough_groups_are_mixed():
    rule = Oversample(IDS, 4, 6, seed=1)
    rounds, prompts, group_R, success_R = play(rule, mixed_if(lambda p: p % 4 == 0))
    assert all(len(wanted) == 4 and set(wanted.values()) == {6} for wanted in rounds)
    assert len(prompts) == 4 * len(rounds)  # none twice
    mixed = [prompt for prompt in prompts if prompt % 4 == 0]
    assert len(mixed) >= 4 > sum(prompt % 4 == 0 for wanted in rounds[:-1] for prompt in wanted)
    assert kept(rule, prompts, group_R, success_R) == {(prompt, s): 3 for prompt in mixed[:4] for s in (0, 1)}


def test_oversampling_gives_up_after_its_rounds_and_when_the_data_is_used_up():
    rule = Oversample(IDS, 4, 2, max_rounds=3)
    rounds, prompts, group_R, success_R = play(rule, lambda *_: 0)
    assert len(rounds) == 3
    assert kept(rule, prompts, group_R, success_R) == {(prompt, 0): 2 for prompt in prompts[:4]}  # never empty
    rounds, prompts, *_ = play(Oversample(IDS[:6], 4, 2, max_rounds=9), lambda *_: 0)
    assert sorted(prompts) == IDS[:6]
    assert [len(wanted) for wanted in rounds] == [4, 2]


def test_every_prompt_has_its_turn_before_one_comes_again():
    rule, drawn = Oversample(IDS, 5, 2, seed=3), []
    for _ in range(8):
        rounds, *_ = play(rule, mixed_if(lambda _: True))
        assert len(rounds) == 1
        drawn += rounds[0]
    assert sorted(drawn) == IDS
    again = [prompt for _ in range(8) for prompt in play(rule, mixed_if(lambda _: True))[0][0]]
    assert sorted(again) == IDS
    assert again != drawn


def test_skipping_holds_the_share_of_flat_groups_at_its_target():
    """Half of the prompts never succeed: without skipping half of all groups would have no variance."""
    rule, prompts = Skip(IDS, 10, 4, seed=0), Counter()
    for step in range(300):
        rounds, *_ = play(rule, mixed_if(lambda p: p % 2 == 0))
        assert sum(prompt % 2 == 0 for wanted in rounds for prompt in wanted) >= 10
        if step >= 100:
            prompts.update(prompt % 2 for wanted in rounds for prompt in wanted)
    assert prompts[1] / prompts.total() == pytest.approx(Skip.TARGETS["hard"], abs=0.03)


def test_skipping_explores_less_while_too_much_is_flat_and_more_otherwise():
    rule = Skip(IDS, 10, 4)
    play(rule, lambda *_: 0)  # all hard
    rule.start([])
    state = rule.state_dict()["explore"]
    assert state["hard"] == pytest.approx(0.49)
    assert state["easy"] == pytest.approx(0.51)
    for _ in range(100):
        play(rule, mixed_if(lambda _: True))
    assert rule.state_dict()["explore"] == pytest.approx({"easy": Skip.MOST, "hard": Skip.MOST})


@pytest.mark.parametrize("kind", [Oversample, Skip, PilotCommit, Conformal])
def test_a_rule_continues_where_it_was_saved(kind):
    def outcome(prompt, k):
        return int(prompt % 5 == 4 or (prompt % 5 > 1 and k % 2 == 1))

    straight, stopped = kind(IDS, 3, 4, seed=7), kind(IDS, 3, 4, seed=7)
    for _ in range(47):
        assert play(straight, outcome)[0] == play(stopped, outcome)[0]
    resumed = kind(IDS, 3, 4, seed=7 if kind is Conformal else 99)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for _ in range(10):
        assert play(resumed, outcome)[0] == play(straight, outcome)[0]


def test_sampling_until_balanced():
    rates = {
        "half": lambda k: k % 2,
        "late": lambda k: int(k >= 8),
        "never": lambda _: 0,
        "rare": lambda k: int(k == 3),
    }
    rule = Sequential(8, max_rounds=3)
    rounds, prompts, group_R, success_R = play(rule, lambda prompt, k: rates[prompt](k), batch=rates)
    assert [sorted(wanted) for wanted in rounds] == [sorted(rates), ["late", "never", "rare"], ["never", "rare"]]
    assert all(set(wanted.values()) == {8} for wanted in rounds)
    assert kept(rule, prompts, group_R, success_R) == {
        **{("half", 0): 4, ("half", 1): 4, ("late", 0): 4, ("late", 1): 4},
        **{("never", 0): 8, ("rare", 1): 1, ("rare", 0): 7},
    }


# -- Pilot-Commit ------------------------------------------------------------------------------------------------------


def with_rate(rates):
    """Outcomes of a prompt in turn: the fraction ``(good, of)`` of its rollouts, the good ones first."""
    return lambda prompt, k: int(k % rates(prompt)[1] < rates(prompt)[0])


@pytest.mark.parametrize(("rollouts", "pilot"), [(8, 2), (16, 4), (64, 16), (128, 32)])
def test_a_quarter_is_the_pilot_and_the_rest_is_committed_to_rates_within_the_bounds(rollouts, pilot):
    """A prompt's number is its successes in a pilot; the bounds are 1/8 and 3/4, both included."""
    ids = [*range(pilot + 1)]
    rule = PilotCommit(ids, len(ids), rollouts, seed=3)
    rounds, prompts, group_R, success_R = play(rule, with_rate(lambda p: (p, pilot)))
    within = {p for p in ids if pilot <= 8 * p and 4 * p <= 3 * pilot}
    assert within
    pilots, commits = rounds[:-1], rounds[-1]
    assert [set(wanted.values()) for wanted in pilots] == [{pilot}]
    assert commits == dict.fromkeys(commits, rollouts - pilot)
    assert set(commits) == within
    assert sum(sum(wanted.values()) for wanted in rounds) == pilot * len(ids) + len(within) * (rollouts - pilot)
    rows = rule.keep(prompts, group_R, success_R)
    assert Counter(prompts[group_R[row]] for row in rows) == dict.fromkeys(within, rollouts)


def test_pilots_go_on_until_a_step_is_full_and_what_exceeds_it_comes_first_in_the_next():
    rule = PilotCommit(IDS, 4, 8, seed=1)
    good = with_rate(lambda p: (1, 2) if p % 2 else (0, 2))
    rounds, prompts, group_R, success_R = play(rule, good)
    pilots, commits = rounds[:-1], rounds[-1]
    assert all(len(wanted) == 4 and set(wanted.values()) == {2} for wanted in pilots)
    passed = [p for wanted in pilots for p in wanted if p % 2]
    assert len(passed) >= 4 > sum(p % 2 for wanted in pilots[:-1] for p in wanted)
    assert list(commits) == passed[:4]
    assert {p for p, _ in kept(rule, prompts, group_R, success_R)} == set(passed[:4])
    for _ in range(20):
        surplus = passed[4:]
        rounds, *_ = play(rule, good)
        assert list(rounds[0])[: len(surplus)] == surplus
        passed = [p for wanted in rounds[:-1] for p in wanted if p % 2]
        assert len(passed) == len(set(passed))


def test_a_prompt_is_left_out_once_sixteen_rollouts_of_its_pilots_were_right():
    rule, pilots = PilotCommit(IDS, 4, 8, seed=2), Counter()
    easy = [3, 7]
    for _ in range(150):
        rounds, *_ = play(rule, with_rate(lambda p: (2, 2) if p in easy else (1, 2)))
        pilots.update(p for wanted in rounds for p in wanted if set(wanted.values()) == {2})
    assert [pilots[p] for p in easy] == [8, 8]
    assert min(pilots[p] for p in IDS if p not in easy) > 8


def test_pilots_without_any_prompt_within_the_bounds_end():
    rule = PilotCommit(IDS, 4, 8, max_rounds=5)
    for _ in range(30):  # all are solved, none is left out for good
        rounds, prompts, group_R, success_R = play(rule, lambda *_: 1)
        assert 0 < len(rounds) <= 5
        assert kept(rule, prompts, group_R, success_R) == {(p, 1): 2 for p in prompts[:4]}
    with pytest.raises(ValueError, match="at least 3 rollouts per prompt, got 2"):
        PilotCommit(IDS, 4, 2)


# -- C-GRPO ------------------------------------------------------------------------------------------------------------


def quantile(scores, delta):
    """The ceil((n + 1)(1 - delta))-th smallest score."""
    place = min(max(int(np.ceil((len(scores) + 1) * (1 - delta))), 1), len(scores))
    return sorted(scores)[place - 1]


def test_sampling_stops_by_conformal_thresholds_that_are_set_every_fifty_steps():
    """First successes come at the place of the prompt's number modulo 10: 0 never, 9 beyond the last size."""
    rule = Conformal(IDS, 10, 8, seed=4)
    first = lambda p: p % 10 or 99  # noqa: E731
    found = []
    for _ in range(101):
        rounds, prompts, group_R, success_R = play(rule, lambda p, k: int(k + 1 == first(p)))
        rows = rule.keep(prompts, group_R, success_R)
        found.append((rounds, Counter(prompts[group_R[row]] for row in rows)))
    calibrates = [set(rounds[0].values()) == {8} for rounds, _ in found]
    assert [step for step, does in enumerate(calibrates) if does] == [0, 50, 100]
    own = found[0][0][0]
    assert len(own) == 10
    score = lambda p, size: first(p) / size if first(p) <= size else 1.0  # noqa: E731
    missed = np.mean([score(p, 8) == 1.0 for p in own])
    thresholds = {size: quantile([score(p, size) for p in own], min(max(missed + 0.05, 0.05), 0.95))
                  for size in (2, 4, 8)}  # fmt: skip
    stopped = Counter()
    for (rounds, trained), does in zip(found, calibrates, strict=True):
        training = rounds[does:]
        assert len(training[0]) == 10
        assert not set(own) & set(training[0])
        total = Counter()
        for wanted in training:
            total.update(wanted)
        for p, count in total.items():
            stops = (size for size in (2, 4, 8) if first(p) <= size and score(p, size) <= thresholds[size])
            assert count == next(stops, 8), (p, thresholds)
            stopped[count] += 1
        assert trained == total
    assert set(stopped) == {2, 4, 8}
    with pytest.raises(ValueError, match="must have more than that, got 10"):
        Conformal(IDS[:10], 10, 8)


@pytest.mark.parametrize(("rollouts", "sizes"), [(2, [2]), (4, [2, 4]), (8, [2, 4, 8]), (12, [2, 4, 8, 12])])
def test_sizes_double_up_to_the_rollouts(rollouts, sizes):
    rule = Conformal(IDS, 4, rollouts)
    rounds, *_ = play(rule, lambda *_: 0)
    assert np.cumsum([next(iter(wanted.values())) for wanted in rounds[1:]]).tolist() == sizes
    assert set(rounds[0].values()) == {rollouts}


def test_rules_are_made_by_name():
    kinds = {
        "oversample": Oversample,
        "skip": Skip,
        "sequential": Sequential,
        "pilot-commit": PilotCommit,
        "c-grpo": Conformal,
    }
    assert {name: type(make(IDS, 4, 8, 0)) for name, make in RULES.items()} == kinds
