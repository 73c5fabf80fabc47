"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable

from knapsack_rl.tasks.arithmetic import arithmetic_task
from knapsack_rl.tasks.countdown import countdown_task
from knapsack_rl.tasks.data import DataRequest, TaskData
from knapsack_rl.tasks.files import columns_task
from knapsack_rl.tasks.hub import dapo_math_task, gsm8k_task, math_task
from knapsack_rl.tasks.reasoning_gym import reasoning_gym_task
from knapsack_rl.tasks.running_sums import running_sums_task
from knapsack_rl.tasks.sums import sums_task

TASKS: dict[str, Callable[[DataRequest], TaskData]] = {
    "arithmetic": arithmetic_task,
    "running-sums": running_sums_task,
    "sums": sums_task,
    "countdown": countdown_task,
    "gsm8k": gsm8k_task,
    "math": math_task,
    "dapo-math-17k": dapo_math_task,
    "reasoning-gym": reasoning_gym_task,
}
"""Tasks by the name in front of a colon; any other name is a file or a hub data set."""

ONE_COMPLETION = ("arithmetic", "running-sums")
"""Tasks whose prompts have a single right completion each, so that its probability is the success rate."""


def load_data(request: DataRequest) -> TaskData:
    """Load the data that a run asks for.

    Raises:
        ValueError: a setting does not fit the data set, or there are too few rows.
        OSError: a file does not exist, or the hub did not deliver.
        ImportError: the data set needs an extra; the message has the line that installs it.
    """
    task = TASKS.get(request.dataset.partition(":")[0])
    if task is not None and ":" in request.dataset and task is not reasoning_gym_task:
        raise ValueError(f"only reasoning-gym takes a part after the colon, got dataset {request.dataset!r}")
    return (task or columns_task)(request)
