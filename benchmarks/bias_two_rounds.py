"""Measure the bias of the gradient under two rounds in a step, by success rate.

    python benchmarks/bias_two_rounds.py
    python benchmarks/bias_two_rounds.py --visits 4

A group of N rollouts with the share x of successes pushes the logit of its prompt by a weight: x (1-x) over the divisor
of the advantage (``docs/method.md``, "Which allocation fits which advantage"). Its expectation is compared with that of
one round of as many rollouts on average, where N is fixed beforehand. The second round depends on the outcomes of the
first, so the two differ. A batch has 64 prompts x 8 rollouts, 4 prompts of each rate, and is allocated by a new
allocator that saw some earlier visits of 8 rollouts. Batches are simulated; averages over the outcomes of the second
round, and the chances of those of the first, are exact.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.session import Session
from knapsack_rl.settings import AllocationSettings

RATES = np.array([0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99])
ALIKE = 4
"""Prompts of each rate in a batch."""
MEAN = 8
MOST = 128

Weight = Callable[[IntArray, FloatArray], FloatArray]


def over_deviation(n: IntArray, x: FloatArray) -> FloatArray:
    """Return the weight with GRPO's advantages, whose standard deviation has divisor n - 1, without its epsilon."""
    return np.sqrt(x * (1.0 - x) * (n - 1) / n)


def over_mean(n: IntArray, x: FloatArray) -> FloatArray:
    """Return the weight with advantages over the mean."""
    return np.where(x > 0.0, 1.0 - x, 0.0)


def binomial(most: int, p: float) -> FloatArray:
    """Return the (most+1, most+1) probabilities of s successes among n rollouts, [n, s]."""
    table = np.zeros((most + 1, most + 1))
    table[0, 0] = 1.0
    for n in range(most):
        table[n + 1] = (1.0 - p) * table[n]
        table[n + 1, 1:] += p * table[n, :-1]
    return table


def expected(weight: Weight, chances: FloatArray, n: int, s: int, more: int) -> float:
    """Return the expected weight of a group of n rollouts with s successes that gets more rollouts."""
    if n + more == 0:
        return 0.0
    x = (s + np.arange(more + 1)) / (n + more)
    return float(chances[more, : more + 1] @ weight(np.int64(n + more), x))


def simulate(value: str, visits: int, batches: int, seed: int) -> list[list[tuple[int, int, int]]]:
    """Return (rollouts and successes of the first round, rollouts of the second) of all groups of each rate."""
    random = np.random.default_rng(seed)
    rate_of = np.repeat(RATES, ALIKE)
    ids = [*range(rate_of.size)]
    seen: list[list[tuple[int, int, int]]] = [[] for _ in RATES]
    for _ in range(batches):
        session = Session(AllocationSettings(rounds=2, value=value, success_threshold=0.5, max_rollouts=MOST))
        for _ in range(visits):
            prompt_R = np.repeat(ids, MEAN)
            session.allocator.observe(prompt_R.tolist(), random.random(prompt_R.size) < rate_of[prompt_R])
        first = session.plan_first(ids, MEAN)
        good = random.binomial(first.counts, rate_of)
        outcome_R = np.concatenate([np.arange(n) < s for n, s in zip(first.counts, good, strict=True)])
        plan = session.plan_rest(first, MEAN * len(ids), first.expand(), outcome_R)
        for k, group in enumerate(zip(first.counts.tolist(), good.tolist(), plan.counts.tolist(), strict=True)):
            seen[k // ALIKE].append((group[0], group[1], group[2] - group[0]))
        assert not session.allocator.failures
    return seen


def table(weight: Weight, groups: Sequence[Sequence[tuple[int, int, int]]], per_rollout: bool) -> None:
    """Print the expected weights of one round and of two."""
    print("|    p | mean rollouts | one round | two rounds |  ratio | standard error |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for p, group in zip(RATES, groups, strict=True):
        chances = binomial(MOST, p)
        n, s, more = np.array(group).T
        share = chances[n[0], s] / (np.bincount(s)[s] / s.size)  # the chance of each first outcome is known
        share /= share.mean()
        mean = float((share * (n + more)).mean())
        low = int(mean)
        ends = [expected(weight, chances, 0, 0, size) for size in (low, low + 1)]
        one = ends[0] + (mean - low) * (ends[1] - ends[0])
        found = np.array([expected(weight, chances, *outcome) for outcome in group])
        if per_rollout:
            found *= (n + more) / mean
        spread = [share[s == k].sum() ** 2 * found[s == k].var() / (s == k).sum() for k in np.unique(s)]
        two, error = float((share * found).mean()), np.sqrt(sum(spread)) / s.size
        print(f"| {p:4.2f} | {mean:5.1f} | {one:.4f} | {two:.4f} | {two / one:.3f} | {error / one:.3f} |")


def main() -> None:
    """Print a table for each advantage with its value and weighting."""
    parser = argparse.ArgumentParser(description="Measure the bias of the gradient under two rounds in a step.")
    parser.add_argument("--visits", type=int, default=1, help="earlier visits of each prompt (default 1)")
    parser.add_argument("--batches", type=int, default=1000, help="batches (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default 0)")
    given = parser.parse_args()
    for name, weight, value, per_rollout in (
        ("group-std, value knapsack, per rollout", over_deviation, "knapsack", True),
        ("group-std, value knapsack, per prompt", over_deviation, "knapsack", False),
        ("group-mean, value likelihood, per prompt", over_mean, "likelihood", False),
    ):
        print(f"\n{name}: {given.batches} batches, {given.visits} earlier visits\n")
        table(weight, simulate(value, given.visits, given.batches, given.seed), per_rollout)


if __name__ == "__main__":
    main()
