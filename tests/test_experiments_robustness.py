"""The robustness experiment: late and blurred policies against their definition, and text that follows the rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import catalogue, robustness
from experiments.contract import Options, Row
from experiments.robustness import (
    DELAY,
    DISCOUNT,
    LOGITS,
    PRIOR,
    RECORDED,
    SAMPLED,
    WINDOW,
    curve,
)
from knapsack_rl.allocation.degradation import uniform_counts
from knapsack_rl.offline.environments import Synthetic
from knapsack_rl.offline.scoring import gain_captured
from knapsack_rl.offline.simulate import allocated, known_rates, simulate

PLACE = Synthetic("late-training", prompts=96, epochs=6, batch_size=32)


class Diary:
    """A uniform policy that notes the outcomes it has seen before each step."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.before: list[list[int]] = []

    def allocate(self, prompts, budget):
        self.before.append(list(self.seen))
        return uniform_counts(prompts.size, budget), np.full(prompts.size, np.nan)

    def observe(self, prompts_R, successes_R):
        self.seen.append(prompts_R.size)


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_outcomes_arrive_whole_epochs_late(epochs: int) -> None:
    diaries = []

    def make(episode):
        diaries.append(Diary())
        return robustness.Late(diaries[-1], episode, epochs)

    simulate(PLACE, make, 0)
    steps = 3  # of an epoch: 96 prompts, 32 at a time
    for step, before in enumerate(diaries[0].before):
        assert len(before) == max(0, step - steps * epochs)


def test_steps_of_an_epoch_with_a_smaller_last_batch() -> None:
    assert robustness.steps_per_epoch(Synthetic(prompts=70, epochs=2, batch_size=32).start(0)) == 3


def test_without_delay_nothing_changes() -> None:
    plain = simulate(PLACE, allocated("beta"), 0)
    wrapped = simulate(PLACE, robustness.late("beta", {}, 0), 0)
    assert (plain.counts == wrapped.counts).all()


def test_without_noise_the_rates_are_known() -> None:
    known = simulate(PLACE, known_rates(), 0)
    assert (simulate(PLACE, robustness.logit_noise(0.0, 0), 0).counts == known.counts).all()
    assert gain_captured(simulate(PLACE, robustness.logit_noise(3.0, 0), 0)) < 0.5


def test_many_fresh_rewards_come_close_to_known_rates_and_few_do_not() -> None:
    gains = [gain_captured(simulate(PLACE, robustness.sampled(n, 0, fallback=True), 0)) for n in (2, 64, 4096)]
    assert gains[0] < gains[1] < gains[2]
    assert gains[2] > 0.95


def test_the_full_version_turns_every_knob_over_its_range() -> None:
    found = robustness.settings(0, quick=False)
    at = {knob: {s.at for s in found if s.knob == knob} for knob in (WINDOW, SAMPLED, DISCOUNT, PRIOR, DELAY, LOGITS)}
    assert at[WINDOW] == {2, 4, 8, 16, 32, 64}
    assert at[DELAY] == {0, 1, 2, 3, 4}
    assert {s.policy for s in found if s.knob == DELAY} == set(robustness.LISTED)
    assert all(len(places) >= 5 for places in at.values())


def test_the_quick_version(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = Options(seeds=1, quick=True, workers=1, runs=tmp_path)
    reported: list[str] = []
    rows = robustness.measure(options, reported.append)
    assert len(reported) == robustness.pieces(options)
    assert json.loads(json.dumps(rows)) == rows
    perfect = [row["gain_captured"] for row in rows if row["knob"] == LOGITS and row["at"] == 0]
    assert perfect == [1.0] * 3
    assert len(robustness.findings(rows)) == 5
    assert robustness.figures(rows)(f"{RECORDED}: rates known but for noise, {LOGITS} 0") == "100 ± 0 %"
    assert set(robustness.tables(rows)) == set(robustness.KNOBS)
    catalogue.draw("robustness", rows, tmp_path)


def rows_with(late: float, rival: float) -> list[Row]:
    """Rows as if measured: the Bayes filter captures 0.8, ``late`` with late outcomes; a Beta prior ``rival``."""
    found: list[Row] = []

    def add(knob: str, policy: str, at: float, gain: float) -> None:
        for seed, offset in ((0, -0.01), (1, 0.01)):
            row = {"seed": seed, "environment": RECORDED, "knob": knob, "policy": policy, "at": at}
            found.append(row | {"gain_captured": gain + offset})

    for policy in ("paper", "Bayes filter"):
        for at, gain in ((0.0, 0.8), (1.0, late), (4.0, late)):
            add(DELAY, policy, at, gain)
    for at in (2.0, 64.0):
        add(WINDOW, "paper", at, 0.5)
        add(SAMPLED, "paper", at, 0.5)
    for policy, knob in (("Beta", DISCOUNT), ("empirical Bayes", DISCOUNT), ("Beta", PRIOR)):
        add(knob, policy, 0.5, rival)
        add(knob, policy, 1.0, rival)
    for at, gain in ((0.0, 1.0), (1.0, 0.6)):
        add(LOGITS, "rates known but for noise", at, gain)
    return found


def test_verdicts_follow_the_rows() -> None:
    good = [finding.verdict for finding in robustness.findings(rows_with(late=0.78, rival=0.7))]
    assert good == ["holds"] * 5
    bad = [finding.verdict for finding in robustness.findings(rows_with(late=0.2, rival=0.95))]
    assert bad == ["does not hold", "holds", "holds", "holds", "does not hold"]
    rows = rows_with(late=0.2, rival=0.95)
    lead, rival, _ = robustness.closest_rival(rows)
    assert (round(lead, 3), rival) == (-0.15, "Beta with discount per visit 0.5")
    assert robustness.figures(rows)(f"{RECORDED}: Bayes filter, {DELAY} 4") == "20 ± 1 %"


def test_a_curve_is_mean_and_deviation_over_seeds() -> None:
    found = curve(rows_with(0.5, 0.7), RECORDED, DELAY, "paper")
    assert found[0.0] == pytest.approx((0.8, 0.01 * np.sqrt(2)))


def test_outcomes_of_other_prompts_than_the_step_serves_are_learned_from() -> None:
    run = simulate(PLACE, robustness.late("bayes-filter", {}, 1), 0)
    counts = run.counts.reshape(-1, 32)
    assert (counts[:4] == counts[0, 0]).all()  # an epoch and a step without any outcome
    assert all(np.ptp(step) > 0 for step in counts[6:])  # each prompt has been heard of
