"""Finding the answer in what a model wrote. Text is searched and compared, never evaluated; all work is linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_TEXT = 100_000
"""Characters of a completion; a longer one is wrong without being read."""

MAX_ANSWER = 512
"""Characters of an answer; a longer one is wrong without being parsed."""

BOX = "\\boxed{"


def text_of(completion: Any) -> str:
    """The text of a completion as trainers pass it: a string, or messages of which the last one counts.

    What is neither (a message without text, for one) is the empty text, which is never right.
    """
    if isinstance(completion, Sequence) and not isinstance(completion, str) and completion:
        last = completion[-1]
        completion = last.get("content") if isinstance(last, dict) else None
    return completion if isinstance(completion, str) else ""


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, braces balanced; None if there is none or it is too long."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    start += len(BOX)
    depth = 1
    for position in range(start, min(len(text), start + MAX_ANSWER + 1)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if not depth:
                return text[start:position]
    return None


def same_length(completions: Sequence[Any], answer: Sequence[Any]) -> None:
    """Refuse columns that do not fit each other.

    Raises:
        ValueError: the numbers of completions and answers differ.
    """
    if len(completions) != len(answer):
        raise ValueError(
            f"completions and answer must be equally long, got {len(completions)} and {len(answer)}; repeat the "
            "answer of a prompt once per completion"
        )
