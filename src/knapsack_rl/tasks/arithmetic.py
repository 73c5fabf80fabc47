"""Generated addition with graded difficulty: a task on which a tiny model can be trained in minutes.

A prompt is an expression such as ``"123+4567="`` and the answer is its value with the digits *reversed*
(``"0964"`` for 4690), so that a model that writes from left to right meets each carry after the digits
that cause it. A completion is the answer followed by the end-of-sequence token.

Problems are graded by *stratum*: the digits of the larger and of the smaller operand, one to four each.
Long operands are hard and short ones easy, which gives a base model the mixture of unsolved, partly solved
and solved prompts on which allocating rollouts makes a difference.

Two expressions with exchanged operands (``"5+12="``, ``"12+5="``) are the same problem; the splits never
share a problem in this sense.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from knapsack_rl.tasks.data import DataRequest, TaskData
from knapsack_rl.tasks.generated import Problem, Splits, below, draw_distinct, draw_splits, splits_task

EOS_TOKEN = "<eos>"  # noqa: S105 - the name of a vocabulary entry, not a secret
PAD_TOKEN = "<pad>"  # noqa: S105

MAX_COMPLETION_TOKENS = 6
"""Tokens of the longest right completion: five digits (9999 + 9999) and the end-of-sequence token."""

# A problem's identity: the larger and the smaller operand.
_Key: TypeAlias = tuple[int, int]

MAX_DIGITS = 4
"""Digits of the longest operand."""


@dataclass(frozen=True, slots=True)
class _Stratum:
    """All problems with ``large`` and ``small`` digits per operand, ``large >= small``."""

    large: int
    small: int
    weight: float

    @property
    def size(self) -> int:
        """Number of different problems."""
        n_large, n_small = _count(self.large), _count(self.small)
        return n_large * (n_large + 1) // 2 if self.large == self.small else n_large * n_small

    def key(self, index: int) -> _Key:
        """Return the problem with this index in ``range(size)``; a one-to-one map."""
        if self.large == self.small:
            # Pairs a >= b numbered along the rows of a triangle.
            row = (math.isqrt(8 * index + 1) - 1) // 2
            column = index - row * (row + 1) // 2
        else:
            row, column = divmod(index, _count(self.small))
        return _first(self.large) + row, _first(self.small) + column


def _count(digits: int) -> int:
    """Return the number of non-negative integers with this many decimal digits (zero has one)."""
    return 10**digits - _first(digits)


def _first(digits: int) -> int:
    """Return the smallest non-negative integer with this many decimal digits."""
    return 0 if digits == 1 else 10 ** (digits - 1)


def _strata() -> tuple[_Stratum, ...]:
    """Return the strata with weights that sum to one: the digits of both operands are independent and uniform."""
    return tuple(
        _Stratum(large, small, (1 if large == small else 2) / MAX_DIGITS**2)
        for large in range(1, MAX_DIGITS + 1)
        for small in range(1, large + 1)
    )


_STRATA = _strata()


class PretrainSampler:
    """Draws problems for pre-training, never one that is reserved for training or evaluation.

    Strata are drawn with their weights and problems uniformly within a stratum, with replacement.

    Args:
        reserved: problems that are never drawn.

    Raises:
        ValueError: a stratum is reserved completely, so that drawing from it could not end.
    """

    def __init__(self, reserved: Sequence[Problem]) -> None:
        self._reserved = frozenset(_key_of(problem) for problem in reserved)
        self._weights = [stratum.weight for stratum in _STRATA]
        for stratum in _STRATA:
            taken = sum((len(str(a)), len(str(b))) == (stratum.large, stratum.small) for a, b in self._reserved)
            if taken >= stratum.size:
                raise ValueError(
                    f"all {stratum.size} problems with {stratum.large} and {stratum.small} digits are reserved, so "
                    f"none is left for pre-training; reserve at most {stratum.size - 1}"
                )

    def sample(self, count: int, rng: random.Random) -> list[Problem]:
        """Draw ``count`` >= 0 problems, possibly with repetitions; the same state of ``rng`` gives the same problems.

        Raises:
            ValueError: ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        problems: list[Problem] = []
        for stratum in rng.choices(_STRATA, weights=self._weights, k=count):
            key = stratum.key(below(stratum.size, rng))
            while key in self._reserved:
                key = stratum.key(below(stratum.size, rng))
            problems.append(_problem(key, rng))
        return problems


def make_splits(seed: int = 0, train: int = 2048, held_out: int = 512) -> Splits:
    """Draw disjoint sets of problems for pre-training, training and evaluation.

    At most half of a stratum is reserved, see :func:`knapsack_rl.tasks.generated.draw_splits`: of the 55 sums of two
    one-digit numbers at most 27 are, and 28 stay for pre-training. The draw depends on nothing but the arguments.

    Args:
        seed: any integer; the same seed gives the same problems in the same order.
        train: number of training problems, at least 1.
        held_out: number of held-out problems, at least 1.

    Raises:
        ValueError: a size is below 1, or both together exceed half of all problems.
    """

    def draw(index: int, count: int, rng: random.Random) -> list[Problem]:
        stratum = _STRATA[index]
        return [_problem(stratum.key(k), rng) for k in draw_distinct(count, rng, partial(below, stratum.size))]

    weights, sizes = [stratum.weight for stratum in _STRATA], [stratum.size for stratum in _STRATA]
    training, evaluation = draw_splits(seed, train, held_out, weights, sizes, draw)
    return Splits(PretrainSampler([*training, *evaluation]), training, evaluation)


def arithmetic_task(request: DataRequest) -> TaskData:
    """Return the generated additions; errors are those of :func:`knapsack_rl.tasks.generated.splits_task`."""
    return splits_task(request, make_splits, MAX_COMPLETION_TOKENS)


def base_model_path() -> Path:
    """Return the folder of the base checkpoint that ships with the package.

    It is pre-trained on the problems that ``make_splits()`` (seed 0) leaves for pre-training. Load it with
    ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``; no network is needed.
    """
    return Path(__file__).parent / "base_model"


def _problem(key: _Key, rng: random.Random) -> Problem:
    """Return a problem with its operands in random order."""
    left, right = key if rng.random() < 0.5 else key[::-1]
    return Problem(
        prompt=f"{left}+{right}=",
        answer=str(left + right)[::-1],
        prompt_id=f"{left}+{right}",
        digits=len(str(key[0])),
    )


def _key_of(problem: Problem) -> _Key:
    """Return the identity of a problem, whatever the order of its operands."""
    left, right = map(int, problem.prompt_id.split("+"))
    return max(left, right), min(left, right)
