"""Addition in base eight: much like the task of ``knapsack-rl train``, and another one, to choose settings on.

A prompt is ``"17+260="`` with octal operands of one to four digits, drawn as there, and the answer the octal sum with
its digits reversed. The base model is pre-trained until its mean success rate is that of the shipped model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from experiments.tokens import pretrain_to
from knapsack_rl.tasks.data import DataRequest, TaskData
from knapsack_rl.tasks.generated import Problem, Splits, below, draw_distinct, draw_splits, splits_task

BASE = 8
MOST = 4
"""Digits of the longest operand."""

MAX_COMPLETION_TOKENS = MOST + 2
MAX_POSITIONS = 2 * MOST + 2 + MAX_COMPLETION_TOKENS
BASE_RATE = 0.3
"""Mean success rate on the training prompts at which pre-training stops."""

STRATA = [(large, small) for large in range(1, MOST + 1) for small in range(1, large + 1)]
"""Digits of both operands."""


@dataclass(frozen=True)
class OctalSampler:
    """Draws problems for pre-training, the digits of both operands uniformly, none that is reserved.

    Attributes:
        reserved: ids of problems that are never drawn.
    """

    reserved: frozenset[str]

    def sample(self, count: int, rng: random.Random) -> list[Problem]:
        """Draw problems, possibly with repetitions; the same state of ``rng`` gives the same problems."""
        found: list[Problem] = []
        while len(found) < count:
            problem = _draw(1 + below(MOST, rng), 1 + below(MOST, rng), rng)
            if problem.prompt_id not in self.reserved:
                found.append(problem)
        return found


def make_octal(train: int = 2048, held_out: int = 512) -> Splits:
    """Draw disjoint sets of problems; they depend on nothing but the arguments.

    Args:
        train: number of training problems, at least 1.
        held_out: number of held-out problems, at least 1.
    """

    def draw(index: int, count: int, rng: random.Random) -> list[Problem]:
        return draw_distinct(count, rng, lambda source: _draw(*STRATA[index], source))

    weights = [1.0 if large == small else 2.0 for large, small in STRATA]
    sizes = [_count(large) * _count(small) for large, small in STRATA]
    training, evaluation = draw_splits(0, train, held_out, weights, sizes, draw)
    return Splits(OctalSampler(frozenset(one.prompt_id for one in (*training, *evaluation))), training, evaluation)


def task(train: int, held_out: int) -> TaskData:
    """Return the problems as a task.

    Args:
        train: prompts to train on.
        held_out: prompts never trained on.
    """
    request = DataRequest(dataset="addition-dev", train_prompts=train, held_out_prompts=held_out)
    return splits_task(request, make_octal, MAX_COMPLETION_TOKENS)


def pretrain(folder: Path, quick: bool) -> None:
    """Pre-train the base model, see :func:`experiments.tokens.pretrain_to`."""
    pretrain_to(folder, quick, make_octal(), MAX_POSITIONS, MAX_COMPLETION_TOKENS, BASE_RATE)


def _count(digits: int) -> int:
    return BASE if digits == 1 else BASE**digits - BASE ** (digits - 1)


def _draw(left: int, right: int, rng: random.Random) -> Problem:
    """A problem whose operands have these numbers of digits."""
    first, second = (
        below(_count(digits), rng) + (0 if digits == 1 else BASE ** (digits - 1)) for digits in (left, right)
    )
    if rng.random() < 0.5:
        first, second = second, first
    name = f"{first:o}+{second:o}"
    return Problem(prompt=f"{name}=", answer=f"{first + second:o}"[::-1], prompt_id=name, digits=max(left, right))
