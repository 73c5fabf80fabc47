import csv
import dataclasses
import gzip
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

import knapsack_rl as kr
from knapsack_rl.cli import COMMANDS, build_parser, main
from knapsack_rl.runs.files import TRAINER_STATE_FILE
from knapsack_rl.training.settings import TrainSettings
from run_folders import write_run

COMMAND_NAMES = ("train", "compare", "report", "allocate", "replay", "verl-args", "completion")
SETTINGS = dataclasses.fields(TrainSettings)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli(capsys):
    """Runs a command that must succeed; returns (standard output, standard error)."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        return tuple(capsys.readouterr())

    return run


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail on its input; returns its one line of output."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("knapsack-rl: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err.removeprefix("knapsack-rl: ").rstrip("\n")

    return run


@pytest.fixture
def misused(capsys):
    """Runs a command that the argument parser refuses; returns its last line."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        return err.splitlines()[-1]

    return run


# -- The command itself -----------------------------------------------------------------------------------------------


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in COMMAND_NAMES if re.search(rf"\n    {name}\s", text)] == list(COMMAND_NAMES)
    assert len(COMMANDS) == len(COMMAND_NAMES)


def test_the_help_of_every_command_has_examples_that_parse(capsys):
    parser = build_parser()
    for command in COMMAND_NAMES:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        _, marker, examples = capsys.readouterr().out.partition("examples:\n")
        lines = [line.strip() for line in examples.splitlines() if line.strip()]
        assert marker and len(lines) >= 2, command
        for line in lines:
            words = line.split("   ")[0].split()  # the rest is an explanation
            assert words[:2] == ["knapsack-rl", command]
            assert parser.parse_args(words[1:]).run, line


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_help_lists_every_setting_and_its_default(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    text = "".join(out.split())  # lines are broken at spaces and hyphens
    varied = ("allocation", "seed", "threads") if command == "compare" else ()
    for spec in SETTINGS:
        listed = f"\n  --{spec.name.replace('_', '-')} " in out
        assert listed == (spec.name not in varied), spec.name
        if listed:
            default = f"(default: {spec.default})" if spec.default not in ("", None) else ""
            assert "".join(f"{spec.metadata['help']} {default}".split()) in text, spec.name


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"knapsack-rl {kr.__version__}\n"


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == build_parser().format_help()


def test_an_unknown_command_is_refused(misused):
    assert "invalid choice: 'alocate'" in misused("alocate")


def test_an_unknown_flag_is_refused_with_the_flag_probably_meant(misused):
    for arguments, message in (
        (("train", "--promt-column", "question"), "--promt-column question (did you mean --prompt-column?)"),
        (("train", "--rollouts-per-promt=4"), "--rollouts-per-promt=4 (did you mean --rollouts-per-prompt?)"),
        (
            ("train", "--learing-rate", "1e-4", "--sed", "3"),
            "--learing-rate 1e-4 --sed 3 (did you mean --learning-rate, --seed?)",
        ),
        (("compare", "--policy", "uniform"), "--policy uniform (did you mean --policies?)"),
        (("report", "run", "--formatt=png"), "--formatt=png (did you mean --format?)"),
        (("train", "--xyzzy"), "--xyzzy (knapsack-rl train --help lists what there is)"),
        (("train", "qa.jsonl"), "qa.jsonl (knapsack-rl train --help lists what there is)"),
    ):
        assert misused(*arguments) == f"knapsack-rl {arguments[0]}: error: unrecognized arguments: {message}"


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_usage_above_an_error_is_short(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--stepps", "3"])
    usage, *_, error = capsys.readouterr().err.splitlines()
    assert usage.startswith(f"usage: knapsack-rl {command} [")
    assert "did you mean --steps?" in error
    with pytest.raises(SystemExit):
        main([command, "--help"])
    head = capsys.readouterr().out.split("\n\n")[0]
    own = ["--output", "--config", "--print-config", "--SETTING"]
    own += ["--resume", "--quiet"] if command == "train" else ["--policies", "--seeds", "--jobs", "--other-rollouts"]
    assert set(re.findall(r"--[\w-]+", head)) == set(own)


def test_the_installed_script_allocates(tmp_path):
    (tmp_path / "rates.csv").write_text("prompt_id,success_rate\na,0.5\nb,1\n")
    script = Path(sys.executable).with_name("knapsack-rl")
    done = subprocess.run(
        [script, "allocate", "rates.csv"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "prompt_id,success_rate,rollouts\na,0.5,14\nb,1.0,2\n"


def test_an_interruption_is_reported_and_exits_with_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("knapsack_rl.cli.allocate.first_rows", interrupted)
    Path("rates.csv").touch()
    assert main(["allocate", "rates.csv"]) == 130
    assert capsys.readouterr() == ("", "knapsack-rl: interrupted\n")


@pytest.fixture
def without_plots(monkeypatch):
    """Pages without plots, which take most of their time; ``test_report.py`` draws them."""
    monkeypatch.setattr("knapsack_rl.report.page.plot", lambda *_: "")


# -- allocate ---------------------------------------------------------------------------------------------------------

RATES = {"easy": 0.9, "even": 0.5, "new": None, "hard": 0.05, "solved": 1.0, "unsolved": 0.0}


def write_rates(path=Path("rates.csv"), rates=RATES):
    lines = [f"{name},{'' if rate is None else rate}\n" for name, rate in rates.items()]
    path.write_text("prompt_id,success_rate\n" + "".join(lines))
    return path


def read_table(text):
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows
    assert list(rows[0]) == ["prompt_id", "success_rate", "rollouts"]
    return (
        [row["prompt_id"] for row in rows],
        [float(row["success_rate"] or "nan") for row in rows],
        [int(row["rollouts"]) for row in rows],
    )


def as_array(rates):
    return np.array([math.nan if rate is None else rate for rate in rates])


def test_rates_are_allocated_as_by_the_library(cli):
    given = as_array(RATES.values())
    for flags, expected in (
        ((), {"budget": 48}),
        (("--budget", 60), {"budget": 60}),
        (("--rollouts-per-prompt", 5), {"budget": 30}),
        (
            ("--budget", 48, "--min-rollouts", 4, "--max-rollouts", 12),
            {"budget": 48, "min_rollouts": 4, "max_rollouts": 12},
        ),
        (("--budget", 9, "--min-rollouts", 0), {"budget": 9, "min_rollouts": 0}),
        (("--budget", 90, "--fallback"), {"budget": 90, "fallback": True}),
    ):
        ids, rates, counts = read_table(cli("allocate", write_rates(), *flags)[0])
        assert ids == list(RATES), flags
        np.testing.assert_array_equal(rates, given)
        assert counts == kr.allocate(given, **expected).counts.tolist(), flags
        assert sum(counts) == expected["budget"], flags


def test_the_use_of_a_surplus_is_reported_apart_from_the_table(cli):
    rates = {"a": 1.0, "b": 0.0}
    out, err = cli("allocate", write_rates(rates=rates))
    found = kr.allocate([1.0, 0.0], 16)
    assert found.reason
    assert err == found.reason + "\n"
    assert read_table(out)[2] == found.counts.tolist()
    assert cli("allocate", write_rates())[1] == ""


def test_rates_without_ids_are_numbered(cli):
    Path("rates.csv").write_text("rate\n0.5\n0.1\n")
    ids, rates, counts = read_table(cli("allocate", "rates.csv", "--rate-column", "rate")[0])
    assert (ids, rates) == (["0", "1"], [0.5, 0.1])
    assert counts == kr.allocate([0.5, 0.1], 16).counts.tolist()


def test_columns_may_have_other_names(cli):
    Path("rates.jsonl").write_text('{"name": 7, "p": 0.5}\n{"name": "é", "p": null}\n', encoding="utf-8")
    out, _ = cli("allocate", "rates.jsonl", "--id-column", "name", "--rate-column", "p", "--format", "json")
    assert [row["prompt_id"] for row in json.loads(out)["prompts"]] == [7, "é"]


def test_json_output(cli):
    out, _ = cli("allocate", write_rates(), "--budget", 60, "--format", "json")
    found = kr.allocate(as_array(RATES.values()), 60)
    assert json.loads(out) == {
        "expected_value": found.expected_value,
        "reason": found.reason,
        "prompts": [
            {"prompt_id": name, "success_rate": rate, "rollouts": count}
            for (name, rate), count in zip(RATES.items(), found.counts.tolist(), strict=True)
        ],
    }


@pytest.mark.parametrize("form", ["csv", "json"])
def test_output_goes_to_a_file(cli, form):
    printed, _ = cli("allocate", write_rates(), "--format", form)
    out, err = cli("allocate", "rates.csv", "--format", form, "--output", "found.txt")
    assert (out, err) == ("", "")
    assert Path("found.txt").read_text(encoding="utf-8") == printed


def reward_log(seed=0, steps=5, prompts=6):
    """Rows of rewards, shuffled, with a few that could not be scored."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(steps):
        for prompt in rng.permutation(prompts)[: prompts - 1]:
            for _ in range(int(rng.integers(1, 6))):
                reward = None if rng.random() < 0.1 else float(rng.random() < (prompt + 1) / (prompts + 1))
                rows.append({"prompt_id": f"p{prompt}", "step": step, "reward": reward})
    return [rows[k] for k in rng.permutation(len(rows))]


def write_table(rows, kind):
    path = Path(f"rewards.{kind}")
    names = list(rows[0])
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pa.table({name: [row[name] for row in rows] for name in names}), path)
    return path


def fed_in_order(rows, *arguments, **settings):
    """An allocator that saw the steps one by one; the prompts in the order in which the file names them."""
    allocator = kr.KnapsackAllocator(*arguments, **settings)
    for step in sorted({row["step"] for row in rows}):
        seen = [row for row in rows if row["step"] == step]
        allocator.observe(
            [row["prompt_id"] for row in seen], [math.nan if row["reward"] is None else row["reward"] for row in seen]
        )
    return allocator, list(dict.fromkeys(row["prompt_id"] for row in rows))


@pytest.mark.parametrize("estimator", ["bayes-filter", "empirical-bayes", "beta", "window"])
def test_rewards_are_allocated_as_by_an_allocator_that_saw_them_step_by_step(cli, estimator):
    rows = reward_log()
    allocator, prompts = fed_in_order(rows, estimator)
    expected = allocator.allocate(prompts, 8 * len(prompts))
    for kind in ("csv", "jsonl", "parquet"):
        ids, rates, counts = read_table(cli("allocate", write_table(rows, kind), "--estimator", estimator)[0])
        assert ids == prompts, kind
        np.testing.assert_array_equal(rates, expected.success_rates)
        assert counts == expected.counts.tolist(), kind
        assert len(set(counts)) > 2


def test_the_order_of_steps_matters_and_is_that_of_their_numbers(cli):
    rows = [
        {"prompt_id": prompt, "step": step, "reward": float((prompt == "rising") == (step >= 10))}
        for step in (13, 12, 11, 10, 3, 2, 1, 0)  # as text, 10 would come before 2
        for prompt in ("rising", "falling")
        for _ in range(4)
    ]
    _, rates, _ = read_table(cli("allocate", write_table(rows, "csv"), "--estimator", "window")[0])
    assert rates == [1.0, 0.0]


def test_rewards_without_steps_are_one_batch(cli):
    rows = [{"prompt_id": row["prompt_id"], "reward": row["reward"]} for row in reward_log()]
    allocator, prompts = fed_in_order([row | {"step": 0} for row in rows])
    _, _, counts = read_table(cli("allocate", write_table(rows, "csv"))[0])
    assert counts == allocator.allocate(prompts, 8 * len(prompts)).counts.tolist()


def test_a_log_with_other_names_bounds_and_threshold(cli):
    rows = [dict(row, reward=2.0 if row["reward"] else 0.5) for row in reward_log(1)]
    allocator, prompts = fed_in_order(rows, min_rollouts=3, max_rollouts=20, success=0.5)
    renamed = [{"id": row["prompt_id"], "epoch": row["step"], "score": row["reward"]} for row in rows]
    out, _ = cli(
        *("allocate", write_table(renamed, "csv"), "--id-column", "id", "--step-column", "epoch"),
        *("--reward-column", "score", "--success-threshold", "0.5", "--min-rollouts", 3, "--max-rollouts", 20),
        *("--budget", 50),
    )
    assert read_table(out)[2] == allocator.allocate(prompts, 50).counts.tolist()


@pytest.mark.parametrize("path", ["run", "run/allocations.jsonl"])
def test_a_run_folder_is_a_log_of_rewards(cli, refused, path):
    visits = [
        (prompt, visit["step"], good, size)
        for visit in write_run(Path("run"), steps=5)
        for prompt, good, size in zip(visit["prompt_ids"], visit["successes"], visit["scored"], strict=True)
    ]
    rows = [
        {"prompt_id": prompt, "step": step, "reward": float(k < good)}
        for prompt, step, good, size in visits
        for k in range(size)
    ]
    allocator, prompts = fed_in_order(rows)
    ids, _, counts = read_table(cli("allocate", path)[0])
    assert ids == prompts
    assert counts == allocator.allocate(prompts, 8 * len(prompts)).counts.tolist()
    assert "give no options for them" in refused("allocate", path, "--reward-column", "score")
    assert "--fallback applies to success rates" in refused("allocate", path, "--fallback")


def test_completions_of_trl_are_a_log_of_rewards(cli):
    rows = [row for row in reward_log() if row["reward"] is not None]
    Path("completions").mkdir()
    for step in sorted({row["step"] for row in rows}):
        of_step = [row for row in rows if row["step"] == step]
        table = {"step": [step] * len(of_step), "prompt": [row["prompt_id"] for row in of_step]}
        scores = {"mine": [2 * row["reward"] + 1 for row in of_step]}  # 1 and 3
        parquet.write_table(pa.table(table | scores), f"completions/completions_{step:05}.parquet")
    allocator, prompts = fed_in_order(sorted(rows, key=lambda row: row["step"]))
    ids, _, counts = read_table(cli("allocate", "completions", "--success-threshold", 2)[0])
    assert ids == prompts
    assert counts == allocator.allocate(prompts, 8 * len(prompts)).counts.tolist()


SINGLE = float(np.float32(0.4))
MESSAGES = [[{"role": "user", "content": f"What is {k}+{k}?"}] for k in range(3)]


def trl_rows(rows):
    Path("log/completions").mkdir(parents=True)
    for step in sorted({row["step"] for row in rows}):
        here = [row for row in rows if row["step"] == step]
        columns = {"step": [step] * len(here), "prompt": [row["prompt"] for row in here]}
        columns |= {
            "completion": [f"{step} {k}" for k in range(len(here))],
            "accuracy": [row["reward"] for row in here],
        }
        parquet.write_table(pa.table(columns), f"log/completions/completions_{step:05}.parquet")
    return "log"


def verl_rows(rows):
    Path("log").mkdir()
    for step in {row["step"] for row in rows}:
        here = [{"input": str(row["prompt"]), "score": row["reward"]} for row in rows if row["step"] == step]
        Path(f"log/{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in here))
    return "log"


def csv_rows(rows):
    return write_table([{**row, "completion": "x" * 131_073} for row in rows], "csv")


def gzip_rows(rows):
    path = write_table(rows, "jsonl")
    Path("rewards.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return "rewards.jsonl.gz"


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("write", [trl_rows, verl_rows, csv_rows, gzip_rows])
@pytest.mark.parametrize(
    ("rewards", "threshold"),
    [
        ((1.0, SINGLE, math.nan), 0.4),  # in single precision 0.4 is no success above 0.4
        ((True, False, None), None),
        ((1.0, 0.0, -math.inf), None),
    ],
)
def test_every_command_counts_the_same_in_the_same_log(cli, write, rewards, threshold):
    """Rewards of successes, failures and rollouts without a score; prompts are messages."""
    dice = np.random.default_rng(3)
    kinds = {(step, k): [0, 1, *dice.integers(0, 3, 4).tolist()] for step in (1, 2) for k in range(3)}
    rows = [
        {"prompt": MESSAGES[k], "step": step, "reward": rewards[kind]}
        for (step, k), group in kinds.items()
        for kind in group
    ]
    flags = [] if threshold is None else ["--success-threshold", threshold]
    path = write(rows)
    good = {key: group.count(0) for key, group in kinds.items()}
    scored = {key: good[key] + group.count(1) for key, group in kinds.items()}

    found = json.loads(cli("replay", path, *flags, "--json", "--no-page", "--seeds", 1)[0])
    assert found["log"]["rollouts"] == sum(scored.values())
    assert found["log"]["unscored"] == len(rows) - sum(scored.values())
    assert found["recorded"]["effective_prompts"] == 1

    found = json.loads(cli("report", path, *flags, "--format", "json")[0])
    assert (found["rollouts"], found["steps"]) == (sum(scored.values()), 2)
    assert (found["all_correct"], found["all_wrong"]) == (0, 0)
    assert "report.html" in cli("report", path, *flags)[0]

    allocator = kr.KnapsackAllocator("beta")
    for (step, k), successes in good.items():
        outcomes = [1.0] * successes + [0.0] * (scored[step, k] - successes)
        allocator.observe([str(k)] * len(outcomes), outcomes)
    _, rates, _ = read_table(cli("allocate", path, *flags, "--estimator", "beta")[0])
    np.testing.assert_allclose(rates, allocator.allocate(["0", "1", "2"], 24).success_rates)


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("name", ["verl.jsonl", "verl.jsonl.gz", "allocations.jsonl"])
def test_every_command_takes_an_allocation_log_of_any_name(cli, name):
    write_run(Path("run"), steps=6)
    content = Path("run/allocations.jsonl").read_bytes()
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert cli("allocate", name) == cli("allocate", "run")
    one, other = (json.loads(cli("replay", path, "--json", "--no-page", "--seeds", 1)[0]) for path in (name, "run"))
    assert one["policies"] == other["policies"]
    figures = [json.loads(cli("report", path, "--format", "json")[0]) for path in (name, "run")]
    assert figures[0]["rollouts"] == figures[1]["rollouts"]
    page = "report.html" if name == "allocations.jsonl" else "verl-report.html"
    assert cli("report", name) == (f"report: {page}\n", "")


@pytest.mark.parametrize("threshold", [0.4, 0.7])  # above and below what single precision holds
def test_a_reward_at_the_threshold_is_no_success_for_any_command(cli, threshold):
    values = [threshold, float(np.float32(threshold)), 1.0]
    rows = [{"prompt_id": p, "step": step, "reward": v} for step in (1, 2) for p in "ab" for v in values]
    path = write_table(rows, "csv")
    flags = ("--success-threshold", threshold)
    found = json.loads(cli("report", path, *flags, "--format", "json")[0])
    assert found["transitions"][2][2] == 2  # a third of the rollouts of both prompts succeeds: medium
    allocator = kr.KnapsackAllocator("beta")
    for _ in range(2):
        allocator.observe(list("aaabbb"), [0.0, 0.0, 1.0] * 2)
    _, rates, _ = read_table(cli("allocate", path, *flags, "--estimator", "beta")[0])
    assert rates == allocator.allocate(["a", "b"], 16).success_rates.tolist()


def test_remarks_on_a_log_go_to_standard_error(cli):
    rows = [row for row in reward_log() if row["step"] < 3]
    path = write_table(rows, "jsonl")
    path.write_text(path.read_text() + '{"prompt_id": "p1", "st')
    out, err = cli("allocate", path)
    assert read_table(out)
    assert "Note: 1 incomplete row was skipped: rewards.jsonl, line" in err
    assert cli("allocate", path, "--quiet") == (out, "")


def test_logs_without_settings_are_compared_by_name(cli):
    write_table(reward_log(0), "csv").rename("first.csv")
    write_table(reward_log(1), "csv").rename("second.csv")
    rows = json.loads(cli("report", "first.csv", "second.csv", "--format", "json")[0])
    assert [row["policy"] for row in rows] == ["first", "second"]


def test_an_infeasible_budget_for_a_log_degrades_with_one_message(cli, caplog):
    rows = reward_log()
    out, err = cli("allocate", write_table(rows, "csv"), "--budget", 6)
    assert sum(read_table(out)[2]) == 6
    assert err.count("budget 6 is below 6 prompts x 2") == 1
    assert caplog.messages == []


def test_bad_input_to_allocate_is_one_line(refused):
    for text, flags, message in (
        ("success_rate\n0.5\nhalf\n", (), "column 'success_rate', row 2: 'half' is not a number"),
        ("success_rate\n1.5\n", (), "1.5"),
        ("success_rate\n-0.5\n", (), "-0.5"),
        ("success_rate\n0.5\n", ("--budget", "-1"), "budget"),
        ("success_rate\n0.5\n", ("--budget", "1"), "budget"),
        ("success_rate\n0.5\n", ("--budget", "129"), "budget"),
        ("success_rate\n0.5\n", ("--min-rollouts", "-1"), "min_rollouts"),
        ("success_rate\n0.5\n", ("--min-rollouts", "9", "--max-rollouts", "8"), "min_rollouts"),
        ("prompt_id,success_rate\n,0.5\n", (), "column 'prompt_id', row 1 is empty; every row needs a prompt id"),
        (
            "prompt_id,mark\na,1\n",
            (),
            "its columns are prompt_id, mark: name one with --reward-column (or name a column of success rates with "
            "--rate-column)",
        ),
        ("name,reward\na,1\n", (), "its columns are name, reward: name one with --id-column"),
        ("prompt_id,accuracy\na,0.5\nb,1\n", (), "name their column with --rate-column if they are success rates"),
        ("prompt_id,reward\na,x\n", (), "column 'reward', row 1: 'x' is not a number"),
        ("prompt_id,reward\na,inf\n", (), "none of the 1 rollouts has a reward"),
        ("prompt_id,step,reward\na,1,1\na,,1\n", (), "column 'step', row 2 is empty"),
        ("prompt_id,reward\na,1\n", ("--fallback",), "--estimator window"),
        ("prompt_id,reward\na,1\n", ("--max-rollouts", "1"), "max_rollouts"),
        ("prompt_id,reward\na,1,2\n", (), "a row has 3 values"),
        ("prompt_id,reward\n", (), "holds no rows"),
        ("success_rate\n0.5\n", ("--output", "missing/found.csv"), "missing/found.csv"),
    ):
        Path("table.csv").write_text(text)
        assert message in refused("allocate", "table.csv", *flags), (text, flags)


def test_a_file_that_cannot_be_read_is_one_line(refused):
    assert "there is no file or folder missing.csv" in refused("allocate", "missing.csv")
    Path("table.txt").write_text("success_rate\n0.5\n")
    assert ".csv, .jsonl, .json, .parquet" in refused("allocate", "table.txt")


def test_a_missing_extra_is_one_line(refused, monkeypatch):
    write_table(reward_log(), "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused("allocate", "rewards.parquet").endswith('pip install "knapsack-rl[data]"')
    monkeypatch.setitem(sys.modules, "yaml", None)
    write_run(Path("run"), steps=1)
    assert refused("report", "run").endswith('This command needs: pip install "knapsack-rl[plots]"')  # and not TRL


def test_contradicting_flags_and_flags_without_a_number_are_refused(misused):
    for rollouts in (8, 9):  # also where it is the default
        assert "not allowed with" in misused("allocate", "a.csv", "--budget", 8, "--rollouts-per-prompt", rollouts)
    assert "invalid int value: '8.5'" in misused("allocate", "a.csv", "--budget", 8.5)
    assert "invalid choice: 'mean'" in misused("allocate", "a.csv", "--estimator", "mean")


# -- Settings ---------------------------------------------------------------------------------------------------------

OTHER = {
    **{
        "allocation": "uniform",
        "rollouts_per_prompt": 6,
        "prompts_per_step": 12,
        "steps": 7,
        "rollout_limit": 700,
        "success_threshold": 0.25,
        "seed": 5,
        "model": "a: b",
    },
    **{"dataset": "no.jsonl", "prompt_column": "question", "answer_column": "é", "train_prompts": 24},
    **{
        "held_out_prompts": 3,
        "estimator": "empirical-bayes",
        "min_rollouts": 3,
        "max_rollouts": 9,
        "weighting": "prompt",
        "advantage": "group-std",
    },
    **{"learning_rate": 1e-5, "updates_per_step": 2, "loss_type": "grpo", "clip_low": 0.1, "clip_high": 0.3},
    **{"kl_coefficient": 0.01, "temperature": 0.7, "max_completion_tokens": 5, "eval_every": 2, "eval_samples": 1},
    **{"save_every": 3, "threads": 1, "report_to": "tensorboard", "num_iterations": 3},
    **{"precision": "float32", "lora_rank": 4, "lora_alpha": 6, "rollouts_per_pass": 6, "gradient_checkpointing": "on"},
    **{"vllm": "server", "vllm_server": "http://localhost:8001", "vllm_memory": 0.5, "dataset_path": "copy"},
    **{"dataset_config": "main", "dataset_split": "test", "verifier": "number", "prompt_template": "Q: {prompt}"},
    **{"chat": "off", "estimator_settings": "discount=0.9", "value": "nonzero-gradient", "replay": 2},
    **{"skip_zero_advantages": "off"},
}


def as_flags(values):
    return [part for name, given in values.items() for part in ("--" + name.replace("_", "-"), given)]


def test_every_setting_is_a_flag(cli):
    # Other values of these go with few of the others.
    few = {"budget_unit": "rollouts", "rounds": 1, "feature_columns": "auto", "prior": ""}
    assert set(OTHER) == {spec.name for spec in SETTINGS} - few.keys()
    assert all(spec.default != OTHER[spec.name] for spec in SETTINGS if spec.name in OTHER)
    out, err = cli("train", "--print-config", *as_flags(OTHER))
    assert yaml.safe_load(out) == OTHER | few
    assert err == ""
    assert yaml.safe_load(cli("train", "--print-config", "--budget-unit", "tokens")[0])["budget_unit"] == "tokens"
    assert yaml.safe_load(cli("train", "--print-config", "--rounds", "2")[0])["rounds"] == 2
    given = {"feature_columns": "level,topic", "prior": "run"}
    assert given.items() <= yaml.safe_load(cli("train", "--print-config", *as_flags(given))[0]).items()
    assert not list(Path().iterdir())


def test_without_flags_the_defaults_are_printed(cli):
    assert yaml.safe_load(cli("train", "--print-config")[0]) == dataclasses.asdict(TrainSettings())


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_printed_configuration_fed_back_prints_the_same(cli, command):
    values = {name: given for name, given in OTHER.items() if name not in ("allocation", "seed", "threads")}
    printed, _ = cli(command, "--print-config", *as_flags(values))
    Path("config.yaml").write_text(printed, encoding="utf-8")
    assert cli(command, "--print-config", "--config", "config.yaml")[0] == printed


def test_flags_override_the_file(cli):
    Path("mine.yaml").write_text("steps: 9\nseed: 4\nlearning_rate: 1\n")
    found = yaml.safe_load(cli("train", "--print-config", "--config", "mine.yaml", "--seed", 0)[0])
    assert found == dataclasses.asdict(TrainSettings(steps=9, seed=0, learning_rate=1.0))


def test_an_empty_file_changes_nothing(cli):
    Path("mine.yaml").write_text("# nothing yet\n")
    assert cli("train", "--print-config", "--config", "mine.yaml") == cli("train", "--print-config")


def test_a_number_may_have_an_exponent_without_a_point(cli):
    # YAML 1.1 takes 1e-4 for text; people write it all the same.
    Path("mine.yaml").write_text("learning_rate: 1e-4\n")
    assert yaml.safe_load(cli("train", "--print-config", "--config", "mine.yaml")[0])["learning_rate"] == 1e-4


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_bad_configuration_file_is_one_line(refused, command):
    for text, message in (
        (
            "step: 9\nlearning-rate: 1\n",
            "mine.yaml: unknown settings learning-rate, step; known are advantage, allocation, ",
        ),
        ("3: 9\n", "mine.yaml: unknown settings 3; known are advantage, allocation, "),
        ("3: 9\nstep: 9\n", "mine.yaml: unknown settings 3, step; known are advantage, allocation, "),
        ("steps: many\n", "mine.yaml: steps must be int, got 'many'"),
        ("steps: 9.0\n", "mine.yaml: steps must be int, got 9.0"),
        ("steps: true\n", "mine.yaml: steps must be int, got True"),
        ("learning_rate: true\n", "mine.yaml: learning_rate must be float, got True"),
        ("learning_rate: fast\n", "mine.yaml: learning_rate must be float, got 'fast'"),
        ("model: 7\n", "mine.yaml: model must be str, got 7"),
        ("model:\n", "mine.yaml: model must be str, got None"),
        ("steps: 0\n", "mine.yaml: steps must be >= 1, got 0"),
        ("weighting: token\n", "mine.yaml: weighting must be one of auto, rollout, prompt, got 'token'"),
        ("- steps\n", "mine.yaml must hold a mapping of settings, got list"),
        ("steps: [1\nseed: 2\n", "mine.yaml is not valid YAML"),
        ("steps: 9\n\tseed: 2\n", "mine.yaml is not valid YAML"),
    ):
        Path("mine.yaml").write_text(text)
        assert refused(command, "--config", "mine.yaml").startswith(message), text


def test_a_missing_configuration_file_is_one_line(refused):
    assert "missing.yaml" in refused("train", "--config", "missing.yaml")


def test_flags_out_of_range_are_one_line(refused):
    assert refused("train", "--steps", 0) == "command line: steps must be >= 1, got 0"
    message = refused("train", "--rollouts-per-prompt", 200)
    assert message.startswith("command line: min_rollouts <= rollouts_per_prompt <= max_rollouts must hold")
    assert not list(Path().iterdir())


def test_flags_of_the_wrong_type_are_refused(misused):
    assert misused("train", "--steps", "many").endswith("argument --steps: invalid int value: 'many'")
    assert "argument --weighting: invalid choice: 'token'" in misused("train", "--weighting", "token")
    assert "invalid choice: 'grpo'" in misused("compare", "--policies", "uniform", "grpo")


def test_compare_has_no_flag_for_what_it_varies(misused):
    for name in ("allocation", "threads"):
        assert f"unrecognized arguments: --{name}" in misused("compare", f"--{name}", "1")


def test_resume_takes_no_other_settings(refused):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("steps: 9\nseed: 4\n")
    Path("mine.yaml").write_text("steps: 9\n")
    for flags in (("--steps", 9), ("--seed", 0), ("--config", "mine.yaml"), ("--output", "other")):
        assert "--resume uses the settings of the run" in refused("train", "--resume", "run", *flags)


def test_resume_prints_the_configuration_of_the_run(cli):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("steps: 9\nseed: 4\n")
    printed, _ = cli("train", "--resume", "run", "--print-config")
    assert printed == TrainSettings(steps=9, seed=4).to_yaml()


# -- Reported before the training libraries are loaded ----------------------------------------------------------------


@pytest.fixture
def too_early(monkeypatch):
    """Makes the module that trains, and what it imports for many seconds, unavailable."""
    for name in ("knapsack_rl.training.run", "knapsack_rl.training.models", "torch", "transformers", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)


def write_questions():
    rows = [{"question": f"{k}+1=", "answer": str(k + 1)} for k in range(40)]
    Path("qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(path):
    """A folder that looks like a model's."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")


ENOUGH = ("--train-prompts", 32, "--held-out-prompts", 8, "--prompts-per-step", 16)


@pytest.mark.usefixtures("too_early")
@pytest.mark.parametrize("command", ["train", "compare"])
def test_common_mistakes_are_reported_before_the_slow_imports(refused, command):
    write_questions()
    Path("empty").mkdir()
    write_model(Path("run/model"))
    for flags, message in (
        (("--model", "missing/"), "there is no model folder missing/; a model is arithmetic-base or smollm2-135m, a "),
        (("--model", "./missing"), "there is no model folder ./missing; "),
        (("--model", "a/b/missing"), "there is no model folder a/b/missing; "),
        (("--model", "empty"), "empty holds no model: it has no config.json"),
        (("--model", "run"), "run holds no model: it has no config.json; the run's model is in run/model"),
        (("--dataset", "missing.jsonl"), "there is no file missing.jsonl"),
        (
            ("--dataset", "qa.jsonl", *ENOUGH),
            "qa.jsonl, row 1: no column 'prompt'; columns are question, answer (name another with prompt_column, "
            "--prompt-column)",
        ),
        (
            ("--dataset", "qa.jsonl", "--prompt-column", "question", "--answer-column", "solution", *ENOUGH),
            "qa.jsonl, row 1: no column 'solution'; columns are question, answer (name another with answer_column, "
            "--answer-column)",
        ),
        (
            ("--dataset", "qa.jsonl", "--prompt-column", "question"),
            "qa.jsonl holds 40 rows, but train_prompts + held_out_prompts is 2560; lower them, for example "
            "--train-prompts 32 --held-out-prompts 8",
        ),
    ):
        assert refused(command, *flags).startswith(message), flags
    assert not Path("runs").exists()


@pytest.mark.usefixtures("too_early")
def test_a_model_folder_and_names_of_the_hub_pass_the_early_check(refused):
    write_model(Path("mine"))
    for name in ("mine", "./mine", "arithmetic-base", "smollm2-135m", "gpt2", "openai-community/gpt2"):
        assert "halted; None in sys.modules" in refused("train", "--model", name)  # it got as far as the imports
    Path("adapters").mkdir()
    Path("adapters/adapter_config.json").write_text("{}")
    assert "halted; None in sys.modules" in refused("train", "--model", "adapters")


@pytest.mark.usefixtures("too_early")
def test_a_folder_that_holds_a_run_is_refused_before_the_slow_imports(refused):
    run = Path("runs/mine")
    write_run(run, steps=3)
    way = "delete it, or choose another folder (--output)"
    assert refused("train", "--output", run) == f"runs/mine already holds a run; {way}"
    (run / "checkpoint-2").mkdir()
    (run / "checkpoint-2" / TRAINER_STATE_FILE).write_text("{}")
    assert not (run / "model").exists()
    assert refused("train", "--output", run) == (
        f"runs/mine already holds a run; resume it (--resume runs/mine), {way}"
    )
    (run / "model").mkdir()  # finished: there is nothing to resume
    assert refused("train", "--output", run) == f"runs/mine already holds a run; {way}"


@pytest.mark.usefixtures("too_early")
def test_a_run_that_cannot_be_resumed_is_refused_before_the_slow_imports(refused):
    assert refused("train", "--resume", "missing") == "there is no run folder missing"
    Path("runs").mkdir()
    assert refused("train", "--resume", "runs") == "runs is not a run folder: it has no config.yaml"
    for name in "gfedcba":
        Path("runs", name).mkdir()
        Path("runs", name, "config.yaml").write_text("steps: 9\n")
    assert refused("train", "--resume", "runs") == (
        "runs is not a run folder: it has no config.yaml; run folders in it: runs/a, runs/b, runs/c, runs/d, runs/e, "
        "and 2 more"
    )
    assert refused("train", "--resume", "runs/a").startswith(
        "runs/a holds no complete checkpoint to resume from; the run ended before its first one (see save_every)"
    )


# -- report -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_plots")
def test_report_of_one_run(cli):
    write_run(Path("runs/one"), steps=4)
    assert cli("report", "runs/one") == ("report: runs/one/report.html\n", "")
    assert "Training run one" in Path("runs/one/report.html").read_text(encoding="utf-8")


@pytest.fixture
def two_runs():
    write_run(Path("runs/uniform"), allocation="uniform", steps=6, evaluate_every=2)
    write_run(Path("runs/knapsack"), steps=6, evaluate_every=2)
    return ["runs/knapsack", "runs/uniform"]


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(("flags", "page"), [((), "comparison.html"), (("--output", "pages/c.html"), "pages/c.html")])
def test_report_of_several_runs_is_a_comparison(cli, two_runs, flags, page):
    out, err = cli("report", *two_runs, *flags)
    assert err == ""
    header, rule, *rows, empty, last = out.splitlines()
    assert header.startswith("| policy | seeds |")
    assert set(rule) == set("| -")
    assert [row.split(" | ")[0] for row in rows] == ["| uniform N=8", "| knapsack N=8"]
    assert (empty, last) == ("", f"report: {page}")
    assert "Comparison of allocation policies" in Path(page).read_text(encoding="utf-8")


def test_the_comparison_as_json(cli, two_runs):
    from knapsack_rl.report import RunLog, comparison_table

    rows = json.loads(cli("report", *two_runs, "--format", "json")[0])
    assert [row["policy"] for row in rows] == ["uniform N=8", "knapsack N=8"]
    expected = comparison_table([RunLog.load(folder) for folder in two_runs])
    assert rows == json.loads(json.dumps(expected))
    assert not Path("comparison.html").exists()


def test_a_run_as_json(cli, two_runs):
    summary = json.loads(cli("report", two_runs[0], "--format", "json")[0])
    rows = [json.loads(line) for line in Path(two_runs[0], "allocations.jsonl").read_text().splitlines()]
    assert summary["folder"] == "knapsack"
    assert summary["finished"] and summary["steps"] == summary["planned_steps"] == 6
    assert summary["rollouts"] == sum(sum(row["counts"]) for row in rows)
    assert summary["largest_allocation"] == max(max(row["counts"]) for row in rows)
    share = [np.mean(row["effective"]) for row in rows]
    assert summary["effective_prompts"]["last"] == pytest.approx(np.mean(share[-2:]))
    assert summary["effective_prompts"]["first"] == pytest.approx(np.mean(share[:2]))
    assert summary["reasons"] == {"cold start": 1}
    assert "NaN" not in json.dumps(summary)


def test_the_plots_as_pictures(cli, two_runs):
    one = cli("report", two_runs[0], "--format", "svg")[0].splitlines()
    assert {str(path) for path in Path("runs/knapsack/figures").iterdir()} == set(one)
    assert len(one) == 7
    assert all(Path(path).read_bytes().startswith(b"<?xml") for path in one)
    both = cli("report", *two_runs, "--format", "png", "--output", "pictures")[0].splitlines()
    assert both[0] == "pictures/accuracy.png" and len(both) == 4
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in both)


@pytest.mark.usefixtures("without_plots")
def test_where_the_page_of_a_run_goes(cli, refused, two_runs):
    assert cli("report", two_runs[0], "--output", "pages/mine.html")[0] == "report: pages/mine.html\n"
    assert "Training run knapsack" in Path("pages/mine.html").read_text(encoding="utf-8")
    assert "JSON goes to standard output" in refused("report", two_runs[0], "--format", "json", "--output", "x.json")


def test_a_report_of_something_other_than_a_run_is_one_line(refused, two_runs):
    Path("empty").mkdir()
    assert "empty is not a run folder" in refused("report", "empty")
    assert refused("report", "missing") == "there is no run folder missing"
    assert refused("report", "runs").startswith("runs is not a run folder: it has no config.yaml; run folders in it: ")
    assert "empty is not a run folder" in refused("report", *two_runs, "empty")
    assert "have the seed 0" in refused("report", "runs/uniform", "runs/uniform")
