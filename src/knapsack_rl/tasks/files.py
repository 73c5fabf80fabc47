"""Your own data sets: a JSONL, CSV or parquet file, or any data set of the hub, with column names as settings."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import cast

from knapsack_rl.offline.tables import READABLE
from knapsack_rl.tasks.data import (
    DataRequest,
    Row,
    Source,
    TaskData,
    checked_answer,
    column,
    read_rows,
    refuse,
    split_rows,
    usable,
)
from knapsack_rl.tasks.math_process import require_math
from knapsack_rl.tasks.verifier import REWARDS, Verifier

MAX_COMPLETION_TOKENS = 256


def columns_task(request: DataRequest) -> TaskData:
    """Return rows of a file or hub data set: the first ``train_prompts`` to train on, the next ones held out.

    A prompt is text, or a list of chat messages, which must then be so in every row. A row without prompt, or with an
    answer that can never be matched, is skipped.

    Raises:
        ValueError: a column is missing, or there are too few rows that can be used.
        FileNotFoundError: a path that looks like a file does not exist.
        OSError: the hub did not deliver.
        ImportError: the verifier needs an extra.
    """
    verifier = cast(Verifier, "exact" if request.verifier == "auto" else request.verifier)
    if verifier != "exact":
        require_math()
    if Path(request.dataset).suffix in READABLE:
        refuse(request, "path", "config", "split")
    stored = read_rows(request, Source(hub=request.dataset), request.split or "train")
    positions, skipped = itertools.count(), list[str]()
    rows = usable(
        stored,
        lambda row, where: _as_row(row, where, next(positions), request, verifier),
        request.dataset,
        skipped,
        most=request.wanted,
    )
    train, held_out = split_rows(request, rows, None, skipped)
    return TaskData(
        train=train,
        held_out=held_out,
        reward=REWARDS[verifier],
        max_completion_tokens=MAX_COMPLETION_TOKENS,
        chat=True,
    )


def _as_row(row: Row, where: str, position: int, request: DataRequest, verifier: Verifier) -> Row:
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
    return request.features_of(row) | {
        "prompt": prompt,
        "answer": checked_answer(answer, verifier, where),
        "prompt_id": row.get("prompt_id", f"{Path(request.dataset).name}:{position}"),
    }
