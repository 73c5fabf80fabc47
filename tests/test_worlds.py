"""The default against uniform allocation and the Beta estimator where rates jump, stand still or cannot be told apart.

Nothing was chosen on these worlds: those that were used for choosing have other mixtures, sizes and seeds.
"""

from __future__ import annotations

import numpy as np
import pytest

import knapsack_rl as kr
from knapsack_rl.offline.environments import Sudden, Synthetic
from knapsack_rl.offline.simulate import Simulation, allocated, simulate

SIZE = {"prompts": 192, "epochs": 14, "batch_size": 32}
TOGETHER = SIZE | {"batch_size": 192}
SEEDS = (301, 302)
MORE = (*SEEDS, 303, 304, 305, 306)  # for batches of all prompts, which take no time

WORLDS = {
    "static": Synthetic("0.3*beta(20,1) + 0.3*beta(1,20) + 0.4*beta(2,2)", **SIZE),
    "learning": Synthetic("beta(1,10)", **SIZE, gain=0.3),
    "up and down": Synthetic(
        "0.7*beta(1,20) + 0.3*uniform", **SIZE, changes=(Sudden(4.0, shift=3.0), Sudden(9.0, shift=-3.0))
    ),
    "collapse": Synthetic("0.6*beta(20,1) + 0.4*uniform", **SIZE, changes=(Sudden(6.5, shift=-4.0),)),
    "format learned": Synthetic("beta(1,20)", **SIZE, changes=(Sudden(5.5, 0.6, "beta(3,2)"),)),
    "another policy": Synthetic("bimodal", **SIZE, changes=(Sudden(7.0, mixture="bimodal"),)),
    "batches of four": Synthetic(
        "bimodal", prompts=96, epochs=12, batch_size=4, changes=(Sudden(6.0, mixture="uniform"),)
    ),
    "some jump at any time": Synthetic(
        "late-training", **SIZE, changes=tuple(Sudden(epoch + 0.5, 0.15, "late-training") for epoch in range(1, 14))
    ),
    "falling": Synthetic("beta(8,1)", **SIZE, drift=-0.25, walk=0.1),
    "fast walk": Synthetic("beta(2,2)", **SIZE, walk=1.0),
    "together": Synthetic("late-training", **TOGETHER),
    "together, walking": Synthetic("beta(1,2)", **TOGETHER, walk=0.4),
    "together, another policy": Synthetic("late-training", **TOGETHER, changes=(Sudden(6.0, mixture="late-training"),)),
    "drawn anew, another policy": Synthetic(
        "late-training", **SIZE, reshuffled=False, changes=(Sudden(7.0, mixture="uniform"),)
    ),
    "many retired": Synthetic("uniform", **SIZE, retired=6000, walk=0.3),
}  # fmt: skip


def value_gained(run: Simulation, prompts: int) -> tuple[float, float]:
    """Points of the gain captured over the whole run (0 for uniform, 100 for known rates), and value over uniform's."""
    used = run.prompt < prompts  # the others are retired
    found, uniform, known = (values[used].sum() for values in (run.values, run.values_if_uniform, run.values_if_known))
    return 100 * (found - uniform) / (known - uniform), found / uniform


@pytest.mark.parametrize("world", WORLDS)
def test_the_filter_is_never_below_uniform_nor_far_below_beta(world: str) -> None:
    gain = {
        name: np.mean([value_gained(simulate(WORLDS[world], allocated(name), seed), WORLDS[world].prompts)[0]
                       for seed in (MORE if "together" in world else SEEDS)])
        for name in ("bayes-filter", "beta")
    }  # fmt: skip
    assert gain["bayes-filter"] > 0
    assert gain["bayes-filter"] > gain["beta"] - 3


@pytest.mark.parametrize("world", ["static", "another policy", "collapse", "together"])
def test_with_skipping_too(world: str) -> None:
    for seed in SEEDS:
        assert value_gained(simulate(WORLDS[world], allocated(min_rollouts=0), seed), SIZE["prompts"])[0] > 0


@pytest.mark.parametrize("size", [SIZE, TOGETHER])
def test_equal_rates_near_one_are_not_chased(size: dict) -> None:
    """Where all prompts are alike, uniform is the optimum, and one failure in a hundred rollouts is noise."""
    for seed in SEEDS:
        run = simulate(Synthetic("point(0.99)", **size), allocated(), seed)
        late = run.step >= run.step.max() // 2
        assert run.values.sum() > 0.97 * run.values_if_uniform.sum()
        assert np.quantile(run.counts[late], 0.9) <= 16


def test_a_saved_state_does_not_harm_another_policy() -> None:
    """In the first epoch of another policy, whose rates have nothing to do with those in the state."""
    rng = np.random.default_rng(7)
    ids, before, after = np.arange(256), rng.beta(0.3, 0.3, 256), rng.beta(0.3, 0.3, 256)
    allocator = kr.KnapsackAllocator()
    values = np.zeros(2)
    for epoch in range(9):
        rates = before if epoch < 6 else after
        for batch in np.array_split(rng.permutation(ids), 8):
            counts = allocator.allocate(batch.tolist(), 8 * batch.size).counts
            if epoch == 6:
                allocator, saved = kr.KnapsackAllocator(), allocator.state_dict()
                allocator.load_state_dict(saved)
            if epoch >= 6:
                values += kr.value(counts, rates[batch]).sum(), kr.value(8, rates[batch]).sum()
            prompts = np.repeat(batch, counts)
            allocator.observe(prompts.tolist(), (rng.random(prompts.size) < rates[prompts]).astype(float))
    assert values[0] > values[1]


@pytest.mark.parametrize("walk", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("size", [SIZE, TOGETHER])
def test_intervals_hold_what_they_promise(walk: float, size: dict) -> None:
    """The true rate lies within the middle 90 % of the posterior in 82 to 95 % of the visits, in more if static."""
    inside = []
    for seed in SEEDS:
        episode = Synthetic("beta(4,4)", **size, walk=walk).start(seed)
        allocator, rng = kr.KnapsackAllocator(), np.random.default_rng(seed)
        for step, batch in enumerate(episode.batches):
            rates, grid = episode.rates(batch), allocator.estimator.grid
            posterior = allocator.estimator.posterior(allocator.tracker.lookup(batch.tolist()))
            # Part of the cell around the true logit is below it: drawn, so that the place is uniform if all is right.
            cell = np.abs(np.log(grid / (1 - grid)) - np.log(rates / (1 - rates))[:, None]).argmin(axis=1)
            rows = np.arange(batch.size)
            place = np.cumsum(posterior, axis=1)[rows, cell] - rng.random(batch.size) * posterior[rows, cell]
            if 3 * step > len(episode.batches):
                inside += ((place > 0.05) & (place < 0.95)).tolist()
            prompts, group = np.repeat(batch, 8), np.repeat(rows, 8)
            success = rng.random(prompts.size) < rates[group]
            allocator.observe(prompts.tolist(), success.astype(float))
            episode.train(batch, np.zeros(batch.size, bool))
    assert 0.82 < np.mean(inside) < (0.95 if walk else 1.0)
