"""Experiments: statistics, named figures, extraction, claims on made-up rows, pages and command."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from evidence_rows import run_row
from experiments import catalogue, claims, measures, names, page, pool, statistics
from experiments.__main__ import main
from experiments.contract import QUICK_SEEDS, Options
from experiments.extract import never_solved, solved_once
from knapsack_rl.report.comparison import accuracy_at_end
from knapsack_rl.runs.log import Visits
from knapsack_rl.training.settings import TrainSettings

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "docs" / "evidence"

# -- Statistics --------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_students_t():
    values = {0: 0.31, 1: 0.42, 2: 0.37, 3: 0.30, 4: 0.44}
    found = statistics.mean_of(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(list(values.values())), scale=stats.sem(list(values.values())))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.mean, found.seeds, found.least, found.most) == (pytest.approx(0.368), 5, 0.30, 0.44)


def test_differences_are_paired_by_seed():
    a, b = {0: 0.5, 1: 0.9, 2: 0.7}, {1: 0.8, 0: 0.45, 3: 0.1}
    found = statistics.difference(a, b)
    paired = stats.ttest_rel([0.5, 0.9], [0.45, 0.8]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high))
    assert found.seeds == 2


def test_one_seed_has_no_interval_and_no_verdict():
    found = statistics.mean_of({3: 0.25})
    assert found.percent() == "25.0 %"
    assert statistics.at_least(found, 0.1) == statistics.not_below(found, 0.1) == "undecided"
    assert statistics.mean_of({0: math.nan}).points() == statistics.factor({}).times() == "–"


def test_figures_show_their_interval():
    found = statistics.Estimate(-0.031, -0.062, 0.0, 5)
    assert found.points() == "−3.1 [−6.2, +0.0]"
    assert statistics.Estimate(0.8, 0.5, 1.2, 3, bounds=1).times() == "at least 0.80 [0.50, 1.20] ×"


def test_the_interval_decides():
    for low, high, verdict in (
        (0.25, 0.30, "holds"),
        (0.05, 0.30, "holds in part"),
        (0.01, 0.10, "holds in part"),
        (-0.10, 0.10, "does not hold"),
        (-0.30, -0.10, "does not hold"),
        (-0.10, 0.30, "undecided"),
    ):
        found = statistics.Estimate((low + high) / 2, low, high, 5)
        ratio = statistics.Estimate(1 + found.mean, 1 + low, 1 + high, 5)
        bound = statistics.Estimate(1 + found.mean, 1 + low, 1 + high, 5, bounds=1)
        assert statistics.at_least(found, 0.2) == statistics.at_least(ratio, 1.2, 1.0) == verdict
        assert statistics.at_least(bound, 1.2, 1.0) == verdict.replace("does not hold", "undecided")
    assert statistics.at_least(statistics.Estimate(0.0, 0.0, 0.0, 5)) == "does not hold"
    for low, high, verdict in ((-0.1, 0.3, "holds"), (-0.3, -0.25, "does not hold"), (-0.3, 0.1, "undecided")):
        assert statistics.not_below(statistics.Estimate(0.0, low, high, 5), -0.2) == verdict


def test_bootstrap_intervals_cover_the_mean_about_as_often_as_promised():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(40):
        _, low, high = statistics.bootstrap_interval(rng.normal(size=40).tolist())
        inside += low <= 0 <= high
    assert 33 <= inside <= 40
    assert statistics.bootstrap_interval([2.5]) == statistics.bootstrap_interval([2.5, 2.5]) == (2.5, 2.5, 2.5)


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
    assert measures.final_accuracy(row) == pytest.approx(0.5)
    assert accuracy_at_end([0.2, 0.6]) == 0.6  # the one before training does not count
    assert accuracy_at_end([0.2]) == 0.2
    assert math.isnan(accuracy_at_end([]))
    assert measures.mean_accuracy(row) == pytest.approx((0.0 / 2 + 0.1 + 0.4 + 0.5 + 0.6 / 2) / 4)
    assert measures.series_mean(row, "all_wrong", last=0.2) == pytest.approx(0.2)
    assert measures.series_mean(row, "all_wrong", "all_correct") == pytest.approx(0.6)


def test_accuracy_at_equal_tokens_is_read_where_the_shortest_run_of_the_seed_ends():
    rising = (0.0, 0.1, 0.2, 0.3, 0.4)
    rows = measures.with_shortest(
        [run_row(arm, seed, accuracy=rising, tokens=t) for arm, seed, t in (("a", 0, 400), ("b", 0, 800), ("b", 1, 80))]
    )
    assert [row["shortest"] for row in rows] == [400, 400, 80]
    # A smoothed straight line is that line but for its ends.
    assert measures.accuracy_at_equal_tokens(rows[1]) == pytest.approx(0.2)


# -- Named figures -----------------------------------------------------------------------------------------------------


def test_the_grammar_of_figures():
    rows = [run_row("uniform", s, accuracy=(0.2, 0.5, 0.5, 0.5), rollouts=600) for s in (0, 1)]
    rows += [run_row("paper", s, accuracy=(0.2, 0.6, 0.6, 0.6), rollouts=600, largest=20 + s) for s in (0, 1)]
    figure = claims.TRAINING["compute"].figures(rows)
    assert figure("paper, accuracy at the end") == "60.0 % [60.0, 60.0]"
    assert figure("paper - uniform, accuracy at the end") == "+10.0 [+10.0, +10.0]"
    assert figure("uniform - paper, accuracy at the end") == "−10.0 [−10.0, −10.0]"
    assert figure("uniform, rollouts") == "600"
    assert figure("paper, largest allocation") == "20 to 21"
    assert figure("uniform / paper, rollouts").startswith("at least ")
    for name, message in (
        ("paper, magic", "measure must be one of accuracy at the end, "),
        ("knapsack, accuracy at the end", "needs runs of the arm 'knapsack'; the rows hold paper, uniform"),
        ("paper / uniform, accuracy", "a ratio is one of rollouts, tokens or seconds, got 'accuracy'"),
    ):
        with pytest.raises(ValueError, match=message):
            figure(name)


def test_every_measure_of_a_run_is_defined():
    rows = measures.with_shortest([run_row("uniform", seed) for seed in (0, 1)])
    undefined = {"hardest became easiest"}  # never, in these rows
    assert measures.calibration_errors(rows[0]) == [0.03] * 4
    for name in measures.MEASURES:
        estimate, text = measures.estimate(rows, f"uniform, {name}")
        assert math.isfinite(estimate.mean) == (text != "–") or name in undefined, name


def test_a_class_of_estimates_averages_its_visits():
    row = run_row("knapsack", 0)
    row["budget"]["by_estimate"] |= {"estimate": [0.0, 0.03, 0.5, None], "mean": [3.0, 6.0, 2.0, 8.0]}
    row["budget"]["by_estimate"]["visits"] = [10, 20, 5, 7]
    assert measures.rollouts_at(row, *measures.ESTIMATE_CLASSES["up to 0.05"]) == pytest.approx((30 + 120) / 30)
    assert measures.rollouts_at(row, *measures.ESTIMATE_CLASSES["0.2 to 0.5"]) == 2.0
    assert measures.rollouts_at(row, *measures.ESTIMATE_CLASSES["unseen"]) == 8.0
    assert math.isnan(measures.rollouts_at(row, *measures.ESTIMATE_CLASSES["above 0.95"]))


def test_names_are_filled_in():
    assert names.fill("a {{one: x, y}} b{{two}}", {"one: x, y": "1", "two": "2"}.__getitem__) == "a 1 b2"
    assert names.first_name("a {{one}} {{two}}") == "one"
    with pytest.raises(ValueError, match="must name a figure"):
        names.first_name("a one")


# -- Extraction --------------------------------------------------------------------------------------------------------


def visits(prompt, scored, successes):
    size = len(prompt)
    return Visits(
        step=np.arange(size),
        prompt=np.array(prompt),
        counts=np.array(scored),
        arrived=np.array(scored),
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


# -- Experiments and arms ----------------------------------------------------------------------------------------------


def test_an_unknown_experiment_is_named():
    with pytest.raises(ValueError, match="experiment must be one of gradient-ratio, "):
        catalogue.load("magic")


def test_arms_differ_from_the_shared_settings_in_what_they_name():
    for name, arm in pool.ARMS.items():
        settings = arm.of(pool.FULL, 3)
        changed = {key for key in vars(settings) if getattr(settings, key) != getattr(pool.FULL, key)}
        wider = {"prompts_per_step"} if arm.wider > 1 or arm.shorter > 1 else set()
        assert changed - {"seed"} <= {*arm.settings, "rollouts_per_prompt"} | wider, name
        assert settings.budget == pool.FULL.budget * arm.multiple // arm.shorter
    assert len({(str(arm.of(pool.FULL, 0)), arm.rule) for arm in pool.ARMS.values()}) == len(pool.ARMS)
    assert len({arm.label for arm in pool.ARMS.values()}) == len(pool.ARMS)


def test_a_wider_arm_has_more_prompts_and_as_many_rollouts():
    arm = pool.Arm("wide", {}, multiple=3, wider=4)
    assert arm.size(64, 8) == (256, 6)
    with pytest.raises(ValueError, match="6 rollouts per prompt must be a multiple of 4 for 'wide'"):
        arm.size(64, 2)


def test_a_shorter_step_has_fewer_prompts():
    arm = pool.Arm("short", {}, shorter=4)
    assert arm.size(64, 8) == (16, 8)
    with pytest.raises(ValueError, match="6 prompts a step must be a multiple of 4 for 'short'"):
        arm.size(6, 8)


def test_all_runs_of_the_shared_task_are_planned_once(tmp_path):
    options = Options(seeds=2, runs=tmp_path)
    runs = catalogue.shared_runs(options)
    assert len({run.folder for run in runs}) == len(runs)
    assert [run.settings.seed for run in runs] == [0] * (len(runs) // 2) + [1] * (len(runs) // 2)
    for experiment in claims.TRAINING.values():
        assert all(run in runs for run in experiment.plan(options)) == (not experiment.task)
    assert {run.settings.dataset for run in runs} == {"arithmetic"}


def test_experiments_share_the_runs_of_an_arm(tmp_path):
    options = Options(seeds=2, runs=tmp_path)
    first, second = (pool.plan(arms, options) for arms in (["uniform", "paper"], ["paper", "knapsack"]))
    assert first[1] == second[0]
    assert [run.settings.seed for run in first] == [0, 0, 1, 1]
    quick = pool.plan(["paper"], Options(seeds=5, quick=True, runs=tmp_path))
    assert len(quick) == QUICK_SEEDS
    assert quick[0].folder != second[0].folder
    assert claims.TRAINING["real-model"].pieces(Options(seeds=5, runs=tmp_path)) == 2 * 2


def test_runs_on_record_are_not_trained_again(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(pool, "execute", lambda runs, *, jobs, progress: trained.extend(runs) or [])
    monkeypatch.setattr(pool, "extract", lambda run, arm, rule: {"arm": arm, "seed": run.settings.seed, "new": True})
    arms, options = ("uniform", "paper"), Options(seeds=2, runs=tmp_path / "runs", record=tmp_path / "record")
    runs = pool.plan(arms, options)
    rows = [
        run_row("uniform", 0) | {"settings": asdict(runs[0].settings)},
        run_row("paper", 0) | {"settings": asdict(runs[1].settings) | {"learning_rate": 0.5}},  # another run
        run_row("uniform", 1) | {"settings": asdict(runs[2].settings), "quick": True},
        run_row("paper", 1) | {"settings": asdict(runs[3].settings) | {"gone": 1}},  # of another release
        run_row("paper", 1) | {"settings": asdict(runs[3].settings) | {"value": "gone"}},  # likewise
        run_row("paper", 1),  # made before rows held settings
        {"seed": 0, "gap": 0.0},  # of an experiment without training
    ]
    options.record.mkdir()
    (options.record / "weighting.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reported = []
    found = pool.measure(arms, runs, options, reported.append)
    assert trained == runs[1:]
    assert reported == ["uniform-seed0 was there"]
    assert found[0] == rows[0]
    assert all(row["new"] for row in found[1:])
    assert pool.missing(runs, Options(runs=options.runs)) == runs


def test_the_committed_rows_are_on_record():
    """Nothing that is on the page would be trained again."""
    options = Options(seeds=5, record=EVIDENCE)
    for name, experiment in claims.TRAINING.items():
        assert pool.missing(experiment.plan(options), options) == [], name


# -- Claims on made-up rows --------------------------------------------------------------------------------------------


def rows_of(name, **by_arm):
    """Three seeds of each arm with a little spread; keywords change an arm's rows."""
    rows = []
    for arm in claims.TRAINING[name].arms:
        for seed in range(3):
            changes = dict(by_arm.get(arm.replace("-", "_"), {}))
            top = changes.pop("top", 0.7) + 0.001 * seed
            rows.append(run_row(arm, seed, accuracy=(0.3, 0.5, top, top, top), **changes))
    return rows


def verdicts(name, **by_arm):
    return [found.verdict for found in claims.TRAINING[name].findings(rows_of(name, **by_arm))]


def test_claims_tables_and_plot_come_from_the_rows_alone(tmp_path):
    pytest.importorskip("matplotlib")
    for name, experiment in claims.TRAINING.items():
        rows = rows_of(name)
        assert experiment.findings(json.loads(json.dumps(rows))) == experiment.findings(rows) != []
        tables = "\n".join(experiment.tables(rows).values())
        assert all(pool.label(arm) in tables for arm in experiment.arms) or name == "budgets"
        data, plot = catalogue.write(name, rows, tmp_path)
        assert catalogue.read(name, tmp_path) == rows
        first = plot.read_bytes()
        assert b"<svg" in first
        catalogue.draw(name, rows, tmp_path)
        assert plot.read_bytes() == first
        assert data.name == f"{name}.jsonl"


def test_a_table_leaves_out_an_arm_against_itself():
    lines = claims.TRAINING["weighting"].tables(rows_of("weighting"))["accuracy"].splitlines()
    assert lines[2].startswith("| uniform N | 1,000 | 70.1 % [")
    assert lines[2].split(" | ")[3::2] == ["–", "–"]
    assert lines[2].endswith("| – |")
    assert lines[3].split(" | ")[3] == "+0.0 [+0.0, +0.0]"


def test_verdicts_follow_the_rows():
    for ratio, verdict in ((0.6, "holds"), (0.4, "holds in part"), (0.2, "does not hold")):
        assert verdicts("gradient-ratio", paper={"ratio": ratio})[0] == verdict
    starved = {"paper": {"per_unsolved_visit": 8.0}, "paper_without_fallback": {"per_unsolved_visit": 2.0}}
    assert verdicts("fallback", **starved)[0] == "holds"
    assert verdicts("fallback")[0] == "does not hold"
    assert verdicts("forgetting", knapsack_min0={"solved_change": -0.10}) == ["holds", "holds", "does not hold"]
    assert verdicts("budgets", paper={"largest": 128}) == ["holds", "does not hold"]
    assert verdicts("compute", uniform_2n={"rollouts": 3000})[0] == "holds"
    assert verdicts("replay", knapsack_replay={"unsolved_left": 0.2}) == ["holds", "does not hold"]
    assert verdicts("rivals", skip={"top": 0.4}) == ["does not hold", "holds", "does not hold"]


# -- Pages -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built():
    return {name: page.build(name, EVIDENCE) for name in page.PAGES}


def test_the_committed_pages_are_what_the_rows_give(built):
    for name, text in built.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run `python -m experiments page`"
        assert "{{" not in text


def test_every_experiment_has_its_plot_and_its_claims_on_the_page(built):
    text = "".join(built.values())
    for name in catalogue.EXPERIMENTS:
        assert f"](evidence/{name}.svg)" in text
        assert f"`python -m experiments {name}`" in text or name == "estimation"
    for command in re.findall(r"python -m experiments ([a-z-]+)", text):
        assert command in (*catalogue.EXPERIMENTS, "page")


def test_an_unknown_name_on_a_page_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "TEMPLATES", tmp_path)
    for name, message in (
        ("magic: a", "experiment must be one of"),
        ("compute: paper, magic", "measure must be one of"),
        ("compute: table magic", "no table 'magic'; there are accuracy"),
        ("estimation: recorded run: Beta, gain", "closest names are .*'recorded run: Beta, gain captured'"),
    ):
        (tmp_path / "evidence.md").write_text(f"{{{{{name}}}}}")
        with pytest.raises(ValueError, match=message):
            page.build("evidence.md", EVIDENCE)


def test_committed_rows_are_small_and_have_their_plot():
    for name in catalogue.EXPERIMENTS:
        assert catalogue.read(name, EVIDENCE)
        # Ten seeds of five arms.
        rows = 400_000 if name == "headline-trl" else 3_000_000 if name.startswith("lab-") else 300_000
        for ending, most in (("jsonl", rows), ("svg", 300_000)):
            assert (EVIDENCE / f"{name}.{ending}").stat().st_size < most, f"{name}.{ending}"


def test_quick_rows_do_not_get_onto_the_page(tmp_path):
    catalogue.write("fallback", [row | {"quick": True} for row in rows_of("fallback")], tmp_path)
    with pytest.raises(ValueError, match="holds a quick run, whose figures mean nothing"):
        page.Evidence(tmp_path)("fallback: paper, accuracy at the end")


# -- Command -----------------------------------------------------------------------------------------------------------


def test_a_run_that_does_not_finish_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pool, "execute", lambda runs, *, jobs, progress: runs[:2])
    assert main(["fallback", "--seeds", "1", "--runs", str(tmp_path), "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "2 of 5 runs did not finish" in err
    assert str(tmp_path / "uniform-seed0" / "log.txt") in err
    assert not list(tmp_path.glob("*.jsonl"))


def test_the_command_fills_in_the_pages_without_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["page"]) == 2
    assert "run `python -m experiments" in capsys.readouterr().err
    monkeypatch.setattr(catalogue, "EXPERIMENTS", {"weighting": claims.TRAINING["weighting"]})
    monkeypatch.setattr(page, "TEMPLATES", tmp_path)
    for name in page.PAGES:
        (tmp_path / name).write_text("{{claims}} {{weighting: paper, accuracy at the end}}")
    catalogue.write("weighting", rows_of("weighting"), tmp_path / "docs" / "evidence")
    assert main(["page"]) == 0
    assert capsys.readouterr().out == f"wrote {', '.join(str(Path('docs') / name) for name in page.PAGES)}\n"
    assert "70.1 % [" in Path("docs/evidence.md").read_text()


def test_bad_arguments_are_one_line(capsys):
    for flag in ("--seeds", "--workers"):
        assert main(["fallback", flag, "0"]) == 2
        assert f"{flag} must be at least 1, got 0" in capsys.readouterr().err
    for arguments in (["nothing"], ["estimation", "--split", "test"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize("name", claims.TRAINING)
def test_a_quick_run_trains_prints_and_writes(name, quick_runs, tmp_path, capsys):
    pytest.importorskip("trl")
    arguments = [name, "--quick", "--seeds", "1", "--runs", str(quick_runs), "--output", str(tmp_path), "--quiet"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"## {name}\n")
    assert err == ""
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == list(claims.TRAINING[name].arms)
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
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in quick_runs.rglob("*.jsonl")} == before
    assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] == rows


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory):
    """Runs shared by the quick experiments, as by the full ones."""
    return tmp_path_factory.mktemp("quick")
