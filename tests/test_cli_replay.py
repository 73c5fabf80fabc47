"""``knapsack-rl replay`` and ``knapsack-rl experiment``: arguments in, tables and files out."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest

from experiments import estimation
from knapsack_rl.cli import main, progress
from knapsack_rl.cli.progress import progress as make_progress


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def log(tmp_path):
    """A small log under column names of its own."""
    rng = np.random.default_rng(0)
    lines = ["iteration,q,grade"]
    for step in range(6):
        for prompt, rate in enumerate(np.linspace(0, 1, 12)):
            lines += [f"{step},q{prompt},{0.9 if rng.random() < rate else 0.1}" for _ in range(4)]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


COLUMNS = ("--id-column", "q", "--reward-column", "grade", "--success-threshold", "0.5", "--seeds", "1")


def test_a_replay_prints_a_table_and_writes_a_page(log, capsys, tmp_path):
    assert main(["replay", str(log), *COLUMNS, "--output", "deep/page.html"]) == 0
    out = capsys.readouterr().out
    assert "288 rollouts, 72 groups of 12 prompts, 6 steps" in out
    assert "step from column 'iteration'" in out
    assert out.rstrip().endswith("report: deep/page.html")
    assert "Dry run" in (tmp_path / "deep" / "page.html").read_text()


def test_a_replay_as_json_is_json_alone(log, capsys, tmp_path):
    assert main(["replay", str(log), *COLUMNS, "--json", "--no-page", "--bandwidth", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["log"]["rollouts"] == 288
    assert found["settings"]["bandwidth"] == 1.0
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no file or folder nowhere"),
        (["log.csv"], "no usual column for the prompt"),
        (
            ["log.csv", "--id-column", "q", "--reward-column", "score"],
            "has no column 'score'; its columns are iteration",
        ),
        (["log.csv", "--id-column", "grade", "--reward-column", "q"], "is no number"),
        (["log.csv", *COLUMNS, "--seeds", "0"], "seeds must be a whole number >= 1, got 0"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(arguments, message, log, capsys):
    assert main(["replay", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.fixture
def tiny_experiment(monkeypatch):
    """Two small environments in place of the experiment's own."""
    from dataclasses import replace

    small = replace(estimation.SYNTHETIC["late in training"], prompts=24, epochs=5, batch_size=12)
    monkeypatch.setattr(estimation, "environments", lambda options: {f"small, {options.split}": small})


@pytest.mark.usefixtures("tiny_experiment")
def test_an_experiment_prints_its_table_and_writes_its_files(capsys, tmp_path):
    assert main(["experiment", "estimation", "--seeds", "2", "--split", "development", "--output", "out"]) == 0
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


@pytest.mark.parametrize("arguments", [["experiment", "nothing"], ["experiment", "estimation", "--split", "test"]])
def test_unknown_names_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_seeds_of_an_experiment_are_at_least_one(capsys):
    assert main(["experiment", "estimation", "--seeds", "0"]) == 2
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err


# -- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 12.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with make_progress(4) as done:
        for name in ("one", "two", "three"):
            done(name)
    assert capsys.readouterr().err == "2/4, about 12 s left: two\n"


def test_quiet_is_quiet(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_EVERY_SECONDS", 0.0)
    with make_progress(1, quiet=True) as done:
        done("one")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with make_progress(2) as done:
        done("one")
        done("two")
    assert "2/2" in terminal.getvalue()


def test_without_rich_a_terminal_gets_lines(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(progress, "PLAIN_EVERY_SECONDS", 0.0)
    with make_progress(2) as done:
        done("one")
    assert terminal.getvalue().startswith("1/2, about ")
