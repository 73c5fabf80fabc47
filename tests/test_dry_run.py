"""The dry run: the run as it was, replayed policies, rollouts at equal value, and the page."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from knapsack_rl.offline import dry_run as module
from knapsack_rl.offline.dry_run import KNAPSACK, LIMIT, Settings, dry_run, simulations
from knapsack_rl.offline.environments import Synthetic, draw_rates
from knapsack_rl.offline.reward_logs import RewardLog
from knapsack_rl.offline.simulate import simulate, uniform
from knapsack_rl.report.dry_run_page import savings, summary, write_dry_run


def make_log(rates, epochs=8, batch=16, rollouts=8, seed=0, graded=False, unscored=0.0):
    """Rollouts of prompts with given rates, shuffled within each epoch."""
    rng = np.random.default_rng(seed)
    ids, steps, rewards, step = [], [], [], 0
    for _ in range(epochs):
        for prompts in np.split(rng.permutation(rates.size), range(batch, rates.size, batch)):
            step += 1
            for prompt in prompts:
                size = rollouts if isinstance(rollouts, int) else int(rng.choice(rollouts))
                outcome = (rng.random(size) < rates[prompt]).astype(float)
                if graded:
                    outcome = np.where(outcome > 0, 1.0, rng.choice([0.0, 0.3], size))
                outcome[rng.random(size) < unscored] = np.nan
                ids += [int(prompt)] * size
                steps += [step] * size
                rewards += outcome.tolist()
    return RewardLog.from_rollouts(
        ids, np.array(steps, float), np.array(rewards), success=0.5, source="made up", notes=["a note"]
    )


RATES = draw_rates("late-training", 64, np.random.default_rng(3))


@pytest.fixture(scope="module")
def result():
    return dry_run(make_log(RATES), Settings(seeds=2))


def test_the_run_as_it_was_is_counted_from_the_log(result):
    log, recorded = result.log, result.recorded
    mixed = (log.successes > 0) & (log.successes < log.totals)
    assert recorded.rollouts == 64 * 8 * 8
    assert recorded.effective_prompts == pytest.approx(mixed.mean())
    assert recorded.effective_rollouts == pytest.approx(log.totals[mixed].sum() / log.totals.sum())


def test_the_value_of_the_run_is_the_sum_over_its_groups(result):
    """Smoothing and value written out for each group."""
    log, total = result.log, 0.0
    for prompt in range(len(log.prompt_ids)):
        rows = np.flatnonzero(log.prompt == prompt)
        for at in range(rows.size):
            kernel = [math.exp(-0.5 * ((at - other) / 2.5) ** 2) for other in range(rows.size)]
            p = np.dot(kernel, log.successes[rows]) / np.dot(kernel, log.totals[rows])
            assert result.rates[rows[at]] == pytest.approx(p, abs=1e-12)
            n = log.totals[rows[at]]
            total += (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2
    assert result.recorded.value == pytest.approx(total)


def test_uniform_is_the_run_where_the_run_was_uniform(result):
    row = result.row("uniform", 1.0)
    assert row.value == pytest.approx(result.recorded.value)
    assert row.rollouts == result.recorded.rollouts
    assert result.equal_value["uniform"] == pytest.approx(result.recorded.rollouts, rel=1e-6)
    assert result.saved("uniform") == pytest.approx(0.0, abs=1e-6)


def test_policies_are_ordered_as_they_must_be(result):
    for budget in (1.0, 0.5):
        values = [result.row(name, budget).value for name in ("uniform", KNAPSACK, LIMIT)]
        assert values == sorted(values)
    for name in result.equal_value:
        spent = [row for row in result.rows if row.policy == name]
        assert [row.budget for row in spent] == sorted((row.budget for row in spent), reverse=True)
        assert [row.value for row in spent] == sorted((row.value for row in spent), reverse=True)
    assert result.saved("uniform") < result.saved(KNAPSACK) < result.saved(LIMIT) < 1


def test_the_rollouts_at_equal_value_buy_it(result):
    """The limit needs no simulation: allocate the interpolated budget at the smoothed rates and add up the values."""
    import knapsack_rl as kr

    share = result.equal_value[LIMIT] / result.recorded.rollouts
    log, bought = result.log, 0.0
    for step in range(log.steps.size):
        here = log.step == step
        rates = result.rates[here]
        counts = kr.allocate(rates, round(share * log.totals[here].sum())).counts
        bought += kr.value(counts, rates).sum()
    # Between two budgets the curve is concave, so the interpolated budget buys a little more than needed.
    assert result.recorded.value <= bought * 1.002
    assert bought <= 1.03 * result.recorded.value


def test_the_knapsack_reaches_no_fewer_prompts_than_the_paper_here(result):
    assert result.row(KNAPSACK, 1.0).effective_rollouts > result.recorded.effective_rollouts
    assert result.calibration.visits.sum() == 2 * result.log.prompt.size


def test_ragged_groups_keep_each_steps_total():
    log = make_log(RATES[:32], rollouts=[4, 8, 12])
    found = dry_run(log, Settings(seeds=1))
    assert found.row(KNAPSACK, 1.0).rollouts == log.totals.sum()
    assert any("groups hold 4 to 12 rollouts" in note for note in found.notes)
    assert math.isnan(found.row(KNAPSACK, 1.0).value_deviation)


def test_remarks_say_what_limits_the_result():
    log = make_log(RATES[:32], epochs=2, graded=True, unscored=0.1)
    once = RewardLog.from_rollouts(
        [*(log.prompt_ids[p] for p in log.prompt), "new", "new"],
        np.append(log.steps[log.step], [99, 99]).astype(float),
        np.append(log.successes > 0, [1, 0]).astype(float),
    )
    notes = " ".join(dry_run(log, Settings(seeds=1)).notes)
    assert "a note" in notes
    assert "the median prompt has 2 visits" in notes
    assert "rollouts without a reward were left out" in notes
    assert "rewards are graded" in notes
    assert "1 of 33 prompts were visited once" in " ".join(dry_run(once, Settings(seeds=1)).notes)


@pytest.mark.parametrize(
    ("ids", "steps", "message"),
    [
        (["a"] * 8, [1, 1, 1, 1, 2, 2, 2, 2], "at least two prompts"),
        (list("aabbccdd"), [1, 1, 1, 1, 2, 2, 2, 2], "no prompt is visited twice.*column that stays the same"),
        (list("abababab"), [1, 1, 2, 2, 3, 3, 4, 4], "each of one rollout"),
    ],
)
def test_a_log_that_says_nothing_is_refused(ids, steps, message):
    log = RewardLog.from_rollouts(ids, np.array(steps, float), np.array([0, 1] * 4, float), source="made up")
    with pytest.raises(ValueError, match=f"made up holds .*{message}"):
        dry_run(log)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_log_without_any_value_is_no_error(rate, tmp_path):
    found = dry_run(make_log(np.full(8, rate), epochs=3, batch=4), Settings(seeds=1))
    assert found.recorded.value == 0
    assert "there is nothing to save" in summary(found)
    json.dumps(found.as_dict(), allow_nan=False)
    assert "Dry run" in write_dry_run(found, tmp_path / "page.html").read_text()


def test_small_groups_have_no_smaller_budget_to_try():
    """Two rollouts a prompt: half of that is one, and only the budgets that are always shown are tried."""
    found = dry_run(make_log(RATES[:16], epochs=4, rollouts=2), Settings(seeds=1))
    assert {row.budget for row in found.rows} == {1.0, 0.5}
    assert found.row("uniform", 0.5).value == 0  # a group of one has no gradient


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds"),
        ({"bandwidth": 0}, "bandwidth"),
        ({"estimator": "guess"}, "estimator must be one of"),
        ({"min_rollouts": 9, "max_rollouts": 8}, "min_rollouts 9 is above"),
        ({"budget_unit": "tokens"}, "a dry run has no lengths"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dry_run(make_log(RATES[:8], epochs=2), Settings(**settings))


def test_progress_is_reported():
    lines = []
    settings = Settings(seeds=1)
    dry_run(make_log(RATES[:8], epochs=2, batch=8), settings, lines.append)
    assert len(lines) == simulations(settings) == 4 * len(module.BUDGETS)


def test_text_and_json_agree(result):
    found = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    text = summary(result)
    saved = 100 * found["equal_value"][KNAPSACK]["saved"]
    assert f"{KNAPSACK}: the value of the run for" in text
    assert f"{saved:.1f} % fewer" in text
    assert module.ASSUMPTION in text
    assert "Gaussian kernel of 2.5 visits" in text
    assert "Note: a note." in text
    assert len(re.findall(r"^\| (as it was|uniform|paper|knapsack|success rates known) ", text, re.MULTILINE)) == 9


def test_a_policy_that_does_not_reach_the_value_says_so():
    """Recorded with the optimum of the true rates: half-blind policies do not get there with the same budget."""
    import knapsack_rl as kr

    rng, ids, steps, rewards = np.random.default_rng(0), [], [], []
    for step in range(12):
        counts = kr.allocate(RATES, 8 * RATES.size).counts
        for prompt, count in enumerate(counts):
            ids += [prompt] * count
            steps += [step] * count
            rewards += (rng.random(count) < RATES[prompt]).tolist()
    log = RewardLog.from_rollouts(ids, np.array(steps, float), np.array(rewards, float))
    found = dry_run(log, Settings(seeds=1))
    assert found.row("uniform", 1.0).value < found.recorded.value
    assert math.isnan(found.equal_value["uniform"])
    assert "the recorded budget does not buy the value of the run" in savings(found, "uniform")
    assert found.as_dict()["equal_value"]["uniform"]["saved"] is None


def test_an_abundant_budget_gives_a_bound():
    """Most rollouts went to solved prompts, so a quarter of the budget is enough for those who know."""
    rates = np.array([1.0] * 14 + [0.5] * 2)
    found = dry_run(make_log(rates, epochs=3, batch=16, rollouts=32), Settings(seeds=1))
    assert found.at_least(LIMIT)
    assert found.saved(LIMIT) == pytest.approx(0.75)
    assert "for at most" in savings(found, LIMIT)
    assert "at least 75.0 % fewer" in savings(found, LIMIT)


def test_the_page_is_self_contained_and_escaped(tmp_path):
    log = make_log(RATES[:16], epochs=4)
    nasty = RewardLog(**{**vars(log), "source": "<script>alert(1)</script>", "notes": ("<b>bold</b>",)})
    page = write_dry_run(dry_run(nasty, Settings(seeds=1)), tmp_path / "deep" / "page.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<b>bold" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert page.count("<svg") == 4
    assert module.ASSUMPTION in page


def test_the_prediction_is_close_to_the_truth():
    """Record a uniform run of an environment whose truth is known; what the replay of its log predicts for the other
    policies is compared with these policies in the environment itself."""
    environment = Synthetic("late-training", prompts=256, epochs=12, batch_size=64, walk=0.1)
    recorded = simulate(environment, uniform(), 0)
    names = ("step", "prompt", "counts", "successes", "effective")
    step, prompt, counts, successes, effective = (getattr(recorded, name) for name in names)
    log = RewardLog("made up", tuple(range(256)), np.unique(step), step, prompt, counts, successes, effective)
    predicted = dry_run(log, Settings(seeds=1))
    steps = predicted.log.steps.size
    for name, make in Settings().policies().items():
        full = simulate(environment, make, 0)
        row = predicted.row(name, 1.0)
        assert row.value / predicted.recorded.value == pytest.approx(
            full.values.sum() / recorded.values.sum(), abs=0.02
        )
        given = full.counts[full.effective].sum() / full.counts.sum()
        assert row.effective_rollouts == pytest.approx(given, abs=0.04)
        assert row.effective_prompts == pytest.approx(full.effective.mean(), abs=0.04)
        if name != "uniform":
            needed = round((1 - predicted.saved(name)) * 64 * 8)
            bought = simulate(environment, make, 0, [needed] * steps).values.sum()
            assert bought == pytest.approx(recorded.values.sum(), rel=0.03)
