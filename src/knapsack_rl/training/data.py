"""Prompts and rewards of a training run."""

from __future__ import annotations

import dataclasses
from typing import Any

from knapsack_rl.tasks.data import DataRequest, Row, TaskData
from knapsack_rl.tasks.registry import load_data
from knapsack_rl.training.settings import TrainSettings


def load_task(settings: TrainSettings) -> TaskData:
    """Load the data set named in the settings.

    Raises:
        ValueError: a setting does not fit the data set, a column is missing, or there are too few rows.
        OSError: a file is missing, or the hub did not deliver.
        ImportError: the data set needs an extra.
    """
    task = load_data(
        DataRequest(
            dataset=settings.dataset,
            train_prompts=settings.train_prompts,
            held_out_prompts=settings.held_out_prompts,
            path=settings.dataset_path,
            config=settings.dataset_config,
            split=settings.dataset_split,
            prompt_column=settings.prompt_column,
            answer_column=settings.answer_column,
            verifier=settings.verifier,
            template=settings.prompt_template,
            features=tuple(settings.columns),
        )
    )
    longest = settings.max_completion_tokens or task.max_completion_tokens
    return dataclasses.replace(task, max_completion_tokens=longest)


def for_tokenizer(task: TaskData, tokenizer: Any, chat: str) -> TaskData:
    """Return the task with its prompts as chat messages if wanted, and an end of answers that the tokenizer knows.

    Args:
        task: prompts as text, or as messages already.
        tokenizer: of the model.
        chat: ``"on"``, ``"off"``, or ``"auto"`` for chat if task and tokenizer support it.

    Raises:
        ValueError: messages are wanted but the tokenizer has no chat template, or the prompts are messages but ``chat``
            is off, or the text that ends an answer is not a single token.
    """
    messages = isinstance(task.train[0]["prompt"], list)
    template = getattr(tokenizer, "chat_template", None) is not None
    if messages and chat == "off":
        raise ValueError("chat is off, but the data set's prompts are chat messages; name a column of plain text")
    wanted = messages or chat == "on" or (chat == "auto" and task.chat and template)
    if wanted and not template:
        raise ValueError("the model's tokenizer has no chat template; set chat to off and give prompts as plain text")
    if wanted and not messages:
        task = dataclasses.replace(task, train=_as_messages(task.train), held_out=_as_messages(task.held_out))
    if task.stop and not wanted:
        stop_token(task, tokenizer)
        return task
    return dataclasses.replace(task, stop="")  # a chat model ends its turn by itself


def stop_token(task: TaskData, tokenizer: Any) -> int | None:
    """Return the token of the text that ends an answer; None if the task has no such text.

    Raises:
        ValueError: the tokenizer has no single token for it.
    """
    if not task.stop:
        return None
    ids = tokenizer(task.stop, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"answers of this data set end in {task.stop!r}, which is not a single token of the model's tokenizer but "
            f"{len(ids)} tokens; use another model, or set chat to on"
        )
    return ids[0]


def _as_messages(rows: Any) -> list[Row]:
    return [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
