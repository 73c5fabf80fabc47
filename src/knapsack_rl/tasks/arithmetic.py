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
from pathlib import Path
from typing import Any, TypeAlias

from knapsack_rl.tasks.data import DataRequest, TaskData, refuse

EOS_TOKEN = "<eos>"  # noqa: S105 - the name of a vocabulary entry, not a secret
PAD_TOKEN = "<pad>"  # noqa: S105

MAX_COMPLETION_TOKENS = 6
"""Tokens of the longest right completion: five digits (9999 + 9999) and the end-of-sequence token."""

# No right completion is longer than this even when every token is spelt out, so that a longer text is
# refused before any work is done on it.
_MAX_COMPLETION_CHARS = 64

# A problem's identity: the larger and the smaller operand.
_Key: TypeAlias = tuple[int, int]

MAX_DIGITS = 4
"""Digits of the longest operand."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt with its exact answer.

    Attributes:
        prompt: The expression up to and with the equals sign, for example ``"123+4567="``.
        answer: The decimal digits of the value, least significant first, without the end-of-sequence token.
        prompt_id: The expression without the equals sign; unique within a split and stable between runs.
        digits: Decimal digits of the larger operand, at least 1.
    """

    prompt: str
    answer: str
    prompt_id: str
    digits: int


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
        """The problem with this index in ``range(size)``; a one-to-one map."""
        if self.large == self.small:
            # Pairs a >= b numbered along the rows of a triangle.
            row = (math.isqrt(8 * index + 1) - 1) // 2
            column = index - row * (row + 1) // 2
        else:
            row, column = divmod(index, _count(self.small))
        return _first(self.large) + row, _first(self.small) + column


def _count(digits: int) -> int:
    """Number of non-negative integers with this many decimal digits (zero has one)."""
    return 10**digits - _first(digits)


def _first(digits: int) -> int:
    """Smallest non-negative integer with this many decimal digits."""
    return 0 if digits == 1 else 10 ** (digits - 1)


def _strata() -> tuple[_Stratum, ...]:
    """The strata with their weights, which sum to one: the digits of both operands are independent and uniform."""
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
        reserved: Problems that are never drawn. Each stratum must keep one that is not reserved.

    Raises:
        ValueError: If a stratum is reserved completely, since drawing from it could not end.
    """

    def __init__(self, reserved: Sequence[Problem]) -> None:
        self._reserved = frozenset(_key_of(problem) for problem in reserved)
        self._weights = [stratum.weight for stratum in _STRATA]
        for stratum in _STRATA:
            taken = sum((len(str(a)), len(str(b))) == (stratum.large, stratum.small) for a, b in self._reserved)
            if taken >= stratum.size:
                raise ValueError(
                    f"All {stratum.size} problems with {stratum.large} and {stratum.small} digits are reserved, so"
                    f" none is left for pre-training; reserve at most {stratum.size - 1}."
                )

    def sample(self, count: int, rng: random.Random) -> list[Problem]:
        """Draw problems.

        Args:
            count: Number of problems, at least 0.
            rng: Source of randomness; the same state gives the same problems.

        Returns:
            ``count`` problems, possibly with repetitions.

        Raises:
            ValueError: If ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}.")
        problems: list[Problem] = []
        for stratum in rng.choices(_STRATA, weights=self._weights, k=count):
            key = stratum.key(below(stratum.size, rng))
            while key in self._reserved:
                key = stratum.key(below(stratum.size, rng))
            problems.append(_problem(key, rng))
        return problems


@dataclass(frozen=True, slots=True)
class Splits:
    """Three pairwise disjoint sets of problems.

    Attributes:
        pretrain: Draws from every problem that is in neither of the other two.
        train: The prompts of the reinforcement learning run.
        held_out: The prompts on which the run is evaluated; the same shares of the strata as ``train``.
    """

    pretrain: PretrainSampler
    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]


def make_splits(seed: int = 0, train: int = 2048, held_out: int = 512) -> Splits:
    """Draw disjoint sets of problems for pre-training, training and evaluation.

    Problems are drawn without replacement. A stratum gets its weight's share of ``train + held_out``, but
    never more than half of its problems: of the 55 sums of two one-digit numbers at most 27 are reserved and
    28 stay for pre-training. What a small stratum cannot give goes to the others by weight. Each stratum is
    then divided between the two sets in the ratio ``train : held_out``, up to rounding.

    The draw depends on nothing but the arguments. It uses only ``random.Random.random``, whose sequence for
    a seed does not change between Python versions, because the shipped base model must not have seen the
    held-out problems of seed 0.

    Args:
        seed: Any integer; the same seed gives the same problems in the same order.
        train: Number of training problems, at least 1.
        held_out: Number of held-out problems, at least 1.

    Returns:
        The splits, with ``train`` and ``held_out`` in random order.

    Raises:
        ValueError: If a size is below 1, or both together exceed half of all problems.
    """
    for name, size in (("train", train), ("held_out", held_out)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    caps = [stratum.size // 2 for stratum in _STRATA]
    if train + held_out > sum(caps):
        raise ValueError(
            f"train + held_out must be at most {sum(caps)} (half of all problems), got {train} + {held_out};"
            " ask for fewer."
        )
    rng = random.Random(seed)  # noqa: S311 - reproducible data, not a secret
    totals = quotas(train + held_out, [stratum.weight for stratum in _STRATA], caps)
    held_out_counts = quotas(held_out, [float(total) for total in totals], totals)

    train_problems: list[Problem] = []
    held_out_problems: list[Problem] = []
    for stratum, total, n_held_out in zip(_STRATA, totals, held_out_counts, strict=True):
        # A dict keeps the order of the draw, which a set would lose.
        indices: dict[int, None] = {}
        while len(indices) < total:
            indices[below(stratum.size, rng)] = None
        problems = [_problem(stratum.key(index), rng) for index in indices]
        held_out_problems += problems[:n_held_out]
        train_problems += problems[n_held_out:]
    return Splits(
        pretrain=PretrainSampler([*train_problems, *held_out_problems]),
        train=shuffled(train_problems, rng),
        held_out=shuffled(held_out_problems, rng),
    )


def to_rows(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Problems as rows for ``datasets.Dataset.from_list``.

    Args:
        problems: Any number of problems.

    Returns:
        One dictionary per problem, in order, with the keys ``prompt``, ``answer``, ``prompt_id``,
        ``digits`` (an integer).
    """
    return [
        {
            "prompt": problem.prompt,
            "answer": problem.answer,
            "prompt_id": problem.prompt_id,
            "digits": problem.digits,
        }
        for problem in problems
    ]


def is_correct(completion: str, answer: str) -> bool:
    """Whether a completion is exactly the answer.

    White space (ASCII) around the completion and one end-of-sequence token at its end do not count;
    everything else does, leading zeros and other scripts' digits included. The text is compared and never
    evaluated, and one that is too long to be right is refused by its length alone.

    Args:
        completion: What the model wrote, of any length.
        answer: The reversed digits of the value, as in ``Problem.answer``.

    Returns:
        True if the completion is right.

    Raises:
        ValueError: If ``answer`` is not a string of ASCII digits, since then no completion could be right.
    """
    if not (answer.isascii() and answer.isdigit()):
        raise ValueError(f"answer must be one or more ASCII digits, got {answer!r}; pass Problem.answer.")
    if len(completion) > _MAX_COMPLETION_CHARS:
        return False
    white = " \t\r\n"
    return completion.strip(white).removesuffix(EOS_TOKEN).rstrip(white) == answer


def accuracy_reward(completions: Sequence[str], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """Exact-match reward in the form that TRL's trainers call.

    Args:
        completions: R completions, plain text.
        answer: The R answers, from the data set's ``answer`` column.
        **kwargs: The data set's other columns and what else TRL passes to every reward function; unused.

    Returns:
        R rewards, 1.0 where the completion is right and 0.0 elsewhere.

    Raises:
        ValueError: If the two sequences differ in length, or an answer is not a string of digits.
    """
    if len(completions) != len(answer):
        raise ValueError(
            f"completions and answer must have the same length, got {len(completions)} and {len(answer)};"
            " repeat the answer of a prompt once per completion."
        )
    return [float(is_correct(text, right)) for text, right in zip(completions, answer, strict=True)]


def arithmetic_task(request: DataRequest) -> TaskData:
    """The generated additions; the split is part of the task, so every seed of a run has the same prompts.

    Raises:
        ValueError: a setting of files was given, or more problems are asked for than there are.
    """
    refuse(request, "path", "config", "split", "verifier", "template", "prompt_column", "answer_column")
    splits = make_splits(train=request.train_prompts, held_out=max(request.held_out_prompts, 1))
    return TaskData(
        train=to_rows(splits.train),
        held_out=to_rows(splits.held_out[: request.held_out_prompts]),
        reward=accuracy_reward,
        max_completion_tokens=MAX_COMPLETION_TOKENS,
    )


def base_model_path() -> Path:
    """Folder of the base checkpoint that ships with the package.

    It is pre-trained on the problems that ``make_splits()`` (seed 0) leaves for pre-training. Load it with
    ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``; no network is needed.
    """
    return Path(__file__).parent / "base_model"


def _problem(key: _Key, rng: random.Random) -> Problem:
    """Spell out a problem, with its operands in random order."""
    left, right = key if rng.random() < 0.5 else key[::-1]
    return Problem(
        prompt=f"{left}+{right}=",
        answer=str(left + right)[::-1],
        prompt_id=f"{left}+{right}",
        digits=len(str(key[0])),
    )


def _key_of(problem: Problem) -> _Key:
    """The identity of a problem, whatever the order of its operands."""
    left, right = map(int, problem.prompt_id.split("+"))
    return max(left, right), min(left, right)


def below(limit: int, rng: random.Random) -> int:
    """A uniform integer in ``range(limit)``, by the one method whose sequence Python guarantees."""
    return int(rng.random() * limit)


def shuffled(problems: list[Problem], rng: random.Random) -> tuple[Problem, ...]:
    """The problems in random order."""
    order = sorted((rng.random(), i) for i in range(len(problems)))
    return tuple(problems[i] for _, i in order)


def quotas(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """Divide ``total`` by weight into integers that respect the caps and sum to ``total`` exactly.

    Where a share exceeds its cap it is cut and the rest is divided among the others; fractions are rounded
    by largest remainder. Needs ``total <= sum(caps)``.
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
