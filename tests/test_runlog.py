import json
import logging
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from knapsack_rl.groups import DIFFICULTY_CLASSES
from knapsack_rl.runs.curves import mean_curve, moving_average, rollouts_to_reach, t_interval, t_quantile, tail_mean
from knapsack_rl.runs.log import RunLog
from run_folders import write_rows, write_run


def class_of(successes, scored):
    rate = Fraction(successes, scored)
    if rate == 1:
        return 0
    if rate == 0:
        return 4
    if rate >= Fraction(4, 5):
        return 1
    return 3 if rate <= Fraction(1, 5) else 2


@pytest.fixture
def rows(tmp_path):
    return write_run(tmp_path, steps=40)


@pytest.fixture
def run(tmp_path, rows):
    return RunLog.load(tmp_path)


def test_steps_rollouts_and_budgets(run, rows):
    assert run.steps.tolist() == [row["step"] for row in rows]
    assert run.rollouts.tolist() == [sum(row["counts"]) for row in rows]
    assert run.cumulative_rollouts[-1] == sum(sum(row["counts"]) for row in rows)
    assert run.min_budget.tolist() == [min(row["counts"]) for row in rows]
    assert run.max_budget.tolist() == [max(row["counts"]) for row in rows]
    assert run.seconds.tolist() == [row["seconds"] for row in rows]
    assert run.reasons[0] == "cold start"
    assert run.finished


def test_success_on_training_prompts_weighs_every_prompt_the_same(run, rows):
    for t, row in enumerate(rows):
        rates = [good / n for good, n in zip(row["successes"], row["scored"], strict=True) if n]
        assert run.training_success[t] == pytest.approx(sum(rates) / len(rates))
    pooled = [sum(row["successes"]) / sum(row["scored"]) for row in rows]
    assert not np.allclose(run.training_success, pooled)


def test_effective_ratios(run, rows):
    for t, row in enumerate(rows):
        useful = [n for n, effective in zip(row["counts"], row["effective"], strict=True) if effective]
        assert run.effective_rollout_ratio[t] == pytest.approx(sum(useful) / sum(row["counts"]))
        assert run.effective_prompt_ratio[t] == pytest.approx(len(useful) / len(row["counts"]))
    assert not np.allclose(run.effective_rollout_ratio, run.effective_prompt_ratio)


def test_the_calibration_error_is_that_of_the_groups_with_a_prediction(tmp_path):
    rows = write_run(tmp_path, steps=6)
    rows[1]["predicted"][0] = None
    rows[2]["predicted"] = [None] * len(rows[2]["predicted"])
    write_rows(tmp_path / "allocations.jsonl", rows)
    found = RunLog.load(tmp_path).calibration_error
    for t, row in enumerate(rows):
        both = [(p, e) for p, e in zip(row["predicted"], row["effective"], strict=True) if p is not None]
        missed = [Fraction(p) - e for p, e in both]
        assert found[t] == pytest.approx(float(sum(missed) / len(missed)) if missed else math.nan, nan_ok=True)


def test_difficulty(run, rows):
    for t, row in enumerate(rows):
        pairs = list(zip(row["successes"], row["scored"], strict=True))
        classes = [class_of(good, total) for good, total in pairs]
        assert run.difficulty_shares[t] == pytest.approx([classes.count(k) / len(classes) for k in range(5)])
        assert run.all_correct_share[t] == pytest.approx(classes.count(0) / len(classes))
        assert run.all_wrong_share[t] == pytest.approx(classes.count(4) / len(classes))


def test_transitions_and_unsolved_share(run, rows):
    history = {}
    for row in rows:
        for name, good, total in zip(row["prompt_ids"], row["successes"], row["scored"], strict=True):
            history.setdefault(name, []).append(class_of(good, total))
    expected = np.zeros((len(DIFFICULTY_CLASSES),) * 2, dtype=int)
    for classes in history.values():
        if len(classes) > 1:
            expected[classes[0], classes[-1]] += 1
    assert run.transitions.tolist() == expected.tolist()
    assert run.unsolved_share == pytest.approx(np.mean([classes[-1] == 4 for classes in history.values()]))
    assert set(run.prompt_ids) == set(history)


def test_budget_by_estimate(run, rows):
    pairs = [(p, n) for row in rows for p, n in zip(row["estimate"], row["counts"], strict=True)]
    data = run.budget_by_estimate
    assert data.visits.sum() == len(pairs)
    assert data.estimate[0] == 0
    assert math.isnan(data.estimate[-1])
    assert data.mean[-1] == pytest.approx(np.mean([n for p, n in pairs if p is None]))
    unsolved = [n for p, n in pairs if p == 0]
    assert data.visits[0] == len(unsolved)
    assert data.mean[0] == pytest.approx(np.mean(unsolved))
    assert (data.low[0], data.high[0]) == pytest.approx((np.quantile(unsolved, 0.1), np.quantile(unsolved, 0.9)))
    fifth = [n for p, n in pairs if p is not None and 0.5 <= p < 0.6]
    assert data.mean[(data.estimate >= 0.5) & (data.estimate < 0.6)] == pytest.approx([np.mean(fifth)])


def test_calibration(run, rows):
    pairs = [(p, e) for row in rows for p, e in zip(row["predicted"], row["effective"], strict=True)]
    data = run.calibration(bins=4)
    assert data.visits.sum() == len(pairs)
    assert data.brier == pytest.approx(np.mean([(p - e) ** 2 for p, e in pairs]))
    share = np.mean([e for _, e in pairs])
    assert data.brier_constant == pytest.approx(share * (1 - share))
    lowest = [(p, e) for p, e in pairs if p < 0.25]
    assert data.predicted[0] == pytest.approx(np.mean([p for p, _ in lowest]))
    assert data.realised[0] == pytest.approx(np.mean([e for _, e in lowest]))


def test_held_out_and_metrics(tmp_path, run):
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in logged if "held_out/accuracy" in row]
    rollouts, accuracy = run.held_out
    assert rollouts.tolist() == [row["rollouts"] for row in evaluations]
    assert accuracy.tolist() == [row["held_out/accuracy"] for row in evaluations]
    steps, loss = run.metric("loss")
    assert steps.size == loss.size == 40


def test_torn_last_line_is_skipped_and_logged(tmp_path, rows, caplog):
    # Torn inside the two bytes of an umlaut.
    with (tmp_path / "allocations.jsonl").open("ab") as file:
        file.write('{"step": 41, "prompt_ids": ["ä'.encode()[:-1])
    with caplog.at_level(logging.WARNING):
        run = RunLog.load(tmp_path)
    assert run.steps[-1] == 40
    assert "line 41" in caplog.text


def test_lines_that_are_no_objects_are_skipped(tmp_path, rows, caplog):
    write_rows(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}], tail='[1, 2]\n\n{"step": 2, "loss": 2.0}\n')
    with caplog.at_level(logging.WARNING):
        run = RunLog.load(tmp_path)
    assert run.metric("loss")[1].tolist() == [1, 2]
    assert "line 2" in caplog.text


def test_after_a_resume_the_later_entry_counts(tmp_path, rows):
    again = [{**row, "counts": [n + 1 for n in row["counts"]]} for row in rows[30:]]
    write_rows(tmp_path / "allocations.jsonl", rows[:35] + again)
    run = RunLog.load(tmp_path)
    assert run.steps.tolist() == list(range(1, 41))
    assert run.rollouts[29] == sum(rows[29]["counts"])
    assert run.rollouts[30:].tolist() == [sum(row["counts"]) for row in again]


def test_repeated_evaluation_counts_once(tmp_path, rows):
    logged = [
        {"step": 0, "rollouts": 0, "held_out/accuracy": 0.1},
        {"step": 5, "rollouts": 40, "held_out/accuracy": 0.2},
        {"step": 5, "rollouts": 40, "loss": None},
        {"step": 5, "rollouts": 44, "held_out/accuracy": 0.3},
        {"step": 9, "rollouts": 80, "held_out/accuracy": None},
    ]
    write_rows(tmp_path / "metrics.jsonl", logged)
    run = RunLog.load(tmp_path)
    assert [part.tolist() for part in run.held_out] == [[0, 44], [0.1, 0.3]]
    assert run.metric("loss")[1].size == 0


def test_groups_without_scores_and_nulls(tmp_path, rows):
    row = {
        "step": 1,
        "prompt_ids": ["a", 1, "1"],
        "counts": [4, 4, 0],
        "arrived": [4, 4, 0],
        "successes": [0, 2, 0],
        "scored": [0, 4, 0],
        "effective": [False, True, False],
        "estimate": [None, 0.5, None],
        "predicted": [None, 0.9, 0.0],
    }
    write_rows(tmp_path / "allocations.jsonl", [row])
    run = RunLog.load(tmp_path)
    assert run.prompt_ids == ("a", 1, "1")  # a number and its text are two prompts
    assert run.visits.difficulty.tolist() == [-1, 2, -1]
    assert run.difficulty_shares.tolist() == [[0, 0, 1, 0, 0]]
    assert run.effective_prompt_ratio.tolist() == [0.5]
    assert run.effective_rollout_ratio.tolist() == [0.5]
    assert run.unsolved_share == 0
    assert run.calibration().visits.tolist() == [1]
    assert run.transitions.sum() == 0
    assert not run.finished


def test_run_without_steps(tmp_path):
    write_run(tmp_path, steps=0, planned=10)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "allocations.jsonl").unlink()
    run = RunLog.load(tmp_path)
    assert not run.finished
    assert run.held_out[0].size == run.effective_rollout_ratio.size == run.max_budget.size == 0
    assert run.difficulty_shares.shape == (0, 5)
    assert run.transitions.sum() == 0
    assert math.isnan(run.unsolved_share)
    assert math.isnan(run.calibration().brier)
    assert run.budget_by_estimate.visits.size == 0


def test_errors_name_file_and_cause(tmp_path, rows):
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(FileNotFoundError, match=r"there is no run folder .*elsewhere"):
        RunLog.load(elsewhere)
    elsewhere.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml"):
        RunLog.load(elsewhere)
    rows[3]["counts"].pop()
    write_rows(tmp_path / "allocations.jsonl", rows)
    with pytest.raises(ValueError, match="step 4: counts has 15 entries for 16 prompt_ids"):
        RunLog.load(tmp_path)
    del rows[3]["scored"]
    write_rows(tmp_path / "allocations.jsonl", rows)
    with pytest.raises(ValueError, match="step 4: expected lists under scored"):
        RunLog.load(tmp_path)
    write_rows(tmp_path / "allocations.jsonl", [{"step": None}])
    with pytest.raises(ValueError, match="line 1: step must be an integer, got None"):
        RunLog.load(tmp_path)
    (tmp_path / "config.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a mapping, got list"):
        RunLog.load(tmp_path)


def test_rollouts_to_reach():
    rollouts, accuracy = [0, 100, 200, 300], [0.2, 0.4, 0.3, 0.5]
    assert rollouts_to_reach(rollouts, accuracy, 0.1) == 0
    assert rollouts_to_reach(rollouts, accuracy, 0.3) == pytest.approx(50)
    assert rollouts_to_reach(rollouts, accuracy, 0.45) == pytest.approx(275)
    assert math.isnan(rollouts_to_reach(rollouts, accuracy, 0.6))
    assert math.isnan(rollouts_to_reach([], [], 0.1))
    assert rollouts_to_reach(rollouts, [0.2, math.nan, 0.4, 0.5], 0.3) == pytest.approx(100)
    with pytest.raises(ValueError, match="same shape"):
        rollouts_to_reach([1, 2], [0.5], 0.1)


def test_moving_average():
    assert moving_average([1, 2, 6, 7], 3).tolist() == pytest.approx([1.5, 3, 5, 6.5])
    assert moving_average([1, math.nan, 3], 3).tolist() == pytest.approx([1, 2, 3])
    assert moving_average([1, 2], 9).tolist() == pytest.approx([1.5, 1.5])
    assert moving_average([], 3).size == 0
    assert moving_average([[0, 1], [1, 0]], 3).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert np.isnan(moving_average([math.nan], 1)).all()
    with pytest.raises(ValueError, match="odd"):
        moving_average([1], 2)


def test_tail_mean():
    assert tail_mean(range(10)) == pytest.approx(8.5)
    assert tail_mean([1, 2, math.nan], share=1) == pytest.approx(1.5)
    assert tail_mean([3]) == 3
    assert math.isnan(tail_mean([]))


def test_mean_curve_covers_only_the_common_range():
    curve = mean_curve([([0, 10, 20], [0, 1, 2]), ([0, 5, 10], [2, 2, 2]), ([], []), ([1], [math.nan])])
    assert curve.x.tolist() == [0, 5, 10]
    assert curve.mean.tolist() == pytest.approx([1, 1.25, 1.5])
    assert curve.low.tolist() == pytest.approx([0, 0.5, 1])
    assert curve.high.tolist() == [2, 2, 2]
    assert mean_curve([]).x.size == 0


@given(probability=st.floats(0.5, 0.9995), degrees=st.integers(1, 60))
def test_t_quantile_against_scipy(probability, degrees):
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-6, abs=1e-9)


def test_t_interval_against_scipy():
    values = [0.31, 0.35, 0.29, 0.4]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx((high - low) / 2)
    assert t_interval([0.3]) is None
    with pytest.raises(ValueError, match="degrees"):
        t_quantile(0.9, 0)
