"""Sums of two to seven digits with the running totals written out: answers of 2 to 18 tokens.

A prompt is an expression such as ``"3+5+9+2="``, its answer the totals after each further digit, ``"8=17=19"``. Long
sums are hard and their answers long, so a rollout of a hard prompt costs several times one of an easy prompt. Only one
text is right. Characters are those of :mod:`knapsack_rl.tasks.arithmetic`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from knapsack_rl.tasks.data import FILE_SETTINGS, DataRequest, TaskData, refuse, shuffled
from knapsack_rl.tasks.generated import Problem, below, draw_distinct, quotas, to_rows
from knapsack_rl.tasks.verifier import accuracy_reward

FEWEST, MOST = 2, 7
"""Digits of a sum."""

MAX_COMPLETION_TOKENS = 18
"""Six totals of two digits, five signs between them and the end-of-sequence token."""

MAX_POSITIONS = 32
"""The longest prompt has 14 characters."""


@dataclass(frozen=True, slots=True)
class RunningSums:
    """Three disjoint sets of problems.

    Attributes:
        pretrain: draws from every problem that is in neither of the other two.
        train: prompts of the reinforcement learning run.
        held_out: prompts on which the run is evaluated.
    """

    pretrain: RunningSumSampler
    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]


class RunningSumSampler:
    """Draws problems for pre-training, every number of digits as often, none that is reserved.

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


def make_running_sums(seed: int = 0, train: int = 2048, held_out: int = 512) -> RunningSums:
    """Draw disjoint sets of problems, every number of digits alike as far as there are enough problems.

    At most half of the problems of a number of digits are reserved. The draw depends on nothing but the arguments.

    Args:
        seed: any integer.
        train: number of training problems, at least 1.
        held_out: number of held-out problems, at least 1.

    Raises:
        ValueError: a size is below 1 or there are too few problems.
    """
    sizes = range(FEWEST, MOST + 1)
    caps = [9**size // 2 for size in sizes]
    if train < 1 or held_out < 1 or train + held_out > sum(caps):
        raise ValueError(
            f"train and held_out must be at least 1 and at most {sum(caps)} together, got {train}, {held_out}"
        )
    rng = random.Random(seed)  # noqa: S311 - reproducible data, not a secret
    totals = quotas(train + held_out, [1.0] * len(caps), caps)
    for_evaluation = quotas(held_out, [float(total) for total in totals], totals)
    training: list[Problem] = []
    evaluation: list[Problem] = []
    for size, total, kept in zip(sizes, totals, for_evaluation, strict=True):
        drawn = draw_distinct(total, rng, partial(_draw, size))
        evaluation += drawn[:kept]
        training += drawn[kept:]
    return RunningSums(
        pretrain=RunningSumSampler([*training, *evaluation]),
        train=tuple(shuffled(training, rng)),
        held_out=tuple(shuffled(evaluation, rng)),
    )


def running_sums_task(request: DataRequest) -> TaskData:
    """The generated sums: every seed trains and is judged on the same prompts.

    Raises:
        ValueError: a setting of files was given, or more problems are asked for than there are.
    """
    refuse(request, *FILE_SETTINGS, "template")
    sums = make_running_sums(train=request.train_prompts, held_out=max(request.held_out_prompts, 1))
    return TaskData(
        train=to_rows(sums.train),
        held_out=to_rows(sums.held_out[: request.held_out_prompts]),
        reward=accuracy_reward,
        max_completion_tokens=MAX_COMPLETION_TOKENS,
    )


def _draw(size: int, rng: random.Random) -> Problem:
    digits = [1 + below(9, rng) for _ in range(size)]
    text = "+".join(map(str, digits))
    totals = list(accumulate(digits))[1:]
    return Problem(prompt=f"{text}=", answer="=".join(map(str, totals)), prompt_id=text, digits=size)
