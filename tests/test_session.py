"""One run of any engine: plans that add up, outcomes that are learned and logged, failures that are survived."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knapsack_rl import KnapsackAllocator
from knapsack_rl.plan import Plan
from knapsack_rl.runs.allocations import PER_PROMPT, read_visits
from knapsack_rl.runs.files import ALLOCATION_LOG, STATE_FILE, WARNINGS_FILE
from knapsack_rl.session import Session
from knapsack_rl.settings import AllocationSettings
from strategies import no_deadline


def session_of(allocator=None, folder=None, **settings) -> Session:
    logs = {"folder": folder, "log_allocations": folder is not None}
    return Session(AllocationSettings(**settings), allocator, **logs)


def observe(session, plan, outcome_of, step=1, lengths=None):
    group_R = plan.expand()
    outcomes = np.array([outcome_of(plan.ids[group], k) for k, group in enumerate(group_R)], dtype=float)
    lengths_R = None if lengths is None else [lengths[plan.ids[group]] for group in group_R]
    return session.observe(plan, group_R, outcomes, lengths_R, step)


ids_of_a_batch = st.lists(st.sampled_from(["a", "b", 7, "7", "c", "d"]), min_size=1, max_size=9)


# -- plans -------------------------------------------------------------------------------------------------------------


@no_deadline
@given(batch=ids_of_a_batch, mean=st.integers(2, 9), allocation=st.sampled_from(["knapsack", "paper", "uniform"]))
def test_counts_sum_to_the_budget_whatever_the_batch_holds(batch, mean, allocation) -> None:
    session = session_of(allocation=allocation)
    for step in range(3):
        plan = session.plan(batch, mean)
        assert plan.ids == list(dict.fromkeys(batch))
        assert plan.counts.sum() == mean * len(batch)
        rows = plan.rows_of(batch)
        for prompt_id, count in zip(plan.ids, plan.counts.tolist(), strict=True):
            shares = [row for row, own in zip(rows.tolist(), batch, strict=True) if own == prompt_id]
            assert sum(shares) == count
            assert 1 not in shares or count == 1
            assert max(shares) - min(share for share in shares if share or count == 0) <= 1
        if allocation == "uniform":
            assert dict(zip(plan.ids, (plan.counts // mean).tolist(), strict=True)) == Counter(batch)
        observe(session, plan, lambda prompt_id, k: len(str(prompt_id)) * k % 3 == 0, step)
    assert not session.allocator.failures


# -- two rounds --------------------------------------------------------------------------------------------------------


def in_two_rounds(session, batch, mean, outcome_of, step=1, multiple=1):
    """A step in two rounds: the plans of the first round and of both, and what was observed."""
    first = session.plan_first(batch, mean, multiple=multiple)
    group_R = first.expand()
    judged = np.array([outcome_of(first.ids[group], k) for k, group in enumerate(group_R)], dtype=float)
    plan = session.plan_rest(first, mean * len(batch), group_R, judged)
    return first, plan, observe(session, plan, outcome_of, step)


@no_deadline
@given(
    batch=ids_of_a_batch,
    mean=st.integers(3, 9),
    parts=st.integers(1, 4),
    value=st.sampled_from(["knapsack", "likelihood"]),
    rate=st.integers(1, 6),
)
def test_two_rounds_sum_to_the_budget_and_the_first_is_even(batch, mean, parts, value, rate) -> None:
    session, batch = session_of(rounds=2, value=value), batch * parts  # rows and budget are a multiple of the parts
    for step in range(3):
        outcome = lambda prompt_id, k: (len(str(prompt_id)) + k * k + step) % rate == 0  # noqa: B023, E731
        first, plan, observation = in_two_rounds(session, batch, mean, outcome, step, parts)
        share = int(first.counts.sum())
        assert share % parts == 0 and 2 * len(batch) <= share <= mean * len(batch)
        assert share < len(batch) * max(mean // 2, 2) + parts
        each = {i: int(count) / batch.count(i) for i, count in zip(first.ids, first.counts, strict=True)}
        assert max(each.values()) - min(each.values()) <= 1
        assert plan.ids == first.ids and plan.counts.sum() == mean * len(batch)
        assert (plan.counts >= first.counts).all()
        assert observation.metrics["budget"] == mean * len(batch)
        assert observation.metrics["budget_max"] == plan.counts.max()
        np.testing.assert_array_equal(plan.allocation.success_rates, first.allocation.success_rates)
    assert not session.allocator.failures


def test_the_second_round_goes_to_groups_without_a_gradient() -> None:
    solved_in_part = lambda prompt_id, k: prompt_id == "always" or (prompt_id == "mixed" and k % 2 == 0)  # noqa: E731
    batch = ["never", "mixed", "always"]
    first, plan, _ = in_two_rounds(session_of(rounds=2), batch, 8, solved_in_part)
    assert first.counts.tolist() == [4, 4, 4]
    assert plan.counts[1] == 4 and (plan.counts[[0, 2]] > 4).all()
    first, plan, _ = in_two_rounds(session_of(rounds=2, value="likelihood"), batch, 8, solved_in_part)
    assert plan.counts.tolist() == [16, 4, 4]


def test_the_first_round_teaches_nothing_before_both_are_observed() -> None:
    """The same step in one go, of the same rollouts, leaves the same allocator behind."""
    rewards = lambda prompt_id, k: 0.2 * (k % 4) + (prompt_id == "a")  # noqa: E731 - graded: the cutoff is learned
    two, one = session_of(rounds=2), session_of()
    for step in range(3):
        _, plan, _ = in_two_rounds(two, ["a", "b", "c"], 8, rewards, step)
        one.adopt(plan.ids, plan.counts)
        observe(one, plan, rewards, step)
    states = [session.allocator.state_dict()["arrays"] for session in (one, two)]
    assert states[0].keys() == states[1].keys()
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name], err_msg=name)


@pytest.mark.parametrize("broken", ["raises", "wrong sum", "no prediction either"])
def test_where_the_second_round_cannot_be_allocated_it_is_divided_evenly(broken, monkeypatch) -> None:
    session = session_of(rounds=2)
    first = session.plan_first(["a", "b", "c"], 8)

    def failing(ids, counts, successes, budget):
        if broken == "wrong sum":
            return session.adopt(ids, np.ones(3, np.int64))
        raise RuntimeError("broken")

    monkeypatch.setattr(session.allocator, "top_up", failing)
    if broken == "no prediction either":
        monkeypatch.setattr(session.allocator, "adopt", failing)
    plan = session.plan_rest(first, 25, first.expand(), np.arange(12) % 5 == 0)
    assert plan.counts.tolist() == [9, 8, 8]
    assert session.allocator.failures["top-up"] == 1
    assert observe(session, plan, lambda prompt_id, k: k % 2).metrics["failures/top-up"] == 1


def test_features_reach_the_second_round() -> None:
    """Prompts of a level that never succeeds are believed to fail, though they are new and have the same outcomes."""
    session = session_of(rounds=2, value="nonzero-gradient")
    level = {"hard": 0, "half": 1}
    for step in range(12):
        batch = [f"{name}{step}-{k}" for name in level for k in range(8)]
        first = session.plan_first(batch, 8, features={"level": [name[:4] for name in batch]})
        outcome = lambda prompt_id, k: level[prompt_id[:4]] * k % 2  # noqa: E731
        group_R = first.expand()
        failed = np.zeros(group_R.size)
        rest = (session.plan_rest(first, 128, group_R, failed).counts - first.counts).reshape(2, 8).sum(axis=1)
        observe(session, session.plan_rest(first, 128, group_R, failed), outcome, step)
    assert rest.sum() == 64 and rest[1] > 2 * rest[0]
    assert not session.allocator.failures


def test_an_infinite_or_missing_reward_of_the_first_round_is_unscored() -> None:
    session = session_of(rounds=2)
    first = session.plan_first(["a", "b"], 8)
    rewards = [np.inf, np.nan, 1.0, 0.0] + [0.0] * 4
    assert session.plan_rest(first, 16, first.expand(), rewards).counts.tolist() == [4, 12]
    assert not session.allocator.failures


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 3}, "rounds must be 1 or 2, got 3"),
        ({"allocation": "paper"}, "rounds=2 needs allocation='knapsack', got 'paper'; set rounds=1"),
        ({"allocation": "uniform"}, "rounds=2 needs allocation='knapsack', got 'uniform'; set rounds=1"),
        ({"budget_unit": "tokens"}, "got 'tokens' and 2; set rounds=1"),
        ({"min_rollouts": 0}, "got 'rollouts' and 0; set rounds=1"),
        ({"estimator": "beta"}, "rounds=2: .* posterior on a grid .* got BetaEstimator; set rounds=1"),
        ({"value": "experiments.values:reward_variance"}, "got BayesFilterEstimator with CustomFunction; set rounds=1"),
    ],
)
def test_two_rounds_that_cannot_work_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        AllocationSettings(**{"rounds": 2} | settings)
    AllocationSettings(**settings | {"rounds": 1})


def test_two_rounds_need_three_rollouts_a_prompt_and_an_allocator_for_them() -> None:
    with pytest.raises(ValueError, match=r"rounds=2 needs num_generations of at least 3, .* got 2"):
        AllocationSettings(rounds=2).check_allocation(2, "num_generations")
    with pytest.raises(ValueError, match=r"rounds=2: .* got WindowEstimator"):
        Session(AllocationSettings(rounds=2), KnapsackAllocator("window"))


def test_a_budget_in_tokens_is_what_the_mean_would_take() -> None:
    session, prompts = session_of(budget_unit="tokens"), ["short", "long", "solved"]
    lengths = {"short": 3, "long": 30, "solved": 10}
    assert session.plan(prompts, 8).counts.tolist() == [8, 8, 8]  # lengths unknown: uniform
    for step in range(5):
        plan = session.plan(prompts, 8)
        observe(session, plan, lambda prompt_id, k: prompt_id == "solved" or k % 2, step, lengths)
    plan = session.plan(prompts, 8)
    expected = session.allocator.predicted_lengths(prompts)
    spent = float(expected @ plan.counts)
    assert spent <= 8 * expected.sum() < spent + expected.max()
    short, long, solved = plan.counts
    assert short > long > solved >= 2
    assert session.plan(prompts, 8, multiple=5).counts.sum() % 5 == 0


def test_a_budget_in_tokens_is_known_after_a_resume(tmp_path) -> None:
    session, twin = session_of(budget_unit="tokens"), session_of(budget_unit="tokens")
    for step in range(3):
        outcome = lambda prompt_id, k: prompt_id == "b" or k % 4 == 0  # noqa: E731
        observe(session, session.plan(["a", "b"], 8), outcome, step, {"a": 2, "b": 20})
    session.save(tmp_path)
    twin.restore(tmp_path / STATE_FILE)
    assert twin.plan(["a", "b"], 8).counts.tolist() == session.plan(["a", "b"], 8).counts.tolist() != [8, 8]


# -- outcomes ----------------------------------------------------------------------------------------------------------


def test_the_success_rule_runs_once_a_step() -> None:
    calls = []

    def rule(rewards):
        calls.append(len(rewards))
        return rewards > 0.5

    session = session_of(KnapsackAllocator(success=rule))
    calls.clear()  # tried once at construction
    found = observe(session, session.plan(["a", "b"], 4), lambda prompt_id, k: k % 2)
    assert calls == [8]
    assert found.groups.successes.tolist() == [2, 2]
    assert found.metrics["effective_gradient_ratio"] == 1.0


def test_a_log_row_has_the_plan_and_its_outcome(tmp_path) -> None:
    session = session_of(folder=tmp_path)
    plan = session.plan(["a", 7, "c"], 3)
    arrived = np.array([0, 0, 1, 0])  # some were lost, those of c altogether
    session.observe(plan, arrived, [1.0, np.inf, 0.0, 0.0], step=5)
    (row,) = [json.loads(line) for line in (tmp_path / ALLOCATION_LOG).read_text().splitlines()]
    assert row["step"] == 5 and row["prompt_ids"] == ["a", 7, "c"] and row["counts"] == [3, 3, 3]
    assert (row["arrived"], row["scored"], row["successes"]) == ([3, 1, 0], [2, 1, 0], [1, 0, 0])
    assert row["effective"] == [True, False, False]
    assert {len(row[name]) for name in PER_PROMPT} == {3}
    _, ids, visits = read_visits(tmp_path / ALLOCATION_LOG)
    assert ids == ("a", 7, "c") and visits.arrived.tolist() == [3, 1, 0]


def test_rollouts_of_several_batches_that_arrive_together_keep_their_plans() -> None:
    session = session_of()
    first, second = session.plan(["a", "b"], 4), session.plan(["c"], 6)
    plan, prompt_R = session.arrived(["c", "a", "c", "x"])
    assert isinstance(plan, Plan) and plan.ids == ["c", "a", "x"] and prompt_R.tolist() == [0, 1, 0, 2]
    assert plan.counts.tolist() == [int(second.counts[0]), int(first.counts[0]), 0]
    assert session.arrived(["a"])[0].counts.tolist() == [0]  # each plan once
    assert session.arrived(["b"])[0].counts.tolist() == [4]


# -- failures ----------------------------------------------------------------------------------------------------------


class Broken(KnapsackAllocator):
    """Returns the given answer, or fails."""

    answer = None

    def allocate(self, prompt_ids, budget):
        if self.answer is None:
            raise ZeroDivisionError("broken")
        found = super().allocate(prompt_ids, budget)
        object.__setattr__(found, "counts", self.answer)
        return found


def test_an_allocator_that_fails_or_answers_wrongly_leaves_the_mean(caplog) -> None:
    answers = {
        "failure": None,
        "sum": np.array([4, 5]),
        "shape": np.array([8]),
        "sign": np.array([9, -1]),
        "type": np.array([4.0, 4.0]),
        "single": np.array([7, 1]),
    }
    for name, answer in answers.items():
        allocator = Broken()
        allocator.answer = answer
        session = Session(AllocationSettings(), allocator, smallest_group=2)
        caplog.clear()
        for _ in range(2):
            assert session.plan(["a", "b"], 4).counts.tolist() == [4, 4], name
        assert allocator.failures == {"allocation": 2}, name
        assert caplog.text.count("allocation failed") == 1, name
        assert allocator.metrics()["allocation_failures"] == allocator.metrics()["failures/allocation"] == 2


def test_an_even_division_spends_the_whole_budget() -> None:
    for session in (session_of(Broken()), session_of(allocation="uniform")):
        for budget in range(9, 12):
            counts = session.plan(["a", "b", "c"], 3, budget=budget).counts
            assert counts.sum() == budget and counts.max() - counts.min() <= 1, budget


def test_failures_are_counted_by_kind(tmp_path) -> None:
    (tmp_path / ALLOCATION_LOG).mkdir()  # a folder in the way
    session = session_of(folder=tmp_path)
    found = observe(session, session.plan(["a"], 4), lambda prompt_id, k: k % 2)
    assert found.metrics["failures/logging"] == 1
    assert found.metrics["allocation_failures"] == 0

    def rule(rewards):
        if len(rewards) > 2:
            raise KeyError("broken")
        return rewards > 0

    session = session_of(KnapsackAllocator(success=rule))
    found = observe(session, session.plan(["a"], 4), lambda prompt_id, k: k % 2)
    assert found.metrics["failures/success rule"] == 1 and found.groups.totals.tolist() == [0]


def test_a_collapse_is_reported_once(tmp_path) -> None:
    session = Session(AllocationSettings(), folder=tmp_path, watch=True)
    for step in range(30):
        observe(session, session.plan(["a", "b"], 4), lambda prompt_id, k: 0, step)
    rows = [json.loads(line) for line in (tmp_path / WARNINGS_FILE).read_text().splitlines()]
    assert [row["kind"] for row in rows].count("collapse") == 1


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused_when_they_are_made() -> None:
    cases = [
        ({"allocation": "greedy"}, "allocation must be one of knapsack, paper, uniform, got 'greedy'"),
        ({"estimator": "oracle"}, "estimator must be one of .*'oracle'"),
        ({"estimator_settings": "window"}, "must be name=value"),
        ({"estimator_settings": "window=3"}, "has no setting window"),
        ({"value": "fame"}, "value must be one of .*'fame'"),
        ({"budget_unit": "hours"}, "budget_unit must be one of .*'hours'"),
        ({"budget_unit": "tokens", "allocation": "uniform"}, "needs allocation='knapsack'"),
        ({"budget_unit": "tokens", "min_rollouts": 1}, "needs min_rollouts >= 2"),
        ({"min_rollouts": -1}, "min_rollouts must be a whole number from 0 to 65536"),
        ({"min_rollouts": 5, "max_rollouts": 4}, "min_rollouts 5 is above max_rollouts 4"),
        ({"min_rollouts": True}, "min_rollouts must be int, got True"),
        ({"success_threshold": float("nan")}, "success_threshold must be a finite number"),
        ({"success_threshold": "high"}, "success_threshold must be float, got 'high'"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            AllocationSettings(**settings)
    with pytest.raises(ValueError, match=r"min_rollouts=2, n=1, max_rollouts=128"):
        AllocationSettings().check_allocation(1, "n")


def test_settings_make_the_allocator_that_they_describe() -> None:
    found = AllocationSettings(
        allocation="paper", estimator_settings="window=8,minimum=4,fallback=false", success_threshold=0.4
    ).make_allocator()
    assert found.estimator_name == "window"
    assert found.estimator.settings() == {"window": 8, "minimum": 4, "fallback": False}
    # A reward of 0.4 that went through float32 is not above a threshold of 0.4.
    found.observe(["a"] * 2, [float(np.float32(0.4)), 0.5])
    assert found.tracker.lookup(["a"]).successes.tolist() == [1.0]


def test_settings_are_read_from_an_object_that_has_some_of_them() -> None:
    class Arguments:
        min_rollouts = 3
        learning_rate = 1e-4

    assert AllocationSettings.of(Arguments()) == AllocationSettings(min_rollouts=3)


@pytest.mark.parametrize(("reward", "kind"), [(1.0, "success"), (0.0, "failure")])
def test_a_run_without_failures_or_without_successes_is_warned_once(reward, kind, caplog):
    session = Session(AllocationSettings())
    for step in range(60):
        plan = session.plan(["a", "b"], 4)
        session.observe(plan, plan.expand(), np.full(8, reward), step=step)
    warned = [record.message for record in caplog.records if f"was a {kind}" in record.message]
    assert len(warned) == 1
    assert warned[0].startswith(f"every rollout of 25 steps was a {kind} (reward above 0)")


def test_what_counts_as_a_success_is_said_when_it_changes_only(caplog):
    session = Session(AllocationSettings(), rewards=["format", "answer"])
    for step, answers in enumerate([[0, 0, 0, 0, 2, 0, 2, 0]] * 4 + [[0, 1, 0, 1, 0, 1, 0, 1]] * 2):
        plan = session.plan(["a", "b"], 4)
        parts = np.stack([np.ones(8), np.asarray(answers, float)], axis=1)
        session.observe(plan, plan.expand(), parts, step=step)
    said = [record.message for record in caplog.records if "counts as a success" in record.message]
    assert said[0] == (
        "allocation counts as a success: answer above 1 (from 0 to 2); 25 % of the rollouts of this step"
    )
    assert len(said) <= 2
    assert session.success_rule()["reward"] == "answer"


# -- features ---------------------------------------------------------------------------------------------------------


def test_features_that_cannot_be_read_do_not_end_the_run(caplog):
    one = session_of()
    one.plan(["a", "b"], 4, features={"x": [1, 2]})
    for wrong in ({"x": ["text", 2]}, {"y": [1, 2]}, {"x": [1]}):
        plan = one.plan(["a", "b"], 4, features=wrong)
        assert plan.counts.sum() == 8
    assert one.allocator.failures == {"features": 3}
    assert one.allocator.metrics()["allocation_failures"] == 3
    assert one.allocator.shared.features.codes(["a", "b"]).tolist() == [[2], [3]]


def test_features_reach_the_first_of_two_rounds_too():
    one = session_of(rounds=2)
    one.plan_first(["a", "b"], 4, features={"x": [1, 2]})
    assert len(one.allocator.shared.features) == 2


@pytest.mark.parametrize("columns", [["level", "topic"], ("level", "topic"), "level, topic", "[level,topic]"])
def test_columns_are_a_list_or_a_text(columns):
    found = AllocationSettings(feature_columns=columns)
    assert found.columns == ["level", "topic"]
    assert AllocationSettings.of(found).columns == found.columns


@pytest.mark.parametrize("settings", [{"feature_columns": ["x"]}, {"prior": "run"}])
@pytest.mark.parametrize("other", [{"estimator": "window"}, {"allocation": "paper"}])
def test_features_need_the_filter(settings, other):
    with pytest.raises(ValueError, match="need the estimator 'bayes-filter', got 'window'"):
        AllocationSettings(**settings, **other)
