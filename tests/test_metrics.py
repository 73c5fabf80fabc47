"""Metrics of a step: what an engine logs of them."""

from __future__ import annotations

import numpy as np
import pytest

from knapsack_rl.metrics import CORE, LOST_GROUPS, OCCASIONAL, select_metrics
from knapsack_rl.runs.watch import WATCHED, watch_rows
from knapsack_rl.session import Session
from knapsack_rl.settings import AllocationSettings

PROMPTS, MEAN = 16, 4


def steps_of(forgetful: bool, steps: int = 120) -> list[dict[str, float]]:
    """Metrics of a run whose policy solves every prompt half of the time, or solves and forgets it in turn."""
    rng = np.random.default_rng(3)
    session = Session(AllocationSettings())
    ids, found = [f"p{k}" for k in range(PROMPTS)], []
    for step in range(steps):
        plan = session.plan(ids, MEAN)
        prompt_R = plan.expand()
        rates = np.where((np.arange(PROMPTS) + step) % 2, 1.0, 0.0) if forgetful else np.full(PROMPTS, 0.5)
        outcomes = (rng.random(prompt_R.size) < rates[prompt_R]).astype(float)
        found.append(session.observe(plan, prompt_R, outcomes, step=step + 1).metrics)
    return found


def test_the_signs_of_trouble_are_found_in_the_core_alone():
    assert {name for name in WATCHED if name.startswith("knapsack/")} <= {
        f"knapsack/{n}" for n in (*CORE, *OCCASIONAL, *LOST_GROUPS)
    }
    for forgetful, kinds in ((True, {"collapse", "oscillation"}), (False, set())):
        steps = steps_of(forgetful)
        findings = {}
        for which in ("core", "all"):
            rows = [
                {"step": k + 1} | {f"knapsack/{name}": number for name, number in select_metrics(step, which).items()}
                for k, step in enumerate(steps)
            ]
            findings[which] = {finding.kind for finding in watch_rows(rows)}
        assert findings["core"] == findings["all"], forgetful
        assert kinds <= findings["core"], forgetful


def test_numbers_of_trouble_are_logged_where_there_is_some():
    calm = {"allocation_failures": 0.0, "degraded_batches": 0.0, "unscored_rollouts": 0.0, "solved_before": 0.0}
    calm |= {"lost": float("nan"), "budget_max": 9.0, "budget": 64.0}
    assert select_metrics(calm, "core") == {"budget_max": 9.0}
    assert select_metrics(calm, "all") is calm
    trouble = {
        "allocation_failures": 1.0,
        "failures/allocation": 1.0,
        "degraded_batches": 2.0,
        "unscored_rollouts": 3.0,
    }
    trouble |= {"solved_before": 4.0, "lost": 0.0, "process_imbalance": 1.0}
    assert select_metrics(trouble | {"prompts_seen": 9.0}, "core") == trouble


def test_lost_groups_are_counted_with_their_difficulty_and_length():
    session = Session(AllocationSettings())
    ids = ["easy", "hard", "lost", "failed"]

    def step(rewards, lengths, lost=()):
        session.plan(ids, MEAN)
        rows = [(name, k) for name in ids[:2] for k in range(MEAN)]
        plan, prompt_R = session.arrived([name for name, _ in rows])
        for cause, names, tokens in lost:
            away, position = session.arrived(names)
            session.lose(cause, away, None if tokens is None else position, tokens)
        return session.observe(plan, prompt_R, [rewards[name] for name, _ in rows], [lengths[name] for name, _ in rows])

    outcomes, lengths = {"easy": 1.0, "hard": 0.0}, {"easy": 10.0, "hard": 30.0}
    assert not {name for name in step(outcomes, lengths).metrics if "lost_" in name or "arrived_" in name}
    before = session.allocator.belief(ids).mean
    lost = [("stale", ["lost", "lost"], [50.0, 70.0]), ("failed", ["failed"], None)]
    expected = session.allocator.predicted_lengths(["failed"])[0]
    found = step(outcomes, lengths, lost).metrics
    assert found["lost_groups"] == 2
    assert found["lost_groups_share"] == 0.5
    assert found["lost_groups/stale"] == found["lost_groups/failed"] == 1
    assert found["lost_groups_success_rate"] == pytest.approx(before[2:].mean())
    assert found["arrived_groups_success_rate"] == pytest.approx(before[:2].mean())
    assert found["lost_groups_length"] == pytest.approx((60 + expected) / 2)
    assert found["arrived_groups_length"] == 20
    assert set(found) & set(LOST_GROUPS) <= set(select_metrics(found, "core"))
    later = step(outcomes, lengths).metrics
    assert later["lost_groups"] == later["lost_groups_share"] == 0
    assert "lost_groups/stale" not in later
    assert len(session.allocator.tracker) == 2  # nothing is learned from what was lost
    session.lose("elsewhere", session.arrived([])[0])
    assert session.allocator.failures["reporting"] == 1
