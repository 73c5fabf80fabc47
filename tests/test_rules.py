"""Rules that generate in rounds, without a model: their requests and the rollouts they keep."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from experiments.rules import RULES, Oversample, Sequential, Skip
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


@pytest.mark.parametrize("kind", [Oversample, Skip])
def test_a_rule_continues_where_it_was_saved(kind):
    outcome = mixed_if(lambda p: p % 3 == 0)
    straight, stopped = kind(IDS, 3, 2, seed=7), kind(IDS, 3, 2, seed=7)
    for _ in range(5):
        assert play(straight, outcome)[0] == play(stopped, outcome)[0]
    resumed = kind(IDS, 3, 2, seed=99)
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


def test_rules_are_made_by_name():
    kinds = {"oversample": Oversample, "skip": Skip, "sequential": Sequential}
    assert {name: type(make(IDS, 4, 8, 0)) for name, make in RULES.items()} == kinds
