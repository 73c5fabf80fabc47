"""``knapsack-rl replay``: arguments in, tables and files out."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest

from knapsack_rl.cli import main, progress
from knapsack_rl.cli.progress import progress as make_progress


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def log(tmp_path):
    """A small log with unusual column names."""
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


@pytest.mark.usefixtures("log")
def test_bad_input_to_replay_is_one_line(capsys):
    for arguments, message in (
        (["nowhere"], "no file or folder nowhere"),
        (["log.csv"], "none of the usual columns for the prompt"),
        (
            ["log.csv", "--id-column", "q", "--reward-column", "score"],
            "has no column 'score'; its columns are iteration",
        ),
        (["log.csv", "--id-column", "grade", "--reward-column", "q"], "is not a number"),
        (["log.csv", *COLUMNS, "--seeds", "0"], "seeds must be a whole number >= 1, got 0"),
    ):
        assert main(["replay", *arguments]) == 2, arguments
        out, err = capsys.readouterr()
        assert out == "", arguments
        assert message in err, arguments
        assert err.count("\n") == 1, arguments


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
