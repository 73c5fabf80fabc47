"""Whether equal wrong answers say more than different ones: success rates of dead groups by their distinct answers.

    python benchmarks/dead_groups.py --bed addition-dev --steps 32
    python benchmarks/dead_groups.py --bed skills-dev --steps 32

A first share of a step is sampled at a checkpoint, a group of rollouts for every training prompt. Of the groups without
a success, those whose wrong answers are all equal are told from those that differ. Success rates are exact. A second
round could use the difference if further rollouts found a success more often in one kind than in the other. Printed are
means and standard errors over the seeds of

* groups: share of the dead groups;
* success rate: its mean;
* found by 8 more: chance that eight further rollouts hold a success, 1 - (1-p)^8, on average;
* by the filter: the same chance as the filter has it, from the earlier visits and this group's failures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch

from experiments.contract import markdown_table
from experiments.lab.run import LabTrainer
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.estimation.grid import check_posterior
from knapsack_rl.success import BoolArray
from step_noise import checkpoint, flags, parsed_by

MORE = 8
"""Rollouts of a second round."""

KINDS = ("all equal", "two answers", "three or more")


def distinct_answers(trainer: LabTrainer, rollouts: int) -> tuple[IntArray, IntArray]:
    """(P,) distinct answers and (P,) successes among some rollouts of every training prompt."""
    rows = [row for row in trainer.data.train for _ in range(rollouts)]
    sampled, rewards = trainer.generate(rows)
    texts = [tuple(row[:n]) for row, n in zip(sampled.tokens.tolist(), sampled.lengths.tolist(), strict=True)]
    groups = [texts[start : start + rollouts] for start in range(0, len(rows), rollouts)]
    successes = (np.reshape(rewards, (-1, rollouts)) > 0).sum(axis=1)
    return np.array([len(set(group)) for group in groups]), successes


def found_by(rates: FloatArray) -> FloatArray:
    """Chance that further rollouts hold a success."""
    return 1.0 - (1.0 - rates) ** MORE


def expected_by_filter(trainer: LabTrainer, dead: BoolArray, rollouts: int) -> FloatArray:
    """(dead,) chance of a success in a second round, by the posterior after a group of failures."""
    allocator = trainer.session.allocator
    estimator = check_posterior(allocator.estimator)
    ids = [row["prompt_id"] for row, one in zip(trainer.data.train, dead.tolist(), strict=True) if one]
    known, failures = allocator.records_of(ids), np.full(len(ids), rollouts)
    likelihood = estimator.likelihood(known) * estimator.binomial_likelihood(np.zeros_like(failures), failures)
    return estimator.posterior_of(likelihood, known.prior) @ found_by(estimator.grid)


def measure(trainer: LabTrainer, rollouts: int) -> FloatArray:
    """(3, 4) figures of the kinds of dead groups; NaN for a kind that does not occur."""
    distinct, successes = distinct_answers(trainer, rollouts)
    dead = successes == 0
    rates = trainer.success_rates(trainer.data.train)[dead]
    believed, kind = expected_by_filter(trainer, dead, rollouts), np.minimum(distinct[dead], len(KINDS)) - 1
    table = np.full((len(KINDS), 4), np.nan)
    for place in range(len(KINDS)):
        own = kind == place
        if own.any():
            table[place] = own.mean(), rates[own].mean(), found_by(rates[own]).mean(), believed[own].mean()
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 2 for bad input."""
    parser = flags(
        "Success rates of groups without a success, by whether their answers are equal.",
        "python benchmarks/dead_groups.py --bed skills-dev --steps 32",
        steps=32,
    )
    parser.add_argument("--rollouts", type=int, default=4, metavar="N", help="of a group (default: %(default)s)")
    parsed = parsed_by(parser, arguments, {"steps": 0, "rollouts": 2, "seeds": 2})
    torch.set_num_threads(1)
    found = np.array(
        [
            measure(checkpoint(parsed.bed, parsed.arm, parsed.steps, seed, parsed.bases), parsed.rollouts)
            for seed in range(1000, 1000 + parsed.seeds)
        ]
    )
    mean, error = 100 * found.mean(axis=0), 100 * found.std(axis=0, ddof=1) / parsed.seeds**0.5
    lines = [
        (kind, *(f"{mean[row, k]:.1f} ± {error[row, k]:.1f} %" for k in range(mean.shape[1])))
        for row, kind in enumerate(KINDS)
    ]
    print(markdown_table(("wrong answers", "groups", "success rate", f"found by {MORE} more", "by the filter"), lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
