r"""The one verifier: is the answer in a completion equal to the gold answer?

======== ================================================= ======================================================
verifier the answer in a completion                        equal means
======== ================================================= ======================================================
exact    all of it, without ASCII white space at the ends  the same characters
math     the last ``\boxed{}`` or ``\fbox{}``, else the    math-verify says so: formulas, sets, intervals, numbers
         last line
number   the line after the last ``####``, else the last   the same, after removing currency and percent signs
         box, else the last number in the text             (``50%`` is 50: GSM8K asks for "what percent")
======== ================================================= ======================================================

A gold answer is read the same way. One for ``number`` without a mark or a box that is more than a number, but does not
start with a word, is taken whole: ``3 1/2`` is three and a half, and ``18 m^2`` is not 2.

Model output is hostile input: it is searched and compared, never evaluated. The search is linear in the length of the
text. A completion of more than 100,000 characters, or an answer of more than 512, is wrong without being parsed. Two
plain literals (``-1,234.5``, ``1e3``, ``3/4``) are compared as exact fractions; every other comparison runs in a worker
process with limits on time and memory, see :mod:`knapsack_rl.tasks.math_process`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

from knapsack_rl.tasks.math_process import shared_process

Verifier = Literal["math", "number", "exact"]
Reward = Callable[..., list[float]]
Equal = Callable[[str, str], bool]

MAX_TEXT = 100_000
"""Characters of a completion; a longer one is wrong without being read."""

MAX_ANSWER = 512
"""Characters of an answer; a longer one is wrong without being parsed."""

MARK = "####"
"""GSM8K's mark before the final number."""

WHITE = " \t\r\n\f\v"

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_LITERAL = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,2})?(?:/[0-9]+)?")
# No two parts match the same character, so that the search is linear. In 10-5 the sign is an operator.
_NUMBER = re.compile(
    r"(?:(?<![^\W_])[-+])?(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?(?:/[0-9][0-9,]*)?"
)
_MIXED = re.compile(r"([-+]?[0-9]+)[ \t]+([0-9]+)/([0-9]+)")
_DIGITS_APART = re.compile(r"[-+]?[0-9]+(?:[ \t]+[0-9]+)+")
_SEPARATOR = re.compile(r"(?<=[0-9])(?:\\[,;:! ]|\{,\}|[~\u00a0\u202f\u2009])+(?=[0-9]{3}(?![0-9]))")
_ROOT = re.compile(r"√\s*([0-9]+|[A-Za-z])")
_CHARACTERS = str.maketrans({"−": "-", "–": "-", "°": "", "π": "\\pi ", "×": "\\times ", "·": "\\cdot "})
_CURRENCY_OR_PERCENT = re.compile(r"\\?[$%]|[€£¥]")
_BOLD = re.compile(r"(?<!\S)\*\*([^*]+)\*\*(?!\w)")
_OPERATORS = tuple("^*/+=!\\(")


def is_correct(completion: str, gold: str, verifier: Verifier = "math") -> bool:
    r"""Return whether the answer in a completion equals the gold answer.

    >>> is_correct("So it is \\boxed{\\frac{2}{4}}.", "0.5")
    True
    >>> is_correct("9 * 8 = 72\n#### 72 dollars", "#### 72", "number")
    True
    >>> is_correct("yes", "Yes", "exact")
    False

    Args:
        completion: what the model wrote, of any length and content; never evaluated.
        gold: the right answer, or a solution that contains it as a completion would.
        verifier: what counts as the answer and as equal, see the module. ``"math"`` and ``"number"`` take at most
            0.8 s of wall-clock time and 2 GiB per comparison, in a worker process; an answer that needs more is wrong.

    Raises:
        ValueError: the verifier is unknown, or the gold answer can never be matched.
        ImportError: a formula has to be compared and math-verify is not installed.
    """
    return judge(completion, gold, verifier, lambda given, right: shared_process().equal(given, right))


def judge(completion: str, gold: str, verifier: Verifier, equal: Equal) -> bool:
    """:func:`is_correct` with the comparison of formulas, ``equal(given, right)``, as an argument."""
    right = gold_answer(gold, verifier)
    if len(completion) > MAX_TEXT:
        return False
    if verifier == "exact":
        return completion.strip(WHITE) == right
    given = _boxed_or_last_line(completion) if verifier == "math" else _number_in(completion)
    if not given or len(given) > MAX_ANSWER:
        return False
    if given == right:
        return True
    one, other = literal(given), literal(right)
    if one is not None and other is not None:
        return one == other
    return not any(map(_DIGITS_APART.fullmatch, (given, right))) and equal(given, right)


def gold_answer(gold: str, verifier: Verifier) -> str:
    """Return the gold answer alone, as a verifier compares it.

    Raises:
        ValueError: the verifier is unknown, or the gold answer can never be matched: it is empty or too long, or, for
            ``"number"``, has no digit.
    """
    if verifier not in get_args(Verifier):
        raise ValueError(f"verifier must be one of {', '.join(get_args(Verifier))}, got {verifier!r}")
    if verifier == "exact":
        return gold.strip(WHITE)
    found = _boxed_or_last_line(gold) if verifier == "math" else _number_in(gold, gold=True)
    if not 0 < len(found) <= MAX_ANSWER:
        needed = "a number" if verifier == "number" else "an answer"
        raise ValueError(f"gold must hold {needed} of 1 to {MAX_ANSWER} characters, got {gold[-80:]!r}")
    return found


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
        found = text.rstrip().rpartition("\n")[2]
    return _plain(found)


def _number_in(text: str, gold: bool = False) -> str:
    """Return the answer for ``"number"``; "" if there is none."""
    _, mark, found = text.rpartition(MARK)
    if mark:
        found = found.lstrip().partition("\n")[0]
    boxed = last_boxed(found)
    found = _BOLD.sub(r"\1", _plain(found if boxed is None else boxed))
    found = _CURRENCY_OR_PERCENT.sub("", found).strip()
    found = re.sub(r"^([-+])\s+", r"\1", found)
    if not re.search("[0-9]", found):
        return ""
    if mark or boxed is not None:
        return _without_words(found)
    numbers = _NUMBER.findall(found)
    if gold and not found[0].isalpha() and (len(numbers) > 1 or any(sign in found for sign in _OPERATORS)):
        return found
    return numbers[-1].rstrip(",").rstrip(".")


def _without_words(text: str) -> str:
    """Return ``72`` of ``72 dollars.``; a text in which more than words follow the number stays as it is."""
    number = _NUMBER.match(text)
    if number is None:
        return text
    token = number[0].rstrip(",").rstrip(".")
    rest = text[len(token) :]
    if any(sign.isnumeric() for sign in rest) or rest.lstrip()[:1] in _OPERATORS:
        return text
    return token


def _plain(text: str) -> str:
    """Return an answer without dollar signs and separators in numbers, and with its signs in LaTeX."""
    text = _SEPARATOR.sub("", text.strip().strip("$").strip())
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


def _rewards(completions: Sequence[Any], answer: Sequence[str], verifier: Verifier) -> list[float]:
    same_length(completions, answer)
    return [float(is_correct(text_of(one), right, verifier)) for one, right in zip(completions, answer, strict=True)]


def accuracy_reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion is exactly the answer, else 0.0.

    Args:
        completions: R generated texts, or lists of messages of which the last one counts.
        answer: R gold answers, one per completion.
        **kwargs: the other columns and objects that TRL passes; unused.

    Raises:
        ValueError: the numbers of completions and answers differ.
    """
    return _rewards(completions, answer, "exact")


def number_reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion ends in the right number, else 0.0.

    Arguments and errors are those of :func:`math_reward`.
    """
    return _rewards(completions, answer, "number")


def math_reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion's boxed answer, or last line, equals the right one, else 0.0.

    Args:
        completions: R generated texts, or lists of messages of which the last one counts.
        answer: R gold answers, one per completion.
        **kwargs: the other columns and objects that TRL passes; unused.

    Raises:
        ValueError: the numbers of completions and answers differ, or a gold answer can never be matched.
        ImportError: a formula has to be compared and math-verify is not installed.
    """
    return _rewards(completions, answer, "math")


REWARDS: dict[Verifier, Reward] = {"exact": accuracy_reward, "number": number_reward, "math": math_reward}
