r"""The one verifier: is the answer in a completion equal to the gold answer?

======== ================================================= ======================================================
verifier the answer in a completion                        equal means
======== ================================================= ======================================================
exact    all of it, without ASCII white space at the ends  the same characters (``1.0`` is ``1``: types of columns)
math     the last ``\boxed{}`` or ``\fbox{}``, else the    math-verify says so: formulas, sets, intervals, numbers
         last line
number   the line after the last ``####``, else the last   the same, after removing currency and percent signs
         box, else the last number in the text             (``50%`` is 50: GSM8K asks for "what percent")
======== ================================================= ======================================================

A gold answer is read the same way; it may be a number instead of text. One for ``number`` without a mark or a box that
is more than a number, but does not start with a word, is taken whole: ``3 1/2`` is three and a half, ``18 m^2`` is 18.

Model output is hostile input: it is searched and compared, never evaluated. The search is linear in the length of the
text. A completion of more than 100,000 characters, or an answer of more than 512, is wrong without being parsed. Two
plain literals (``-1,234.5``, ``1e3``, ``3/4``) are compared as exact fractions; every other comparison runs in a worker
process with limits on time and memory, see :mod:`knapsack_rl.tasks.math_process`.

math-verify reads formulas and numbers. What is rewritten here before is what it cannot read or reads as something else:
spaces between thousands, ``3 1/2``, ``√2``, degree signs, dashes, ``2 x 10^5``, units without ``\\text``, Markdown, and
words before the answer.
"""

from __future__ import annotations

import functools
import logging
import math
import numbers
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal, get_args

from knapsack_rl.tasks.math_process import shared_process

Verifier = Literal["math", "number", "exact"]
Reward = Callable[..., list[float]]
Equal = Callable[[str, str], bool]

logger = logging.getLogger(__name__)

MAX_TEXT = 100_000
"""Characters of a completion; a longer one is wrong without being read."""

MAX_ANSWER = 512
"""Characters of an answer; a longer one is wrong without being parsed."""

MARK = "####"
"""GSM8K's mark before the final number."""

WHITE = " \t\r\n\f\v"

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_LITERAL = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,2})?(?:/[0-9]+)?")
# No two parts match the same character, so that the search is linear. In 10-5 the sign is an operator.
_NUMBER = re.compile(
    r"(?:(?<![^\W_])[-+])?(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?(?:/[0-9][0-9,]*)?"
)
_MIXED = re.compile(r"([-+]?[0-9]+)[ \t]+([0-9]+)/([0-9]+)")
_DIGITS_APART = re.compile(r"[-+]?[0-9]+(?:[ \t]+[0-9]+)+")
_SEPARATOR = re.compile(r"(?<=[0-9])(?:\\[,;:! ]|\{,\}|,\\!|[~\u00a0\u202f\u2009])+(?=[0-9]{3}(?![0-9]))")
_TIMES_TEN = re.compile(r"(?<=[0-9]) ?(?:[xX*]|\\times) ?10\^\{?([-+]?[0-9]{1,3})\}?(?![0-9])")
_UNIT = re.compile(r"\s*[A-Za-z]+(?:/[A-Za-z]+)?(?:\^[0-9]|\^\{[0-9]\}|[²³])?\.?|\s*\([A-Za-z -]+\)\.?")
_POWER_OF_UNIT = re.compile(r"([0-9] ?[A-Za-z]+)(?:\^[0-9]|\^\{[0-9]\})(?![0-9])")
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")
_ROOT = re.compile(r"√\s*([0-9]+|[A-Za-z])")
_CHARACTERS = str.maketrans({"−": "-", "–": "-", "°": "", "×": "\\times ", "·": "\\cdot ", "\u200b": "", "\ufeff": ""})
_CURRENCY_OR_PERCENT = re.compile(r"\\?[$%]|[€£¥]")
_EMPHASIS = re.compile(r"(?<!\S)(\*{1,3}|__?|`)(?=\S)([^*_`]+)(?<=\S)\1(?!\w)")
_LEAD = re.compile(
    r"(?:(?:so |thus )?(?:the )?(?:final )?answer(?: is)?:?|[≈~]|\\approx(?![a-z])|USD?(?![a-z])|EUR|GBP|Rs\.?)\s*",
    re.IGNORECASE,
)
_OPERATORS = tuple("^*/+=!\\(")


def is_correct(completion: str, gold: str | float, verifier: Verifier = "math") -> bool:
    r"""Return whether the answer in a completion equals the gold answer.

    >>> is_correct("So it is \\boxed{\\frac{2}{4}}.", "0.5")
    True
    >>> is_correct("9 * 8 = 72\n#### 72 dollars", "#### 72", "number")
    True
    >>> is_correct("yes", "Yes", "exact")
    False

    Args:
        completion: what the model wrote, of any length and content; never evaluated.
        gold: the right answer as text or a number, or a solution that contains it as a completion would.
        verifier: what counts as the answer and as equal, see the module. ``"math"`` and ``"number"`` take at most
            0.8 s of wall-clock time and 2 GiB per comparison, in a worker process; an answer that needs more is wrong.

    Raises:
        ValueError: the verifier is unknown, or the gold answer can never be matched.
        ImportError: a formula has to be compared and math-verify is not installed.
    """
    return judge(completion, gold, verifier, lambda given, right: shared_process().equal(given, right))


def judge(completion: str, gold: Any, verifier: Verifier, equal: Equal) -> bool:
    """:func:`is_correct` with the comparison of formulas, ``equal(given, right)``, as an argument."""
    right = gold_answer(gold, verifier)
    if len(completion) > MAX_TEXT:
        return False
    if verifier == "exact":
        return _without_decimals(completion.strip(WHITE)) == _without_decimals(right)
    given = _boxed_or_last_line(completion) if verifier == "math" else _number_in(completion)
    if not given or len(given) > MAX_ANSWER:
        return False
    if given == right:
        return True
    one, other = literal(given), literal(right)
    if one is not None and other is not None:
        return one == other
    return not any(map(_DIGITS_APART.fullmatch, (given, right))) and equal(given, right)


def gold_answer(gold: Any, verifier: Verifier) -> str:
    """Return the gold answer alone, as a verifier compares it.

    Args:
        gold: text or a number, as the column of a data set has it.
        verifier: decides where the answer is.

    Raises:
        ValueError: the verifier is unknown, or the gold answer can never be matched: it is empty or too long, neither
            text nor a number, or, for ``"number"``, has no digit.
    """
    return _gold_answer(answer_text(gold), verifier)


@functools.lru_cache(maxsize=1024)
def _gold_answer(gold: str, verifier: Verifier) -> str:
    """:func:`gold_answer` of text, once for all rollouts of a prompt."""
    if verifier not in get_args(Verifier):
        raise ValueError(f"verifier must be one of {', '.join(get_args(Verifier))}, got {verifier!r}")
    if verifier == "exact":
        found = gold.strip(WHITE)
        if not 0 < len(found) <= MAX_TEXT:
            raise ValueError(f"gold must be a text of 1 to {MAX_TEXT} characters, got {len(found)}")
        return found
    found = _boxed_or_last_line(gold) if verifier == "math" else _number_in(gold, gold=True)
    if not 0 < len(found) <= MAX_ANSWER:
        needed = "a number" if verifier == "number" else "an answer"
        raise ValueError(f"gold must hold {needed} of 1 to {MAX_ANSWER} characters, got {gold[-80:]!r}")
    return found


def answer_text(value: Any) -> str:
    """Return the answer in a column as text: a whole number without decimals, whatever type the column has.

    Raises:
        ValueError: it is neither text nor a finite number.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) == 0:  # an array or tensor of one number
        value = value.item()
    if isinstance(value, (numbers.Real, Decimal)) and math.isfinite(value):
        return _without_decimals(str(value))
    raise ValueError(f"an answer must be text or a finite number, got {str(value)[:80]!r} ({type(value).__name__})")


def is_missing(value: Any) -> bool:
    """Return whether a field of a row is empty: nothing, blank text, or what a column of floats has instead."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _without_decimals(text: str) -> str:
    """Return ``1`` for ``1.0``, which is how a column of floats writes it; any other text as it is."""
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def literal(text: str) -> Fraction | None:
    """Return the exact value of a plain decimal or fraction of integers; None for anything else."""
    if not _LITERAL.fullmatch(text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):  # ".", "1.5/2", "1/0"
        return None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` or ``\fbox{...}``, or of ``\boxed 2``.

    Returns:
        The content up to the balancing brace; "" if the box does not end within 512 characters; None without a box.
    """
    box = None
    for box in _BOX.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    if box is None:
        return None
    start = box.end()
    if text[start : start + 1] != "{":
        return text[start : start + 1].strip()
    depth = 0
    for position in range(start, min(len(text), start + MAX_ANSWER + 2)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            return text[start + 1 : position]
    return ""


def _boxed_or_last_line(text: str) -> str:
    """Return the answer for ``"math"``; "" if there is none."""
    found = last_boxed(text)
    if found is None:
        found = _bare(text.rstrip().rpartition("\n")[2])
    return _plain(_bare(_plain(found)))


def _number_in(text: str, gold: bool = False) -> str:
    """Return the answer for ``"number"``; "" if there is none."""
    _, mark, found = text.rpartition(MARK)
    if mark:
        found = found.lstrip().partition("\n")[0]
    boxed = last_boxed(found)
    found = _plain(_bare(_plain(found if boxed is None else boxed)))
    found = _CURRENCY_OR_PERCENT.sub("", found).strip()
    found = _POWER_OF_UNIT.sub(r"\1", re.sub(r"^([-+])\s+", r"\1", found))
    if not re.search("[0-9]", found):
        return ""
    if mark or boxed is not None:
        return _without_words(found)
    all_found = _NUMBER.findall(found)
    if gold and not found[0].isalpha() and (len(all_found) > 1 or any(sign in found for sign in _OPERATORS)):
        return _without_words(found)
    return str(all_found[-1]).rstrip(",").rstrip(".")


def _without_words(text: str) -> str:
    """Return ``72`` of ``72 dollars.``; a text in which more than words follow the number stays as it is."""
    number = _NUMBER.match(text)
    if number is None:
        return text
    token = number[0].rstrip(",").rstrip(".")
    rest = text[len(token) :]
    if _UNIT.fullmatch(rest):
        return token
    if any(sign.isnumeric() for sign in rest) or rest.lstrip()[:1] in _OPERATORS:
        return text
    return token


def _bare(text: str) -> str:
    """Return an answer without Markdown around it and without words such as "The answer is" before it."""
    text = _EMPHASIS.sub(r"\2", text.strip())
    lead = _LEAD.match(text)
    return text[lead.end() :] if lead else text


def _plain(text: str) -> str:
    """Return an answer without dollar signs and separators in numbers, and with its signs in LaTeX."""
    text = _SEPARATOR.sub("", text.strip().removesuffix(".").strip("$").strip().rstrip("\\ ").removesuffix("."))
    text = _TIMES_TEN.sub(r"\\times 10^{\1}", text)
    text = _ROOT.sub(r"\\sqrt{\1}", text.translate(_CHARACTERS))
    mixed = _MIXED.fullmatch(text)
    return f"{mixed[1]}\\frac{{{mixed[2]}}}{{{mixed[3]}}}" if mixed else text


def text_of(completion: Any) -> str:
    """Return the text of a completion as trainers pass it: a string, or messages of which the last one counts.

    Anything else, such as a message without text, is the empty text.
    """
    if isinstance(completion, Sequence) and not isinstance(completion, str) and completion:
        last = completion[-1]
        completion = last.get("content") if isinstance(last, dict) else None
    return completion if isinstance(completion, str) else ""


def tagged_answer(text: str) -> str | None:
    """Return the content of the last ``<answer>...</answer>``, or all that follows an open one; None without a tag."""
    _, tag, found = text.rpartition("<answer>")
    return found.partition("</answer>")[0] if tag else None


def same_length(completions: Sequence[Any], answer: Sequence[Any]) -> None:
    """Refuse columns of different lengths.

    Raises:
        ValueError: the numbers of completions and answers differ.
    """
    if len(completions) != len(answer):
        raise ValueError(
            f"completions and answer must be equally long, got {len(completions)} and {len(answer)}; repeat the "
            "answer of a prompt once per completion"
        )


def _rewards(completions: Sequence[Any], answer: Sequence[Any], verifier: Verifier) -> list[float]:
    same_length(completions, answer)
    return [_reward(text_of(one), right, verifier) for one, right in zip(completions, answer, strict=True)]


def _reward(completion: str, gold: Any, verifier: Verifier) -> float:
    """Return 1.0 or 0.0; a gold answer that cannot be used ends no run."""
    try:
        gold_answer(gold, verifier)
    except ValueError as error:
        _warn_unusable(verifier, str(error))
        return 0.0
    return float(is_correct(completion, gold, verifier))


_warned: set[str] = set()


def _warn_unusable(verifier: str, error: str) -> None:
    """Log the first gold answer that cannot be used by each verifier."""
    if verifier not in _warned:
        _warned.add(verifier)
        logger.warning("%s. All rollouts of this prompt get reward 0. Further ones are not reported", error)


def accuracy_reward(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion is exactly the answer, else 0.0.

    Args:
        completions: R generated texts, or lists of messages of which the last one counts.
        answer: R gold answers, text or numbers, one per completion.
        **kwargs: the other columns and objects that TRL passes; unused.

    Raises:
        ValueError: the numbers of completions and answers differ.
    """
    return _rewards(completions, answer, "exact")


def number_reward(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion ends in the right number, else 0.0.

    Arguments and errors are those of :func:`math_reward`.
    """
    return _rewards(completions, answer, "number")


def math_reward(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion's boxed answer, or last line, equals the right one, else 0.0.

    A gold answer that can never be matched gives 0.0, and the first one is logged.

    Args:
        completions: R generated texts, or lists of messages of which the last one counts.
        answer: R gold answers, text or numbers, one per completion.
        **kwargs: the other columns and objects that TRL passes; unused.

    Raises:
        ValueError: the numbers of completions and answers differ.
        ImportError: a formula has to be compared and math-verify is not installed.
    """
    return _rewards(completions, answer, "math")


REWARDS: dict[Verifier, Reward] = {"exact": accuracy_reward, "number": number_reward, "math": math_reward}
