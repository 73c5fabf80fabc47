"""MATH, competition problems (Hendrycks et al. 2021, MIT licence).

On the hub it is read from ``DigitalLearningGmbH/MATH-lighteval``; held-out problems are of its test split. A copy of
one's own may have an ``answer`` column, or the worked ``solution`` with the answer in its last box.
"""

from __future__ import annotations

from knapsack_rl.tasks.data import DataRequest, Row, Source, TaskData, column, read_splits, refuse, text_id
from knapsack_rl.tasks.extraction import last_boxed
from knapsack_rl.tasks.math_answers import MathVerifier, math_reward

SOURCE = Source(hub="DigitalLearningGmbH/MATH-lighteval", held_out_split="test")
TEMPLATE = "{prompt}\n\nReason step by step, and put your final answer within \\boxed{}."
MAX_COMPLETION_TOKENS = 1024


def math_task(request: DataRequest) -> TaskData:
    """MATH with answers checked by math-verify, its subjects mixed.

    Raises:
        ValueError: there are too few rows, or a column is missing.
        OSError: neither the hub nor the copy delivered.
        ImportError: math-verify is not installed.
    """
    refuse(request, "verifier", "prompt_column", "answer_column")
    MathVerifier()  # says now, and not after the first generation, that its package is missing

    def as_row(row: Row, where: str) -> Row:
        problem = str(column(row, "problem", where))
        answer = row.get("answer") or last_boxed(str(column(row, "solution", where)))
        if not answer:
            raise ValueError(f"{where}: the solution has no \\boxed{{}} answer")
        prompt = request.framed(problem, TEMPLATE)
        return {"prompt": prompt, "answer": str(answer), "prompt_id": text_id("math", problem)}

    train, held_out = read_splits(request, SOURCE, as_row)
    return TaskData(
        train=train, held_out=held_out, reward=math_reward, max_completion_tokens=MAX_COMPLETION_TOKENS, chat=True
    )
