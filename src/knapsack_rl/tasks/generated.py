"""The parts that generated data sets share: problems, and draws that are the same for every Python version and run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from knapsack_rl.tasks.data import DataRequest, Row

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt with its exact answer.

    Attributes:
        prompt: the expression up to and with the equals sign, for example ``"123+4567="``.
        answer: the one right completion, without the end-of-sequence token.
        prompt_id: the expression without the equals sign; unique within a split and stable between runs.
        digits: a grade of difficulty, at least 1: digits of the larger operand, or number of summands.
    """

    prompt: str
    answer: str
    prompt_id: str
    digits: int


def to_rows(problems: Sequence[Problem]) -> list[Row]:
    """Problems as rows for ``datasets.Dataset.from_list``: one dictionary of the fields per problem, in order."""
    return [asdict(problem) for problem in problems]


def below(limit: int, rng: random.Random) -> int:
    """A uniform integer in ``range(limit)``, by the one method whose sequence Python guarantees."""
    return int(rng.random() * limit)


def draw_distinct(count: int, rng: random.Random, draw: Callable[[random.Random], T | None]) -> list[T]:
    """Draw until there are ``count`` different items; ``None`` and repetitions do not count.

    The caller must know that there are as many; otherwise this does not end.
    """
    found: dict[T, None] = {}
    while len(found) < count:
        item = draw(rng)
        if item is not None:
            found[item] = None
    return list(found)


def check_size(request: DataRequest, most: int) -> None:
    """Refuse to generate more problems than a task has.

    Raises:
        ValueError: ``train_prompts + held_out_prompts`` exceeds ``most``.
    """
    if request.wanted > most:
        raise ValueError(
            f"{request.dataset} has {most} problems for train_prompts + held_out_prompts, got {request.wanted}; "
            "lower them"
        )


def quotas(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Divide ``total`` by weight into integers that respect the caps and sum to ``total`` exactly.

    Where a share exceeds its cap it is cut and the rest is divided among the others; fractions are rounded by largest
    remainder. Needs ``total <= sum(caps)``.
    """
    shares = [0.0] * len(weights)
    free = list(range(len(weights)))
    left = float(total)
    while free:
        scale = left / sum(weights[i] for i in free)
        over = [i for i in free if weights[i] * scale > caps[i]]
        if not over:
            for i in free:
                shares[i] = weights[i] * scale
            break
        for i in over:
            shares[i] = float(caps[i])
            left -= caps[i]
        free = [i for i in free if i not in over]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
