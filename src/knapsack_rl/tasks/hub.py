r"""Published data sets: ``gsm8k``, ``math`` and ``dapo-math-17k``, from the hub or from a copy of it.

* GSM8K, grade-school word problems (Cobbe et al. 2021, MIT licence).
* MATH, competition problems (Hendrycks et al. 2021, MIT licence). A copy may have an ``answer`` column, or the worked
  ``solution`` with the answer in its last box.
* DAPO-Math-17K, competition problems with integer answers (Yu et al. 2025, Apache-2.0). On the hub it is read from a
  version without repeated problems and instructions. Copies in the original layout are read too: a prompt of one chat
  message, the answer in ``reward_model.ground_truth``; known instructions around the problem are removed.

All of them need math-verify, the extra ``math``, and say so when they are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from knapsack_rl.tasks.data import (
    DataRequest,
    Row,
    Source,
    TaskData,
    checked_answer,
    column,
    read_splits,
    refuse,
    text_id,
)
from knapsack_rl.tasks.math_process import require_math
from knapsack_rl.tasks.verifier import MARK, REWARDS, Verifier, gold_answer, is_missing, last_boxed, text_of

GSM8K = Source(hub="openai/gsm8k", config="main", held_out_split="test")
GSM8K_TEMPLATE = "{prompt}\n\nReason step by step, then give the answer as a number after ####."
MATH = Source(hub="DigitalLearningGmbH/MATH-lighteval", held_out_split="test")
DAPO_MATH = Source(hub="open-r1/DAPO-Math-17k-Processed", config="all")
MATH_TEMPLATE = "{prompt}\n\nReason step by step, and put your final answer within \\boxed{}."

_DAPO_INSTRUCTIONS = (
    # As published by the authors of DAPO.
    re.compile(
        r"Solve the following math problem step by step\..*?\n\n(.*)\n\nRemember to put your answer .*", re.DOTALL
    ),
    # As used by the authors of GRESO.
    re.compile(r"Please solve the following math problem: (.*?)\. The assistant first thinks about .*", re.DOTALL),
)


def gsm8k_task(request: DataRequest) -> TaskData:
    """Return GSM8K, held out from its test split; see :func:`_published` for errors."""

    def problem_and_answer(row: Row, where: str) -> tuple[str, str]:
        question, solution = (column(row, name, where) for name in ("question", "answer"))
        return str(question), f"{MARK} {gold_answer(checked_answer(solution, 'number', where), 'number')}"

    return _published(request, GSM8K, GSM8K_TEMPLATE, "number", problem_and_answer, max_completion_tokens=320)


def math_task(request: DataRequest) -> TaskData:
    """Return MATH, its subjects mixed, held out from its test split; see :func:`_published` for errors."""

    def problem_and_answer(row: Row, where: str) -> tuple[str, str]:
        problem, answer = str(column(row, "problem", where)), _first_value(row, "answer")
        if answer is None:
            solution = _first_value(row, "solution")
            if solution is None:
                raise ValueError(f"{where}: no value in column 'answer' or 'solution'; columns are {', '.join(row)}")
            answer = last_boxed(str(solution))
            if not answer:
                raise ValueError(f"{where}: the solution has no \\boxed{{}} answer")
        return problem, checked_answer(answer, "math", where)

    return _published(request, MATH, MATH_TEMPLATE, "math", problem_and_answer)


def dapo_math_task(request: DataRequest) -> TaskData:
    """Return DAPO-Math-17K; held-out problems are other ones of the same split. See :func:`_published` for errors."""

    def problem_and_answer(row: Row, where: str) -> tuple[str, str]:
        nested = row.get("reward_model")
        answer = _first_value(row | (nested if isinstance(nested, dict) else {}), "solution", "answer", "ground_truth")
        if answer is None:
            raise ValueError(f"{where}: no answer in solution, answer or reward_model.ground_truth")
        problem = _without_instructions(text_of(column(row, "prompt", where)))
        if not problem:
            raise ValueError(f"{where}: no text in column 'prompt', got {str(row['prompt'])[:80]!r}")
        return problem, checked_answer(answer, "math", where)

    return _published(request, DAPO_MATH, MATH_TEMPLATE, "math", problem_and_answer)


def _published(
    request: DataRequest,
    source: Source,
    template: str,
    verifier: Verifier,
    problem_and_answer: Callable[[Row, str], tuple[str, str]],
    max_completion_tokens: int = 1024,
) -> TaskData:
    """Return rows of a published data set in random order, with ids that do not depend on it.

    Args:
        request: how many rows, and whether from a copy.
        source: where the data set is on the hub.
        template: the instruction around each problem, with ``{prompt}`` in it.
        verifier: how answers are checked.
        problem_and_answer: reads both from a row as stored; also gets the name of the row for errors.
        max_completion_tokens: longest answer.

    Raises:
        ValueError: there are too few rows, or none can be used: a column is missing, or no answer can be matched.
        OSError: neither the hub nor the copy delivered.
        ImportError: math-verify is not installed.
    """
    refuse(request, "verifier", "prompt_column", "answer_column")
    require_math()

    def as_row(row: Row, where: str) -> Row:
        problem, answer = problem_and_answer(row, where)
        prompt = request.framed(problem, template)
        found = {"prompt": prompt, "answer": answer, "prompt_id": text_id(request.dataset, problem)}
        return request.features_of(row) | found

    train, held_out = read_splits(request, source, as_row)
    return TaskData(
        train=train,
        held_out=held_out,
        reward=REWARDS[verifier],
        max_completion_tokens=max_completion_tokens,
        chat=True,
    )


def _first_value(row: Row, *names: str) -> Any:
    """Return the first of these columns that has a value, which may be 0; None if none has."""
    return next((row[name] for name in names if not is_missing(row.get(name))), None)


def _without_instructions(prompt: str) -> str:
    for instructions in _DAPO_INSTRUCTIONS:
        found = instructions.fullmatch(prompt.strip())
        if found:
            return found[1].strip()
    return prompt.strip()
