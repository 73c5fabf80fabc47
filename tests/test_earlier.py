"""Success rates of an earlier run, from each kind of file that a run leaves."""

from __future__ import annotations

import json

import numpy as np
import pytest

import knapsack_rl as kr
from knapsack_rl.estimation.features import MISSING
from knapsack_rl.offline.earlier import earlier_rates
from knapsack_rl.session import Session

REWARDS = {"a": [1, 1, 0, 1], "b": [0, 0], "c": [1, 1, 1]}
RATES = {"a": 3.5 / 5, "b": 0.5 / 3, "c": 3.5 / 4}


@pytest.fixture
def earlier(tmp_path):
    """Three steps of a run: its folder, with log and state, and a table of its rewards."""
    session = Session(kr.AllocationSettings(), folder=tmp_path, log_allocations=True)
    rows = [(step, name, reward) for name, given in REWARDS.items() for step, reward in enumerate(given)]
    for step in sorted({step for step, _, _ in rows}):
        now = [(name, reward) for at, name, reward in rows if at == step]
        ids = [name for name, _ in now]
        session.observe(session.plan(ids, 2), np.arange(len(ids)), [float(r) for _, r in now], step=step)
    table = tmp_path / "other" / "rewards.jsonl"
    table.parent.mkdir()
    table.write_text("\n".join(json.dumps({"prompt_id": n, "step": s, "reward": r}) for s, n, r in rows))
    session.save(tmp_path)
    return tmp_path


def test_every_file_of_a_run_gives_its_rates(earlier):
    for path in (earlier, earlier / "allocations.jsonl", earlier / "other", str(earlier / "other" / "rewards.jsonl")):
        assert earlier_rates(path) == pytest.approx(RATES), path
    (state,) = earlier.glob("*.npz")
    found = earlier_rates(state)  # older visits count less
    assert set(found) == set(RATES)
    a = 1 + 0.8 * (0 + 0.8 * (1 + 0.8))
    assert found["a"] == pytest.approx((a + 0.5) / (1 + 0.8 + 0.64 + 0.512 + 1))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        earlier_rates(tmp_path / "nowhere")
    (tmp_path / "state.npz").write_bytes(b"no state")
    with pytest.raises(ValueError, match=r"state\.npz"):
        earlier_rates(tmp_path / "state.npz")


def test_the_rates_are_a_feature_beside_others(earlier, caplog):
    session = Session(kr.AllocationSettings(feature_columns=["x"]), earlier=earlier_rates(earlier))
    session.plan(["a", "b", "new"], 2, features={"x": [1, 1, 2]})
    features = session.allocator.shared.features
    assert features.names == ["earlier rate", "x"]
    assert (features.codes(["a", "b", "new"])[:, 0] == MISSING).tolist() == [False, False, True]
    assert "earlier run" not in caplog.text
    session.plan(["other"], 2, features={"x": [1]})
    assert "no prompt of a batch is in the earlier run" in caplog.text
    assert not session.allocator.failures


def test_an_earlier_run_helps_from_the_second_batch_on():
    """Before a prompt of this run was ever seen, its estimate is close to its rate in the earlier run."""
    rng, prompts = np.random.default_rng(0), 400
    rates = rng.choice([0.03, 0.5, 0.97], prompts)
    known = {f"p{k}": (rng.binomial(32, rates[k]) + 0.5) / 33 for k in range(prompts)}
    errors = {}
    for name, earlier in {"without": None, "with": known, "worthless": dict(zip(known, rng.random(prompts)))}.items():  # noqa: B905 - as long
        session, found = Session(kr.AllocationSettings(), earlier=earlier), []
        for start in range(0, prompts, 40):
            some = np.arange(start, start + 40)
            plan = session.plan([f"p{k}" for k in some], 8)
            if start >= 80:
                found.append(plan.allocation.success_rates - rates[some])
            prompt_R = plan.expand()
            session.observe(
                plan, prompt_R, (np.random.default_rng(start).random(prompt_R.size) < rates[some][prompt_R]) * 1.0
            )
        errors[name] = np.sqrt(np.mean(np.square(found)))
    assert errors["with"] < 0.5 * errors["without"]
    assert errors["worthless"] < 1.05 * errors["without"]
