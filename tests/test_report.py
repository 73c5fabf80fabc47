import dataclasses
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from scipy import stats

from experiments import page as evidence_page
from knapsack_rl.report import comparison_table, plots, uniform_runs, write_comparison, write_report
from knapsack_rl.report.page import Plot, save_plots
from knapsack_rl.runs.curves import Curve
from knapsack_rl.runs.files import ALLOCATION_LOG
from knapsack_rl.runs.log import RunLog
from knapsack_rl.training.settings import TrainSettings
from run_folders import write_rows, write_run

EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"

RUN_PLOTS = [
    "Held-out accuracy",
    "Share of the work that carries a gradient",
    "How the budget is spread over visits",
    "Budget by estimated success rate",
    "Difficulty of the prompts",
    "Where the prompts moved (number of prompts)",
    "Predicted against realised gradients",
]
COMPARISON_PLOTS = [
    "Held-out accuracy",
    "Held-out accuracy at the end",
    "Share of the rollouts that carry a gradient",
    "Share of the prompts that carry a gradient",
]


class Page(HTMLParser):
    """Collects tags, attributes and text of a page, and checks that elements nest."""

    def __init__(self, text):
        super().__init__()
        self.source, self.tags, self.attributes, self.texts, self.open = text, [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def plots(self):
        return [value for tag, name, value in self.attributes if tag == "svg" and name == "aria-label"]


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def check_self_contained(page):
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not {"script", "link", "iframe", "img", "object", "foreignobject"} & set(page.tags)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    references = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href")]
    references += re.findall(r"url\(([^)]*)\)", page.source)
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    assert all(reference.startswith("#") and reference[1:] in identifiers for reference in references)


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "run", steps=30)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run folder with its page."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    write_run(folder, steps=30)
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def folders(tmp_path):
    made = []
    for seed in range(3):
        for allocation, size in (("knapsack", 8), ("uniform", 16), ("uniform", 8)):
            made.append(tmp_path / f"{allocation}{size}-{seed}")
            write_run(made[-1], allocation=allocation, rollouts_per_prompt=size, seed=seed, steps=20)
    return made


def test_report_holds_every_plot_and_the_figures(reported):
    page = read(reported / "report.html")
    assert page.plots() == RUN_PLOTS
    assert page.tags.count("figcaption") == len(RUN_PLOTS)
    check_self_contained(page)
    run = RunLog.load(reported)
    assert f"{run.rollouts.sum():,}" in page.texts
    assert f"{100 * run.held_out[1][-1]:.1f} %" in page.texts
    assert "cold start" in page.texts
    assert "unfinished" not in page.source


def test_plots_hold_marks(reported):
    source = (reported / "report.html").read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL):
        assert svg.count("<path") > 10
        assert "<text" in svg


def test_report_is_reproducible_and_leaves_the_style_alone(reported, tmp_path):
    before, first = dict(rcParams), (reported / "report.html").read_bytes()
    assert write_report(reported, tmp_path / "again.html").read_bytes() == first
    assert dict(rcParams) == before


def test_hostile_text_is_escaped(tmp_path):
    ids = ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "数学 ü 🙂", "\ud800", "a\u2028b", 7]
    model = "</style></title><script>x</script> $\\frac{$ 漢字"
    for seed, size in ((0, 8), (1, 4)):
        write_run(tmp_path / f"<b>{seed}", steps=4, ids=ids, prompts_per_step=6, model=model, rollouts_per_prompt=size)
    path = tmp_path / "<b>0" / "allocations.jsonl"
    assert "<script>" in path.read_text(encoding="utf-8")
    page = read(write_report(tmp_path / "<b>0"))
    check_self_contained(page)
    assert "<script" not in page.source
    assert ids[0] in page.texts
    assert ids[1] in page.texts
    assert ids[2] in page.texts
    assert model in page.texts
    assert "b" not in page.tags


def test_hostile_labels_are_escaped_in_comparisons(tmp_path):
    models = ["<script>alert(1)</script>", '$\\frac{$ 漢字 & "quoted" --> \' 🙂']
    for index, model in enumerate(models):
        write_run(tmp_path / f"<i>{index}", model=model, steps=12)
    page = read(write_comparison([tmp_path / "<i>0", tmp_path / "<i>1"], tmp_path / "page.html"))
    check_self_contained(page)
    assert page.plots() == COMPARISON_PLOTS
    assert "<script" not in page.source
    assert "i" not in page.tags
    # Once in the table, and in the legends of the three plots with curves.
    for model in models:
        assert page.texts.count(f"knapsack N=8 (model {model})") >= 4


def test_long_and_broken_labels_fit_the_plots(tmp_path):
    for name, model in (("a", "organisation/" + "long-" * 60), ("b", "\\ud83d")):
        write_run(tmp_path / name, model=model, steps=12)
        config = tmp_path / name / "config.yaml"
        config.write_text(config.read_text(encoding="utf-8").replace("\\\\u", "\\u"), encoding="utf-8")
    page = read(write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html"))
    assert page.plots() == COMPARISON_PLOTS
    assert "knapsack N=8 (model \ufffd)" in page.texts


def test_unfinished_runs_say_so(tmp_path):
    write_run(tmp_path / "part", steps=3, planned=40)
    page = read(write_report(tmp_path / "part"))
    assert "This run is unfinished: 3 of 40 planned steps are recorded." in page.texts
    assert "Only one held-out evaluation is recorded, so there is no curve yet." in page.texts
    assert page.plots() == RUN_PLOTS[1:]

    write_run(tmp_path / "none", steps=0, planned=40)
    for name in ("allocations.jsonl", "metrics.jsonl"):
        (tmp_path / "none" / name).unlink()
    page = read(write_report(tmp_path / "none"))
    assert "This run is unfinished: 0 of 40 planned steps are recorded." in page.texts
    assert "No held-out evaluation is recorded, so the accuracy is unknown." in page.texts
    assert page.plots() == []

    page = read(write_comparison([tmp_path / "none"], tmp_path / "page.html"))
    assert any("is unfinished (0 of 40 steps)" in text for text in page.texts)
    assert "no uniform policy among them" in page.source
    assert page.plots() == []


def test_comparison_page(folders, tmp_path):
    path = write_comparison(folders, tmp_path)
    assert path == tmp_path / "comparison.html"
    page = read(path)
    check_self_contained(page)
    assert page.plots() == COMPARISON_PLOTS
    assert "baseline: uniform N=8" in page.source
    for label in ("uniform N=8", "uniform N=16", "knapsack N=8"):
        assert page.texts.count(label) >= 1 + len(COMPARISON_PLOTS)
    assert write_comparison([str(folder) for folder in folders], tmp_path / "new" / "a.html").is_file()


def test_comparison_table_against_direct_computation(folders):
    runs = [RunLog.load(folder) for folder in folders]
    table = comparison_table(runs)
    assert [row["policy"] for row in table] == ["uniform N=8", "uniform N=16", "knapsack N=8"]
    assert [row["baseline"] for row in table] == [True, False, False]
    knapsack, uniform = table[2], table[0]
    mine, base = runs[0::3], runs[2::3]
    final = np.array([run.held_out[1][-3:].mean() for run in mine])
    gap = final - [run.held_out[1][-3:].mean() for run in base]
    half = stats.t.ppf(0.975, 2) / np.sqrt(3)
    assert knapsack["seeds"] == [0, 1, 2]
    assert knapsack["unfinished"] == 0
    assert knapsack["rollouts"] == 20 * 16 * 8
    assert knapsack["accuracy"] == pytest.approx(final.mean())
    assert knapsack["accuracy_interval"] == pytest.approx(half * final.std(ddof=1))
    assert knapsack["accuracy_by_seed"] == pytest.approx(dict(enumerate(final)))
    assert knapsack["difference"] == pytest.approx(gap.mean())
    assert knapsack["difference_interval"] == pytest.approx(half * gap.std(ddof=1))
    assert knapsack["difference_pairs"] == 3
    for key, ratios, steps in (
        ("effective_rollouts", [run.effective_rollout_ratio for run in mine], 20),
        ("training_success", [run.training_success for run in mine], 4),
        ("effective_prompts", [run.effective_prompt_ratio for run in mine], 20),
    ):
        assert knapsack[key] == pytest.approx(np.mean([ratio[-steps:].mean() for ratio in ratios]))
    # Evaluations are evenly spaced: trapezoids are the mean with half weight at both ends.
    on_the_way = [
        np.average(np.array([run.held_out[1] for run in group]), axis=1, weights=[0.5, 1, 1, 1, 0.5])
        for group in (mine, base)
    ]
    assert knapsack["mean_accuracy"] == pytest.approx(on_the_way[0].mean())
    assert knapsack["mean_difference"] == pytest.approx((on_the_way[0] - on_the_way[1]).mean())
    assert knapsack["largest_allocation"] == max(run.max_budget.max() for run in mine)
    assert knapsack["unsolved_share"] == pytest.approx(np.mean([run.unsolved_share for run in mine]))

    # Evaluations at 0, 640, ... 2560 rollouts; smoothed over three, two at the ends.
    assert uniform["difference"] is None
    curves = np.array([run.held_out[1] for run in base]).mean(axis=0)
    assert uniform["target_accuracy"] == pytest.approx(curves[-2:].mean())
    assert uniform["rollouts_ratio"] == pytest.approx(1)
    fast = np.array([run.held_out[1] for run in mine]).mean(axis=0)
    smooth = [fast[:2].mean(), *(fast[i - 1 : i + 2].mean() for i in (1, 2, 3)), fast[-2:].mean()]
    at = next(i for i, value in enumerate(smooth) if value >= uniform["target_accuracy"])
    part = (uniform["target_accuracy"] - smooth[at - 1]) / (smooth[at] - smooth[at - 1])
    assert knapsack["rollouts_to_target"] == pytest.approx(640 * (at - 1 + part))
    assert knapsack["rollouts_ratio"] == pytest.approx(knapsack["rollouts_to_target"] / uniform["rollouts_to_target"])
    # 128 rollouts a step, in 2 seconds where they are uniform and 1 second elsewhere.
    for row, seconds in ((uniform, 2), (knapsack, 1)):
        assert row["seconds"] == seconds * 20
        assert row["seconds_to_target"] == pytest.approx(row["rollouts_to_target"] / 128 * seconds)
    assert knapsack["seconds_ratio"] == pytest.approx(knapsack["rollouts_ratio"] / 2)


def test_recorded_uniform_runs_are_those_of_the_rows(tmp_path):
    written = evidence_page.write_recorded(EVIDENCE, tmp_path / "uniform_runs.json")
    assert written.read_bytes() == uniform_runs.FILE.read_bytes(), "run `python -m experiments recorded`"


def test_a_run_on_the_shipped_task_is_shown_beside_recorded_uniform_runs(tmp_path):
    task, (theirs, *_) = uniform_runs.read()
    last = theirs.rollouts[-1]
    assert theirs.ratio(theirs.rollouts, theirs.mean) == 1.0
    assert theirs.ratio(theirs.rollouts / 2, theirs.mean) == 0.5
    assert np.isnan(theirs.ratio(theirs.rollouts, theirs.mean - 0.01))
    defaults = dataclasses.asdict(TrainSettings())
    assert uniform_runs.uniform_for(defaults)[0] is theirs
    assert uniform_runs.uniform_for(defaults | {"train_prompts": 100}) == uniform_runs.uniform_for({}) == ()
    for name, settings in (("same", task), ("other", {})):
        write_run(tmp_path / name, steps=20, evaluate_every=5, **settings)
        text = write_report(tmp_path / name).read_text(encoding="utf-8")
        assert (theirs.name in text) == ("Rollouts to uniform" in text) == (name == "same")
    axes = Figure().subplots()
    plots.held_out_accuracy([0, last], [0.3, 0.8], axes, others=[("uniform", theirs.rollouts, theirs.accuracy)])
    grey, own = axes.lines
    np.testing.assert_allclose(grey.get_ydata(), 100 * theirs.accuracy.mean(axis=0))
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((100 * theirs.accuracy.min(), 100 * theirs.accuracy.max()))
    assert own.get_ydata().tolist() == [30.0, 80.0]


def test_the_page_of_a_run_shows_where_the_time_of_a_step_goes(tmp_path):
    write_run(tmp_path)
    text = " ".join("".join(read(write_report(tmp_path)).texts).split())
    assert "median; generation 0.25 s, update 0.5 s" in text
    assert "Rows left out of updates" in text and "62.5 %" in text


def test_unfinished_runs_are_not_compared_with_finished_ones(tmp_path):
    for allocation in ("uniform", "knapsack", "paper"):
        for seed in (0, 1):
            steps = 30 if allocation == "uniform" or (allocation == "knapsack" and seed == 0) else 12
            write_run(tmp_path / f"{allocation}{seed}", allocation=allocation, seed=seed, steps=steps, planned=30)
    folders = sorted(path.parent for path in tmp_path.glob("*/config.yaml"))
    table = {row["policy"]: row for row in comparison_table([RunLog.load(folder) for folder in folders])}
    mixed, early = table["knapsack N=8"], table["paper N=8"]
    assert (mixed["seeds"], mixed["unfinished"], mixed["difference_pairs"]) == ([0, 1], 1, 1)
    assert mixed["accuracy"] == pytest.approx(RunLog.load(tmp_path / "knapsack0").held_out[1][-3:].mean())
    assert mixed["rollouts"] == 30 * 16 * 8
    assert (early["unfinished"], early["difference"], early["rollouts"]) == (2, None, 12 * 16 * 8)
    text = "".join(read(write_comparison(folders, tmp_path)).texts)
    assert "knapsack N=8, seed 1, is unfinished (12 of 30 steps): it is left out" in text
    assert "paper N=8, seed 0, is unfinished (12 of 30 steps): its figures are those of its last step" in text
    assert "not reached" not in text


def test_comparison_without_a_seed_in_common(tmp_path):
    write_run(tmp_path / "a", allocation="uniform", seed=1, gain=0.05)
    write_run(tmp_path / "b", seed=2, gain=0.0)
    table = comparison_table([RunLog.load(tmp_path / name) for name in "ab"])
    assert table[1]["difference"] is None
    assert table[1]["difference_pairs"] == 0
    assert table[1]["accuracy_interval"] is None
    assert table[1]["rollouts_to_target"] is None
    page = read(write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path))
    assert "not reached" in page.texts


def test_incidental_settings_do_not_split_a_policy(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / str(seed), seed=seed, threads=seed, save_every=10 * seed)
    table = comparison_table([RunLog.load(tmp_path / str(seed)) for seed in (0, 1)])
    assert [(row["policy"], row["seeds"]) for row in table] == [("knapsack N=8", [0, 1])]


def test_runs_that_differ_in_a_setting_are_not_averaged(tmp_path):
    for name, estimator in (("a", "beta"), ("b", "window")):
        write_run(tmp_path / name, estimator=estimator)
    runs = [RunLog.load(tmp_path / name) for name in "ab"]
    assert [row["policy"] for row in comparison_table(runs)] == [
        "knapsack N=8 (estimator beta)",
        "knapsack N=8 (estimator window)",
    ]
    with pytest.raises(ValueError, match="two runs of 'knapsack N=8' have the seed 0"):
        comparison_table([runs[0], runs[0]])
    with pytest.raises(ValueError, match="at least one run folder"):
        write_comparison([], tmp_path)


@pytest.mark.parametrize("module", ["matplotlib", "matplotlib.figure"])
def test_missing_matplotlib_gives_the_install_line(folder, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "knapsack-rl\[plots\]"'):
        write_report(folder)


def test_logged_repeats_and_reasons_do_not_break_the_page(folder):
    write_rows(folder / "metrics.jsonl", [{"step": 1, "rollouts": 5, "held_out/accuracy": 0.5}] * 2, tail='{"step"')
    assert read(write_report(folder)).plots() == RUN_PLOTS[1:]


def test_plots_return_their_axes_and_draw_the_data(folder):
    run = RunLog.load(folder)
    ax = Figure().add_subplot()
    assert plots.effective_ratios(run.steps, run.effective_rollout_ratio, run.effective_prompt_ratio, ax) is ax
    assert ax.lines[0].get_ydata() == pytest.approx(100 * run.effective_rollout_ratio)
    assert ax.lines[2].get_ydata() == pytest.approx(100 * run.effective_prompt_ratio)

    ax = Figure().add_subplot()
    assert plots.budget_histogram(run.visits.counts, ax) is ax
    assert sum(bar.get_height() for bar in ax.patches) == run.visits.counts.size
    assert ax.get_yscale() == "log"

    ax = Figure().add_subplot()
    assert plots.transitions(run.transitions, ax) is ax
    assert [int(text.get_text().replace(",", "")) for text in ax.texts] == run.transitions.ravel().tolist()

    ax = Figure().add_subplot()
    assert plots.final_values({"a": [0.5, 0.7], "b": []}, ax, quantity="accuracy") is ax
    assert ax.lines[0].get_xdata() == pytest.approx([50, 70])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize(
    ("accuracy", "limits"),
    [
        ([0.0, 0.0], (-2, 8)),  # no change is not drawn as a large one, and no percentage is below 0
        ([1.0, 1.0], (91, 102)),
        ([0.5, 0.5], (45, 55)),
        ([0.0, 1.0], (-2, 102)),
        ([0.2, 0.6], (18, 62)),  # as matplotlib has it
    ],
)
def test_an_axis_of_accuracies_shows_what_percentages_can_be(accuracy, limits):
    ax = plots.held_out_accuracy([0, 512], accuracy, Figure().add_subplot())
    assert ax.get_ylim() == pytest.approx(limits)
    curve = Curve(np.array([0.0, 512.0]), np.array(accuracy), np.array(accuracy), np.array(accuracy))
    assert plots.accuracy_by_policy({"a": curve}, Figure().add_subplot()).get_ylim() == pytest.approx(limits)


def test_a_share_of_all_or_none_does_not_hide_under_the_frame():
    ax = plots.effective_ratios([1, 2], [0.0, 1.0], [0.0, 1.0], Figure().add_subplot())
    assert ax.get_ylim() == (-2, 102)


def test_wide_budgets_are_binned_without_loss():
    counts = np.array([1, 2, 2, 500, 1000])
    ax = plots.budget_histogram(counts, Figure().add_subplot())
    assert len(ax.patches) <= 65
    assert sum(bar.get_height() for bar in ax.patches) == counts.size


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_holds_its_caption_and_is_reproducible(tmp_path, kind):
    def draw(ax):
        ax.plot([0, 1])
        return ax

    spec = Plot("line", "A line & what to see.", draw)
    before = dict(rcParams)
    (path,) = save_plots([spec], tmp_path / "new", kind)
    assert path == tmp_path / "new" / f"line.{kind}"
    data = path.read_bytes()
    assert b"A line & what to see." in data or b"A line &amp; what to see." in data
    assert save_plots([spec], tmp_path / "new", kind)[0].read_bytes() == data
    assert dict(rcParams) == before


def rewrite_rows(folder, change):
    path = folder / ALLOCATION_LOG
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | change(k, row)) + "\n" for k, row in enumerate(rows)))
    return rows


def test_the_page_says_what_counted_as_a_success(folder):
    rules = [{"reward": "answer", "above": 1, "low": 0, "high": 2}, {"reward": "<b>format</b>", "above": 0.5}]
    rows = rewrite_rows(folder, lambda k, row: {"success": rules[k >= 10]})
    share = sum(sum(row["successes"]) for row in rows) / sum(sum(row["scored"]) for row in rows)
    page = read(write_report(folder))
    expected = (
        f"A success is answer above 1 (from 0 to 2); from step {rows[10]['step']}: <b>format</b> above 0.5. "
        f"{100 * share:.1f}\xa0% of all rollouts were one."
    )
    assert expected in page.texts


@pytest.mark.parametrize(("word", "good"), [("Every", True), ("No", False)])
def test_a_run_of_successes_or_failures_alone_is_noticed(folder, word, good):
    rewrite_rows(folder, lambda k, row: {"successes": [n if good else 0 for n in row["scored"]]})
    page = read(write_report(folder))
    assert any(text.startswith(f"{word} scored rollout was a success, so allocation") for text in page.texts)
