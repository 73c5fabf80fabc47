"""The display of ``knapsack-rl train`` while it runs."""

import io
import logging
import math

import pytest

from knapsack_rl.cli.display import Pace, Panel, PlainLines, Quiet, make_display
from knapsack_rl.runs.watch import Finding
from knapsack_rl.training.settings import TrainSettings

STEP = {
    **{"step": 3, "reward": 0.25, "knapsack/effective_gradient_ratio": 0.5, "knapsack/effective_prompt_ratio": 0.75},
    **{"knapsack/generation_seconds": 0.5, "knapsack/update_seconds": 0.75, "knapsack/rows_skipped": 0.625},
    **{"knapsack/budget_max": 17.0, "step_time": 1.5, "knapsack/budget_to/hard": 0.5, "knapsack/budget_to/easy": None},
}
EVALUATION = {"step": 4, "held_out/accuracy": 0.125, "held_out/greedy_accuracy": 0.375}


def test_a_display_fits_its_output(monkeypatch):
    assert isinstance(make_display(quiet=True), Quiet)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert isinstance(make_display(quiet=False), PlainLines)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert isinstance(make_display(quiet=False), Panel)


def shown_by(display, rows, capsys):
    display.start(TrainSettings(steps=20, seed=7), first_step=2)
    for row in rows:
        display.row(row)
    display.stop()
    return capsys.readouterr().out


def test_the_quiet_display_prints_nothing(capsys):
    assert shown_by(Quiet(), [STEP, EVALUATION], capsys) == ""


def test_plain_lines_show_every_evaluation_and_a_step_now_and_then(capsys):
    lines = shown_by(PlainLines(), [EVALUATION | {"step": 0}, STEP, STEP | {"step": 4}, EVALUATION], capsys)
    first, threads, start, step, evaluation = lines.splitlines()
    assert first == "knapsack-n4-seed7: 20 steps of 512 rollouts"
    assert "torch thread" in threads
    assert start == "step 0/20  held-out accuracy 0.125  greedy 0.375"
    assert step.startswith("step 3/20  reward 0.250  effective gradient ratio 0.50 (prompts 0.75)  largest budget 17")
    assert step.endswith("1.50 s/step (generation 0.50, update 0.75)")
    assert evaluation == "step 4/20  held-out accuracy 0.125  greedy 0.375"


def test_the_panel_shows_the_newest_numbers(capsys):
    text = shown_by(Panel(), [EVALUATION | {"step": 0}, STEP], capsys)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "knapsack-n4-seed7: 128 prompts x 4 rollouts" in lines
    assert any(line.startswith("step") and "3/20" in line for line in lines)
    assert {"reward 0.250 ▃", "held-out accuracy 0.125", "effective prompts 0.75 ▆", "largest budget 17"} <= set(lines)
    assert {"seconds per step 1.50 generation 0.50, update 0.75", "rows left out of updates 62%"} <= set(lines)
    assert any("torch thread" in line for line in lines)
    assert "rollouts per second -" in lines  # the first step is a warm-up
    assert f"hard {'█' * 12} 50%" in lines
    assert "easy 0%" in lines


FINDING = Finding("collapse", 9, "Few [bold]prompts[/bold] carry.", "A cause.", "A remedy.")


def test_every_display_shows_a_warning(capsys, caplog):
    for display in (PlainLines(), Panel()):
        display.start(TrainSettings(steps=20), first_step=0)
        display.warn(FINDING)
        display.stop()
        text = " ".join(capsys.readouterr().out.split())
        assert "step 9: Few [bold]prompts[/bold] carry. A cause. A remedy." in text
    Quiet().warn(FINDING)
    assert capsys.readouterr().out == ""
    assert "step 9: Few [bold]prompts" in caplog.text


def test_log_lines_go_through_the_panel(capsys):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        panel = Panel()
        panel.start(TrainSettings(steps=20), first_step=0)
        assert handler.stream is not stream
        panel.stop()
        assert handler.stream is stream
    finally:
        logging.getLogger().removeHandler(handler)
    assert stream.getvalue() == ""


def test_the_pace_leaves_out_the_first_step_and_counts_evaluations():
    times = iter([0.0, 100.0, 104.0, 114.0, 115.0])
    pace = Pace(TrainSettings(steps=1000, prompts_per_step=4, rollouts_per_prompt=5), clock=lambda: next(times))
    pace.row({"step": 1, "loss": 0.1})
    assert (pace.left, math.isnan(pace.rollouts_per_second)) == ("", True)
    pace.row({"step": 1, "held_out/accuracy": 0.5})  # its time counts with the next step
    pace.row({"step": 2, "loss": 0.1})
    assert pace.seconds == 100.0
    assert pace.left == "27 h 43 min"
    pace.row({"step": 3, "loss": 0.1})
    assert pace.seconds == pytest.approx(0.9 * 100 + 0.1 * 4)
    assert pace.rollouts_per_second == pytest.approx(20 / 90.4)
    pace.row({"step": 998, "loss": 0.1})
    assert pace.left == "2 min 45 s"  # 2 steps of 0.9 * 90.4 + 1 = 82.36 s
    pace.row({"step": 1000, "loss": 0.1})
    assert pace.left == "0 s"
