"""The experiment on estimators: its environments, its rows, its tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from experiments import estimation
from experiments.__main__ import main
from experiments.contract import Options


@pytest.fixture
def tiny_experiment(monkeypatch):
    """Two small environments in place of the experiment's own."""
    small = replace(estimation.SYNTHETIC["late in training"], prompts=24, epochs=5, batch_size=12)
    places = {"recorded run, small": small, "also small": small}
    monkeypatch.setattr(estimation, "environments", lambda options: places)


@pytest.mark.usefixtures("tiny_experiment")
def test_it_prints_its_tables_and_writes_its_files(capsys, tmp_path):
    arguments = ["estimation", "--seeds", "2", "--split", "development", "--quiet", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    allocating = ("uniform", "uniform 2N", *estimation.LISTED, "Bayes filter, may skip", "rates known")
    for label in allocating:
        assert f"\n| {label} | " in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "estimation.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in rows] == [*allocating, *allocating, *estimation.LISTED]
    assert rows[len(allocating) - 1]["mean"]["gain_captured"] == 1.0
    assert all(abs(row["mean"]["gain_captured"]) < 1e-12 for row in rows[2 * len(allocating) :])  # they only watch
    assert (tmp_path / "out" / "estimation.svg").read_bytes().count(b"<svg") == 1
    assert err == ""
    figure = estimation.figures(rows)
    assert figure("recorded run: rates known, gain captured") == "100.0 ± 0.0 %"
    assert figure("watched: Beta, Brier score") in estimation.tables(rows)["watched"]


def test_its_own_environments():
    """The full and the quick ones, without running them."""
    full, quick = Options(split="all"), Options(quick=True)
    assert next(iter(estimation.environments(full))) == "recorded run, all (590 prompts)"
    assert next(iter(estimation.environments(quick))) == "recorded run, report (295 prompts)"
    assert estimation.pieces(full) == (7 * 9 + 9 * 3 + 5) * 5
    for environment in estimation.environments(quick).values():
        episode = environment.start(0)
        assert max(batch.size for batch in episode.batches) in (128, 256)
        assert len(episode.batches) <= 36


def test_an_estimator_joins_the_table_by_its_name(monkeypatch):
    monkeypatch.setattr(estimation, "LISTED", {**estimation.LISTED, "slow Beta": ("beta", {"discount": 1.0})})
    assert "slow Beta" in estimation.policies()
