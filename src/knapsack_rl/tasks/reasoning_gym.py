"""Any task of reasoning-gym: about a hundred generators of problems with verifiers, without a network.

A data set is named ``reasoning-gym:TASK``; its knobs follow as in a URL:
``reasoning-gym:chain_sum?min_terms=2&max_terms=3``. Its verifiers give wrong answers a few hundredths of a point; a
success is a score of 1. The answer is the content of the last ``<answer>...</answer>``, else the whole completion.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

from knapsack_rl.tasks.data import FILE_SETTINGS, DataRequest, Row, TaskData, refuse, split_rows
from knapsack_rl.tasks.verifier import MAX_TEXT, same_length, tagged_answer, text_of

TEMPLATE = "{prompt}\nThink, then write the answer alone between <answer> and </answer>."
MAX_COMPLETION_TOKENS = 256
SEED = 0
FULL_SCORE = 1.0


def reasoning_gym_task(request: DataRequest) -> TaskData:
    """Return problems of a generator, the same for every run.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: the task or a knob is unknown, or a setting of files was given.
    """
    refuse(request, *FILE_SETTINGS)
    name, _, query = request.dataset.partition(":")[2].partition("?")
    problems = _problems(name, query, request.wanted)
    rows = [_row(request, name, problems[index], index) for index in range(request.wanted)]
    train, held_out = split_rows(request, rows, None)
    return TaskData(
        train=train,
        held_out=held_out,
        reward=_reward_for(problems),
        max_completion_tokens=MAX_COMPLETION_TOKENS,
        chat=True,
    )


def _problems(name: str, query: str, size: int) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(
            f'{error}. Data sets of reasoning-gym need: pip install "knapsack-rl[reasoning-gym]"'
        ) from error
    if name not in DATASETS:
        raise ValueError(
            f"reasoning-gym has no task {name!r}; name one as reasoning-gym:TASK: {', '.join(sorted(DATASETS))}"
        )
    try:
        return reasoning_gym.create_dataset(name, seed=SEED, size=size, **_knobs(query))
    except (TypeError, AssertionError) as error:  # how its configurations refuse
        raise ValueError(f"reasoning-gym:{name} does not take the knobs {query!r}: {error}") from error


def _knobs(query: str) -> dict[str, Any]:
    """Return the knobs of a query; numbers, lists and true or false as in JSON, anything else is text."""
    knobs: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
        if name in ("seed", "size"):
            raise ValueError(
                f"{name} is not a knob: train_prompts and held_out_prompts decide how many problems there are"
            )
        try:
            knobs[name] = json.loads(text)
        except ValueError:
            knobs[name] = text
    return knobs


def _row(request: DataRequest, name: str, problem: dict[str, Any], index: int) -> Row:
    return {
        "prompt": request.framed(str(problem["question"]), TEMPLATE),
        "answer": str(problem["answer"]),
        "prompt_id": f"reasoning-gym/{name}/{index}",
        "problem": index,
    }


def _reward_for(problems: Any) -> Any:
    def reasoning_gym_reward(completions: Sequence[Any], problem: Sequence[int], **kwargs: Any) -> list[float]:
        """TRL reward function: 1.0 where the task's own verifier gives the full score, else 0.0."""
        same_length(completions, problem)
        return [
            float(problems.score_answer(answer_of(text), problems[index]) >= FULL_SCORE)
            for text, index in zip(completions, problem, strict=True)
        ]

    return reasoning_gym_reward


def answer_of(completion: Any) -> str | None:
    """Return the answer in a completion; None if it is too long to be read."""
    text = text_of(completion)
    if len(text) > MAX_TEXT:
        return None
    found = tagged_answer(text)
    return (text if found is None else found).strip()
