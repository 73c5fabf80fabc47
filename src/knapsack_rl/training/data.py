"""Prompts and rewards of a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knapsack_rl.logs import READABLE, read_columns
from knapsack_rl.tasks import (
    MAX_COMPLETION_TOKENS,
    accuracy_reward,
    exact_match_reward,
    make_splits,
    running_sums,
    to_rows,
)
from knapsack_rl.tasks.running_sums import make_running_sums
from knapsack_rl.training.settings import TrainSettings

Row = dict[str, Any]

FILE_COMPLETION_TOKENS = 256

GENERATED = ("arithmetic", "running-sums")
"""Data sets that are generated; every prompt has one right completion."""


@dataclass(frozen=True)
class TaskData:
    """What a run trains and is judged on.

    Attributes:
        train: rows with ``prompt``, ``answer`` and ``prompt_id``.
        held_out: rows of the same kind, never trained on.
        reward: TRL reward function; 1 for a right answer, 0 for a wrong one.
        max_completion_tokens: longest answer.
    """

    train: Sequence[Row]
    held_out: Sequence[Row]
    reward: Callable[..., list[float]]
    max_completion_tokens: int


def load_task(settings: TrainSettings) -> TaskData:
    """Load the data set that the settings name.

    Of a file or hub data set the first ``train_prompts`` rows are trained on and the next ``held_out_prompts`` are held
    out; a completion is right if it equals the answer but for white space at the ends.

    Raises:
        ValueError: a column is missing, or there are too few rows.
        FileNotFoundError: a path that looks like a file does not exist.
    """
    if settings.dataset == "arithmetic":
        # The split is part of the task, not of the run: every seed trains and is judged on the same prompts.
        splits = make_splits(train=settings.train_prompts, held_out=max(settings.held_out_prompts, 1))
        train, held_out = to_rows(splits.train), to_rows(splits.held_out[: settings.held_out_prompts])
        longest = settings.max_completion_tokens or MAX_COMPLETION_TOKENS
        return TaskData(train, held_out, accuracy_reward, longest)
    if settings.dataset == "running-sums":
        sums = make_running_sums(train=settings.train_prompts, held_out=max(settings.held_out_prompts, 1))
        longest = settings.max_completion_tokens or running_sums.MAX_COMPLETION_TOKENS
        held_out = to_rows(sums.held_out[: settings.held_out_prompts])
        return TaskData(to_rows(sums.train), held_out, exact_match_reward, longest)
    rows = _read_rows(settings.dataset)
    wanted = settings.train_prompts + settings.held_out_prompts
    if len(rows) < wanted:
        raise ValueError(
            f"{settings.dataset} holds {len(rows)} rows, but train_prompts + held_out_prompts is {wanted}; lower them"
        )
    kept = [_as_row(row, position, settings) for position, row in enumerate(rows[:wanted])]
    return TaskData(
        kept[: settings.train_prompts],
        kept[settings.train_prompts :],
        exact_match_reward,
        settings.max_completion_tokens or FILE_COMPLETION_TOKENS,
    )


def _read_rows(name: str) -> list[Row]:
    if Path(name).suffix in READABLE:
        columns = read_columns(name)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    from datasets import load_dataset

    return load_dataset(name, split="train").to_list()


def _as_row(row: Row, position: int, settings: TrainSettings) -> Row:
    for column in (settings.prompt_column, settings.answer_column):
        if row.get(column) in (None, ""):
            raise ValueError(
                f"{settings.dataset}, row {position}: no value in column {column!r}; columns are {', '.join(row)} "
                "(set prompt_column and answer_column)"
            )
    return {
        "prompt": str(row[settings.prompt_column]),
        "answer": str(row[settings.answer_column]),
        "prompt_id": row.get("prompt_id", f"{Path(settings.dataset).name}:{position}"),
    }
