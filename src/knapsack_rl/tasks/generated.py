"""Code that generated data sets share: problems, splits, and draws that are the same in every run and Python version.

All draws use only ``random.Random.random``, whose sequence for a seed does not change between Python versions: the
shipped base model must not have seen the held-out problems of seed 0.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar

from knapsack_rl.tasks.data import FILE_SETTINGS, DataRequest, Row, TaskData, refuse, shuffled
from knapsack_rl.tasks.verifier import accuracy_reward

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
    """Return problems as rows for ``datasets.Dataset.from_list``: one dictionary per problem, in order."""
    return [asdict(problem) for problem in problems]


class Sampler(Protocol):
    """Draws problems for pre-training, none that is reserved for training or evaluation."""

    def sample(self, count: int, rng: random.Random) -> list[Problem]:
        """Draw problems, possibly with repetitions; the same state of ``rng`` gives the same problems."""
        ...


@dataclass(frozen=True, slots=True)
class Splits:
    """Three pairwise disjoint sets of problems.

    Attributes:
        pretrain: draws from every problem that is in neither of the other two.
        train: prompts of the reinforcement learning run, in random order.
        held_out: prompts on which the run is evaluated, in random order.
    """

    pretrain: Sampler
    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]


def draw_splits(
    seed: int,
    train: int,
    held_out: int,
    weights: Sequence[float],
    sizes: Sequence[int],
    draw: Callable[[int, int, random.Random], list[Problem]],
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Draw disjoint training and held-out problems from S strata of difficulty.

    A stratum gets its weight's share of ``train + held_out``, but never more than half of its problems, so that enough
    remain for pre-training. What a small stratum cannot give goes to the others by weight. Each stratum is then divided
    in the ratio ``train : held_out``, up to rounding.

    Args:
        seed: any integer.
        train: number of training problems, at least 1.
        held_out: number of held-out problems, at least 1.
        weights: S relative shares, > 0.
        sizes: S numbers of problems.
        draw: (stratum, count, rng) to that many different problems.

    Raises:
        ValueError: a number is below 1, or both together exceed half of all problems.
    """
    caps = [size // 2 for size in sizes]
    if train < 1 or held_out < 1 or train + held_out > sum(caps):
        raise ValueError(
            f"train and held_out must be at least 1 and at most {sum(caps)} together (half of all problems), got "
            f"{train} and {held_out}; ask for fewer"
        )
    rng = random.Random(seed)  # noqa: S311 - reproducible data, not a secret
    totals = quotas(train + held_out, weights, caps)
    held_out_counts = quotas(held_out, [float(total) for total in totals], totals)
    training: list[Problem] = []
    evaluation: list[Problem] = []
    for stratum, (total, kept) in enumerate(zip(totals, held_out_counts, strict=True)):
        problems = draw(stratum, total, rng)
        evaluation += problems[:kept]
        training += problems[kept:]
    return tuple(shuffled(training, rng)), tuple(shuffled(evaluation, rng))


def splits_task(request: DataRequest, make: Callable[..., Splits], max_completion_tokens: int) -> TaskData:
    """Return a task of the splits of seed 0, so that every seed of a run trains and is evaluated on the same prompts.

    Raises:
        ValueError: a setting of files was given, or more problems are asked for than there are.
    """
    refuse(request, *FILE_SETTINGS, "template")
    splits = make(train=request.train_prompts, held_out=max(request.held_out_prompts, 1))
    return TaskData(
        train=to_rows(splits.train),
        held_out=to_rows(splits.held_out[: request.held_out_prompts]),
        reward=accuracy_reward,
        max_completion_tokens=max_completion_tokens,
    )


def below(limit: int, rng: random.Random) -> int:
    """Return a uniform integer in ``range(limit)``, by the only method whose sequence Python guarantees."""
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
