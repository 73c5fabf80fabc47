"""DAPO-Math-17K (Yu et al. 2025, Apache-2.0): competition problems whose answers are whole numbers.

On the hub it is read from ``open-r1/DAPO-Math-17k-Processed``, where no problem repeats and none is wrapped in an
instruction. Copies in the original layout are read too: a prompt of one chat message, the answer in
``reward_model.ground_truth``; the instructions that are known to stand around the problem are taken off.
"""

from __future__ import annotations

import re

from knapsack_rl.tasks.data import DataRequest, Row, Source, TaskData, column, read_splits, refuse, text_id
from knapsack_rl.tasks.extraction import text_of
from knapsack_rl.tasks.math_answers import MathVerifier, math_reward
from knapsack_rl.tasks.math_problems import MAX_COMPLETION_TOKENS, TEMPLATE

SOURCE = Source(hub="open-r1/DAPO-Math-17k-Processed", config="all")

_WRAPPERS = (
    # As published by the authors of DAPO.
    re.compile(
        r"Solve the following math problem step by step\..*?\n\n(.*)\n\nRemember to put your answer .*", re.DOTALL
    ),
    # As used by the authors of GRESO.
    re.compile(r"Please solve the following math problem: (.*?)\. The assistant first thinks about .*", re.DOTALL),
)


def dapo_math_task(request: DataRequest) -> TaskData:
    """DAPO-Math-17K with answers checked by math-verify; held-out problems are other ones of the same set.

    Raises:
        ValueError: there are too few rows, or a column is missing.
        OSError: neither the hub nor the copy delivered.
        ImportError: math-verify is not installed.
    """
    refuse(request, "verifier", "prompt_column", "answer_column")
    MathVerifier()  # says now, and not after the first generation, that its package is missing

    def as_row(row: Row, where: str) -> Row:
        problem = bare(text_of(column(row, "prompt", where)))
        judged = row.get("reward_model") or {}
        answer = row.get("solution") or row.get("answer") or judged.get("ground_truth")
        if not answer:
            raise ValueError(f"{where}: no answer in solution, answer or reward_model.ground_truth")
        prompt = request.framed(problem, TEMPLATE)
        return {"prompt": prompt, "answer": str(answer), "prompt_id": text_id("dapo-math-17k", problem)}

    train, held_out = read_splits(request, SOURCE, as_row)
    return TaskData(
        train=train, held_out=held_out, reward=math_reward, max_completion_tokens=MAX_COMPLETION_TOKENS, chat=True
    )


def bare(prompt: str) -> str:
    """The problem without a known instruction around it."""
    for wrapper in _WRAPPERS:
        found = wrapper.fullmatch(prompt.strip())
        if found:
            return found[1].strip()
    return prompt.strip()
