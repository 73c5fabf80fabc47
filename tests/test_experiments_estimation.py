"""``python -m experiments estimation``: arguments in, tables and files out."""

from __future__ import annotations

import json

import pytest

from experiments import estimation
from experiments.__main__ import main


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny_experiment(monkeypatch):
    """Two small environments in place of the experiment's own."""
    from dataclasses import replace

    small = replace(estimation.SYNTHETIC["late in training"], prompts=24, epochs=5, batch_size=12)
    monkeypatch.setattr(estimation, "environments", lambda options: {f"small, {options.split}": small})


@pytest.mark.usefixtures("tiny_experiment")
def test_an_experiment_prints_its_table_and_writes_its_files(capsys, tmp_path):
    assert main(["estimation", "--seeds", "2", "--split", "development", "--output", "out"]) == 0
    out, err = capsys.readouterr()
    assert "**small, development** (2 seeds)" in out
    assert "**small, development, uniform allocation watched** (2 seeds)" in out
    allocating = ("uniform", "uniform 2N", *estimation.LISTED, "Bayes filter, may skip", "rates known")
    for label in allocating:
        assert f"\n| {label} | " in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "estimation.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in rows] == [*allocating, *estimation.LISTED]
    assert rows[len(allocating) - 1]["mean"]["gain_captured"] == 1.0
    assert all(abs(row["mean"]["gain_captured"]) < 1e-12 for row in rows[len(allocating) :])  # they only watch
    page = (tmp_path / "out" / "estimation.html").read_text()
    assert page.count("<svg") == 4
    assert err == ""


def test_the_experiments_own_environments(tmp_path):
    """What runs by default and in a hurry, without running it."""
    full, quick = estimation.Options(split="all"), estimation.Options(quick=True)
    assert next(iter(estimation.environments(full))) == "recorded run, all (590 prompts)"
    assert next(iter(estimation.environments(quick))) == "recorded run, report (295 prompts)"
    assert full.seed_list == [0, 1, 2, 3, 4]
    assert quick.seed_list == [0, 1]
    assert estimation.simulations(full) == (7 * 9 + 5) * 5
    for environment in estimation.environments(quick).values():
        episode = environment.start(0)
        assert max(batch.size for batch in episode.batches) == 128
        assert len(episode.batches) <= 36


def test_an_estimator_joins_the_table_by_its_name(monkeypatch):
    monkeypatch.setattr(estimation, "LISTED", {**estimation.LISTED, "slow Beta": ("beta", {"discount": 1.0})})
    assert "slow Beta" in estimation.policies(estimation.Options())


@pytest.mark.parametrize("arguments", [["nothing"], ["estimation", "--split", "test"]])
def test_unknown_names_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_seeds_of_an_experiment_are_at_least_one(capsys):
    assert main(["estimation", "--seeds", "0"]) == 2
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err
