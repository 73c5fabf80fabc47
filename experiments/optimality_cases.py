"""Random knapsacks and the methods that solve them: the material of ``experiments.optimality``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from experiments import values
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.costs import ROUNDING, Certificate
from knapsack_rl.allocation.policies import allocate
from knapsack_rl.allocation.value import nonzero_gradient_probability
from knapsack_rl.allocation.value import value as knapsack_value
from knapsack_rl.offline.environments import draw_rates

ANY_TABLE = "any table"
"""Values without a formula, which rise and fall."""
FORMULAS: dict[str, Callable[[ArrayLike, ArrayLike], FloatArray]] = {
    "knapsack": knapsack_value,
    "nonzero-gradient": nonzero_gradient_probability,
    "variance": values.reward_variance,
    "signal-to-noise": values.signal_to_noise,
}
CASE_VALUES = (*FORMULAS, ANY_TABLE)
PRICED_VALUES = ("knapsack", "signal-to-noise", ANY_TABLE)
RATES = ("uniform", "late-training", "0.3*point(0) + 0.3*point(1) + 0.4*uniform", "hard")

EXACT = 1e-12
"""Relative gaps up to this are rounding of sums."""
OURS, PAPER, HIGHS = "ours", "the paper's dynamic program", "HiGHS"

FALLBACK_ON_TRUTH = "fallback rule, true rates"
PAPER_RULE = "paper: window and fallback"
RULES = ("uniform", PAPER_RULE, "window without fallback", FALLBACK_ON_TRUTH, "empirical Bayes")
MIXTURES = {
    "late in training": "late-training",
    "very late in training": "0.38*beta(100,1) + 0.22*beta(1,100) + 0.4*uniform",
    "too hard": "hard",
    "any rate alike": "uniform",
    "some without hope": "0.25*point(0) + 0.25*point(1) + 0.5*uniform",
}

HIGHS_SECONDS = 60.0
HIGHS_SCALE = 1e4
"""HiGHS stops at an absolute gap of 1e-6, which is much in units of the paper's values; they are scaled by this."""


@dataclass(frozen=True, eq=False)
class Case:
    """One knapsack.

    Attributes:
        value: name of ``FORMULAS``, or ``ANY_TABLE``.
        rates: (M,) success rates.
        table: (M, high + 1) V[i, n].
        budget: rollouts, all handed out; with costs, an upper limit.
        low: N_low of every prompt.
        high: N_up of every prompt.
        costs: (M,) whole numbers, cost of a rollout; None where each costs one.
    """

    value: str
    rates: FloatArray
    table: FloatArray
    budget: int
    low: int
    high: int
    costs: IntArray | None

    def worth(self, counts: IntArray) -> float:
        """Sum of values, rounded once."""
        return math.fsum(self.table[np.arange(counts.size), counts])

    def feasible(self, counts: IntArray) -> bool:
        """Whether counts respect bounds and budget."""
        if counts.min() < self.low or counts.max() > self.high:
            return False
        if self.costs is None:
            return int(counts.sum()) == self.budget
        return float(self.costs @ counts) <= self.budget * (1.0 + ROUNDING)


def draw_case(rng: np.random.Generator, value: str, prompts: int, low: int, high: int, *, priced: bool) -> Case:
    """A random knapsack.

    Args:
        rng: source of randomness.
        value: of ``CASE_VALUES``.
        prompts: M.
        low: N_low.
        high: N_up.
        priced: whether rollouts have costs, whole numbers from 20 to 2000 as lengths in tokens have.
    """
    rates = draw_rates(str(rng.choice(RATES)), prompts, rng)
    if rng.random() < 0.25:
        rates = np.rint(8 * rates) / 8  # estimates from eight rollouts: prompts tie
    if value == ANY_TABLE:
        table = np.concatenate([np.zeros((prompts, 1)), rng.normal(0.2, 1.0, (prompts, high)).cumsum(axis=1)], axis=1)
    else:
        table = FORMULAS[value](np.arange(high + 1), rates[:, None])
    costs = rng.integers(20, 2001, prompts) if priced else None
    price = np.ones(prompts, np.int64) if costs is None else costs
    least, most = low * int(price.sum()), high * int(price.sum())
    return Case(value, rates, table, int(rng.integers(least, most + 1)), low, high, costs)


def solve_ours(case: Case) -> tuple[IntArray, Certificate | None]:
    """Counts and certificate of :func:`knapsack_rl.allocate`."""
    named = ("knapsack", "nonzero-gradient")
    value = case.value if case.value in named else FORMULAS.get(case.value, case.table)
    found = allocate(case.rates, case.budget, case.low, case.high, costs=case.costs, value=value)
    return found.counts, found.certificate


def solve_by_paper(case: Case) -> IntArray:
    """Counts of the paper's dynamic program; every rollout costs one."""
    from benchmarks.paper_solver import paper_dynamic_program

    return paper_dynamic_program(case.table, case.budget, case.low, case.high)


def solve_by_enumeration(case: Case) -> IntArray:
    """Counts of the best of all feasible allocations, (high - low + 1)^M of them."""
    prompts = case.rates.size
    choices = np.array(list(itertools.product(range(case.low, case.high + 1), repeat=prompts)))
    if case.costs is None:
        choices = choices[choices.sum(axis=1) == case.budget]
    else:
        choices = choices[choices @ case.costs <= case.budget]
    return choices[np.argmax(case.table[np.arange(prompts), choices].sum(axis=1))]


def solve_by_highs(case: Case) -> IntArray | None:
    """Counts by integer programming, one binary variable per prompt and count; None where HiGHS finds none in time.

    Raises:
        ImportError: scipy is not installed.
    """
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    prompts, width = case.table.shape
    counts = np.arange(width)
    price = np.ones(prompts) if case.costs is None else case.costs
    one_each = sparse.kron(sparse.eye(prompts), np.ones(width), format="csr")
    spent = sparse.csr_matrix(np.outer(price, counts).reshape(1, -1))
    allowed = np.tile((counts >= case.low).astype(np.float64), prompts)
    found = milp(
        -HIGHS_SCALE * case.table.ravel(),
        integrality=np.ones(prompts * width),
        bounds=Bounds(0.0, allowed),
        constraints=[
            LinearConstraint(one_each, 1.0, 1.0),
            LinearConstraint(spent, case.budget if case.costs is None else -np.inf, case.budget),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": HIGHS_SECONDS},
    )
    if found.x is None:
        return None
    return np.rint(found.x).astype(np.int64).reshape(prompts, width) @ counts
