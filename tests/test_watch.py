"""The watch on synthetic series: it reports trouble and is silent otherwise."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from knapsack_rl.runs.files import read_rows
from knapsack_rl.runs.watch import WINDOW, WarningLog, Watch, watch_rows

KINDS = {"collapse", "bought", "stragglers", "oscillation", "miscalibration", "truncation", "starvation"}


def series(steps: int = 60, *, seed: int = 0, **means: float) -> list[dict[str, float]]:
    """A healthy run with noise, some of whose means are replaced; ``__`` means a slash."""
    dice = np.random.default_rng(seed)
    healthy = {
        **{"knapsack/effective_gradient_ratio": 0.55, "knapsack/effective_prompt_ratio": 0.45},
        **{"knapsack/all_correct": 0.3, "knapsack/all_wrong": 0.25, "knapsack/solved_before": 20.0},
        **{"knapsack/lost": 0.05, "knapsack/predicted_nonzero_gradient": 0.5},
        **{"knapsack/realised_nonzero_gradient": 0.47, "knapsack/process_imbalance": 1.05},
        **{"knapsack/lost_groups_share": 0.1, "knapsack/lost_groups_success_rate": 0.45},
        **{"knapsack/arrived_groups_success_rate": 0.5, "knapsack/lost_groups_length": 330.0},
        **{"knapsack/arrived_groups_length": 300.0},
        **{"completions/mean_length": 300.0, "completions/max_length": 700.0, "completions/clipped_ratio": 0.05},
    } | {name.replace("__", "/"): mean for name, mean in means.items()}
    return [
        {"step": step} | {name: mean * (1 + 0.1 * dice.standard_normal()) for name, mean in healthy.items()}
        for step in range(1, steps + 1)
    ]


def kinds(rows) -> list[str]:
    return [finding.kind for finding in watch_rows(rows)]


def test_a_healthy_run_is_silent():
    assert {seed: found for seed in range(20) if (found := kinds(series(200, seed=seed)))} == {}


SIGNS = {
    "collapse": {"knapsack__effective_prompt_ratio": 0.05, "knapsack__effective_gradient_ratio": 0.06},
    "bought": {"knapsack__effective_gradient_ratio": 0.6, "knapsack__effective_prompt_ratio": 0.25},
    "stragglers": {"completions__max_length": 2400.0},
    "oscillation": {"knapsack__lost": 0.3},
    "miscalibration": {"knapsack__realised_nonzero_gradient": 0.2},
    "truncation": {"completions__clipped_ratio": 0.5},
    "starvation": {"knapsack__lost_groups_success_rate": 0.2},
}


def test_each_sign_is_reported_alone_and_once():
    for kind, means in SIGNS.items():
        found = watch_rows(series(400, **means))
        assert [(finding.kind, finding.step) for finding in found] == [(kind, WINDOW)]
        assert found[0].cause and found[0].remedy, kind
        assert str(found[0]).startswith(f"step {WINDOW}: {found[0].seen}")


def test_every_kind_is_tested():
    assert set(SIGNS) == KINDS


def test_other_ways_to_the_same_signs():
    (longer,) = watch_rows(series(knapsack__lost_groups_length=600.0))
    assert longer.kind == "starvation"
    assert "longer (595 tokens" in longer.seen
    assert "harder" not in longer.seen
    assert kinds(series(knapsack__lost_groups_success_rate=0.2, knapsack__lost_groups_share=0.01)) == []
    assert kinds(series(knapsack__process_imbalance=1.6)) == ["stragglers"]
    (uneven,) = watch_rows(series(knapsack__process_imbalance=1.6))
    assert "busiest process generates 1.5" in uneven.seen
    (graded,) = watch_rows(series(knapsack__predicted_nonzero_gradient=0.25))
    assert graded.kind == "miscalibration"
    assert "success_threshold" in graded.remedy


@pytest.mark.parametrize(
    ("solved", "unsolved", "words"),
    [(0.9, 0.05, "data set is used up"), (0.05, 0.9, "verifier rejects"), (0.45, 0.45, "groups are too small")],
)
def test_a_collapse_has_the_cause_that_the_groups_show(solved, unsolved, words):
    rows = series(knapsack__all_correct=solved, knapsack__all_wrong=unsolved, **SIGNS["collapse"])
    (finding,) = watch_rows(rows)
    assert words in finding.cause


def test_a_short_trouble_is_no_sign():
    rows = series(200)
    for row in rows[100:104]:
        row |= {"knapsack/effective_prompt_ratio": 0.0, "knapsack/lost": 0.6, "completions/clipped_ratio": 1.0}
        row |= {"knapsack/predicted_nonzero_gradient": 0.9}
    assert kinds(rows) == []


def test_late_trouble_is_reported_when_it_comes():
    rows = series(100) + [row | {"step": row["step"] + 100} for row in series(100, knapsack__lost=0.4)]
    (finding,) = watch_rows(rows)
    assert finding.kind == "oscillation"
    # 0.05 and 0.4 mix to 0.15 after two sevenths of the window.
    assert 100 + WINDOW * 2 / 7 - 2 <= finding.step <= 100 + WINDOW * 2 / 7 + 4


def test_losses_are_weighed_by_the_prompts_that_could_be_lost():
    rows = series()
    for row in rows:
        many = row["step"] % 2 == 0
        row |= {"knapsack/solved_before": 60.0 if many else 1.0, "knapsack/lost": 0.02 if many else 1.0}
    assert kinds(rows) == []  # the plain mean of the shares is 0.51
    for row in rows:
        row |= {"knapsack/solved_before": 1.0, "knapsack/lost": 1.0}
    assert kinds(rows) == []  # too few to judge by


def test_steps_without_solved_prompts_keep_their_place():
    rows = series(knapsack__lost=0.5)
    for row in rows[::2]:
        row |= {"knapsack/solved_before": 0.0, "knapsack/lost": float("nan")}
    assert kinds(rows) == ["oscillation"]


def test_short_completions_and_missing_numbers_are_no_stragglers():
    assert kinds(series(completions__mean_length=4.0, completions__max_length=40.0)) == []
    bare = [{"step": row["step"], "loss": 0.1, "completions/max_length": None} for row in series()]
    assert kinds(bare) == []


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        ([0.3, 0.5, 0.7, 0.65, 0.68], []),
        ([0.3, 0.7, 0.5, 0.7], []),  # one bad evaluation
        ([0.3, 0.7, 0.55, 0.58], ["oscillation"]),
        ([0.7, 0.2], []),  # too few
    ],
)
def test_a_lasting_drop_of_held_out_accuracy_is_reported(accuracy, expected):
    rows = [{"step": 10 * k, "held_out/accuracy": value} for k, value in enumerate(accuracy)]
    assert kinds(rows) == expected


def test_the_window_is_a_number_of_rows():
    rows = series(30, **SIGNS["truncation"])
    assert [finding.step for finding in watch_rows(rows, window=5)] == [5]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Watch(window=0)


def test_findings_are_written_and_a_resumed_run_repeats_none(tmp_path):
    path, found = tmp_path / "warnings.jsonl", []
    log = WarningLog(path, found.append)
    for row in series(**SIGNS["truncation"]):
        log.row(row)
    assert [finding.kind for finding in found] == ["truncation"]
    (row,) = read_rows(path)
    assert row["kind"] == "truncation" and row["step"] == WINDOW
    assert {"seen", "cause", "remedy"} <= set(row)

    again = WarningLog(path, found.append)
    for row in series(**SIGNS["truncation"], **SIGNS["oscillation"]):
        again.row(row)
    assert [finding.kind for finding in found] == ["truncation", "oscillation"]
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["truncation", "oscillation"]


def test_by_default_a_finding_is_logged_and_a_file_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    log = WarningLog(tmp_path / "file" / "warnings.jsonl")
    with caplog.at_level(logging.WARNING):
        for row in series(**SIGNS["collapse"]):
            log.row(row)
    assert "of the prompts carry a gradient" in caplog.text
    assert "could not be written" in caplog.text
