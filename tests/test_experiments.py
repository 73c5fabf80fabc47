"""Experiments of the evidence page: statistics, extraction, catalogue, command and page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from evidence_rows import run_row
from experiments import catalogue, page, pool, statistics
from experiments.contract import Options
from experiments.extract import never_solved, solved_once
from knapsack_rl.cli import main
from knapsack_rl.report.comparison import accuracy_at_end
from knapsack_rl.runs.log import Visits
from knapsack_rl.training.settings import TrainSettings

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "docs" / "evidence"
TRAINED = [name for name in catalogue.EXPERIMENTS if hasattr(catalogue.load(name), "ARMS")]

# -- Statistics --------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_students_t():
    values = {0: 0.31, 1: 0.42, 2: 0.37, 3: 0.30, 4: 0.44}
    found = statistics.mean_of(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(list(values.values())), scale=stats.sem(list(values.values())))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.mean, found.seeds) == (pytest.approx(0.368), 5)


def test_differences_are_paired_by_seed():
    a, b = {0: 0.5, 1: 0.9, 2: 0.7}, {1: 0.8, 0: 0.45, 3: 0.1}
    found = statistics.difference(a, b)
    paired = stats.ttest_rel([0.5, 0.9], [0.45, 0.8]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high))
    assert found.seeds == 2


def test_one_seed_has_no_interval_and_no_verdict():
    found = statistics.mean_of({3: 0.25})
    assert found.percent() == "25.0 %"
    assert statistics.judged(found, 0.1) == "undecided"
    assert statistics.mean_of({0: math.nan}).points() == statistics.factor({}).times() == "–"


def test_figures_are_told_with_their_interval():
    found = statistics.Estimate(0.031, 0.010, 0.052, 5)
    assert found.points() == "+3.1 [+1.0, +5.2]"
    assert statistics.Estimate(0.8, 0.5, 1.2, 3, bounds=1).times() == "at least 0.80 [0.50, 1.20] ×"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.25, 0.30, "holds"),
        (0.05, 0.30, "holds in part"),
        (0.01, 0.10, "holds in part"),
        (-0.10, 0.10, "does not hold"),
        (-0.30, -0.10, "does not hold"),
        (-0.10, 0.30, "undecided"),
    ],
)
def test_the_interval_decides(low, high, verdict):
    assert statistics.judged(statistics.Estimate((low + high) / 2, low, high, 5), 0.2) == verdict


def test_the_cost_of_the_same_accuracy():
    # Curves of three equal points at the end are left as they are by the smoothing where it matters.
    fast = (0.2, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6)
    slow = (0.2, 0.2, 0.2, 0.6, 0.6, 0.6, 0.6)
    rows = [run_row("uniform", s, accuracy=slow, rollouts=600) for s in (0, 1)]
    rows += [run_row("knapsack", s, accuracy=fast, rollouts=600) for s in (0, 1)]
    # Smoothed over three: slow reaches 0.6 at the fifth point (400), fast at the third (200).
    found = statistics.relative_cost(rows, "knapsack", "uniform")
    assert (found.mean, found.seeds, found.bounds) == (pytest.approx(200 / 400), 2, 0)
    assert statistics.relative_cost(rows, "uniform", "knapsack").mean == pytest.approx(2.0)


def test_a_target_never_reached_is_a_lower_bound():
    rows = [run_row("uniform", 0, accuracy=(0.2, 0.6, 0.6, 0.6, 0.6), rollouts=400)]
    rows += [run_row("paper", 0, accuracy=(0.2, 0.3, 0.3, 0.3, 0.3), rollouts=800)]
    found = statistics.relative_cost(rows, "paper", "uniform")
    assert (found.mean, found.bounds) == (pytest.approx(800 / 200), 1)
    assert found.times().startswith("at least 4.00")


def test_the_accuracy_at_the_end_and_on_the_way():
    row = run_row("uniform", 0, accuracy=(0.0, 0.1, 0.4, 0.5, 0.6))
    assert statistics.final_accuracy(row) == pytest.approx(0.5)
    assert accuracy_at_end([0.2, 0.6]) == 0.6  # the one before training does not count
    assert accuracy_at_end([0.2]) == 0.2
    assert math.isnan(accuracy_at_end([]))
    assert statistics.mean_accuracy(row) == pytest.approx((0.0 / 2 + 0.1 + 0.4 + 0.5 + 0.6 / 2) / 4)
    assert statistics.series_mean("all_wrong", 0.2)(row) == pytest.approx(0.2)


# -- Extraction --------------------------------------------------------------------------------------------------------


def visits(prompt, scored, successes):
    size = len(prompt)
    return Visits(
        step=np.arange(size),
        prompt=np.array(prompt),
        counts=np.array(scored),
        successes=np.array(successes),
        scored=np.array(scored),
        effective=np.zeros(size, dtype=bool),
        estimate=np.full(size, np.nan),
        predicted=np.full(size, np.nan),
    )


def test_visits_of_prompts_that_never_succeeded_so_far():
    #                prompt 0: fails, fails, succeeds, fails;  prompt 1: unscored, succeeds, fails
    found = never_solved(visits([0, 1, 0, 1, 0, 0, 1], [4, 0, 4, 4, 4, 4, 4], [0, 0, 0, 2, 1, 0, 0]))
    assert found.tolist() == [False, False, True, False, True, False, False]


def test_prompts_seen_solved_twice_in_a_row():
    found = solved_once(visits([0, 0, 1, 1, 1, 2, 2, 3, 3], [4, 2, 4, 4, 4, 1, 1, 4, 4], [4, 2, 4, 3, 4, 1, 1, 4, 4]))
    assert found == {0, 3}  # 1 has a failure between, 2 has single rollouts


def test_exact_success_rates_of_the_base_model():
    pytest.importorskip("torch")
    from experiments.exact import success_rates
    from knapsack_rl.tasks import base_model_path

    ids, rates = success_rates(TrainSettings(), None)
    record = json.loads((base_model_path() / "training.json").read_text())["train_prompts"]
    expected = record["spectrum_expected"]
    assert len(ids) == rates.size == record["count"]
    assert rates.mean() == pytest.approx(expected["mean"], rel=1e-4)
    assert ((1 - rates) ** 8).mean() == pytest.approx(expected["unsolved"], rel=1e-4)
    with pytest.raises(ValueError, match="temperature 1"):
        success_rates(TrainSettings(temperature=0.5), None)


# -- Catalogue ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalogue.EXPERIMENTS)
def test_an_experiment_offers_what_the_page_needs(name):
    experiment = catalogue.load(name)
    assert experiment.QUESTION.endswith("?")
    assert experiment.pieces(Options(seeds=3, quick=True)) >= 1
    for part in ("measure", "findings", "paragraph", "figure"):
        assert callable(getattr(experiment, part)), part


def test_an_unknown_experiment_is_named():
    with pytest.raises(ValueError, match="experiment must be one of gradient-ratio, "):
        catalogue.load("magic")


def test_arms_differ_from_the_shared_settings_in_what_they_name():
    for name, arm in pool.ARMS.items():
        settings = arm.of(pool.FULL, 3)
        changed = {key for key in vars(settings) if getattr(settings, key) != getattr(pool.FULL, key)}
        assert changed - {"seed"} <= {*arm.settings, "rollouts_per_prompt"}, name
        assert settings.budget == pool.FULL.budget * arm.multiple
    assert len({str(arm.of(pool.FULL, 0)) for arm in pool.ARMS.values()}) == len(pool.ARMS)
    assert len({arm.label for arm in pool.ARMS.values()}) == len(pool.ARMS)


def test_all_runs_of_the_shared_task_are_planned_once(tmp_path):
    options = Options(seeds=2, runs=tmp_path)
    runs = catalogue.shared_runs(options)
    assert len({run.folder for run in runs}) == len(runs)
    assert [run.settings.seed for run in runs] == [0] * (len(runs) // 2) + [1] * (len(runs) // 2)
    for name in TRAINED:
        if name != "tokens":
            assert set(pool.plan(catalogue.load(name).ARMS, options)) <= set(runs)
    assert {run.settings.dataset for run in runs} == {"arithmetic"}


def test_experiments_share_the_runs_of_an_arm(tmp_path):
    options = Options(seeds=2, runs=tmp_path)
    first, second = (pool.plan(arms, options) for arms in (["uniform", "paper"], ["paper", "knapsack"]))
    assert first[1] == second[0]
    assert [run.settings.seed for run in first] == [0, 0, 1, 1]
    quick = pool.plan(["paper"], Options(seeds=5, quick=True, runs=tmp_path))
    assert len(quick) == pool.QUICK_SEEDS
    assert quick[0].folder != second[0].folder


def test_runs_on_record_are_not_trained_again(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(pool, "execute", lambda runs, *, jobs, progress: trained.extend(runs) or [])
    monkeypatch.setattr(pool, "extract", lambda run, arm: {"arm": arm, "seed": run.settings.seed, "new": True})
    arms, options = ("uniform", "paper"), Options(seeds=2, runs=tmp_path / "runs", record=tmp_path / "record")
    runs = pool.plan(arms, options)
    rows = [
        run_row("uniform", 0) | {"settings": asdict(runs[0].settings)},
        run_row("paper", 0) | {"settings": asdict(runs[1].settings) | {"learning_rate": 0.5}},  # another run
        run_row("uniform", 1) | {"settings": asdict(runs[2].settings), "quick": True},
        run_row("paper", 1) | {"settings": asdict(runs[3].settings) | {"gone": 1}},  # of another release
        run_row("paper", 1),  # made before rows held settings
        {"seed": 0, "gap": 0.0},  # of an experiment without training
    ]
    options.record.mkdir()
    (options.record / "weighting.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = []
    found = pool.measure(arms, options, told.append)
    assert trained == runs[1:]
    assert told == ["uniform-seed0 was there"]
    assert found[0] == rows[0]
    assert all(row["new"] for row in found[1:])
    assert pool.missing(runs, Options(runs=options.runs)) == runs


# -- Findings on made-up rows ------------------------------------------------------------------------------------------


def rows_of(name, **by_arm):
    """Three seeds of each arm with a little spread; keywords change an arm's rows."""
    rows = []
    for arm in catalogue.load(name).ARMS:
        for seed in range(3):
            changes = dict(by_arm.get(arm.replace("-", "_"), {}))
            top = changes.pop("top", 0.7) + 0.001 * seed
            rows.append(run_row(arm, seed, accuracy=(0.3, 0.5, top, top, top), **changes))
    return rows


def verdicts(name, **by_arm):
    rows = rows_of(name, **by_arm)
    return {found.claim: found.verdict for found in catalogue.load(name).findings(rows)}


@pytest.mark.parametrize("name", TRAINED)
def test_findings_paragraph_and_figure_come_from_the_rows_alone(name, tmp_path):
    experiment, rows = catalogue.load(name), rows_of(name)
    again = json.loads(json.dumps(rows))
    assert experiment.findings(again) == experiment.findings(rows)
    assert experiment.findings(rows)
    text = experiment.paragraph(rows)
    for arm in experiment.ARMS:
        assert pool.label(arm) in text
    data, plot = catalogue.write(name, rows, tmp_path)
    assert catalogue.read(name, tmp_path) == rows
    first = plot.read_bytes()
    assert b"<svg" in first
    catalogue.draw(name, rows, tmp_path)
    assert plot.read_bytes() == first
    assert data.name == f"{name}.jsonl"


def test_a_ratio_raised_by_thirty_points_holds_and_by_ten_in_part():
    claim = "paper: the effective gradient ratio rises by 20 to 40 points over uniform"
    assert verdicts("gradient-ratio", paper={"ratio": 0.6})[claim] == "holds"
    assert verdicts("gradient-ratio", paper={"ratio": 0.4})[claim] == "holds in part"
    assert verdicts("gradient-ratio", paper={"ratio": 0.2})[claim] == "does not hold"


def test_starvation_is_seen():
    found = verdicts("fallback", paper={"per_unsolved_visit": 8.0}, paper_without_fallback={"per_unsolved_visit": 2.0})
    assert found["Without the fallback unsolved prompts starve"] == "holds"
    assert verdicts("fallback")["Without the fallback unsolved prompts starve"] == "does not hold"


def test_regression_of_solved_prompts_is_seen():
    found = verdicts("forgetting", knapsack_min0={"solved_change": -0.10})
    assert found["Solved prompts do not regress at min_rollouts 0"] == "does not hold"
    assert found["Solved prompts do not regress at min_rollouts 2"] == "holds"


def test_the_largest_allocation_is_compared():
    found = verdicts("budgets", paper={"largest": 128})
    assert found["paper: single prompts get up to 93 rollouts"] == "holds"
    assert found["Bayes filter: single prompts get up to 93 rollouts"] == "does not hold"


# -- Page --------------------------------------------------------------------------------------------------------------


def test_the_committed_page_is_what_the_rows_give():
    assert (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8") == page.build(EVIDENCE)


def test_committed_rows_are_small_and_have_their_plot():
    for name in catalogue.EXPERIMENTS:
        rows = catalogue.read(name, EVIDENCE)
        if rows is not None:
            for ending in ("jsonl", "svg"):
                assert (EVIDENCE / f"{name}.{ending}").stat().st_size < 300_000, f"{name}.{ending}"
            assert all("seed" in row for row in rows)


def test_the_page_says_what_was_not_measured(tmp_path):
    folder = tmp_path / "evidence"
    catalogue.write("fallback", rows_of("fallback"), folder)
    assert page.write(folder) == tmp_path / "evidence.md"
    text = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert text == page.build(folder)
    sections = text.split("\n## ")
    assert len(sections) == 1 + len(catalogue.EXPERIMENTS)
    for name, section in zip(catalogue.EXPERIMENTS, sections[1:], strict=True):
        assert ("Not measured yet" in section) == (name != "fallback")
        assert f"`knapsack-rl experiment {name}`" in section
    assert "evidence/fallback.svg" in text


def test_a_run_that_does_not_finish_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pool, "execute", lambda runs, *, jobs, progress: runs[:2])
    assert main(["experiment", "fallback", "--seeds", "1", "--runs", str(tmp_path), "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "2 of 5 runs did not finish" in err
    assert str(tmp_path / "uniform-seed0" / "log.txt") in err
    assert not list(tmp_path.glob("*.jsonl"))


def test_quick_rows_do_not_get_onto_the_page(tmp_path):
    catalogue.write("fallback", [row | {"quick": True} for row in rows_of("fallback")], tmp_path)
    with pytest.raises(ValueError, match="holds a quick run, whose figures mean nothing"):
        page.build(tmp_path)


def test_the_command_writes_the_page_without_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", "page"]) == 2
    assert "run the experiments first" in capsys.readouterr().err
    catalogue.write("weighting", rows_of("weighting"), tmp_path / "docs" / "evidence")
    assert main(["experiment", "page"]) == 0
    assert capsys.readouterr().out == f"wrote {Path('docs/evidence.md')}\n"


@pytest.mark.parametrize("flag", ["--seeds", "--workers"])
def test_numbers_of_the_command_are_at_least_one(flag, capsys):
    assert main(["experiment", "fallback", flag, "0"]) == 2
    assert f"{flag} must be at least 1, got 0" in capsys.readouterr().err


# -- Quick runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory):
    """Runs shared by the quick experiments, as by the full ones."""
    return tmp_path_factory.mktemp("quick")


@pytest.mark.parametrize("name", TRAINED)
def test_a_quick_run_trains_prints_and_writes(name, quick_runs, tmp_path, capsys):
    pytest.importorskip("trl")
    arguments = ["experiment", name, "--quick", "--seeds", "1", "--runs", str(quick_runs), "--output", str(tmp_path)]
    assert main([*arguments, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"## {catalogue.load(name).TITLE}\n")
    assert err == ""
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == list(catalogue.load(name).ARMS)
    for row in rows:
        assert row["quick"]
        curve = row["evaluations"]
        assert curve["rollouts"][0] == curve["tokens"][0] == 0
        assert curve["rollouts"][-1] == row["rollouts"]
        assert row["rollouts"] >= pool.QUICK.budget * pool.QUICK.steps or row["arm"] == "knapsack-tokens"
        assert all(0 <= value <= 1 for value in curve["accuracy"])
        assert sum(row["budget"]["visits"]) >= pool.QUICK.steps
    # Again: nothing is trained, and the rows are the same.
    before = {path: path.stat().st_mtime_ns for path in quick_runs.rglob("*.jsonl")}
    assert main([*arguments, "--quiet"]) == 0
    assert {path: path.stat().st_mtime_ns for path in quick_runs.rglob("*.jsonl")} == before
    assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] == rows
