"""Sums of two to seven digits with the running totals written out: answers of 2 to 18 tokens.

A prompt is an expression such as ``"3+5+9+2="``, its answer the totals after each further digit, ``"8=17=19"``. Long
sums are hard and their answers long, so a rollout of a hard prompt costs several times one of an easy prompt. Only one
text is right. Characters are those of :mod:`knapsack_rl.tasks.arithmetic`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from itertools import accumulate

from knapsack_rl.tasks.data import DataRequest, TaskData
from knapsack_rl.tasks.generated import Problem, Splits, below, draw_distinct, draw_splits, splits_task

FEWEST, MOST = 2, 7
"""Digits of a sum."""

MAX_COMPLETION_TOKENS = 18
"""Six totals of two digits, five signs between them and the end-of-sequence token."""

MAX_POSITIONS = 32
"""The longest prompt has 14 characters."""


class RunningSumSampler:
    """Draws problems for pre-training, each number of digits equally often, none that is reserved.

    Args:
        reserved: problems that are never drawn.
    """

    def __init__(self, reserved: Sequence[Problem]) -> None:
        self._reserved = frozenset(problem.prompt for problem in reserved)

    def sample(self, count: int, rng: random.Random) -> list[Problem]:
        """Draw problems, possibly with repetitions.

        Args:
            count: number of problems.
            rng: source of randomness; the same state gives the same problems.
        """
        found: list[Problem] = []
        while len(found) < count:
            problem = _draw(FEWEST + below(MOST - FEWEST + 1, rng), rng)
            if problem.prompt not in self._reserved:
                found.append(problem)
        return found


def make_running_sums(seed: int = 0, train: int = 2048, held_out: int = 512) -> Splits:
    """Draw disjoint sets of problems, equally many of each number of digits as far as there are enough problems.

    The draw depends on nothing but the arguments, see :func:`knapsack_rl.tasks.generated.draw_splits`.

    Args:
        seed: any integer.
        train: number of training problems, at least 1.
        held_out: number of held-out problems, at least 1.

    Raises:
        ValueError: a size is below 1, or both together exceed half of all problems.
    """

    def draw(index: int, count: int, rng: random.Random) -> list[Problem]:
        return draw_distinct(count, rng, partial(_draw, FEWEST + index))

    sizes = [9**digits for digits in range(FEWEST, MOST + 1)]
    training, evaluation = draw_splits(seed, train, held_out, [1.0] * len(sizes), sizes, draw)
    return Splits(RunningSumSampler([*training, *evaluation]), training, evaluation)


def running_sums_task(request: DataRequest) -> TaskData:
    """Return the generated sums; errors are those of :func:`knapsack_rl.tasks.generated.splits_task`."""
    return splits_task(request, make_running_sums, MAX_COMPLETION_TOKENS)


def _draw(size: int, rng: random.Random) -> Problem:
    digits = [1 + below(9, rng) for _ in range(size)]
    text = "+".join(map(str, digits))
    totals = list(accumulate(digits))[1:]
    return Problem(prompt=f"{text}=", answer="=".join(map(str, totals)), prompt_id=text, digits=size)
