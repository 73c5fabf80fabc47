"""Environments: mixtures, learning dynamics, and a trace smoothed and replayed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from cases import message_of
from experiments.trace import SPLITS, load_trace
from knapsack_rl.offline.environments import (
    MIXTURES,
    Replay,
    Sudden,
    Synthetic,
    Trace,
    draw_rates,
    shuffled_batches,
)

# -- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixture", "cdf"),
    [
        ("uniform", stats.uniform.cdf),
        ("beta(2, 5)", stats.beta(2, 5).cdf),
        (
            "late-training",
            lambda x: 0.38 * stats.beta(30, 1).cdf(x) + 0.22 * stats.beta(1, 30).cdf(x) + 0.4 * stats.uniform.cdf(x),
        ),
    ],
)
def test_rates_follow_the_mixture(mixture, cdf):
    rates = draw_rates(mixture, 4000, np.random.default_rng(0))
    assert stats.kstest(rates, cdf).pvalue > 0.01


def test_points_are_exact_and_weighted():
    rates = draw_rates("0.25*point(0) + 0.75*point(1)", 4000, np.random.default_rng(0))
    assert set(rates) == {0.0, 1.0}
    assert rates.mean() == pytest.approx(0.75, abs=0.03)


def test_every_named_mixture_gives_rates():
    for name in MIXTURES:
        rates = draw_rates(name, 50, np.random.default_rng(0))
        assert rates.shape == (50,), name
        assert ((rates >= 0) & (rates <= 1)).all(), name


def test_invalid_mixtures_are_refused():
    for mixture, message in (
        ("gaussian", "'gaussian' is not understood; write late-training, bimodal, hard, or terms"),
        ("0.5*uniform", "sum to 0.5"),
        ("uniform + uniform", "sum to 2"),
        ("beta(1)", "two numbers above 0"),
        ("beta(0,1)", "two numbers above 0"),
        ("beta(a,1)", "could not convert"),
        ("point(1.5)", "one number in [0, 1]"),
        ("1.2.3*uniform", "could not convert"),
    ):
        found = message_of(ValueError, draw_rates, mixture, 3, np.random.default_rng(0))
        assert message in found, (mixture, found)


# -- batches ----------------------------------------------------------------------------------------------------------


@given(prompts=st.integers(1, 40), epochs=st.integers(1, 4), size=st.integers(1, 50))
def test_every_prompt_comes_once_an_epoch(prompts, epochs, size):
    batches = shuffled_batches(prompts, epochs, size, np.random.default_rng(0))
    per_epoch = math.ceil(prompts / size)
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        mine = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert all(batch.size <= size for batch in mine)
        assert sorted(np.concatenate(mine)) == list(range(prompts))


# -- learning ---------------------------------------------------------------------------------------------------------


def logit(p):
    return math.log(p / (1 - p))


def test_effective_groups_learn_and_others_do_not():
    episode = Synthetic("point(0.3)", prompts=3, epochs=1, batch_size=3, gain=0.5).start(0)
    episode.train(np.array([0, 1]), np.array([True, False]))
    rates = episode.rates(np.arange(3))
    assert logit(rates[0]) == pytest.approx(logit(0.3) + 0.5)
    assert rates[1:] == pytest.approx(0.3)


def test_drift_is_per_epoch_and_for_all_prompts():
    environment = Synthetic("point(0.3)", prompts=10, epochs=2, batch_size=4, drift=0.2)
    episode = environment.start(0)
    for batch in episode.batches:
        episode.train(batch, np.zeros(batch.size, bool))
    assert logit(episode.rates(np.array([7]))[0]) == pytest.approx(logit(0.3) + 2 * 0.2)


def test_the_walk_has_its_size_and_does_not_depend_on_the_policy():
    environment = Synthetic("point(0.5)", prompts=4000, epochs=1, batch_size=4000, walk=0.25)
    idle, busy = environment.start(3), environment.start(3)
    everyone = np.arange(4000)
    idle.train(everyone, np.zeros(4000, bool))
    busy.train(everyone, np.ones(4000, bool))  # gain is 0: only the walk moves
    moved = np.log(idle.rates(everyone)) - np.log1p(-idle.rates(everyone))
    assert moved.std() == pytest.approx(0.25, rel=0.05)
    assert moved.mean() == pytest.approx(0.0, abs=0.02)
    assert (idle.rates(everyone) == busy.rates(everyone)).all()


def test_unsolvable_prompts_never_learn():
    episode = Synthetic("0.5*point(0) + 0.5*point(1)", prompts=20, epochs=1, gain=1.0, drift=1.0, walk=1.0).start(0)
    before = episode.rates(np.arange(20))
    episode.train(np.arange(20), np.ones(20, bool))
    assert (episode.rates(np.arange(20)) == before).all()
    assert set(before) == {0.0, 1.0}


def test_a_seed_fixes_everything():
    environment = Synthetic(prompts=50, epochs=2, batch_size=16)
    one, same, other = (environment.start(seed) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(one.batches, same.batches, strict=True))
    assert (one.rates(np.arange(50)) == same.rates(np.arange(50))).all()
    assert (one.rates(np.arange(50)) != other.rates(np.arange(50))).any()


def test_impossible_dynamics_are_refused():
    for settings in ({"walk": -0.1}, {"gain": float("nan")}, {"drift": float("inf")}):
        assert "finite" in message_of(ValueError, Synthetic(**settings).start, 0), settings


# -- sudden changes and unusual batches -----------------------------------------------------------------------------


def rates_by_epoch(environment):
    """(epochs + 1, prompts) rates of all prompts in use, before each epoch and at the end; nothing is effective."""
    episode, found = environment.start(5), []
    everyone = np.arange(environment.prompts)
    per_epoch = math.ceil(environment.prompts / environment.batch_size)
    for step, batch in enumerate(episode.batches):
        if step % per_epoch == 0:
            found.append(episode.rates(everyone))
        episode.train(batch, np.zeros(batch.size, bool))
    return np.array([*found, episode.rates(everyone)])


def test_a_sudden_change_is_at_its_time_and_of_its_kind():
    changes = (Sudden(3.0, share=0.5, mixture="point(0.9)"), Sudden(1.0, shift=-2.0))
    found = rates_by_epoch(Synthetic("point(0.3)", prompts=600, epochs=4, batch_size=100, changes=changes))
    lower = 1 / (1 + math.exp(2 - logit(0.3)))
    assert found[0] == pytest.approx(0.3)
    assert found[1:3] == pytest.approx(lower)
    changed = np.isclose(found[3], 0.9)
    assert found[3][~changed] == pytest.approx(lower)
    assert changed.mean() == pytest.approx(0.5, abs=0.08)  # four standard errors
    assert found[4] == pytest.approx(found[3])


def test_a_change_within_an_epoch_and_a_draw_under_drift():
    episode = Synthetic(
        "uniform", prompts=40, epochs=2, batch_size=10, drift=1.0, changes=(Sudden(0.5, mixture="point(0.5)"),)
    ).start(0)
    for batch in episode.batches[:2]:
        assert not np.isclose(episode.rates(np.arange(40)), 0.5).all()
        episode.train(batch, np.zeros(batch.size, bool))
    assert episode.rates(np.arange(40)) == pytest.approx(0.5)


def test_retired_prompts_come_once_and_before_all_others():
    environment = Synthetic(
        "uniform", prompts=12, epochs=3, batch_size=4, retired=10, changes=(Sudden(1.0, shift=9.0),)
    )
    episode = environment.start(1)
    in_order = [np.sort(np.concatenate(episode.batches[k : k + 3])).tolist() for k in (0, 3, 6, 9)]
    assert in_order == [list(range(12, 22)), *[list(range(12))] * 3]
    before = episode.rates(np.arange(12))
    for step, batch in enumerate(episode.batches):  # time counts from the end of their epoch
        assert (episode.rates(np.arange(12)) == before).all() == (step < 6), step
        episode.train(batch, np.zeros(batch.size, bool))


def test_batches_drawn_anew_are_distinct_within_a_batch_only():
    environment = Synthetic("uniform", prompts=30, epochs=20, batch_size=10, reshuffled=False)
    batches = environment.start(2).batches
    assert len(batches) == 60
    assert all(np.unique(batch).size == 10 for batch in batches)
    assert np.ptp(np.bincount(np.concatenate(batches))) > 0


def test_impossible_changes_are_refused():
    for change in (
        Sudden(0.0),
        Sudden(math.nan),
        Sudden(1.0, share=0.0),
        Sudden(1.0, share=1.5),
        Sudden(1.0, shift=math.inf),
    ):
        assert "share in (0, 1]" in message_of(ValueError, Synthetic(changes=(change,)).start, 0)
    assert "gaussian" in message_of(ValueError, Synthetic(changes=(Sudden(1.0, mixture="gaussian"),)).start, 0)
    assert "retired" in message_of(ValueError, Synthetic(retired=-1).start, 0)


def test_prompts_of_a_skill_share_a_rate_and_change_together():
    environment = Synthetic(
        "uniform", prompts=60, epochs=2, batch_size=20, skills=6, spread=0.1, changes=(Sudden(1.0, 0.5, shift=3.0),)
    )
    episode, everyone = environment.start(3), np.arange(60)
    skill = np.array(episode.features(everyone)["skill"])
    names, place, sizes = np.unique(skill, return_inverse=True, return_counts=True)
    assert sizes.tolist() == [10] * 6
    before = special.logit(episode.rates(everyone))
    assert all(before[place == k].std() < 0.2 for k in range(names.size))
    assert before.std() > 0.5
    for batch in episode.batches[:3]:
        episode.train(batch, np.zeros(batch.size, bool))
    moved = special.logit(episode.rates(everyone)) - before
    by_skill = [moved[place == k] for k in range(names.size)]
    assert {round(float(part[0]), 6) for part in by_skill} == {0.0, 3.0}
    assert all(np.ptp(part) < 1e-9 for part in by_skill)


def test_a_practised_skill_moves_as_a_whole():
    environment = Synthetic("uniform", prompts=12, epochs=1, batch_size=12, skills=3, skill_gain=0.25)
    episode, everyone = environment.start(0), np.arange(12)
    before = special.logit(episode.rates(everyone))
    skill = np.array(episode.features(everyone)["skill"])
    batch = episode.batches[0]
    episode.train(batch, (skill[batch] == skill[0]) & (batch < 6))  # two of its four prompts
    moved = special.logit(episode.rates(everyone)) - before
    np.testing.assert_allclose(moved, np.where(skill == skill[0], 0.5, 0.0), atol=1e-9)


def test_misleading_features_pair_the_hardest_skill_with_the_easiest():
    episode, everyone = Synthetic("uniform", prompts=80, skills=8, spread=0.0).start(1), np.arange(80)
    columns = {name: np.array(values) for name, values in episode.features(everyone).items()}
    rates = episode.rates(everyone)
    order = list(dict.fromkeys(columns["skill"][np.argsort(rates)].tolist()))
    for low, high in zip(order[:4], order[:3:-1], strict=True):
        pair = {columns["misleading"][columns["skill"] == name][0] for name in (low, high)}
        assert len(pair) == 1
        assert np.isin(columns["skill"][np.isin(columns["misleading"], list(pair))], [low, high]).all()
    assert Synthetic("uniform", prompts=80).start(1).features(everyone) == {}


@pytest.mark.parametrize("wrong", [{"skills": -1}, {"skills": 41}, {"spread": -0.1}, {"skill_gain": math.nan}])
def test_impossible_skills_are_refused(wrong):
    (name,) = wrong
    assert name in message_of(ValueError, Synthetic(prompts=40, **wrong).start, 0)


# -- traces -----------------------------------------------------------------------------------------------------------


@st.composite
def traces(draw):
    """Ragged traces of 1 to 5 prompts with 1 to 7 visits of 1 to 9 rollouts."""
    prompt, successes, totals = [], [], []
    for i in range(draw(st.integers(1, 5))):
        for _ in range(draw(st.integers(1, 7))):
            total = draw(st.integers(1, 9))
            prompt.append(i)
            totals.append(total)
            successes.append(draw(st.integers(0, total)))
    return Trace(*(np.array(column) for column in (prompt, successes, totals)))


@given(trace=traces(), bandwidth=st.sampled_from([0.01, 0.5, 1.0, 2.5, 10.0]))
def test_smoothing_is_the_kernel_written_out(trace, bandwidth):
    smooth = trace.smooth(bandwidth)
    for at in range(trace.prompt.size):
        top = bottom = 0.0
        for other in range(trace.prompt.size):
            if trace.prompt[other] == trace.prompt[at]:
                weight = math.exp(-0.5 * ((at - other) / bandwidth) ** 2)
                top += weight * trace.successes[other]
                bottom += weight * trace.totals[other]
        assert smooth[at] == pytest.approx(top / bottom, abs=1e-12)


@given(trace=traces())
def test_a_narrow_kernel_is_the_raw_rate_and_a_wide_one_the_overall_rate(trace):
    assert trace.smooth(1e-3) == pytest.approx(trace.successes / trace.totals)
    good, total = np.bincount(trace.prompt, trace.successes), np.bincount(trace.prompt, trace.totals)
    assert trace.smooth(1e6) == pytest.approx((good / total)[trace.prompt])


@given(trace=traces())
def test_rates_of_the_solved_and_the_unsolved_are_exact(trace):
    never = Trace(trace.prompt, np.zeros_like(trace.totals), trace.totals)
    always = Trace(trace.prompt, trace.totals, trace.totals)
    assert (never.smooth(2.5) == 0).all()
    assert (always.smooth(2.5) == 1).all()


@given(trace=traces(), data=st.data())
def test_taking_prompts_keeps_their_visits(trace, data):
    chosen = np.array(data.draw(st.permutations(range(len(trace)))))[: data.draw(st.integers(1, len(trace)))]
    taken = trace.take(chosen)
    assert len(taken) == chosen.size
    for new, old in enumerate(chosen):
        assert taken.successes[taken.prompt == new].tolist() == trace.successes[trace.prompt == old].tolist()
        assert taken.totals[taken.prompt == new].tolist() == trace.totals[trace.prompt == old].tolist()


def test_visits_in_order_of_time_become_a_trace():
    trace = Trace.from_visits([1, 0, 1, 2, 0], [1, 2, 3, 4, 5], [5, 5, 5, 5, 5])
    assert trace.prompt.tolist() == [0, 0, 1, 1, 2]
    assert trace.successes.tolist() == [2, 5, 1, 3, 4]


def test_a_malformed_trace_is_refused():
    for columns, message in (
        (([], [], []), "no visits"),
        (([0, 1], [1], [1]), "equally long"),
        (([1, 1], [1, 1], [1, 1]), "from 0 without gaps"),
        (([0, 2], [1, 1], [1, 1]), "from 0 without gaps"),
        (([0, 1, 0], [1, 1, 1], [1, 1, 1]), "from 0 without gaps"),
        (([0], [2], [1]), "no more successes"),
        (([0], [0], [0]), "at least one rollout"),
        (([0], [-1], [1]), "whole numbers >= 0"),
    ):
        found = message_of(ValueError, Trace, *(np.array(column, dtype=np.int64) for column in columns))
        assert message in found, (columns, found)


def test_a_bandwidth_is_positive():
    trace = Trace(np.array([0]), np.array([1]), np.array([2]))
    for bandwidth in (0.0, -1.0, float("nan"), float("inf")):
        assert "bandwidth" in message_of(ValueError, trace.smooth, bandwidth), bandwidth


def test_a_replay_walks_through_the_visits_and_holds_the_last():
    trace = Trace.from_visits([0, 0, 0, 1], [0, 1, 2, 3], [4, 4, 4, 4])
    batches = [np.array([0, 1]), np.array([0]), np.array([1, 0]), np.array([0])]
    episode = Replay(trace, bandwidth=1e-3, batches=batches).start(0)
    met = []
    for batch in episode.batches:
        met.append(episode.rates(batch).tolist())
        episode.train(batch, np.ones(batch.size, bool))
    assert met == [[0.0, 0.75], [0.25], [0.75, 0.5], [0.5]]


def test_a_replay_without_batches_visits_all_prompts_as_often_as_the_most_visited():
    trace = Trace.from_visits([0, 0, 0, 1], [0, 1, 2, 3], [4, 4, 4, 4])
    batches = Replay(trace, batch_size=2).start(0).batches
    assert [sorted(batch) for batch in batches] == [[0, 1]] * 3
    assert len(Replay(trace, batch_size=2, epochs=5).start(0).batches) == 5


# -- the recorded run that ships --------------------------------------------------------------------------------------


def test_the_shipped_trace_matches_its_notice():
    trace = load_trace()
    assert len(trace) == 590
    assert (trace.visits.min(), trace.visits.max()) == (46, 57)
    assert set(trace.totals) == {8}


def test_the_halves_share_no_prompt_and_make_up_the_whole():
    def histories(split):
        trace = load_trace(split)
        return [tuple(trace.successes[trace.prompt == i]) for i in range(len(trace))]

    development, report = histories("development"), histories("report")
    assert len(development) == len(report) == 295
    assert sorted(development + report) == sorted(histories("all"))
    assert histories("development") == development  # fixed


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=f"one of {', '.join(SPLITS)}, got 'test'"):
        load_trace("test")
