"""A killed run continues from its last checkpoint like an uninterrupted one: no observation is lost or doubled."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from knapsack_rl.runs.files import by_step

KNOWN = 16  # rollouts of each prompt before the run
EPOCH = 6  # steps: 24 prompts, 4 at a time


def moments_of(number: int, steps: int, seed: int) -> list[tuple[str, int, float]]:
    """Random moments, the kinds in turn; a tiny step takes a few hundredths of a second."""
    rng = random.Random(seed)
    return [
        (
            "guc"[k % 3],
            rng.choice(range(2, steps + 1, 2) if k % 3 == 2 else range(1, steps + 1)),
            rng.choice((0, 1, 3)) * rng.random() / 50,
        )
        for k in range(number)
    ]


def run(folder: Path, moments: list[tuple[str, int, float]], steps: int) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_worker.py")), str(folder), json.dumps(moments), str(steps)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


def without_clock(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "seconds"}


def check(found: list[dict], steps: int) -> None:
    """Compare with the uninterrupted run, the first one."""
    whole, *others = found
    assert not whole["killed"]
    expected = [without_clock(row) for row in whole["rows"]]
    assert [row["step"] for row in expected] == list(range(1, steps + 1))
    assert any(max(row["counts"]) > min(row["counts"]) for row in expected), "the run never allocates"
    for one in others:
        rows = [without_clock(row) for row in by_step(one["rows"])]
        scored = Counter({f"p{k}": KNOWN for k in range(24)})
        for row in rows:
            scored.update(dict(zip(row["prompt_ids"], row["scored"], strict=True)))
        assert one["end"]["rollouts"] == dict(scored), (one["moment"], "each observation counts once")
        assert one["end"]["steps"] == steps
        assert rows == expected, one["moment"]
        assert one["end"] == whole["end"], one["moment"]
    assert sum(one["killed"] for one in others) >= len(others) * 0.6


def test_a_killed_run_continues_as_the_uninterrupted_one(tmp_path: Path) -> None:
    steps = EPOCH + 2
    check(run(tmp_path, moments_of(5, steps, seed=3), steps), steps)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [EPOCH, 2 * EPOCH + 2])
def test_killed_at_sixty_moments(steps: int, tmp_path: Path) -> None:
    found = run(tmp_path, moments_of(30, steps, seed=steps), steps)
    print(f"{sum(one['killed'] for one in found)} of 30 runs of {steps} steps were killed in time")
    check(found, steps)
