"""Sums, differences and products of small numbers for language models that know some arithmetic: no file, no hub.

A prompt shows three solved problems and asks the fourth, so that a model answers with a number and a new line, chat or
no chat. Two thirds of the operands have one digit, the others two: a model of some hundred million parameters solves
some sums of one-digit numbers often and products of two-digit numbers never. The first line of a completion is its
answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from knapsack_rl.tasks.data import FILE_SETTINGS, DataRequest, TaskData, refuse, split_rows
from knapsack_rl.tasks.generated import below, check_size, draw_distinct
from knapsack_rl.tasks.verifier import accuracy_reward, text_of

TEMPLATE = "3+4=7\n12-5=7\n2*8=16\n{prompt}"
MAX_COMPLETION_TOKENS = 8
ONE_DIGIT = 2 / 3
"""Share of operands with one digit; the others have two."""
MOST = 10_000


def sums_task(request: DataRequest) -> TaskData:
    """Return the generated problems: the same ones for every run, in random order, without repetitions.

    Raises:
        ValueError: a setting of files was given, or more problems are asked for than there are.
    """
    refuse(request, *FILE_SETTINGS)
    check_size(request, MOST)
    rng = random.Random(0)  # noqa: S311 - reproducible data, not a secret
    rows = [
        {"prompt": request.framed(f"{text}=", TEMPLATE), "answer": str(value), "prompt_id": f"sums/{text}"}
        for text, value in draw_distinct(request.wanted, rng, _draw)
    ]
    train, held_out = split_rows(request, rows, None)
    return TaskData(
        train=train, held_out=held_out, reward=sums_reward, max_completion_tokens=MAX_COMPLETION_TOKENS, stop="\n"
    )


def sums_reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion's first line is the right number, else 0.0.

    Arguments and errors are those of :func:`knapsack_rl.tasks.accuracy_reward`; a full stop after the number is
    ignored.
    """
    first_lines = [text_of(completion)[:64].partition("\n")[0].rstrip(" .") for completion in completions]
    return accuracy_reward(first_lines, answer)


def _draw(rng: random.Random) -> tuple[str, int]:
    operation = "+-*"[below(3, rng)]
    left, right = (_operand(rng) for _ in range(2))
    if operation == "-" and left < right:
        left, right = right, left
    value = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return f"{left}{operation}{right}", value


def _operand(rng: random.Random) -> int:
    first = 1 if rng.random() < ONE_DIGIT else 10
    return first + int(rng.random() * 9 * first)
