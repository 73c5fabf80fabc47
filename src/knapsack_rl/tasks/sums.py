"""Sums, differences and products of small numbers for language models that know some arithmetic: no file, no hub.

A prompt shows three solved problems and asks the fourth, so that a model answers with a number and a new line, chat or
no chat. Two thirds of the operands have one digit, the others two: a model of some hundred million parameters solves
some sums of one-digit numbers often and products of two-digit numbers never. The first line of a completion is its
answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from knapsack_rl.tasks.data import DataRequest, TaskData, refuse
from knapsack_rl.tasks.extraction import same_length, text_of

TEMPLATE = "3+4=7\n12-5=7\n2*8=16\n{prompt}"
MAX_COMPLETION_TOKENS = 8
ONE_DIGIT = 2 / 3
"""Share of operands with one digit; the others have two."""
MOST = 10_000
_NUMBER = re.compile(r" ?(-?[0-9]{1,12})[ .]*")


def sums_task(request: DataRequest) -> TaskData:
    """The generated problems: the same ones for every run, in random order, none of them twice.

    Raises:
        ValueError: a setting of files was given, or more problems are asked for than there are.
    """
    refuse(request, "path", "config", "split", "verifier", "prompt_column", "answer_column")
    problems = _problems(request.wanted)
    rows = [
        {"prompt": request.framed(f"{text}=", TEMPLATE), "answer": str(value), "prompt_id": f"sums/{text}"}
        for text, value in problems
    ]
    return TaskData(
        train=rows[: request.train_prompts],
        held_out=rows[request.train_prompts :],
        reward=sums_reward,
        max_completion_tokens=MAX_COMPLETION_TOKENS,
        stop="\n",
    )


def sums_reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion's first line is the right number, else 0.0.

    Args:
        completions: generated texts or messages.
        answer: right answers, one per completion.
        **kwargs: the other columns and objects TRL passes; not used.

    Raises:
        ValueError: the numbers of completions and answers differ.
    """
    same_length(completions, answer)
    return [float(_first_line(text) == int(right)) for text, right in zip(completions, answer, strict=True)]


def _first_line(completion: Any) -> int | None:
    found = _NUMBER.fullmatch(text_of(completion)[:64].partition("\n")[0])
    return int(found[1]) if found else None


def _problems(count: int) -> list[tuple[str, int]]:
    if count > MOST:
        raise ValueError(f"sums has {MOST} problems for train_prompts + held_out_prompts, got {count}; lower them")
    rng = random.Random(0)  # noqa: S311 - reproducible data, not a secret
    found: dict[str, int] = {}
    while len(found) < count:
        operation = "+-*"[int(rng.random() * 3)]
        left, right = (_operand(rng) for _ in range(2))
        if operation == "-" and left < right:
            left, right = right, left
        value = {"+": left + right, "-": left - right, "*": left * right}[operation]
        found[f"{left}{operation}{right}"] = value
    return list(found.items())


def _operand(rng: random.Random) -> int:
    first = 1 if rng.random() < ONE_DIGIT else 10
    return first + int(rng.random() * 9 * first)
