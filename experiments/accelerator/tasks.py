"""Tasks for an accelerator whose prompts show solved examples, so that a small model answers in one line.

* ``gsm8k-few-shot``: GSM8K (hub name or a copy, see :mod:`knapsack_rl.tasks.hub`) after four problems with one-line
  solutions, which were written for this purpose.
* ``mixed:TASK;TASK``: problems of several generators of reasoning-gym in equal parts, each after three problems of its
  own generator. The generator is the column ``grade``, by which prompts may share knowledge.

Any other name is that of :func:`knapsack_rl.tasks.registry.load_data`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from knapsack_rl.tasks.data import DataRequest, Row, TaskData, distinct
from knapsack_rl.tasks.registry import load_data
from knapsack_rl.tasks.verifier import Reward

GSM8K = "gsm8k-few-shot"
MIXED = "mixed:"
GSM8K_TOKENS, MIXED_TOKENS = 64, 24
SHOTS = 3
"""Solved problems in front of one of reasoning-gym."""
SURPLUS = 4
"""Problems that are generated for each that is wanted: generators of easy problems repeat themselves."""

ASKED = "Question: {prompt}\nAnswer:"
GSM8K_TEMPLATE = (
    "Question: A box holds 6 pens. How many pens do 4 boxes hold?\nAnswer: 6*4=24. #### 24\n\n"
    "Question: Mia picks 15 plums, gives 3 to Tom and eats 2. How many are left?\n"
    "Answer: 15-3=12. 12-2=10. #### 10\n\n"
    "Question: A ticket costs $9 and a drink a third of that. What do two tickets and a drink cost?\n"
    "Answer: 9/3=3. 2*9=18. 18+3=21. #### 21\n\n"
    "Question: Ben reads 20 pages a day for a week, then 50 more. How many pages does he read?\n"
    "Answer: 7*20=140. 140+50=190. #### 190\n\n" + ASKED
)

CANDIDATES = (
    "letter_counting?min_words=3&max_words=6",
    "chain_sum?min_terms=2&max_terms=3&min_digits=1&max_digits=1",
    "gcd?min_value=2&max_value=30",
    "products?min_digits=1&max_digits=2",
    'calendar_arithmetic?tasks=["weekday_of_date"]',
    "basic_arithmetic?min_terms=2&max_terms=3&min_digits=1&max_digits=1",
    "count_bits?min_n=1&max_n=500",
    "leg_counting?min_animals=1&max_animals=2&max_instances=4",
    "lcm?min_value=2&max_value=40",
    "string_insertion?min_string_length=5&max_string_length=5",
)
"""Generators of reasoning-gym from which those are taken that the base model solves now and then."""


@functools.cache
def load(dataset: str, train_prompts: int, held_out_prompts: int, copy: Path | None = None) -> TaskData:
    """Return the prompts of a task and their reward; once in a process, since each generator has a process of its own.

    Args:
        dataset: name of the task.
        train_prompts: prompts to train on.
        held_out_prompts: prompts to hold out.
        copy: file or folder of a published data set, instead of the hub.

    Raises:
        ValueError: a generator has too few different problems, or see ``load_data``.
        OSError: neither the hub nor the copy delivered.
        ImportError: an extra is not installed.
    """
    if dataset.startswith(MIXED):
        return _mixed(dataset.removeprefix(MIXED).split(";"), train_prompts, held_out_prompts)
    few_shot = dataset == GSM8K
    request = DataRequest(
        dataset="gsm8k" if few_shot else dataset,
        train_prompts=train_prompts,
        held_out_prompts=held_out_prompts,
        path=str(copy or ""),
        template=GSM8K_TEMPLATE if few_shot else "",
    )
    task = load_data(request)
    return replace(task, stop="\n", max_completion_tokens=GSM8K_TOKENS) if few_shot else task


def _mixed(names: Sequence[str], train_prompts: int, held_out_prompts: int) -> TaskData:
    train: list[Row] = []
    held_out: list[Row] = []
    rewards: dict[str, Reward] = {}
    for place, name in enumerate(names):
        parts = [(wanted + place) // len(names) for wanted in (train_prompts, held_out_prompts)]
        rows, rewards[name] = _few_shot(name, sum(parts))
        train, held_out = train + rows[: parts[0]], held_out + rows[parts[0] :]

    def reward(completions: Sequence[Any], grade: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """TRL reward function: of each row that of its generator."""
        return [
            rewards[name](completions=[text], **{key: [values[row]] for key, values in columns.items()})[0]
            for row, (text, name) in enumerate(zip(completions, grade, strict=True))
        ]

    return TaskData(train=train, held_out=held_out, reward=reward, max_completion_tokens=MIXED_TOKENS, stop="\n")


def _few_shot(name: str, wanted: int) -> tuple[list[Row], Reward]:
    """Different problems of a generator, each after the same solved ones, and their reward."""
    generated = SURPLUS * (wanted + SHOTS)
    task = load_data(
        DataRequest(dataset=f"reasoning-gym:{name}", train_prompts=generated, held_out_prompts=0, template="{prompt}")
    )
    rows = distinct(task.train)[: SHOTS + wanted]
    if len(rows) < SHOTS + wanted:
        raise ValueError(
            f"{name} has {len(rows)} different problems in {generated}, but {SHOTS} + {wanted} are wanted; widen its "
            "knobs or lower train_prompts"
        )
    solved = "".join(f"{ASKED.format(prompt=row['prompt'])} {row['answer']}\n\n" for row in rows[:SHOTS])
    return [
        {**row, "prompt": solved + ASKED.format(prompt=row["prompt"]), "grade": name} for row in rows[SHOTS:]
    ], task.reward
