"""How much noise in the estimated success rate can the allocation bear?

Policies of the simulator whose estimates are made worse in one way at a time: fewer or older rewards in the window,
another discount or prior, outcomes that arrive epochs late, and noise put on the true rates themselves. The recorded
run takes part with the half of its prompts on which nothing was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from experiments.contract import Options, Row
from experiments.pieces import Piece, run_pieces, seeds_of
from experiments.robustness_text import (
    DELAY,
    DISCOUNT,
    LOGITS,
    PRIOR,
    RECORDED,
    SAMPLED,
    WINDOW,
    figure,
    findings,
    paragraph,
)
from experiments.trace import load_trace
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.policies import allocate
from knapsack_rl.allocation.value import nonzero_gradient_probability
from knapsack_rl.offline.environments import BoolArray, Environment, Episode, Replay, Synthetic
from knapsack_rl.offline.scoring import figures
from knapsack_rl.offline.simulate import Policy, PolicyMaker, allocated, simulate

__all__ = ["QUESTION", "TITLE", "figure", "findings", "measure", "paragraph", "pieces"]

TITLE = "Robustness to noise in the success rate"
QUESTION = "How much of the gain is left when success rates are estimated from few, old or late rewards?"

MIN_ROLLOUTS, MAX_ROLLOUTS, ROLLOUTS_PER_PROMPT = 2, 128, 8
FIRST_VISIT = 8
"""Visits before this one (from 0) are left out: with outcomes four epochs late nothing is known before the fifth."""
NOISE = 3
"""Stream of random numbers of the noise; environments and rewards use those below."""

ENVIRONMENTS: Mapping[str, Synthetic] = {
    "late in training": Synthetic("late-training", prompts=512, epochs=24),
    "learning and drifting": Synthetic(
        "0.4*beta(1,30) + 0.6*beta(1,2)", prompts=512, epochs=24, gain=0.05, drift=0.03, walk=0.25
    ),
}
"""Synthetic ones beside the recorded run: rates that stand still, and rates that move."""

FIGURES = ("gain_captured", "effective_rollouts", "effective_prompts", "brier")

WINDOWS = (2, 4, 8, 16, 32, 64)
DISCOUNTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PRIORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
DELAYS = (0, 1, 2, 3, 4)
NOISES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)

ESTIMATORS = {
    "paper": ("window", {}),
    "paper without fallback": ("window", {"fallback": False}),
    "Beta": ("beta", {}),
    "empirical Bayes": ("empirical-bayes", {}),
    "Bayes filter": ("bayes-filter", {}),
}


class Late:
    """A policy that sees outcomes whole epochs after they were made.

    Args:
        policy: the policy.
        episode: tells how many steps make an epoch.
        epochs: delay, >= 0; 0 passes outcomes on at once.
    """

    def __init__(self, policy: Policy, episode: Episode, epochs: int) -> None:
        self.policy, self.delay = policy, epochs * steps_per_epoch(episode)
        self._held: list[tuple[IntArray, BoolArray]] = []

    def allocate(self, prompts: IntArray, budget: int) -> tuple[IntArray, FloatArray]:
        """What the policy says with what it was told so far."""
        return self.policy.allocate(prompts, budget)

    def observe(self, prompts_R: IntArray, successes_R: BoolArray) -> None:
        """Hold the outcomes of this step, pass on those that are due."""
        self._held.append((prompts_R, successes_R))
        if len(self._held) > self.delay:
            self.policy.observe(*self._held.pop(0))


def steps_per_epoch(episode: Episode) -> int:
    """Steps until every prompt was visited once."""
    every = np.unique(np.concatenate(list(episode.batches))).size
    return int(np.searchsorted(np.cumsum([batch.size for batch in episode.batches]), every)) + 1


class Told:
    """Takes for the truth what ``blur`` makes of the true rates.

    Args:
        episode: tells the true rates.
        blur: (M,) true rates to (M,) rates that the allocation is told.
        fallback: whether the paper's fallback rule applies.
    """

    def __init__(self, episode: Episode, blur: Callable[[FloatArray], FloatArray], *, fallback: bool) -> None:
        self.episode, self.blur, self.fallback = episode, blur, fallback

    def allocate(self, prompts: IntArray, budget: int) -> tuple[IntArray, FloatArray]:
        """The optimum, or the paper's rule, for the blurred rates."""
        rates = self.blur(self.episode.rates(prompts))
        counts = allocate(rates, budget, MIN_ROLLOUTS, MAX_ROLLOUTS, fallback=self.fallback).counts
        return counts, nonzero_gradient_probability(counts, rates)

    def observe(self, prompts_R: IntArray, successes_R: BoolArray) -> None:
        """Nothing is learned."""


def late(name: str, settings: Mapping[str, object], epochs: int) -> PolicyMaker:
    """Makes an allocator of a named estimator that sees outcomes late."""
    make = allocated(name, MIN_ROLLOUTS, MAX_ROLLOUTS, **settings)
    return lambda episode: Late(make(episode), episode, epochs)


def logit_noise(deviation: float, seed: int) -> PolicyMaker:
    """Makes a policy that is told logit(p) plus normal noise, drawn anew at every visit."""

    def make(episode: Episode) -> Policy:
        rng = np.random.default_rng([seed, NOISE])

        def blur(rates: FloatArray) -> FloatArray:
            noise = deviation * rng.standard_normal(rates.size)
            with np.errstate(divide="ignore", over="ignore"):
                logits = np.log(rates) - np.log1p(-rates)
                return 1.0 / (1.0 + np.exp(-(logits + noise)))

        return Told(episode, blur, fallback=False)

    return make


def sampled(rewards: int, seed: int, *, fallback: bool) -> PolicyMaker:
    """Makes a policy that is told the mean of fresh rewards, drawn anew at every visit: noise without age."""

    def make(episode: Episode) -> Policy:
        rng = np.random.default_rng([seed, NOISE])
        return Told(episode, lambda rates: rng.binomial(rewards, rates) / rewards, fallback=fallback)

    return make


@dataclass(frozen=True)
class Setting:
    """One point of a sensitivity curve.

    Attributes:
        knob: what is turned.
        policy: label of the curve.
        at: where on the curve.
        make: makes the policy.
    """

    knob: str
    policy: str
    at: float
    make: PolicyMaker


def settings(seed: int, *, quick: bool) -> list[Setting]:
    """Every point of every curve; ``seed`` fixes the noise."""

    def some(values: tuple[float, ...]) -> tuple[float, ...]:
        return (values[0], values[-1]) if quick else values

    found = []
    for window in some(WINDOWS):
        for label in ("paper", "paper without fallback"):
            name, fixed = ESTIMATORS[label]
            found.append(Setting(WINDOW, label, window, late(name, {**fixed, "window": int(window)}, 0)))
        for label, fallback in (("paper", True), ("paper without fallback", False)):
            found.append(Setting(SAMPLED, label, window, sampled(int(window), seed, fallback=fallback)))
    for discount in some(DISCOUNTS):
        for label in ("Beta", "empirical Bayes"):
            found.append(Setting(DISCOUNT, label, discount, late(ESTIMATORS[label][0], {"discount": discount}, 0)))
    for count in some(PRIORS):
        prior = {"prior_successes": count, "prior_failures": count}
        found.append(Setting(PRIOR, "Beta", 2 * count, late("beta", prior, 0)))
    for delay in some(DELAYS):
        for label, (name, fixed) in ESTIMATORS.items():
            found.append(Setting(DELAY, label, delay, late(name, fixed, int(delay))))
    for deviation in some(NOISES):
        found.append(Setting(LOGITS, "rates known but for noise", deviation, logit_noise(deviation, seed)))
    return found


def environments(*, quick: bool) -> dict[str, Environment]:
    """The recorded run, its report half, and the synthetic ones."""
    trace = load_trace("report")
    if not quick:
        return {RECORDED: Replay(trace), **ENVIRONMENTS}
    small = {label: replace(place, prompts=64, epochs=10) for label, place in ENVIRONMENTS.items()}
    return {RECORDED: Replay(trace.take(np.arange(64)), epochs=10), **small}


def _pieces(options: Options) -> list[Piece]:
    return [
        Piece(f"seed{seed}-environment{k}{'-quick' * options.quick}", simulated, (seed, where, options.quick))
        for seed in seeds_of(options)
        for k, where in enumerate(environments(quick=options.quick))
    ]


def pieces(options: Options) -> int:
    """Pieces of work."""
    return len(_pieces(options))


def measure(options: Options, done: Callable[[str], None]) -> list[Row]:
    """Simulate every setting in every environment."""
    return run_pieces(_pieces(options), options.runs / "robustness", options.workers, done)


def simulated(seed: int, where: str, quick: bool) -> list[Row]:
    """All settings in one environment with one seed; a setting's figures in a row."""
    environment = environments(quick=quick)[where]
    rows: list[Row] = []
    for setting in settings(seed, quick=quick):
        run = simulate(
            environment,
            setting.make,
            seed,
            ROLLOUTS_PER_PROMPT,
            min_rollouts=MIN_ROLLOUTS,
            max_rollouts=MAX_ROLLOUTS,
        )
        measured = figures(run, FIRST_VISIT)
        rows.append(
            {"seed": seed, "environment": where, "knob": setting.knob, "policy": setting.policy, "at": setting.at}
            | {name: round(measured[name], 5) if np.isfinite(measured[name]) else None for name in FIGURES}
        )
    return rows
