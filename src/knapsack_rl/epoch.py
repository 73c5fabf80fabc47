"""Budget over the batches of an epoch: one price of a rollout for all, so that batches which need more get more.

    maximise    sum_b f_b(T_b)
    subject to  sum_b T_b = budget,   least_b <= T_b <= most_b,   T_b a multiple of ``rows_multiple``

Here f_b(T) is the most that batch b can make of T rollouts. By exchange f_b(T+1) - f_b(T) is the next largest marginal
value of the batch, so f_b is concave, and in steps of ``rows_multiple`` too: a step's gain is the sum of the next so
many marginals, which falls. The batches therefore are themselves rows of the one knapsack of :mod:`knapsack_rl.solver`,
and the plan is exact. All batches that are not at a limit buy up to the same marginal value.

Source: Fox 1966 (marginal analysis of separable concave resource allocation), applied twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl import solver
from knapsack_rl.belief import Belief
from knapsack_rl.rows import Rows
from knapsack_rl.value import FloatArray, IntArray, check_success_rates, check_whole
from knapsack_rl.value_functions import ValueLike, marginal_table


def plan_epoch(
    batches: Sequence[ArrayLike | Belief],
    budget: int,
    min_rollouts: int = 2,
    max_rollouts: int = 128,
    *,
    rows_multiple: int = 1,
    slack: float = 0.25,
    value: ValueLike = "knapsack",
) -> list[IntArray]:
    """Counts for every batch of an epoch, exactly the best for the epoch's budget.

    A batch's rollouts stay within ``slack`` of its share of the budget, which is in proportion to its prompts, and are
    a multiple of ``rows_multiple``; all batches together get exactly the budget.

    Args:
        batches: per batch, either (M,) success rates in [0, 1], NaN for an unseen prompt, which is valued as the mean
            of the epoch's others; or a :class:`~knapsack_rl.belief.Belief`, as ``KnapsackAllocator.belief`` returns
            it, with its expected values.
        budget: rollouts of the epoch, a multiple of ``rows_multiple``.
        min_rollouts: N_low, >= 1.
        max_rollouts: N_up; of a belief at most its columns.
        rows_multiple: what a batch's rollouts must be a multiple of: what an engine needs for its micro-batches.
        slack: share by which a batch may leave its share of the budget, >= 0; ``math.inf`` for no limit.
        value: see :func:`knapsack_rl.allocate`; beliefs bring their own. It must be concave from ``min_rollouts`` on.

    Returns:
        Per batch (M,) int64 rollouts.

    Raises:
        ValueError: an argument is out of range, values are not concave, or no totals within the limits sum to the
            budget.

    Examples:
        >>> easy, hard = [0.99, 0.98], [0.3, 0.2]
        >>> plan = plan_epoch([easy, hard], budget=32, rows_multiple=4, slack=0.5)
        >>> print(plan[0].sum(), plan[1].sum())
        8 24
    """
    budget = check_whole("budget", budget, minimum=0)
    low = check_whole("min_rollouts", min_rollouts, minimum=1)
    high = check_whole("max_rollouts", max_rollouts, minimum=low)
    block = check_whole("rows_multiple", rows_multiple, minimum=1)
    if not slack >= 0.0:
        raise ValueError(f"slack must be a share >= 0, got {slack!r}")
    if not len(batches):
        raise ValueError("batches is empty; a plan needs at least one batch")
    tables = _tables(batches, value, high)
    least, most = _limits([len(table) for table in tables], budget, low, high, block, slack)
    totals = _totals(tables, budget, low, high, block, least, most)
    return [
        solver.solve(table, int(total), low, high, method="greedy") for table, total in zip(tables, totals, strict=True)
    ]


def _tables(batches: Sequence[ArrayLike | Belief], value: ValueLike, width: int) -> list[FloatArray]:
    """(M_b, width) marginal values of each batch."""
    tables: list[FloatArray] = []
    unseen = []
    for b, batch in enumerate(batches):
        if isinstance(batch, Belief):
            if batch.marginals.shape[1] < width:
                raise ValueError(f"max_rollouts {width} exceeds the {batch.marginals.shape[1]} columns of belief {b}")
            tables.append(batch.marginals[:, :width])
            unseen.append(np.zeros(len(batch.mean), bool))
        else:
            rates = check_success_rates(batch, allow_nan=True)
            if rates.ndim != 1:
                raise ValueError(f"batch {b} must hold success rates (M,), got shape {rates.shape}")
            unseen.append(np.isnan(rates))
            tables.append(marginal_table(value, np.where(unseen[-1], 0.0, rates), width))
        if not len(tables[-1]):
            raise ValueError(f"batch {b} is empty; a batch needs at least one prompt")
    if any(missing.any() for missing in unseen):
        seen = [table[~missing] for table, missing in zip(tables, unseen, strict=True)]
        known = np.concatenate(seen)
        typical = known.mean(axis=0) if len(known) else np.zeros(width)
        for table, missing in zip(tables, unseen, strict=True):
            table[missing] = typical
    return tables


def _limits(
    prompts: Sequence[int], budget: int, low: int, high: int, block: int, slack: float
) -> tuple[IntArray, IntArray]:
    """(B,) fewest and most rollouts of each batch, multiples of the block."""
    sizes = np.array(prompts)
    share = budget * sizes / sizes.sum()
    rounding = 1e-9 * share
    least = np.maximum(low * sizes, share * max(1.0 - slack, 0.0) - rounding)
    limit = 1.0 * high * sizes
    if slack < np.inf:  # a share may be 0, and infinitely more than that is no number
        limit = np.minimum(limit, share * (1.0 + slack) + rounding)
    least, most = np.ceil(least / block).astype(np.int64) * block, np.floor(limit / block).astype(np.int64) * block
    if budget % block:
        raise ValueError(f"budget {budget} is no multiple of rows_multiple {block}; choose {budget - budget % block}")
    if (least > most).any() or not least.sum() <= budget <= most.sum():
        b = int(np.argmax(least - most))
        raise ValueError(
            f"no totals fit: with min_rollouts={low}, max_rollouts={high}, rows_multiple={block} and slack={slack:g} "
            f"the batches take {least.sum()} to {most.sum()} rollouts, the budget is {budget}; the narrowest batch, "
            f"{b}, takes {least[b]} to {most[b]}. Raise slack or change the bounds"
        )
    return least, most


def _totals(
    tables: list[FloatArray], budget: int, low: int, high: int, block: int, least: IntArray, most: IntArray
) -> IntArray:
    """(B,) rollouts of each batch: the knapsack whose rows are batches and whose unit is a block of rollouts."""
    blocks = (most - least) // block
    gains = np.zeros((len(tables), max(int(blocks.max()), 1)))
    for b, table in enumerate(tables):
        bounds = np.full(len(table), low), np.full(len(table), high)
        rows, concave = solver.concave_rows(Rows(table=np.ascontiguousarray(table)), *bounds)
        if not concave:
            raise ValueError(f"the values of batch {b} are not concave from {low} rollouts on; choose another value")
        # The minima are given; what lies between least and most comes best first.
        best_first = -np.sort(-rows.table[:, low:high], axis=None)
        given = low * len(table)
        gains[b, : blocks[b]] = best_first[least[b] - given : most[b] - given].reshape(-1, block).sum(axis=1)
    spare = (budget - int(least.sum())) // block
    chosen = solver.solve(np.minimum.accumulate(gains, axis=1), spare, 0, blocks, method="greedy")
    return least + block * chosen
