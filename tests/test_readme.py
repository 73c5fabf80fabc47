"""The README claims what the evidence page says, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments import catalogue
from experiments.budgets import largest
from experiments.statistics import (
    Estimate,
    compare,
    final_accuracy,
    mean_accuracy,
    per_seed,
    series_mean,
    summary,
)

ROOT = Path(__file__).parent.parent
ARMS = {"uniform N=8": "uniform", "uniform N=16": "uniform-2n", "paper N=8": "paper", "knapsack N=8": "knapsack"}
FIGURE = re.compile(r"(?:(?<![\w.])[+-])?\d+(?:,\d{3})*\.\d+(?: [%×])?|\d+ [%×]")


def plain(text: str) -> str:
    return text.replace("−", "-")


def section() -> str:
    text = plain((ROOT / "README.md").read_text(encoding="utf-8"))
    return text.split("## What it bought\n", 1)[1].split("\n## ", 1)[0]


def table() -> list[dict[str, str]]:
    lines = [line for line in section().splitlines() if line.startswith("|")]
    header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in body]


def cell_of(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d+(?:\.\d+)?", text.replace(",", ""))]


def with_half_width(estimate: Estimate) -> list[float]:
    return [100 * estimate.mean, 50 * (estimate.high - estimate.low)]


def test_the_table_of_the_readme_is_that_of_the_rows():
    rows = catalogue.read("compute", ROOT / "docs" / "evidence")
    assert rows is not None
    shown = table()
    assert [row["policy"] for row in shown] == list(ARMS)
    for row in shown:
        arm = ARMS[row["policy"]]
        expected = {
            "seeds": [len(per_seed(rows, arm, final_accuracy))],
            "rollouts generated": [summary(rows, arm, lambda run: run["rollouts"]).mean],
            "held-out accuracy at the end": with_half_width(summary(rows, arm, final_accuracy)),
            "held-out accuracy, mean over the run": with_half_width(summary(rows, arm, mean_accuracy)),
            "rollouts with a gradient": [100 * summary(rows, arm, series_mean("rollout_ratio")).mean],
            "prompts with a gradient": [100 * summary(rows, arm, series_mean("prompt_ratio")).mean],
            "largest allocation": [max(per_seed(rows, arm, largest).values())],
        }
        if arm != "uniform":
            expected |= {
                "difference to baseline, points": with_half_width(compare(rows, arm, "uniform", final_accuracy)),
                "its difference, points": with_half_width(compare(rows, arm, "uniform", mean_accuracy)),
            }
        for column, numbers in expected.items():
            # Half widths are rounded from the ends on one side and from themselves on the other.
            assert cell_of(row[column]) == pytest.approx(numbers, abs=0.051), (arm, column)


def test_every_figure_of_the_readme_stands_on_the_evidence_page():
    page = set(FIGURE.findall(plain((ROOT / "docs" / "evidence.md").read_text(encoding="utf-8"))))
    prose = "\n".join(line for line in section().splitlines() if not line.startswith("|"))
    claimed = set(FIGURE.findall(prose))
    assert len(claimed) > 20
    assert sorted(claimed - page) == []


def test_the_check_finds_a_figure_that_was_made_up():
    assert FIGURE.findall("+6.6 [-4.4, +17.6] points, 74.7 %, 0.74 ×, 2,048 prompts, 95 %, N=8") == [
        *("+6.6", "-4.4", "+17.6", "74.7 %", "0.74 ×", "95 %")
    ]
