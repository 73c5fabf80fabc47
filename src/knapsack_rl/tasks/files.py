"""Data sets of one's own: a JSONL, CSV or parquet file, or any data set of the hub, with a column mapping."""

from __future__ import annotations

from pathlib import Path

from knapsack_rl.offline.tables import READABLE
from knapsack_rl.tasks.data import DataRequest, Reward, Row, Source, TaskData, column, read_rows, refuse, split_rows
from knapsack_rl.tasks.gsm8k import gsm8k_reward
from knapsack_rl.tasks.matching import exact_match_reward
from knapsack_rl.tasks.math_answers import MathVerifier, math_reward

MAX_COMPLETION_TOKENS = 256

VERIFIERS: dict[str, Reward] = {"exact": exact_match_reward, "number": gsm8k_reward, "math": math_reward}
"""Verifiers that need no more than the answer, by name."""


def columns_task(request: DataRequest) -> TaskData:
    """Rows of a file or hub data set: the first ``train_prompts`` to train on, the next ones held out.

    A prompt is text, or a list of chat messages, which must then be so in every row.

    Raises:
        ValueError: a column is missing, or there are too few rows.
        FileNotFoundError: a path that looks like a file does not exist.
        OSError: the hub did not deliver.
        ImportError: the verifier needs an extra.
    """
    reward = VERIFIERS["exact" if request.verifier == "auto" else request.verifier]
    if reward is math_reward:
        MathVerifier()  # says now, and not after the first generation, that its package is missing
    if Path(request.dataset).suffix in READABLE:
        refuse(request, "path", "config", "split")
        source = Source(hub=str(request.dataset))
    else:
        source = Source(hub=request.dataset)
    rows = read_rows(request, source, request.split or "train")
    train, held_out = split_rows(
        request, [_as_row(row, at, request) for at, row in enumerate(rows[: request.wanted])], None
    )
    return TaskData(
        train=train, held_out=held_out, reward=reward, max_completion_tokens=MAX_COMPLETION_TOKENS, chat=True
    )


def _as_row(row: Row, position: int, request: DataRequest) -> Row:
    where = f"{request.dataset}, row {position + 1}"
    found = []
    for setting, name in (("prompt_column", request.prompt_column), ("answer_column", request.answer_column)):
        try:
            found.append(column(row, name, where))
        except ValueError as error:
            raise ValueError(f"{error} (name another with {setting}, --{setting.replace('_', '-')})") from error
    prompt, answer = found
    if isinstance(prompt, list):
        refuse(request, "template")
    else:
        prompt = request.framed(str(prompt))
    return {
        "prompt": prompt,
        "answer": str(answer),
        "prompt_id": row.get("prompt_id", f"{Path(request.dataset).name}:{position}"),
    }
