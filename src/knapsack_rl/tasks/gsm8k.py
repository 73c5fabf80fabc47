r"""Verifier for GSM8K and other data sets whose answers are numbers.

The number that counts is, in this order, the one after the last ``####`` (GSM8K's own mark), the one inside the last
``\boxed{}``, or the last one in the text. Where a mark is there, what follows it must be a number; the text before is
not searched then. Numbers are compared exactly, as fractions:

* ASCII digits only; a sign, one decimal point, thousands separators (``1,234,567``, also ``{,}`` in LaTeX);
* ``a/b`` and ``\frac{a}{b}`` of whole numbers; an exponent of at most two digits (``1.5e3``);
* a currency sign (``$``, ``€``, ``£``, ``¥``) and a percent sign do not count: ``50%`` is 50, not 0.5. GSM8K asks for
  "what percent" and expects 50;
* after a mark, words may follow the number (``#### 72 dollars``), other digits may not (``#### 5^2`` is no number).

A number of more than 64 characters, and a text of more than 100,000, is wrong unread: no long string reaches ``int``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from knapsack_rl.tasks.data import DataRequest, Row, Source, TaskData, column, read_splits, refuse, text_id
from knapsack_rl.tasks.extraction import BOX, MAX_TEXT, last_boxed, same_length, text_of

SOURCE = Source(hub="openai/gsm8k", config="main", held_out_split="test")
TEMPLATE = "{prompt}\n\nReason step by step, then give the answer as a number after ####."
MAX_COMPLETION_TOKENS = 320

MARK = "####"
MAX_NUMBER = 64
"""Characters of a number."""

# Every part takes the longest run at once and none can match the same characters in two ways, so the search is linear.
_NUMBER = re.compile(r"(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?:/[0-9][0-9,]*)?")
_PARTS = re.compile(r"([0-9,]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+))?(?:/([0-9,]+))?")
_THOUSANDS = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{([0-9,]+)\}\{([0-9,]+)\}")
_SIGNS = {"-": -1, "+": 1, "−": -1}
_CURRENCY = "$€£¥"


def final_number(text: str) -> Fraction | None:
    """The number that a text ends in, see the module; None where there is none that can be read."""
    if len(text) > MAX_TEXT:
        return None
    mark = text.rfind(MARK)
    if mark >= 0:
        return _leading_number(text[mark + len(MARK) :].lstrip().partition("\n")[0])
    if BOX in text:
        boxed = last_boxed(text)
        return None if boxed is None else _leading_number(_plain(boxed))
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    if last is None:
        return None
    number = _value(last[0].rstrip(",").rstrip("."))
    before = text[max(last.start() - 3, 0) : last.start()].rstrip(_CURRENCY)
    # In 10-5 the sign is an operator; in "is -5" it belongs to the number.
    signed = before[-1:] in _SIGNS and not before[-2:-1].isalnum()
    return -number if number is not None and signed and _SIGNS[before[-1]] < 0 else number


def _plain(latex: str) -> str:
    """The few pieces of LaTeX that stand around numbers, removed."""
    for piece, plain in (("{,}", ","), ("\\$", "$"), ("\\%", "%"), ("\\!", ""), ("\\,", ""), ("\\ ", " ")):
        latex = latex.replace(piece, plain)
    return latex.strip().strip("$").strip()


def _leading_number(text: str) -> Fraction | None:
    """The number at the start of a text in which no other digit follows."""
    text = text.strip()
    fraction = _FRACTION.match(text)
    if fraction:
        number = _value(f"{fraction[2]}/{fraction[3]}")
        sign, rest = _SIGNS.get(fraction[1], 1), text[fraction.end() :]
    else:
        # A sign before or after the currency sign: -$5, $-5.
        bare = text.lstrip(_CURRENCY).lstrip()
        sign = _SIGNS.get(bare[:1], 1)
        bare = (bare[1:] if bare[:1] in _SIGNS else bare).lstrip(_CURRENCY + " ")
        found = _NUMBER.match(bare)
        if not found:
            return None
        token = found[0].rstrip(",").rstrip(".")
        number, rest = _value(token), bare[len(token) :]
    if number is None or any(sign.isnumeric() for sign in rest) or rest.lstrip()[:1] in tuple("^*/+=!\\("):
        return None
    return sign * number


def _value(token: str) -> Fraction | None:
    """A bounded token of digits as a fraction."""
    parts = _PARTS.fullmatch(token) if len(token) <= MAX_NUMBER else None
    if parts is None:
        return None
    whole, decimals, exponent, below = parts[1], parts[2] or "", parts[3] or "0", parts[4] or "1"
    for digits in (whole or "0", below):
        if not _THOUSANDS.fullmatch(digits):
            return None
    if len(exponent.lstrip("+-")) > 2 or not whole + decimals:
        return None
    number = Fraction(int(whole.replace(",", "") + decimals), 10 ** len(decimals)) * Fraction(10) ** int(exponent)
    divisor = int(below.replace(",", ""))
    return number / divisor if divisor else None


def is_correct(completion: Any, answer: str) -> bool:
    """Whether a completion ends in the number of the answer.

    Args:
        completion: text, or messages of which the last one counts; of any length.
        answer: a number, or a solution that ends in ``#### number`` as in GSM8K's own files.

    Raises:
        ValueError: the answer holds no number.
    """
    right = final_number(answer)
    if right is None:
        raise ValueError(f"answer must hold a number, got {answer[:80]!r}")
    return final_number(text_of(completion)) == right


def gsm8k_reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion ends in the right number, else 0.0.

    Args:
        completions: generated texts or messages.
        answer: right answers, one per completion.
        **kwargs: the other columns and objects TRL passes; not used.

    Raises:
        ValueError: the numbers of completions and answers differ, or an answer holds no number.
    """
    same_length(completions, answer)
    return [float(is_correct(text, right)) for text, right in zip(completions, answer, strict=True)]


def gsm8k_task(request: DataRequest) -> TaskData:
    """GSM8K, grade-school word problems (Cobbe et al. 2021, MIT licence), held out from its test split.

    Raises:
        ValueError: there are too few rows, or a column is missing.
        OSError: neither the hub nor the copy delivered.
    """
    refuse(request, "verifier", "prompt_column", "answer_column")

    def as_row(row: Row, where: str) -> Row:
        question, solution = (str(column(row, name, where)) for name in ("question", "answer"))
        right = final_number(solution)
        if right is None:
            raise ValueError(f"{where}: the answer does not end in a number: {solution[-80:]!r}")
        prompt = request.framed(question, TEMPLATE)
        return {"prompt": prompt, "answer": f"{MARK} {right}", "prompt_id": text_id("gsm8k", question)}

    train, held_out = read_splits(request, SOURCE, as_row)
    return TaskData(
        train=train, held_out=held_out, reward=gsm8k_reward, max_completion_tokens=MAX_COMPLETION_TOKENS, chat=True
    )
