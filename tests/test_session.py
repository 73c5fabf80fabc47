"""One run of any engine: plans that add up, outcomes that are learned and logged, failures that are survived."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knapsack_rl import KnapsackAllocator
from knapsack_rl.runs.allocations import PER_PROMPT, read_visits
from knapsack_rl.runs.files import ALLOCATION_LOG, STATE_FILE, WARNINGS_FILE
from knapsack_rl.session import Plan, Session
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
