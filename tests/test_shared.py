"""Knowledge that prompts share: against a hierarchical model by brute force, and that useless features cost nothing."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from scipy.stats import binom

import knapsack_rl as kr
from knapsack_rl.estimation import shared
from knapsack_rl.estimation.bayes import BayesFilterEstimator
from knapsack_rl.estimation.grid import LARGEST_LOGIT
from knapsack_rl.estimation.shared import JUMPS, SPEEDS, SPREADS, SharedKnowledge
from knapsack_rl.offline.environments import Sudden, Synthetic
from knapsack_rl.offline.scoring import figures
from knapsack_rl.offline.simulate import allocated, simulate
from oracles import assert_same_state

POINTS = 15
GRID = BayesFilterEstimator(POINTS)


def walk(variance: float) -> np.ndarray:
    """(to, from) chance to move between points of the grid: a walk in continuous time with reflecting ends."""
    spacing = 2 * LARGEST_LOGIT / (POINTS - 1)
    rate = np.zeros((POINTS, POINTS))
    for k in range(POINTS - 1):
        rate[k, k + 1] = rate[k + 1, k] = 1.0
    return expm((rate - np.diag(rate.sum(axis=0))) * variance / (2 * spacing**2))


def priors_by_brute_force(population, values, visits, spread: float, speed: float) -> tuple[np.ndarray, np.ndarray]:
    """Prior of a prompt of each value after some visits, and the log probability of the batches of those visits.

    The rates of prompts stand still; the center of a value moves before each batch but the first. All paths of a center
    over the grid are summed, and all rates of its prompts.

    Args:
        population: (POINTS,) chance of each center at the start, and after a jump.
        values: (M,) value of each prompt, from 0.
        visits: (prompt, batch, successes, rollouts) of each visit, batches from 0.
        spread: of prompts around their center.
        speed: variance of the walk of a center per batch.
    """
    around, batches = walk(spread**2), 1 + max(batch for _, batch, _, _ in visits)
    moves = (1 - JUMPS) * walk(speed) + JUMPS * np.outer(population, np.ones(POINTS))
    found = []
    for value in range(max(values) + 1):
        belief = population.copy()
        for t in range(batches):
            if t:
                belief = moves @ belief
            for prompt in range(len(values)):
                if values[prompt] == value:
                    history = [
                        math.prod(binom.pmf(s, n, rate) for p, b, s, n in visits if p == prompt and b < t)
                        for rate in GRID.grid
                    ]
                    lost = sum(chance * past for chance, past in zip(population, history, strict=True))
                    before = [(1 - JUMPS) * past + JUMPS * lost for past in history]
                    after = list(before)
                    for p, b, s, n in visits:
                        if (p, b) == (prompt, t):
                            after = [past * binom.pmf(s, n, GRID.grid[g]) for g, past in enumerate(after)]
                    belief = belief * (np.array(after) @ around) / (np.array(before) @ around)
            belief = belief / belief.sum()
        found.append(around @ (moves @ belief))
    return np.array(found)


def known_from(visits, prompts: int, before: int) -> np.ndarray:
    """(M, POINTS) likelihood of all visits before a batch."""
    found = np.ones((prompts, POINTS))
    for prompt, batch, good, total in visits:
        if batch < before:
            found[prompt] *= binom.pmf(good, total, GRID.grid)
    return found


def learned(values, visits, population, *, columns=("x",)) -> SharedKnowledge:
    knowledge, ids = SharedKnowledge(GRID), list(range(len(values)))
    knowledge.note(ids, {name: [f"v{value}" for value in values] for name in columns})
    for batch in sorted({batch for _, batch, _, _ in visits}):
        now = [visit for visit in visits if visit[1] == batch]
        prompts = [prompt for prompt, *_ in now]
        known = known_from(visits, len(ids), batch)[prompts]
        likelihood = np.array([binom.pmf(good, total, GRID.grid) for _, _, good, total in now])
        knowledge.learn(prompts, population, known, likelihood)
    return knowledge


def only(knowledge: SharedKnowledge, expert: int) -> SharedKnowledge:
    knowledge.weights = np.eye(knowledge.weights.size)[expert]
    return knowledge


POPULATION = np.linspace(1.0, 2.0, POINTS) / np.linspace(1.0, 2.0, POINTS).sum()
VALUES = (0, 0, 1)
VISITS = ((0, 0, 3, 4), (1, 0, 2, 8), (2, 0, 0, 4), (0, 1, 1, 2), (2, 1, 1, 6), (1, 2, 8, 8), (2, 2, 0, 3))


@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize(("s", "v"), list(itertools.product(range(SPREADS.size), range(SPEEDS.size))))
def test_the_prior_of_an_expert_is_that_of_the_hierarchical_model(batches, s, v):
    visits = [visit for visit in VISITS if visit[1] < batches]
    want = priors_by_brute_force(POPULATION, VALUES, visits, float(SPREADS[s]), float(SPEEDS[v]))
    knowledge = only(learned(VALUES, visits, POPULATION), 1 + s * SPEEDS.size + v)
    got = knowledge.prior(range(3), POPULATION)
    np.testing.assert_allclose(got, want[list(VALUES)], rtol=1e-4, atol=1e-7)


def test_weights_are_products_of_predictions_with_a_share():
    """Against prior times likelihood summed by loops, from the priors before each batch."""
    want = np.array([0.5] + [0.5 / 6] * 6)
    for batch in range(3):
        before = [visit for visit in VISITS if visit[1] < batch]
        now = [visit for visit in VISITS if visit[1] == batch]
        experts = [np.tile(POPULATION, (3, 1))]
        for s, v in itertools.product(SPREADS, SPEEDS):
            if before:
                experts.append(priors_by_brute_force(POPULATION, VALUES, before, float(s), float(v))[list(VALUES)])
            else:
                experts.append(np.tile(walk(float(s) ** 2) @ POPULATION, (3, 1)))
        known = known_from(VISITS, 3, batch)
        known = (1 - JUMPS) * known + JUMPS * (known @ POPULATION)[:, None]
        share = 0.02 * len(now) / 64
        for e, prior in enumerate(experts):
            want[e] = (1 - share) * want[e] + share * (0.5 if e == 0 else 0.5 / 6)
            for prompt, _, good, total in now:
                chance = [prior[prompt, g] * known[prompt, g] for g in range(POINTS)]
                want[e] *= sum(c * binom.pmf(good, total, GRID.grid[g]) for g, c in enumerate(chance)) / sum(chance)
        want /= want.sum()
    got = learned(VALUES, VISITS, POPULATION).weights
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_outcomes_of_a_prompt_say_the_same_of_the_center_in_one_visit_or_in_two(monkeypatch):
    monkeypatch.setattr(shared, "JUMPS", 0.0)
    monkeypatch.setattr(shared, "SPEEDS", np.zeros(2))
    once = learned((0, 0), [(0, 0, 3, 10), (1, 0, 5, 8)], POPULATION)
    twice = learned((0, 0), [(0, 0, 1, 4), (1, 0, 4, 4), (0, 1, 2, 6), (1, 1, 1, 4)], POPULATION)
    for expert in range(1, 7):
        np.testing.assert_allclose(
            only(once, expert).prior([0], POPULATION), only(twice, expert).prior([0], POPULATION), rtol=1e-4, atol=1e-9
        )


# -- the allocator ----------------------------------------------------------------------------------------------------


def test_a_prompt_never_seen_is_believed_to_be_like_those_of_its_value():
    allocator = kr.KnapsackAllocator()
    ids = [f"p{k}" for k in range(40)]
    skill = ["easy" if k < 20 else "hard" for k in range(40)]
    for start in (0, 20, 5, 25, 10, 30):
        some = ids[start : start + 5]
        allocator.allocate(some, 40, features={"skill": skill[start : start + 5]})
        allocator.observe([p for p in some for _ in range(8)], [1 if start < 20 else 0] * 40)
    allocator.note_features(ids, {"skill": skill})
    new = allocator.belief([ids[19], ids[39], "without"]).mean
    assert new[0] > 0.9
    assert new[1] < 0.1
    assert 0.3 < new[2] < 0.7


def test_own_outcomes_outweigh_the_prior_as_they_come():
    allocator = kr.KnapsackAllocator()
    ids = [f"p{k}" for k in range(40)]
    allocator.note_features(ids, {"skill": ["easy"] * 40})
    means = []
    for _ in range(6):
        allocator.observe([p for p in ids for _ in range(8)], [0 if p == "p0" else 1 for p in ids for _ in range(8)])
        means.append(allocator.belief(["p0"]).mean[0])
    assert means[0] > means[1] > means[-1]
    assert means[-1] < 0.03


def test_prompts_with_and_without_features_in_one_batch():
    """A prompt without features has the prior of the population; nobody's features change what it is."""
    with_features, without = kr.KnapsackAllocator(), kr.KnapsackAllocator()
    ids, rng = [f"p{k}" for k in range(30)], np.random.default_rng(1)
    with_features.note_features(ids[:15], {"x": [f"v{k % 3}" for k in range(15)]})
    rewards = rng.random(240) < np.repeat(rng.random(30), 8)
    for allocator in (with_features, without):
        allocator.observe([p for p in ids for _ in range(8)], rewards)
    one, other = (allocator.belief(ids).mean for allocator in (with_features, without))
    np.testing.assert_array_equal(one[15:], other[15:])
    assert (one[:15] != other[:15]).all()
    found = with_features.allocate([*ids, "new"], 248)
    assert found.counts.sum() == 248
    assert not found.degraded


def test_features_are_kept_and_need_not_come_again():
    again, once = kr.KnapsackAllocator(), kr.KnapsackAllocator()
    ids, features = ["a", "b", "c", "d"], {"x": [1, 1, 2, 2]}
    once.note_features(ids, features)
    for step in range(4):
        for allocator in (again, once):
            allocator.allocate(ids, 32, features=features if allocator is again else None)
            allocator.observe([p for p in ids for _ in range(8)], np.arange(32) % (step + 2) == 0)
    assert_same_state(again.state_dict(), once.state_dict())


@pytest.mark.parametrize("estimator", ["beta", "empirical-bayes", "window"])
def test_other_estimators_refuse_features(estimator):
    with pytest.raises(ValueError, match="features need the estimator 'bayes-filter'"):
        kr.KnapsackAllocator(estimator).allocate(["a"], 8, features={"x": [1]})


def test_refused_features_leave_no_trace():
    allocator = kr.KnapsackAllocator()
    for wrong in ({"x": [10**400]}, {"x": [1, 2]}, {}):
        with pytest.raises(ValueError, match="feature"):
            allocator.note_features(["a"], wrong)
    assert allocator.shared is None
    allocator.note_features(["a"], {"x": ["text"]})
    allocator.observe(["a", "b"], [1, 0])
    assert allocator.metrics()["allocation_failures"] == 0


BATCHES = st.lists(
    st.lists(
        st.tuples(st.integers(0, 11), st.integers(0, 4), st.booleans()),
        min_size=1,
        max_size=8,
        unique_by=lambda visit: visit[0],
    ),
    min_size=1,
    max_size=5,
)


def run(allocator: kr.KnapsackAllocator, batches, *, reverse: bool = False) -> kr.KnapsackAllocator:
    for batch in batches:
        order = batch[::-1] if reverse else batch
        featured = [prompt for prompt, _, has in order if has]
        if featured:
            features = {"x": [f"v{p % 3}" for p in featured], "y": [p / 2 for p in featured]}
            allocator.note_features(featured, features)
        ids = [prompt for prompt, _, _ in order for _ in range(4)]
        allocator.observe(ids, [k < good for _, good, _ in order for k in range(4)])
    return allocator


@settings(deadline=None, max_examples=30)
@given(BATCHES)
def test_priors_are_distributions_and_the_order_of_a_batch_does_not_matter(batches):
    one = run(kr.KnapsackAllocator(), batches)
    # Codes are given in the order of appearance, so both know the features beforehand.
    everyone = [[(p, 0, True) for p in range(12)]]
    forth, back = (run(kr.KnapsackAllocator(), everyone + batches, reverse=reverse) for reverse in (False, True))
    for allocator in (one, forth):
        if allocator.shared is not None:
            prior = allocator.shared.prior([*range(12), "new"], allocator.estimator.prior)
            np.testing.assert_allclose(prior.sum(axis=1), 1.0)
            assert (prior > 0).all()
            np.testing.assert_array_equal(prior[12], allocator.estimator.prior)
            assert sum(allocator.shared.trust().values()) <= 1.0 + 1e-9
    np.testing.assert_allclose(forth.belief(range(12)).mean, back.belief(range(12)).mean, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(BATCHES, BATCHES)
def test_a_restored_allocator_goes_on_bit_for_bit(first, then):
    one = run(kr.KnapsackAllocator(), first)
    other = kr.KnapsackAllocator()
    other.load_state_dict(one.state_dict())
    assert_same_state(one.state_dict(), other.state_dict())
    assert_same_state(run(one, then).state_dict(), run(other, then).state_dict())
    assert one.allocate(range(12), 96).counts.tolist() == other.allocate(range(12), 96).counts.tolist()


def test_state_in_a_file(tmp_path):
    one = run(kr.KnapsackAllocator(), [[(p, p % 5, True) for p in range(12)]] * 3)
    one.save(tmp_path / "state.npz")
    other = kr.KnapsackAllocator.load(tmp_path / "state.npz")
    np.testing.assert_array_equal(one.belief(range(12)).mean, other.belief(range(12)).mean)
    assert other.metrics()["features/x"] == one.metrics()["features/x"]


@cache
def saved() -> dict:
    return run(kr.KnapsackAllocator(), [[(p, p % 5, True) for p in range(12)]] * 3).state_dict()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights", lambda a: a[:-1]),
        ("weights", lambda a: -a),
        ("weights", lambda a: a * np.nan),
        ("clock", lambda a: -a),
        ("clock", lambda a: a.astype(float)),
        ("clock", lambda a: a - 1),
        ("values", lambda a: a[:-1]),
        ("values", np.zeros_like),
        ("values", lambda a: a + 10**6),
        ("values", lambda a: -a - 1),
        ("values", lambda a: a.astype(np.float64)),
        ("beliefs", lambda a: a[:, :1]),
        ("beliefs", lambda a: a * 2),
        ("beliefs", lambda a: a * np.float32(np.nan)),
        ("beliefs", lambda a: -a),
        ("beliefs", lambda a: a.astype(np.float64)),
        ("seen", lambda a: a * 0),
        ("seen", lambda a: a[:-1]),
        ("seen", lambda a: a + 100),
        ("codes", lambda a: a + 10**4),
        ("features", lambda a: a[:-1]),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(name, damage):
    state = saved()
    arrays = state["arrays"] | {f"shared.{name}": damage(state["arrays"][f"shared.{name}"])}
    other = run(kr.KnapsackAllocator(), [[(1, 1, True)]])
    before = other.state_dict()
    with pytest.raises(ValueError, match=r"shared knowledge|features of prompts"):
        other.load_state_dict(state | {"arrays": arrays})
    assert_same_state(before, other.state_dict())
    for missing in ("weights", "beliefs", "codes"):
        lacking = {key: array for key, array in state["arrays"].items() if key != f"shared.{missing}"}
        with pytest.raises(ValueError, match=r"shared knowledge|features of prompts"):
            other.load_state_dict(state | {"arrays": lacking})


# -- what features are worth ------------------------------------------------------------------------------------------

SIZE = {"prompts": 256, "epochs": 6, "batch_size": 32, "skills": 32}
SEEDS = range(4)
LEARNED = tuple(Sudden(epoch + 0.5, 0.2, shift=5.0) for epoch in range(1, 5))
WORLDS = {
    "static": Synthetic("bimodal", **SIZE),
    "learned suddenly": Synthetic("beta(1,30)", **SIZE, changes=LEARNED),
    "collapse": Synthetic("late-training", **SIZE, changes=(Sudden(3.5, 0.5, shift=-5.0),)),
    "jump": Synthetic("bimodal", **SIZE, changes=(Sudden(2.5, 0.5, "bimodal"), Sudden(5.5, 0.5, "bimodal"))),
}  # fmt: skip


@cache
def value(world: str, *features: str) -> float:
    """Value of all groups over the seeds."""
    return sum(simulate(WORLDS[world], allocated(features=features), seed).values.sum() for seed in SEEDS)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("column", ["useless", "misleading"])
def test_features_that_say_nothing_cost_nothing(world, column):
    assert value(world, column) > 0.99 * value(world)


@pytest.mark.parametrize("world", WORLDS)
def test_informative_features_gain_also_among_others(world):
    assert value(world, "skill") > 1.02 * value(world)
    assert value(world, "skill", "useless", "misleading") > 1.02 * value(world)


def test_a_value_of_its_own_for_every_prompt_does_not_hurt():
    alone = replace(WORLDS["static"], skills=SIZE["prompts"])  # every prompt is a skill
    without, with_own = (
        sum(simulate(alone, allocated(features=features), seed).values.sum() for seed in range(10))
        for features in ((), ("skill",))
    )
    assert with_own > 0.99 * without


def test_predictions_are_calibrated_where_skills_are_learned_suddenly():
    found = [figures(simulate(WORLDS["learned suddenly"], allocated(features=["skill"]), seed), 1) for seed in SEEDS]
    assert abs(np.mean([row["predicted"] - row["realised"] for row in found])) < 0.05
