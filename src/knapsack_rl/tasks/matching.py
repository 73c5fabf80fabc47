"""A verifier for any data set with one right answer: the completion must equal it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from knapsack_rl.tasks.extraction import same_length, text_of


def exact_match_reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion equals the answer but for white space at the ends, else 0.0.

    Texts are compared, never evaluated; the work is linear in their length.

    Args:
        completions: generated texts, or messages of which the last one counts.
        answer: right answers, one per completion.
        **kwargs: the other columns and objects TRL passes; not used.

    Raises:
        ValueError: the numbers of completions and answers differ.
    """
    same_length(completions, answer)
    return [float(text_of(given).strip() == right.strip()) for given, right in zip(completions, answer, strict=True)]
