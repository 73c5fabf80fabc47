"""Numbers about one allocation and what came of it, for a logger.

Source: paper, section 4, and this project's documentation of metrics.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from knapsack_rl.allocation import Allocation
from knapsack_rl.belief import Belief
from knapsack_rl.tracker import Records
from knapsack_rl.value import IntArray

BUDGET_BINS = (0, 1, 2, 3, 5, 9, 17, 33, 65)
"""Left edges of the budget histogram's bins; the last is open."""


def allocation_metrics(allocation: Allocation, belief: Belief | None = None) -> dict[str, float]:
    """How a budget was spread; and, where it is known what was believed of the prompts, over which of them."""
    counts = allocation.counts
    spread = {"budget": float(counts.sum()), "budget_min": float(counts.min()), "budget_max": float(counts.max())}
    if belief is None:
        return spread
    unseen = np.isnan(belief.mean)
    found = spread | {
        "expected_value": allocation.expected_value,
        "estimated_success_rate": float(belief.mean[~unseen].mean()) if not unseen.all() else float("nan"),
        "fallback": float(allocation.reason.startswith("fallback") or "; fallback" in allocation.reason),
    }
    given = max(int(counts.sum()), 1)
    with np.errstate(invalid="ignore"):
        hard, easy = belief.mean < 0.2, belief.mean > 0.8
    for name, members in (("unseen", unseen), ("hard", hard), ("medium", ~(unseen | hard | easy)), ("easy", easy)):
        found[f"budget_to/{name}"] = float(counts[members].sum() / given)
    bins = np.searchsorted(BUDGET_BINS, counts, side="right") - 1
    shares = np.bincount(bins, minlength=len(BUDGET_BINS)) / counts.size
    names = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(BUDGET_BINS)]
    names.append(f"{BUDGET_BINS[-1]}+")
    return found | {f"budget_share/{name}": float(share) for name, share in zip(names, shares, strict=True)}


def lost_metrics(known: Records, successes: IntArray, totals: IntArray) -> dict[str, float]:
    """How many prompts had only successes at their last visit, and what share of them now fails more often than not.

    Args:
        known: (M,) what was recorded of the visited prompts before this visit.
        successes: (M,) successes of this visit.
        totals: (M,) scored rollouts of this visit.
    """
    solved = (known.newest_total > 0) & (known.newest_successes == known.newest_total)
    lost = 2 * successes < totals
    share = float(lost[solved].mean()) if solved.any() else float("nan")
    return {"solved_before": float(solved.sum()), "lost": share}
