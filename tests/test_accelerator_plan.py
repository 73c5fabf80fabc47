"""The plan of runs on accelerators: its arithmetic by hand, and its figures from the rows on record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import catalogue, page
from experiments.accelerator import plan
from experiments.contract import select

EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"


def test_a_step_by_hand():
    model = plan.Model("toy", parameters=1e9, layers=10, kv_width=100)
    given = plan.Assumptions(
        flops=1e14, bandwidth=1e12, train_share=0.5, read_share=0.5, start_seconds=0.001, rest_seconds=2.0,
        prompts=10, rollouts=4, prompt_tokens=100, answer_tokens=200, longest_tokens=1000,
    )  # fmt: skip
    found = plan.step(model, 4, 0.25, given)
    # 1,000 steps that read 2 GB at 500 GB/s and take 1 ms to start; 10 rollouts x 200 tokens x 200 of context x 4 kB.
    assert found.generation == pytest.approx(1000 * (0.004 + 0.001) + 10 * 200 * 200 * 4000 / 5e11)
    # A quarter of 10 rollouts of 300 tokens, 8 operations for each of 1e9 parameters, 5e13 a second.
    assert found.training == pytest.approx(0.25 * 10 * 300 * 8e9 / 5e13)
    assert found.seconds == found.generation + found.training + 2.0


def test_more_accelerators_shorten_training_and_not_the_longest_answer():
    for model in plan.MODELS:
        steps = [plan.step(model, count, 1.0) for count in plan.ACCELERATORS]
        assert [step.training * count for step, count in zip(steps, plan.ACCELERATORS, strict=True)] == pytest.approx(
            [8 * steps[0].training] * 4
        )
        longest = replace(plan.ASSUMPTIONS, answer_tokens=0)
        assert all(step.generation > plan.step(model, 1, 1.0, longest).generation for step in steps)


def test_rows_with_a_gradient_are_those_of_the_recorded_run():
    with (Path(plan.__file__).parent.parent / "data" / "qwen15b_grpo.npz").open("rb") as file:
        successes = np.load(file)["successes"]
    assert plan.rows_with_gradient() == pytest.approx(np.mean([0 < wins < 8 for wins in successes.tolist()]))


def test_the_tables_use_the_ratios_on_record(capsys):
    tables = plan.tables(EVIDENCE)
    cell = {line.split(" | ")[0]: line.split(" | ")[1] for line in tables["savings"].splitlines()[2:]}
    lab, small = (
        catalogue.load(name).figures(catalogue.read(name, EVIDENCE)) for name in ("lab-headline", "accelerator")
    )
    skills = lab("skills: recommended-twice / uniform, rollouts")
    assert cell["| recommended setting, tiny model on skills"] == skills
    assert cell["| first default, SmolLM2-135M on sums"] == small("knapsack / uniform, rollouts")
    runs = [row for row in catalogue.read("lab-headline", EVIDENCE) if row["settings"]["dataset"] == "skills"]
    passed = {
        arm: sum(row["rows_updated"] for row in select(runs, part="training", arm=arm))
        for arm in ("uniform", "recommended-twice")
    }
    more = passed["recommended-twice"] / passed["uniform"]  # of as many rollouts
    one, own = (plan.step(plan.MODELS[0], 8, plan.rows_with_gradient() * rows).seconds for rows in (1.0, more))
    ratio = float(skills.split(" ")[0])
    saved = (one - ratio * own) * plan.ASSUMPTIONS.steps * 8 / 3600
    row = next(line for line in tables["savings"].splitlines() if "on skills" in line)
    assert f"| {more:.2f} × |" in row
    assert float(row.split(" | ")[3].split(" ")[0]) == pytest.approx(saved, abs=1.0)
    assert len(tables["cost"].splitlines()) == 2 + len(plan.MODELS) * len(plan.ACCELERATORS)
    assert page.Evidence(EVIDENCE)("plan: cost") == tables["cost"]
    assert plan.main(["--record", str(EVIDENCE)]) == 0
    assert tables["inputs"] in capsys.readouterr().out


def test_a_folder_without_rows_is_named(tmp_path, capsys):
    assert plan.main(["--record", str(tmp_path)]) == 2
    assert str(tmp_path / "lab-headline.jsonl") in capsys.readouterr().err
