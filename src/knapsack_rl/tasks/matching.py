"""A verifier for any data set with one right answer: the completion must equal it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def exact_match_reward(completions: Sequence[str], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion equals the answer but for white space at the ends, else 0.0.

    Texts are compared, never evaluated; the work is linear in their length.

    Args:
        completions: generated texts.
        answer: right answers, one per completion.
        **kwargs: the other columns and objects TRL passes; not used.

    Raises:
        ValueError: the numbers of completions and answers differ.
    """
    if len(completions) != len(answer):
        raise ValueError(f"completions and answer must be equally long, got {len(completions)} and {len(answer)}")
    return [float(text.strip() == right.strip()) for text, right in zip(completions, answer, strict=True)]
