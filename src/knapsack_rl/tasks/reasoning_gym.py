"""Any task of reasoning-gym: about a hundred generators of problems with verifiers, without a network.

A data set is named ``reasoning-gym:TASK``; its knobs follow as in a URL:
``reasoning-gym:chain_sum?min_terms=2&max_terms=3``. Its verifiers give wrong answers a few hundredths of a point; a
success is a score of 1. The answer is the content of the last ``<answer>...</answer>``, else the whole completion.

Problems are made and scored in a worker process with limits on time and memory, :mod:`knapsack_rl.tasks.gym_worker`: an
answer whose check fails, takes too long or gives no number is wrong, and no answer is evaluated as Python.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

from knapsack_rl.tasks.data import FILE_SETTINGS, DataRequest, Row, TaskData, refuse, split_rows
from knapsack_rl.tasks.gym_worker import SEED
from knapsack_rl.tasks.math_process import GuardedProcess
from knapsack_rl.tasks.verifier import MAX_TEXT, same_length, tagged_answer, text_of

TEMPLATE = "{prompt}\nThink, then write the answer alone between <answer> and </answer>."
MAX_COMPLETION_TOKENS = 256
PAID_FOR_ANY_TEXT = ("game_of_life_halting",)
"""Tasks whose verifier gives nearly any text the full score."""

NO_PROBLEMS = ("composite",)
"""Not a task, but a mixture of tasks whose settings do not fit into knobs."""


class GymProcess(GuardedProcess):
    """Makes the problems of a task, the same in every process, and scores answers to them.

    Args:
        name: of the task.
        size: number of problems.
        knobs: of the task.
        seconds: wall-clock time per answer, > 0; one that takes longer is wrong.

    Attributes:
        rows: question and answer of each problem; empty until the worker is ready.
    """

    def __init__(self, name: str, size: int, knobs: dict[str, Any], seconds: float = 2.0) -> None:
        arguments = [name, str(size), json.dumps(knobs)]
        super().__init__("knapsack_rl.tasks.gym_worker", arguments, seconds, megabytes=4096)
        self._settings = (name, size, knobs, seconds)
        self.rows: list[tuple[str, str]] = []

    def copy(self) -> GymProcess:
        """Return the same with a worker of its own."""
        return GymProcess(*self._settings)

    def _launch(self) -> subprocess.Popen[bytes]:
        self.rows = []
        return super()._launch()

    def _greeted(self, line: bytes) -> None:
        question, answer = json.loads(line)
        self.rows.append((question, answer))


def reasoning_gym_task(request: DataRequest) -> TaskData:
    """Return problems of a generator, the same for every run.

    Raises:
        ImportError: reasoning-gym is not installed, or the system cannot fork processes (Windows).
        ValueError: the task or a knob is unknown, its verifier pays for any text, or a setting of files was given.
        RuntimeError: the process that makes the problems ended.
    """
    refuse(request, *FILE_SETTINGS)
    name, _, query = request.dataset.partition(":")[2].partition("?")
    knobs = _checked_knobs(name, query, request.wanted)
    process = GymProcess(name, request.wanted, knobs)
    process.start()
    rows = [_row(request, name, *row, index) for index, row in enumerate(process.rows)]
    train, held_out = split_rows(request, rows, None)
    return TaskData(
        train=train,
        held_out=held_out,
        reward=_reward_of(process),
        max_completion_tokens=MAX_COMPLETION_TOKENS,
        chat=True,
    )


def _checked_knobs(name: str, query: str, size: int) -> dict[str, Any]:
    """Return the knobs of a task, if there is such a task and it takes them."""
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
    if name in PAID_FOR_ANY_TEXT:
        raise ValueError(f"reasoning-gym:{name} gives any text the full score, so nothing can be learned; name another")
    if name in NO_PROBLEMS:
        raise ValueError(f"reasoning-gym:{name} needs settings that are not knobs; name one task")
    knobs = _knobs(query)
    try:
        reasoning_gym.create_dataset(name, seed=SEED, size=size, **knobs)
        return knobs
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


def _row(request: DataRequest, name: str, question: str, answer: str, index: int) -> Row:
    return {
        "prompt": request.framed(question, TEMPLATE),
        "answer": answer,
        "prompt_id": f"reasoning-gym/{name}/{index}",
        "problem": index,
    }


def _reward_of(process: GymProcess) -> Any:
    first = os.getpid()

    @functools.cache
    def process_of(pid: int) -> GymProcess:
        """Return the worker of a process; one that was forked gets another."""
        return process if pid == first else process.copy()

    def reasoning_gym_reward(completions: Sequence[Any], problem: Sequence[int], **kwargs: Any) -> list[float]:
        """TRL reward function: 1.0 where the task's own verifier gives the full score, else 0.0."""
        same_length(completions, problem)
        worker = process_of(os.getpid())
        answers = map(answer_of, completions)
        return [
            float(answer is not None and worker.holds(int(index), answer))
            for answer, index in zip(answers, problem, strict=True)
        ]

    return reasoning_gym_reward


def answer_of(completion: Any) -> str | None:
    """Return the answer in a completion; None if it is too long to be read."""
    text = text_of(completion)
    if len(text) > MAX_TEXT:
        return None
    found = tagged_answer(text)
    return (text if found is None else found).strip()
