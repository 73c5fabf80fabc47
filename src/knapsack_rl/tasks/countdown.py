"""Countdown: reach a target with given numbers, each used exactly once, by +, -, * and /.

Problems are generated, or read from a file or folder with the columns ``nums`` and ``target``. Hard and easy ones mix:
two to four numbers, equally often. The answer is the content of the last ``<answer>...</answer>``, else
the last line; it may end in ``= target``. It is parsed as arithmetic and computed exactly, never evaluated as code.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from knapsack_rl.tasks.data import (
    DataRequest,
    Row,
    Source,
    TaskData,
    column,
    read_splits,
    refuse,
    shuffled,
    split_rows,
)
from knapsack_rl.tasks.generated import below, check_size, draw_distinct
from knapsack_rl.tasks.verifier import MAX_TEXT, answer_text, same_length, tagged_answer, text_of

TEMPLATE = "{prompt}\nThink, then write the expression alone between <answer> and </answer>."
MAX_COMPLETION_TOKENS = 256
MAX_EXPRESSION = 256
"""Characters of an expression; a longer one is wrong without being parsed."""
MOST = 50_000
SOURCE = Source(hub="Jiayi-Pan/Countdown-Tasks-3to4")

_TOKEN = re.compile(r"\s*([0-9]{1,9}|[-+*/()])")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


def countdown_task(request: DataRequest) -> TaskData:
    """Return generated problems, the same for every run, or those of a copy that ``path`` names.

    Raises:
        ValueError: a setting does not apply, or there are too few problems.
        OSError: the file or folder could not be read.
    """
    refuse(request, "verifier", "prompt_column", "answer_column")
    if request.path:
        train, held_out = read_splits(request, SOURCE, lambda row, where: _read(request, row, where))
    else:
        refuse(request, "config", "split")
        check_size(request, MOST)
        rng = random.Random(0)  # noqa: S311 - reproducible data, not a secret
        problems = draw_distinct(request.wanted, rng, _draw)
        train, held_out = split_rows(request, [_row(request, *problem) for problem in problems], None)
    return TaskData(
        train=train, held_out=held_out, reward=countdown_reward, max_completion_tokens=MAX_COMPLETION_TOKENS, chat=True
    )


def countdown_reward(
    completions: Sequence[Any], answer: Sequence[str], numbers: Sequence[Sequence[int]], **kwargs: Any
) -> list[float]:
    """TRL reward function: 1.0 where the expression uses each number once and equals the target, else 0.0.

    Args:
        completions: generated texts or messages.
        answer: targets, one per completion.
        numbers: the numbers to use, one list per completion.
        **kwargs: the other columns and objects TRL passes; not used.

    Raises:
        ValueError: the numbers of completions and answers differ.
    """
    same_length(completions, answer)
    same_length(completions, numbers)
    return [
        float(reaches_target(text, given, _whole(target)))
        for text, given, target in zip(completions, numbers, answer, strict=True)
    ]


def reaches_target(completion: Any, numbers: Sequence[int], target: int) -> bool:
    """Return whether a completion's expression uses each of the numbers exactly once and equals the target."""
    expression = _expression(text_of(completion))
    used = Counter(int(token) for token in re.findall(r"[0-9]+", expression))
    return used == Counter(numbers) and arithmetic_value(expression) == target


def arithmetic_value(expression: str) -> Fraction | None:
    """Return the exact value of whole numbers with + - * / and parentheses; None for anything else or division by 0."""
    tokens, end = [], 0
    if len(expression) > MAX_EXPRESSION:
        return None
    expression = expression.strip()
    while end < len(expression):
        found = _TOKEN.match(expression, end)
        if not found:
            return None
        tokens.append(found[1])
        end = found.end()
    parser = _Parser(tokens)
    try:
        value = parser.sum()
    except (ZeroDivisionError, _NoArithmeticError):
        return None
    return value if parser.at == len(tokens) else None


class _NoArithmeticError(Exception):
    """The tokens do not form an expression."""


class _Parser:
    """Recursive descent; ``MAX_EXPRESSION`` bounds its depth."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.at = tokens, 0

    def _next(self, *allowed: str) -> str | None:
        if self.at < len(self.tokens) and self.tokens[self.at] in allowed:
            self.at += 1
            return self.tokens[self.at - 1]
        return None

    def sum(self) -> Fraction:
        value = self._product()
        while sign := self._next("+", "-"):
            value = value + self._product() if sign == "+" else value - self._product()
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while sign := self._next("*", "/"):
            value = value * self._factor() if sign == "*" else value / self._factor()
        return value

    def _factor(self) -> Fraction:
        if self._next("-"):
            return -self._factor()
        if self._next("("):
            value = self.sum()
            if not self._next(")"):
                raise _NoArithmeticError
            return value
        if self.at < len(self.tokens) and self.tokens[self.at].isdigit():
            self.at += 1
            return Fraction(int(self.tokens[self.at - 1]))
        raise _NoArithmeticError


def _expression(text: str) -> str:
    """Return the expression in a completion, without a trailing ``= target``."""
    if len(text) > MAX_TEXT:
        return ""
    found = tagged_answer(text)
    if found is None:
        found = text.rstrip().rpartition("\n")[2]
    return found.translate(_SIGNS).partition("=")[0].strip()[: MAX_EXPRESSION + 1]


def _row(request: DataRequest, numbers: Sequence[int], target: int) -> Row:
    listed = ", ".join(map(str, numbers))
    text = f"Use the numbers {listed}, each exactly once, with + - * / and parentheses, to make {target}."
    return {
        "prompt": request.framed(text, TEMPLATE),
        "answer": str(target),
        "prompt_id": f"countdown/{'-'.join(map(str, numbers))}/{target}",
        "numbers": list(numbers),
    }


def _read(request: DataRequest, row: Row, where: str) -> Row:
    numbers, target = column(row, "nums", where), column(row, "target", where)
    try:
        return _row(request, [_whole(number) for number in numbers], _whole(target))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: nums and target must be whole numbers, got {numbers!r} and {target!r}") from error


def _whole(value: Any) -> int:
    """Return a whole number given as a number of any type, or as text."""
    number = Fraction(answer_text(value))
    if number.denominator != 1:
        raise ValueError(f"not a whole number: {value!r}")
    return number.numerator


def _draw(rng: random.Random) -> tuple[tuple[int, ...], int] | None:
    """Return random numbers and a target that they can make; None for a target that is not wanted."""
    numbers = [1 + below(99, rng) for _ in range(2 + below(3, rng))]
    target = Fraction(numbers[0])
    for number in numbers[1:]:
        target = (target + number, target - number, target * number, target / number)[below(4, rng)]
    if target.denominator != 1 or not 0 < target < 1000:
        return None
    return tuple(shuffled(numbers, rng)), int(target)
