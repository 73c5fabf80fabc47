"""How much noise in the estimated success rate can the allocation bear?

Policies of the simulator whose estimates are made worse in one way at a time: fewer or older rewards in the window,
another discount or prior, outcomes that arrive epochs late, and noise put on the true rates themselves. The recorded
run takes part with the half of its prompts on which nothing was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from experiments.contract import Finding, Options, Row, Verdict, by_name, markdown_table
from experiments.estimation import LISTED
from experiments.pieces import Piece, run_pieces
from experiments.trace import load_trace
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.policies import allocate
from knapsack_rl.allocation.value import nonzero_gradient_probability
from knapsack_rl.offline.environments import BoolArray, Environment, Episode, Replay, Synthetic
from knapsack_rl.offline.scoring import figures as scores
from knapsack_rl.offline.simulate import Policy, PolicyMaker, allocated, simulate

RECORDED = "recorded run"
WINDOW, SAMPLED = "window (rewards)", "fresh rewards"
DISCOUNT, PRIOR = "discount per visit", "prior (pseudo-rewards)"
DELAY, LOGITS = "outcomes late (epochs)", "noise on the true rate (logits)"
KNOBS = {"window": WINDOW, "fresh": SAMPLED, "discount": DISCOUNT, "prior": PRIOR, "late": DELAY, "noise": LOGITS}
"""Short name of a knob, that of its table, to the full one in the rows."""
DEFAULT, PAPER, KNOWN = "Bayes filter", "paper", "rates known but for noise"

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
"""Synthetic ones beside the recorded run: constant rates, and rates that move."""

SCORES = ("gain_captured", "effective_rollouts", "effective_prompts", "brier")

WINDOWS = (2, 4, 8, 16, 32, 64)
DISCOUNTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PRIORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
DELAYS = (0, 1, 2, 3, 4)
NOISES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


class Late:
    """A policy that sees outcomes whole epochs after they were made.

    Args:
        policy: the policy.
        episode: has the steps of an epoch.
        epochs: delay, >= 0; 0 passes outcomes on at once.
    """

    def __init__(self, policy: Policy, episode: Episode, epochs: int) -> None:
        self.policy, self.delay = policy, epochs * steps_per_epoch(episode)
        self._held: list[tuple[IntArray, BoolArray]] = []

    def allocate(self, prompts: IntArray, budget: int) -> tuple[IntArray, FloatArray]:
        """The allocation from the outcomes passed on so far."""
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


class GivenRates:
    """Allocates for blurred rates as if they were the true ones.

    Args:
        episode: has the true rates.
        blur: (M,) true rates to the (M,) rates that the allocation is given.
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
        """Learn nothing."""


def late(name: str, settings: Mapping[str, Any], epochs: int) -> PolicyMaker:
    """Makes an allocator of a named estimator that sees outcomes late."""
    make = allocated(name, MIN_ROLLOUTS, MAX_ROLLOUTS, **settings)
    return lambda episode: Late(make(episode), episode, epochs)


def logit_noise(deviation: float, seed: int) -> PolicyMaker:
    """Makes a policy that is given logit(p) plus normal noise, drawn anew at every visit."""

    def make(episode: Episode) -> Policy:
        rng = np.random.default_rng([seed, NOISE])

        def blur(rates: FloatArray) -> FloatArray:
            noise = deviation * rng.standard_normal(rates.size)
            with np.errstate(divide="ignore", over="ignore"):
                logits = np.log(rates) - np.log1p(-rates)
                return 1.0 / (1.0 + np.exp(-(logits + noise)))

        return GivenRates(episode, blur, fallback=False)

    return make


def sampled(rewards: int, seed: int, *, fallback: bool) -> PolicyMaker:
    """Makes a policy that is given the mean of fresh rewards, drawn anew at every visit: noise without age."""

    def make(episode: Episode) -> Policy:
        rng = np.random.default_rng([seed, NOISE])
        return GivenRates(episode, lambda rates: rng.binomial(rewards, rates) / rewards, fallback=fallback)

    return make


@dataclass(frozen=True)
class Setting:
    """One point of a sensitivity curve.

    Attributes:
        knob: the setting that is changed.
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
            name, fixed = LISTED[label]
            found.append(Setting(WINDOW, label, window, late(name, {**fixed, "window": int(window)}, 0)))
        for label, fallback in (("paper", True), ("paper without fallback", False)):
            found.append(Setting(SAMPLED, label, window, sampled(int(window), seed, fallback=fallback)))
    for discount in some(DISCOUNTS):
        for label in ("Beta", "empirical Bayes"):
            found.append(Setting(DISCOUNT, label, discount, late(LISTED[label][0], {"discount": discount}, 0)))
    for count in some(PRIORS):
        prior = {"prior_successes": count, "prior_failures": count}
        found.append(Setting(PRIOR, "Beta", 2 * count, late("beta", prior, 0)))
    for delay in some(DELAYS):
        for label, (name, fixed) in LISTED.items():
            found.append(Setting(DELAY, label, delay, late(name, fixed, int(delay))))
    for deviation in some(NOISES):
        found.append(Setting(LOGITS, KNOWN, deviation, logit_noise(deviation, seed)))
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
        for seed in options.seed_range
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
        measured = scores(run, FIRST_VISIT)
        rows.append(
            {"seed": seed, "environment": where, "knob": setting.knob, "policy": setting.policy, "at": setting.at}
            | {name: round(measured[name], 5) if np.isfinite(measured[name]) else None for name in SCORES}
        )
    return rows


Curve = dict[float, tuple[float, float]]
"""Where on the curve to (mean, standard deviation over seeds) of the gain captured."""


def curve(rows: Sequence[Row], environment: str, knob: str, policy: str) -> Curve:
    """Gain captured of a policy as the knob is turned; settings in which it is not defined are left out."""
    found: dict[float, list[float]] = {}
    for row in rows:
        asked = (row["environment"], row["knob"], row["policy"]) == (environment, knob, policy)
        if asked and row["gain_captured"] is not None:
            found.setdefault(row["at"], []).append(row["gain_captured"])
    return {
        at: (float(np.mean(gains)), float(np.std(gains, ddof=1)) if len(gains) > 1 else 0.0)
        for at, gains in sorted(found.items())
    }


def curves(rows: Sequence[Row]) -> dict[tuple[str, str, str], Curve]:
    """Every curve, by environment, knob and policy, in the order of the rows."""
    keys = dict.fromkeys((row["environment"], row["knob"], row["policy"]) for row in rows)
    return {key: curve(rows, *key) for key in keys}


def _percent(at: tuple[float, float]) -> str:
    return f"{100 * at[0]:.0f} ± {100 * at[1]:.0f} %".replace("-", "−")


def _ends(found: Curve) -> str:
    """The worst and the best point, with their settings."""
    worst, best = min(found, key=lambda at: found[at][0]), max(found, key=lambda at: found[at][0])
    return f"from {_percent(found[worst])} at {worst:g} to {_percent(found[best])} at {best:g}"


def _spread(found: Curve) -> float:
    means = [mean for mean, _ in found.values()]
    return max(means) - min(means)


def _graded(loss: float, small: float, large: float) -> Verdict:
    return "holds" if loss <= small else "holds in part" if loss <= large else "does not hold"


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Claims on the recorded run, whose rates are those of a real training run, and the default in all environments."""
    late = {policy: curve(rows, RECORDED, DELAY, policy) for policy in (DEFAULT, PAPER)}
    first, last = min(at for at in late[DEFAULT] if at), max(late[DEFAULT])
    window = curve(rows, RECORDED, WINDOW, PAPER)
    knobs = {(policy, knob): curve(rows, RECORDED, knob, policy)
             for policy, knob in (("Beta", DISCOUNT), ("empirical Bayes", DISCOUNT), ("Beta", PRIOR))}  # fmt: skip
    noise = curve(rows, RECORDED, LOGITS, KNOWN)
    half = max(at for at, (mean, _) in noise.items() if mean >= 0.5)
    lead, rival, where = closest_rival(rows)
    return [
        Finding(
            "Success rates of an earlier epoch are accurate enough (one more epoch of delay costs at most a tenth of "
            "the gain)",
            "assumed",
            "; ".join(
                f"{policy}: {_percent(gains[0.0])} of the gain captured at once, {_percent(gains[first])} with "
                f"outcomes {first:g} epoch{'s' * (first > 1)} late, {_percent(gains[last])} with {last:g}"
                for policy, gains in late.items()
            ),
            _graded(1.0 - late[DEFAULT][first][0] / late[DEFAULT][0.0][0], 0.1, 0.5),
        ),
        Finding(
            "The length of the paper's window matters little (at most 5 points of the gain)",
            "16 rewards",
            f"gain captured {_ends(window)} rewards",
            _graded(_spread(window), 0.05, 0.2),
        ),
        Finding(
            "Discount and smoothing matter little (at most 5 points of the gain)",
            "–",
            "; ".join(f"{policy}, {knob}: {_ends(found)}" for (policy, knob), found in knobs.items()),
            _graded(max(map(_spread, knobs.values())), 0.05, 0.2),
        ),
        Finding(
            "Half of the gain survives noise of one logit on the true rates",
            "–",
            ", ".join(f"{at:g} logits: {_percent(gain)}" for at, gain in noise.items()),
            "holds" if half >= 1.0 else "holds in part" if half >= 0.5 else "does not hold",
        ),
        Finding(
            "The Bayes filter with its defaults captures as much as the best setting of any other estimator",
            "–",
            f"smallest lead {100 * lead:+.1f} points, over {rival} ({where})".replace("-", "−"),
            _graded(-lead, 0.0, 0.05),
        ),
    ]


def closest_rival(rows: Sequence[Row]) -> tuple[float, str, str]:
    """Smallest lead of the default over the best setting of any other estimator: (lead, that setting, environment)."""
    return min(
        (curve(rows, where, DELAY, DEFAULT)[0.0][0] - mean, f"{policy} with {knob} {at:g}", where)
        for (where, knob, policy), found in curves(rows).items()
        if knob in (WINDOW, DISCOUNT, PRIOR)
        for at, (mean, _) in found.items()
    )


def figures(rows: Sequence[Row]) -> Callable[[str], str]:
    """Gain captured by name: "recorded run: Bayes filter, outcomes late (epochs) 4"."""
    return by_name(
        {
            f"{where}: {policy}, {knob} {at:g}": _percent(gain)
            for (where, knob, policy), found in curves(rows).items()
            for at, gain in found.items()
        }
    )


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """A table for each knob: the recorded run."""
    found = {}
    for name, knob in KNOBS.items():
        lines = {policy: line for (where, k, policy), line in curves(rows).items() if (where, k) == (RECORDED, knob)}
        points = sorted({at for line in lines.values() for at in line})
        body = [(label, *(_percent(line[at]) if at in line else "–" for at in points)) for label, line in lines.items()]
        found[name] = markdown_table((knob, *(f"{at:g}" for at in points)), body)
    return found
