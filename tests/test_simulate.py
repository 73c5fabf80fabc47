"""Policies in environments: draws, comparisons and the meaning of the figures."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import knapsack_rl as kr
from cases import named_case
from knapsack_rl.allocation.degradation import uniform_counts
from knapsack_rl.offline.environments import Replay, Synthetic, Trace
from knapsack_rl.offline.scoring import (
    cell,
    compare,
    discovery,
    figures,
    gain_captured,
    markdown_tables,
)
from knapsack_rl.offline.simulate import Simulation, allocated, known_rates, simulate, uniform

SMALL = Synthetic("late-training", prompts=48, epochs=6, batch_size=16)
POLICIES = {
    "uniform": uniform(),
    "window": allocated("window"),
    "no fallback": allocated("window", fallback=False),
    "beta": allocated("beta"),
    "empirical-bayes": allocated(),
    "known": known_rates(),
}


@given(prompts=st.integers(1, 20), budget=st.integers(0, 200))
def test_uniform_counts_differ_by_one_at_most(prompts, budget):
    counts = uniform_counts(prompts, budget)
    assert counts.sum() == budget
    assert counts.max() - counts.min() <= 1


def test_a_simulation_accounts_for_every_rollout():
    for name, policy in POLICIES.items():
        with named_case(name=name):
            run = simulate(SMALL, policy, 1)
            assert run.prompt.size == 48 * 6
            steps = np.bincount(run.step, run.counts)
            assert (steps == 16 * 8).all()
            assert (np.bincount(run.step, run.uniform) == steps).all()
            assert (np.bincount(run.step, run.best) == steps).all()
            assert ((run.successes >= 0) & (run.successes <= run.counts)).all()
            for prompt in range(48):
                assert run.visit[run.prompt == prompt].tolist() == list(range(6))


def test_policies_meet_the_same_prompts_in_the_same_order():
    runs = [simulate(SMALL, make, 4) for make in POLICIES.values()]
    for run in runs[1:]:
        assert (run.prompt == runs[0].prompt).all()
        assert (run.rates == runs[0].rates).all()


def test_uniform_and_the_allocator_meet_the_same_rewards_at_first():
    """Nothing is known of a first batch, so all policies that know no rates are uniform there and see the same."""
    one, other = simulate(SMALL, uniform(), 2), simulate(SMALL, allocated(), 2)
    first = one.step == 0
    assert (one.counts[first] == other.counts[first]).all()
    assert (one.successes[first] == other.successes[first]).all()


def test_a_simulation_is_reproducible_and_seeds_differ():
    one, same, other = (simulate(SMALL, allocated(), seed) for seed in (0, 0, 1))
    assert (one.counts == same.counts).all()
    assert (one.successes == same.successes).all()
    assert (one.successes != other.successes).any()


def test_rewards_have_the_true_rate():
    run = simulate(Synthetic("point(0.3)", prompts=256, epochs=10), uniform(), 0)
    share = run.successes.sum() / run.counts.sum()
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / run.counts.sum()))


def test_the_realised_ratio_is_the_expected_one():
    """Against the paper's probability, summed over the visits: Monte Carlo and closed form agree."""
    run = simulate(Synthetic("uniform", prompts=512, epochs=10), uniform(), 0)
    chance = 1 - run.rates**8 - (1 - run.rates) ** 8
    spread = math.sqrt((chance * (1 - chance)).sum()) / chance.size
    assert run.effective.mean() == pytest.approx(chance.mean(), abs=4 * spread)


def test_values_are_those_of_many_simulated_groups():
    """V(N, p) is the chance of a mixed group times p (1-p)^2."""
    run = simulate(Synthetic("beta(2,3)", prompts=8, epochs=1), known_rates(), 0)
    rng = np.random.default_rng(0)
    for p, n, found in zip(run.rates, run.counts, run.values, strict=True):
        good = (rng.random((40_000, n)) < p).sum(axis=1)
        mixed = ((good > 0) & (good < n)).mean()
        assert found == pytest.approx(mixed * p * (1 - p) ** 2, abs=0.002)


class Ledger:
    """A policy that records what it observes."""

    def __init__(self):
        self.seen = []

    def allocate(self, prompts, budget):
        return uniform_counts(prompts.size, budget), np.full(prompts.size, np.nan)

    def observe(self, prompts_R, successes_R):
        self.seen.append((prompts_R.copy(), successes_R.copy()))


def test_a_policy_observes_what_happened():
    ledger = Ledger()
    run = simulate(SMALL, lambda _: ledger, 0)
    for step, (prompts_R, successes_R) in enumerate(ledger.seen):
        here = run.step == step
        for prompt, count, successes in zip(run.prompt[here], run.counts[here], run.successes[here], strict=True):
            assert (prompts_R == prompt).sum() == count
            assert successes_R[prompts_R == prompt].sum() == successes


def test_the_adapter_is_the_allocator():
    """The same rewards into an allocator by hand give the same counts."""
    run = simulate(SMALL, allocated("beta"), 5)
    ledger = Ledger()
    allocator = kr.KnapsackAllocator("beta")

    class Both:
        def allocate(self, prompts, budget):
            return allocator.allocate(prompts.tolist(), budget).counts, np.full(prompts.size, np.nan)

        def observe(self, prompts_R, successes_R):
            ledger.observe(prompts_R, successes_R)
            allocator.observe(prompts_R.tolist(), successes_R.astype(float))

    again = simulate(SMALL, lambda _: Both(), 5)
    assert (again.counts == run.counts).all()


def test_the_environment_learns_from_effective_groups_only():
    environment = Synthetic("point(0.5)", prompts=16, epochs=2, batch_size=16, gain=0.5)
    run = simulate(environment, uniform(), 0, budget=2)
    first, second = run.visit == 0, run.visit == 1
    effective = run.effective[first][np.argsort(run.prompt[first])]
    later = run.rates[second][np.argsort(run.prompt[second])]
    assert 0 < effective.sum() < 16
    assert later[effective] == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert later[~effective] == pytest.approx(0.5)


def test_budgets_may_differ_between_steps():
    budgets = [16 * (2 + step % 5) for step in range(18)]
    run = simulate(SMALL, allocated(), 0, budgets)
    assert np.bincount(run.step, run.counts).tolist() == budgets


def test_a_starved_step_is_not_an_error():
    for budget, name in itertools.product([0, 1, 7, 16, 31], POLICIES):
        with named_case(budget=budget, name=name):
            environment = Synthetic("late-training", prompts=16, epochs=3, batch_size=16)
            run = simulate(environment, POLICIES[name], 0, [budget] * 3)
            assert (np.bincount(run.step, run.counts, minlength=3) == budget).all()


@pytest.mark.parametrize(
    ("budget", "message"),
    [([8, 8], "18 steps and 2 budgets"), (-1, "budget of step 0"), ([8.5] * 18, "budget of step")],
)
def test_impossible_budgets_are_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        simulate(SMALL, uniform(), 0, budget)


def test_progress_counts_the_steps():
    reported = []
    simulate(SMALL, uniform(), 0, advanced=lambda done, total: reported.append((done, total)))
    assert reported == [(k, 18) for k in range(1, 19)]


# -- figure of merit --------------------------------------------------------------------------------------------------


def test_uniform_captures_nothing_and_the_true_rates_everything():
    for mixture, gain in itertools.product(
        ["late-training", "uniform", "hard", "0.5*point(0) + 0.5*uniform"], [0.0, 0.1]
    ):
        with named_case(mixture=mixture, gain=gain):
            environment = Synthetic(mixture, prompts=32, epochs=5, batch_size=16, gain=gain)
            assert gain_captured(simulate(environment, uniform(), 0)) == 0.0
            assert gain_captured(simulate(environment, known_rates(), 0)) == 1.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(list(POLICIES)), budget=st.integers(1, 12))
def test_no_policy_beats_the_true_rates(seed, name, budget):
    run = simulate(SMALL, POLICIES[name], seed, budget)
    gain = gain_captured(run)
    assert math.isnan(gain) or gain <= 1 + 1e-9


def test_the_references_are_what_the_two_policies_earn_alone():
    run, base, most = (simulate(SMALL, make, 3) for make in (allocated(), uniform(), known_rates()))
    late = run.visit >= 3
    expected = (run.values[late].sum() - base.values[late].sum()) / (most.values[late].sum() - base.values[late].sum())
    assert gain_captured(run) == pytest.approx(expected, rel=1e-12)


def test_the_first_visits_are_left_out():
    run = simulate(SMALL, allocated(), 3)
    assert gain_captured(run, 0) != gain_captured(run, 3)
    assert math.isnan(gain_captured(run, 6))  # six visits: nothing is left


def test_twice_the_budget_is_placed_on_the_same_scale():
    run = simulate(SMALL, uniform(2), 0)
    assert (run.counts == 16).all()
    assert gain_captured(run) > 0


def test_no_gain_is_not_a_number():
    assert math.isnan(gain_captured(simulate(Synthetic("point(0)", prompts=8, epochs=4), allocated(), 0)))
    assert math.isnan(gain_captured(simulate(Synthetic("point(0.4)", prompts=8, epochs=4), uniform(), 0)))


def by_hand(**columns):
    size = len(columns["prompt"])
    filled = {"step": np.arange(size), "rates": np.full(size, 0.5), "predicted": np.full(size, np.nan)}
    filled |= {name: np.full(size, 4) for name in ("uniform", "best", "counts")}
    return Simulation(**(filled | {name: np.array(values) for name, values in columns.items()}))


def test_discovery_counts_prompts_that_come_later():
    # Prompt 0 found at its second visit, 1 solved at once, 2 never, 3 found at its third.
    run = by_hand(
        prompt=[0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3],
        visit=[0] * 4 + [1] * 4 + [2] * 4,
        successes=[0, 3, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2],
    )
    assert discovery(run) == (3, 2)
    assert discovery(run, early=2) == (2, 1)
    found = figures(run, first_visit=0)
    assert (found["unsolved"], found["found"], found["found_share"]) == (3, 2, pytest.approx(2 / 3))


def test_ratios_and_calibration_by_hand():
    run = by_hand(
        prompt=[0, 1, 2, 0, 1, 2],
        visit=[0, 0, 0, 1, 1, 1],
        counts=[4, 4, 4, 2, 6, 0],
        successes=[0, 4, 2, 1, 6, 0],
        predicted=[0.9, 0.9, 0.9, 0.5, 0.2, np.nan],
        rates=[0.1, 0.9, 0.5, 0.2, 0.8, 0.3],
    )
    found = figures(run, first_visit=1)
    assert found["effective_rollouts"] == pytest.approx(2 / 8)
    assert found["effective_prompts"] == pytest.approx(1 / 2)
    assert found["predicted"] == pytest.approx(0.35)
    assert found["realised"] == pytest.approx(0.5)
    assert found["brier"] == pytest.approx((0.5**2 + 0.2**2) / 2)
    assert found["rollouts"] == 20
    assert found["final_rate"] == pytest.approx((0.2 + 0.8 + 0.3) / 3)
    assert math.isnan(figures(run, first_visit=2)["effective_rollouts"])


def test_the_true_rates_are_calibrated():
    run = simulate(Synthetic("uniform", prompts=512, epochs=8), known_rates(), 0)
    found = figures(run)
    assert found["predicted"] == pytest.approx(found["realised"], abs=0.02)
    chance = run.predicted[run.visit >= 3]
    assert found["brier"] == pytest.approx((chance * (1 - chance)).mean(), abs=0.01)


# -- several policies and seeds ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    policies = {name: POLICIES[name] for name in ("uniform", "window", "empirical-bayes", "known")}
    return compare({"here": SMALL, "there": Synthetic("hard", prompts=16, epochs=4)}, policies, (0, 1, 2))


def test_a_comparison_has_a_row_for_each_pair(results):
    pairs = [(row.environment, row.policy) for row in results]
    assert pairs == [(e, p) for e in ("here", "there") for p in ("uniform", "window", "empirical-bayes", "known")]
    assert all(list(row.by_seed) == [0, 1, 2] for row in results)


def test_means_and_deviations_are_over_the_seeds(results):
    row = results[2]
    gains = [gain_captured(simulate(SMALL, allocated(), seed)) for seed in (0, 1, 2)]
    assert row.mean("gain_captured") == pytest.approx(sum(gains) / 3)
    mean = sum(gains) / 3
    assert row.deviation("gain_captured") == pytest.approx(math.sqrt(sum((g - mean) ** 2 for g in gains) / 2))


def test_the_reliability_curve_pools_the_seeds(results):
    runs = [simulate(SMALL, allocated(), seed) for seed in (0, 1, 2)]
    late = [run.visit >= 3 for run in runs]
    predicted = np.concatenate([run.predicted[k] for run, k in zip(runs, late, strict=True)])
    effective = np.concatenate([run.effective[k] for run, k in zip(runs, late, strict=True)])
    curve = results[2].calibration
    inside = (predicted >= 0.3) & (predicted < 0.4)
    place = np.searchsorted(curve.predicted, 0.3)
    assert curve.visits.sum() == predicted.size
    assert curve.visits[place] == inside.sum()
    assert curve.realised[place] == pytest.approx(effective[inside].mean())


def test_results_are_json_and_markdown(results):
    rows = [json.loads(json.dumps(row.as_dict(), allow_nan=False)) for row in results]
    assert rows[0]["mean"]["gain_captured"] == 0.0
    assert rows[0]["mean"]["predicted"] is None  # uniform predicts nothing
    text = markdown_tables(results)
    assert text.count("| policy | gain captured |") == 2
    assert "| uniform | 0.0 ± 0.0 % |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_cells():
    assert cell("gain_captured", 0.1234, 0.02) == "12.3 ± 2.0 %"
    assert cell("gain_captured", -0.05) == "−5.0 %"
    assert cell("brier", 0.12345, 0.001) == "0.123 ± 0.001"
    assert cell("found", 12.4, 1.5) == "12 ± 2"
    assert cell("brier", float("nan")) == "–"


@pytest.mark.parametrize("seeds", [(), (0, 0)])
def test_seeds_are_distinct(seeds):
    with pytest.raises(ValueError, match="seeds must be distinct"):
        compare({"here": SMALL}, {"uniform": uniform()}, seeds)


def test_a_trace_is_an_environment_too():
    rng = np.random.default_rng(0)
    rates = rng.random(24)
    prompt = np.repeat(np.arange(24), 8)
    trace = Trace(prompt, rng.binomial(8, rates[prompt]), np.full(prompt.size, 8))
    results = compare({"trace": Replay(trace, batch_size=12)}, {"u": uniform(), "k": known_rates()}, (0, 1))
    assert [row.mean("gain_captured") for row in results] == [0.0, 1.0]


# -- the paper's rule with and without its fallback -------------------------------------------------------------------


def test_without_the_fallback_the_window_treats_its_means_as_true():
    allocator = kr.KnapsackAllocator("window", fallback=False)
    ids = ["easy", "half", "rare", "never"]
    successes = [8, 4, 1, 0]
    allocator.observe(
        [prompt for prompt in ids for _ in range(8)], [float(k < good) for good in successes for k in range(8)]
    )
    counts = allocator.allocate(ids, 200).counts
    assert counts.tolist() == kr.allocate([1, 0.5, 0.125, 0], 200).counts.tolist()
    assert counts.tolist() != kr.allocate([1, 0.5, 0.125, 0], 200, fallback=True).counts.tolist()


def test_the_fallback_is_part_of_the_saved_settings(tmp_path):
    allocator = kr.KnapsackAllocator("window", fallback=False)
    allocator.observe(["a"] * 8, [1, 0] * 4)
    allocator.save(tmp_path / "state.npz")
    again = kr.KnapsackAllocator.load(tmp_path / "state.npz")
    assert again.estimator.settings() == {"window": 16, "minimum": 8, "fallback": False}
    assert kr.KnapsackAllocator("window").estimator.settings() == {"window": 16, "minimum": 8, "fallback": True}
    with pytest.raises(ValueError, match="belongs to estimator"):
        kr.KnapsackAllocator("window").load_state_dict(allocator.state_dict())
    with pytest.raises(ValueError, match="fallback must be true or false, got 'no'"):
        kr.KnapsackAllocator("window", fallback="no")
