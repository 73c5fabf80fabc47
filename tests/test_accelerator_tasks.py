"""Few-shot tasks of the accelerator, what decides whether they are trained on, and their dry runs on the CPU."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402
from experiments import catalogue  # noqa: E402
from experiments.accelerator import __main__ as command  # noqa: E402
from experiments.accelerator import tasks  # noqa: E402
from experiments.accelerator.__main__ import PLANS, quick  # noqa: E402
from experiments.accelerator.evidence import ACCELERATOR, NOTHING  # noqa: E402
from experiments.accelerator.train import Trainer, measure_success  # noqa: E402
from experiments.contract import seeds_of, select  # noqa: E402
from experiments.pool import ARMS  # noqa: E402

EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"
EASY = "mixed:chain_sum?min_terms=2&max_terms=3&min_digits=1&max_digits=1"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny random model that reads any text, letters as the same token."""
    folder = tmp_path_factory.mktemp("model")
    tiny.model(seed=3).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """Folder laid out like GSM8K, with answers that a tiny model does not hit by chance."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, start in (("train", 0), ("test", 100)):
        rows = [
            {"question": f"What is {k}?", "answer": f"It is {k}.\n#### {1000 + k}"} for k in range(start, start + 20)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# -- Tasks -------------------------------------------------------------------------------------------------------------


def test_the_solved_examples_of_gsm8k_are_right():
    solutions = re.findall(r"Answer: (.+)#### (\d+)", tasks.GSM8K_TEMPLATE)
    assert len(solutions) == 4
    for steps, answer in solutions:
        results = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)\.", steps)
        for left, sign, right, result in results:
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
        assert results[-1][-1] == answer


def test_gsm8k_shows_examples_and_reads_the_number(gsm8k):
    pytest.importorskip("math_verify")
    task = tasks.load(tasks.GSM8K, 12, 6, gsm8k)
    assert (len(task.train), len(task.held_out), task.stop) == (12, 6, "\n")
    row = task.train[0]
    assert row["prompt"].startswith(tasks.GSM8K_TEMPLATE.partition("{prompt}")[0])
    assert re.fullmatch(r"(?s).*Question: What is \d+\?\nAnswer:", row["prompt"])
    right = row["answer"].removeprefix("#### ")
    wrong = str(int(right) + 1)
    assert task.reward(completions=[f" 1+1=2. #### {right}", f" {wrong}"], answer=[row["answer"]] * 2) == [1.0, 0.0]


def test_the_mixture_has_equal_parts_examples_and_each_its_own_verifier():
    pytest.importorskip("reasoning_gym")
    names = tasks.CANDIDATES[:2]
    task = tasks.load(tasks.MIXED + ";".join(names), 10, 5)
    assert Counter(row["grade"] for row in task.train) == dict(zip(names, (5, 5), strict=True))
    assert len(task.held_out) == 5
    prompts = [row["prompt"] for row in [*task.train, *task.held_out]]
    assert len(set(prompts)) == 15
    assert all(prompt.count("Question: ") == tasks.SHOTS + 1 for prompt in prompts)
    assert all(prompt.endswith("\nAnswer:") for prompt in prompts)
    columns = {name: [row[name] for row in task.train] for name in task.train[0] if name != "prompt"}
    assert task.reward(completions=[f" {answer}" for answer in columns["answer"]], **columns) == [1.0] * 10
    assert task.reward(completions=[" I do not know"] * 10, **columns) == [0.0] * 10


def test_every_candidate_has_problems_for_the_smallest_mixture():
    pytest.importorskip("reasoning_gym")
    plan = PLANS["reasoning-gym"]
    parts = [-(-wanted // plan.fewest) for wanted in (plan.base.train_prompts, plan.base.held_out_prompts)]
    for name in (tasks.CANDIDATES[6], tasks.CANDIDATES[2]):  # those that repeat themselves most
        assert len(tasks.load(tasks.MIXED + name, *parts).train) == parts[0]


def test_a_generator_with_too_few_problems_is_named():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(
        ValueError, match=r"gcd\?min_value=2&max_value=3 has \d+ different problems in \d+, but 3 \+ 24"
    ):
        tasks.load("mixed:gcd?min_value=2&max_value=3", 16, 8)


# -- What is trained on ------------------------------------------------------------------------------------------------


def probed(plan, *rates):
    pieces = plan.probes()
    return [{"settings": asdict(piece), "rate": rate} for piece, rate in zip(pieces, rates, strict=True)]


def test_tasks_are_trained_on_by_the_success_rate_of_the_base():
    gsm8k, gym = PLANS["gsm8k"], PLANS["reasoning-gym"]
    assert gsm8k.chosen(probed(gsm8k, 0.02)) is None
    assert gsm8k.chosen(probed(gsm8k, 0.021)).base.dataset == tasks.GSM8K
    rates = [0.5, 0.9, 0.01, 0.1, 0.03] + [0.0] * (len(tasks.CANDIDATES) - 5)
    first, _, _, fourth, fifth, *_ = tasks.CANDIDATES
    assert gym.chosen(probed(gym, *rates)).base.dataset == f"mixed:{first};{fourth};{fifth}"
    assert gym.chosen(probed(gym, *rates[:4], *[0.0] * (len(rates) - 4))) is None
    assert PLANS["sums"].chosen([]) is PLANS["sums"]


def test_the_recommended_setting_is_an_arm_of_every_task():
    assert {task: plan.arms[-1] for task, plan in PLANS.items()} == {
        "sums": "recommended-plain-twice",
        "gsm8k": "recommended-plain-twice",
        "reasoning-gym": "recommended-twice",
    }
    for plan in PLANS.values():
        assert {"uniform", "uniform-2n", "paper"} < set(plan.arms)
        assert ARMS[plan.arms[-1]].settings["advantage"] == "posterior-mean"
        assert ARMS[plan.arms[-1]].settings["num_iterations"] == 2
        assert plan.base.steps >= 200
        assert (plan.base.prompts_per_step, plan.base.rollouts_per_prompt) == (64, 8)


def test_the_success_rate_of_the_base_counts_every_sample(model):
    pytest.importorskip("reasoning_gym")
    settings = replace(quick(PLANS["reasoning-gym"]).base, dataset=EASY, train_prompts=6)

    class Lucky(Trainer):
        def _score(self, rows, sampled):
            return [float(place % 4 == 0) for place, _ in enumerate(rows)]  # twice 3 x 2 rows

    row = measure_success(settings, model, "cpu", Lucky)
    assert row["prompts"] == [2, 4, 0]
    assert row["rate"] == round(4 / 12, 4)
    assert measure_success(settings, model, "cpu")["prompts"] == [6, 0, 0]


# -- Dry runs ----------------------------------------------------------------------------------------------------------


def dry_run(task, folder, *more):
    file = folder / "rows.jsonl"
    arguments = ["--quick", "--task", task, "--rows", str(file), "--workers", "1", "--seeds", "2", *map(str, more)]
    status = command.main(arguments)
    return status, [json.loads(line) for line in file.read_text().splitlines()]


def test_gsm8k_is_not_started_where_the_base_fails_and_says_what_it_found(model, tmp_path, capsys, gsm8k):
    pytest.importorskip("math_verify")
    status, rows = dry_run("gsm8k", tmp_path, "--model", model, "--copy", gsm8k)
    assert status == 0
    assert [row["part"] for row in rows] == ["probe"]
    assert sum(rows[0]["prompts"]) == 6
    shown = capsys.readouterr().out
    assert f"the base model solves {100 * rows[0]['rate']:.1f} % of gsm8k-few-shot" in shown
    assert "nothing is trained: fewer than 1 tasks lie between 2 % and 90 %\n0 pieces left" in shown


@pytest.mark.parametrize("task", ["gsm8k", "reasoning-gym"])
def test_the_dry_run_of_a_task_measures_every_piece(task, model, tmp_path, monkeypatch, gsm8k):
    pytest.importorskip({"gsm8k": "math_verify", "reasoning-gym": "reasoning_gym"}[task])
    real = command.measure_success
    monkeypatch.setattr(command, "measure_success", lambda *args, **rest: real(*args, **rest) | {"rate": 0.3})
    timed = {"seconds_per_step": 1.0, "rollouts_per_second": 1.0}  # what is timed is tested with ``sums``
    monkeypatch.setattr(command, "measure_throughput", lambda settings, **_: timed | {"settings": vars(settings)})
    status, rows = dry_run(task, tmp_path, "--model", model, "--copy", gsm8k)
    plan = quick(PLANS[task])
    assert status == 0
    assert Counter(row["part"] for row in rows) == {
        "probe": len(plan.candidates), "later throughput": 4, "later tuning": 4, "later training": 4}  # fmt: skip
    training = select(rows, part="later training")
    assert [row["arm"] for row in training] == list(PLANS[task].arms)
    assert all(row["finished"] and row["steps"] == 2 for row in training)
    assert {row["settings"]["dataset"] for row in training} == {
        tasks.GSM8K if task == "gsm8k" else tasks.MIXED + ";".join(tasks.CANDIDATES[:2])
    }


def test_later_rows_have_tables_and_claims_of_their_own(model, tmp_path):
    record = catalogue.read("accelerator", EVIDENCE)
    assert ACCELERATOR.tables(record)["later"] == ACCELERATOR.tables(record)["probes"] == NOTHING
    rows = []
    for seed in (0, 1):
        plan = replace(quick(PLANS["sums"]), seeds=(seed,))
        measurement = command.Measurement(tmp_path / "rows.jsonl", model, "cpu", float("inf"), workers=1)
        assert measurement.run(plan) == 0
        rows = measurement.rows("later training")
        probe = {"part": "probe", "settings": {"dataset": "x"}, "rate": 0.25, "prompts": [1, 2]}
        tables = ACCELERATOR.tables([*record, *rows, probe])
        assert tables["accuracy"] == ACCELERATOR.tables(record)["accuracy"]
        assert "| `x` | 25.0 % | 1, 2 |" in tables["probes"]
        assert (tables["later"] == NOTHING) == (seed == 0)  # one seed is too few
    assert "recommended, no columns" in tables["later"]
    found = ACCELERATOR.findings([*record, *rows])
    assert found[:-4] == ACCELERATOR.findings(record)
    assert all("recommended setting" in claim.claim and "sums" in claim.claim for claim in found[-4:])
    assert seeds_of([*record, *rows]) == 3  # of the first runs


def test_bad_arguments_are_named(tmp_path, capsys):
    rows = ["--rows", str(tmp_path / "rows.jsonl")]
    assert command.main([*rows, "--quick", "--task", "gsm8k"]) == 2
    assert "--quick --task gsm8k needs --model" in capsys.readouterr().err
