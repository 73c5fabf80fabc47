"""Countdown: reach a target with given numbers, each used exactly once, by +, -, * and /.

Problems are generated, or read from a file or folder with the columns ``nums`` and ``target``. Hard and easy ones mix:
two to four numbers, equally often. The answer of a completion is what stands in its last ``<answer>...</answer>``, else
its last line; it may end in ``= target``. It is parsed as arithmetic and computed exactly, never evaluated as code.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from knapsack_rl.tasks.data import DataRequest, Row, Source, TaskData, column, read_splits, refuse
from knapsack_rl.tasks.extraction import MAX_TEXT, same_length, text_of

TEMPLATE = "{prompt}\nThink, then write the expression alone between <answer> and </answer>."
MAX_COMPLETION_TOKENS = 256
MAX_EXPRESSION = 256
"""Characters of an expression; a longer one is wrong without being parsed."""
MOST = 50_000
SOURCE = Source(hub="Jiayi-Pan/Countdown-Tasks-3to4")

_TOKEN = re.compile(r"\s*([0-9]{1,9}|[-+*/()])")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


def countdown_task(request: DataRequest) -> TaskData:
    """Generated problems, the same for every run, or those of a copy that ``path`` names.

    Raises:
        ValueError: a setting does not apply, or there are too few problems.
        OSError: the file or folder could not be read.
    """
    refuse(request, "verifier", "prompt_column", "answer_column")
    if request.path:
        train, held_out = read_splits(request, SOURCE, lambda row, where: _read(request, row, where))
    else:
        refuse(request, "config", "split")
        problems = _generated(request.wanted)
        rows = [_row(request, numbers, target) for numbers, target in problems]
        train, held_out = rows[: request.train_prompts], rows[request.train_prompts :]
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
        float(is_correct(text, given, int(target)))
        for text, given, target in zip(completions, numbers, answer, strict=True)
    ]


def is_correct(completion: Any, numbers: Sequence[int], target: int) -> bool:
    """Whether a completion's expression uses each of the numbers exactly once and equals the target."""
    expression = _expression(text_of(completion))
    used = Counter(int(token) for token in re.findall(r"[0-9]+", expression))
    return used == Counter(numbers) and arithmetic_value(expression) == target


def arithmetic_value(expression: str) -> Fraction | None:
    """The exact value of whole numbers joined by + - * / and parentheses; None for anything else and division by 0."""
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
    """Tokens that make no expression."""


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
    """What a completion answers, without ``= target`` behind it."""
    if len(text) > MAX_TEXT:
        return ""
    start = text.rfind("<answer>")
    found = text[start + 8 :].partition("</answer>")[0] if start >= 0 else text.rstrip().rpartition("\n")[2]
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
    return _row(request, [int(number) for number in numbers], int(target))


def _generated(count: int) -> list[tuple[tuple[int, ...], int]]:
    """Different problems, each with a solution: numbers are joined at random to make the target."""
    if count > MOST:
        raise ValueError(f"countdown has {MOST} problems for train_prompts + held_out_prompts, got {count}; lower them")
    rng = random.Random(0)  # noqa: S311 - reproducible data, not a secret
    found: dict[tuple[tuple[int, ...], int], None] = {}
    while len(found) < count:
        numbers = [1 + int(rng.random() * 99) for _ in range(2 + int(rng.random() * 3))]
        target = Fraction(numbers[0])
        for number in numbers[1:]:
            target = (target + number, target - number, target * number, target / number)[int(rng.random() * 4)]
        if target.denominator == 1 and 0 < target < 1000:
            order = sorted((rng.random(), number) for number in numbers)
            found[tuple(number for _, number in order), int(target)] = None
    return list(found)
