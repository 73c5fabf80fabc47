"""What is read from the rows of the lab: whole seeds alone, the chosen rates, and verdicts by the interval."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

from experiments import catalogue
from experiments.contract import Options, select
from experiments.lab.evidence import HEADLINE, headline_claims
from experiments.statistics import Estimate, at_most

EVIDENCE = Path(__file__).parent.parent / "docs" / "evidence"


def test_rows_on_record_are_read_and_the_dry_run_needs_none(tmp_path):
    done = []
    record = Options(record=EVIDENCE, runs=tmp_path)
    rows = HEADLINE.measure(record, done.append)
    assert rows == catalogue.read("lab-headline", EVIDENCE)
    with pytest.raises(FileNotFoundError, match=r"python -m experiments\.lab headline --rows"):
        HEADLINE.measure(Options(record=tmp_path), done.append)
    dry = HEADLINE.measure(Options(quick=True, runs=tmp_path), done.append)
    assert len(done) == 2 * HEADLINE.pieces(record)
    assert all(row["quick"] for row in dry)
    assert len(HEADLINE.findings(dry)) == len(headline_claims("addition"))
    assert HEADLINE.figures(dry)("addition: seeds") == "2"


def test_reported_runs_are_those_of_the_registration():
    rows, plan = catalogue.read("lab-headline", EVIDENCE), HEADLINE.plan
    assert all(len(row["commit"]) == 40 and row["finished"] for row in rows)
    tuned = select(rows, part="tuning")
    assert {row["seed"] for row in tuned} == {plan.tuning_seed}
    runs = [row for row in select(rows, part="training") if row["settings"]["dataset"] == "skills"]
    assert sorted((row["arm"], row["seed"]) for row in runs) == sorted((a, s) for a in plan.arms for s in plan.seeds)
    for row in runs:
        assert row["settings"]["learning_rate"] == plan.chosen_rate(tuned, "skills", row["arm"])
    assert len({row["base"] for row in runs}) == 1
    ends = [np.mean(row["evaluations"]["accuracy"][-3:]) for row in select(runs, arm="uniform")]
    assert HEADLINE.figures(rows)("skills: uniform, accuracy at the end").startswith(f"{100 * np.mean(ends):.1f} % [")


def test_a_seed_that_some_arm_lacks_is_left_out():
    rows = catalogue.read("lab-headline", EVIDENCE)
    cut = [row for row in rows if not (row["part"] == "training" and row["arm"] == "paper" and row["seed"] > 6)]
    assert HEADLINE.figures(cut)("skills: seeds") == "7"
    begun = [row for row in rows if not (row["part"] == "training" and row["arm"] == "paper" and row["seed"] > 3)]
    assert HEADLINE.figures(begun)("skills: seeds") == "10"
    assert "| paper |" not in HEADLINE.tables(begun)["accuracy on skills"]
    assert not [one for one in HEADLINE.findings(begun) if "the paper's rule" in one.claim]
    few = [row for row in rows if not (row["part"] == "training" and row["seed"] > 0)]
    assert HEADLINE.findings(few) == []
    with pytest.raises(ValueError, match="must start with a bed"):
        HEADLINE.figures(rows)("uniform, rollouts")


@pytest.mark.parametrize(
    ("mean", "low", "high", "bounds", "verdict"),
    [
        (0.4, 0.3, 0.6, 0, "holds"),
        (0.55, 0.5, 0.6, 0, "holds in part"),  # more than the aim
        (0.4, 0.2, 0.8, 0, "holds in part"),  # not surely below what must be proven
        (0.6, 0.3, 1.2, 0, "undecided"),
        (0.4, 0.3, 0.6, 1, "undecided"),  # a seed never reached it
        (0.9, 0.7, 1.1, 3, "does not hold"),
        (0.4, math.nan, math.nan, 0, "undecided"),
    ],
)
def test_a_cost_is_at_most_the_aim_if_its_interval_says_so(mean, low, high, bounds, verdict):
    assert at_most(Estimate(mean, low, high, 10, bounds), 1 / 2, 1 / 1.5) == verdict
