"""Hypothesis strategies and small helpers shared by the tests of the allocation core."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

no_deadline = settings(deadline=None)  # the machine may be busy

EXTREME_RATES = (0.0, 1.0, 1e-300, 1.0 - 1e-16, 1e-17, 0.5, 1.0 / 3.0, 0.01, 0.99)


def success_rates(*, allow_nan: bool = False) -> st.SearchStrategy[float]:
    """A probability: extremes, fractions of a few rollouts (so that prompts tie), anything; NaN on request."""
    rates = st.one_of(
        st.sampled_from(EXTREME_RATES),
        st.integers(0, 8).map(lambda k: k / 8),
        st.floats(0.0, 1.0, allow_subnormal=False),
    )
    return st.one_of(rates, st.just(float("nan"))) if allow_nan else rates


class Batch(NamedTuple):
    """Prompts and a budget that fits their bounds."""

    rates: NDArray[np.float64]
    budget: int
    lower: Any
    upper: Any


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    max_prompts: int = 8,
    least: int = 1,
    cap: int = 14,
    allow_nan: bool = False,
    per_prompt: bool = True,
) -> Batch:
    """Rates, bounds (one pair, or one per prompt) and a budget between the sums of the bounds."""
    rates = np.array(draw(st.lists(success_rates(allow_nan=allow_nan), min_size=1, max_size=max_prompts)))
    prompts = rates.size
    if per_prompt and draw(st.booleans()):
        pairs = draw(st.lists(_bounds(least, cap), min_size=prompts, max_size=prompts))
        lower, upper = np.array([low for low, _ in pairs]), np.array([high for _, high in pairs])
        lowest, highest = int(lower.sum()), int(upper.sum())
    else:
        lower, upper = draw(_bounds(least, cap))
        lowest, highest = lower * prompts, upper * prompts
    return Batch(rates, draw(st.integers(lowest, highest)), lower, upper)


def _bounds(least: int, cap: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(least, cap), st.integers(least, cap)).map(lambda pair: (min(pair), max(pair)))


class Knapsack(NamedTuple):
    """An instance of the solver's problem; ``marginals`` holds whole numbers, so sums are exact and ties occur."""

    marginals: NDArray[np.float64]
    budget: int
    lower: NDArray[np.int64]
    upper: NDArray[np.int64]


@st.composite
def _knapsacks(draw: st.DrawFn, *, concave: bool, max_prompts: int, max_rollouts: int, largest: int) -> Knapsack:
    prompts = draw(st.integers(1, max_prompts))
    width = draw(st.integers(1, max_rollouts))
    row = st.lists(st.integers(-1, largest), min_size=width, max_size=width)
    rows = draw(st.lists(row, min_size=prompts, max_size=prompts))
    table = np.array([sorted(r, reverse=True) if concave else r for r in rows], dtype=np.float64)
    pairs = draw(st.lists(_bounds(0, width), min_size=prompts, max_size=prompts))
    lower, upper = np.array([low for low, _ in pairs]), np.array([high for _, high in pairs])
    return Knapsack(table, draw(st.integers(int(lower.sum()), int(upper.sum()))), lower, upper)


def concave_tables(max_prompts: int = 6, max_rollouts: int = 10, largest: int = 6) -> st.SearchStrategy[Knapsack]:
    """Rows of marginals that never rise: the greedy's case."""
    return _knapsacks(concave=True, max_prompts=max_prompts, max_rollouts=max_rollouts, largest=largest)


def arbitrary_tables(max_prompts: int = 3, max_rollouts: int = 5, largest: int = 6) -> st.SearchStrategy[Knapsack]:
    """Any marginals: the dynamic program's case."""
    return _knapsacks(concave=False, max_prompts=max_prompts, max_rollouts=max_rollouts, largest=largest)


class Rollouts(NamedTuple):
    """Rows of ragged groups in any order."""

    groups: NDArray[Any]
    rewards: NDArray[np.float64]


@st.composite
def ragged_groups(draw: st.DrawFn, *, allow_nan: bool = False, graded: bool = True) -> Rollouts:
    """Groups of 1 to 6 rollouts with ids of one type (whole numbers or strings), rows shuffled."""
    ids = draw(
        st.one_of(
            st.lists(st.integers(-5, 2**40), min_size=1, max_size=6, unique=True),
            st.lists(st.text("abc/é7", max_size=3), min_size=1, max_size=6, unique=True),
        )
    )
    levels = st.sampled_from([0.0, 1.0, -1.0])
    reward = st.one_of(levels, st.floats(-10.0, 10.0, width=16)) if graded else levels
    if allow_nan:
        reward = st.one_of(reward, reward, st.just(float("nan")))
    rows = [(prompt_id, score) for prompt_id in ids for score in draw(st.lists(reward, min_size=1, max_size=6))]
    rows = draw(st.permutations(rows))
    return Rollouts(np.array([prompt_id for prompt_id, _ in rows]), np.array([score for _, score in rows], dtype=float))


def visits(max_visits: int = 6, max_rollouts: int = 90) -> st.SearchStrategy[list[list[bool]]]:
    """Outcomes of one prompt, visit by visit, oldest first."""
    return st.lists(st.lists(st.booleans(), min_size=1, max_size=max_rollouts), min_size=1, max_size=max_visits)
