"""The task of the experiment on budgets in tokens: running sums, whose answers vary in length, and its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.contract import Options
from experiments.pool import root_of
from knapsack_rl.tasks.generated import Splits

TASK = "running-sums"
STEPS = 300
BASE_RATE = 0.2
"""Mean success rate on the training prompts at which pre-training of the base model stops."""


def changes(options: Options) -> dict[str, Any]:
    """Shared settings that differ on this task."""
    return {"dataset": TASK, "model": str(_base(options))} | ({} if options.quick else {"steps": STEPS})


def _base(options: Options) -> Path:
    return root_of(options) / f"{TASK}-base"


def make_base_model(options: Options) -> None:
    """Pre-train a base model for the task, unless the folder of the runs holds one.

    Raises:
        RuntimeError: pre-training did not reach the target.
    """
    folder = _base(options)
    if not (folder / "tokenizer_config.json").is_file():  # written last
        pretrain(folder, options.quick)


def pretrain(folder: Path, quick: bool) -> None:
    """Pre-train a base model for the task, see :func:`pretrain_to`."""
    from knapsack_rl.tasks import running_sums as task

    pretrain_to(folder, quick, task.make_running_sums(), task.MAX_POSITIONS, task.MAX_COMPLETION_TOKENS, BASE_RATE)


def pretrain_to(folder: Path, quick: bool, splits: Splits, positions: int, completion: int, rate: float) -> None:
    """Pre-train a base model with seed 0 until its mean success rate on the training prompts is high enough.

    Args:
        folder: of the model and its tokenizer; the tokenizer is written last.
        quick: make a tiny model that is good for nothing but tests.
        splits: of the task.
        positions: tokens of the longest text.
        completion: tokens of the longest answer, its end included.
        rate: mean success rate at which pre-training stops.

    Raises:
        RuntimeError: pre-training did not reach the target.
    """
    import torch

    from knapsack_rl.tasks.pretraining import Schedule, Target, build_model, build_tokenizer, train_until

    torch.manual_seed(0)
    lowest = 0.0 if quick else rate
    model = build_model(*((16, 1) if quick else (96, 2)), positions, completion)
    target, schedule = (
        Target(unsolved=(0.0, 1.0), solved=0.0, mean=(lowest, 1.0)),
        Schedule(max_steps=8000, eval_every=25),
    )
    lines: list[str] = []
    made = train_until(target, model, schedule, splits.pretrain, splits.train, lines.append)
    if made is None:
        raise RuntimeError(f"pre-training did not reach a mean success rate of {lowest}; it ended with {lines[-1]}")
    made[0].save_pretrained(folder)
    build_tokenizer(positions).save_pretrained(folder)
