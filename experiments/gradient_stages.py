"""Models at several points of a training run, for ``experiments.gradient_value``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from knapsack_rl.runs.files import ALLOCATION_LOG, METRICS_FILE, MODEL_FOLDER, complete_checkpoints, steps_of
from knapsack_rl.tasks import base_model_path
from knapsack_rl.training.settings import TrainSettings


def models_at(steps: Sequence[int], settings: TrainSettings, folder: Path) -> dict[int, Path]:
    """Folders of the model after the given numbers of steps of one training run; 0 is the base model.

    The run is that of ``knapsack-rl train`` with these settings, taken up again from one number of steps to the next;
    what the folder holds is used again.

    Args:
        steps: numbers of steps, >= 0.
        settings: of the run; its ``steps`` are replaced, and its model is the shipped one.
        folder: of the run and the models.

    Raises:
        ValueError: a model of fewer steps than the run already has is asked for and was not kept.
    """
    found: dict[int, Path] = {}
    for step in sorted(steps):
        target = base_model_path() if step == 0 else folder / f"step-{step}"
        if not target.is_dir():
            _train_to(replace(settings, steps=step), folder / "run")
            partial = folder / f"step-{step}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(folder / "run" / MODEL_FOLDER, partial)
            partial.rename(target)  # so that a model is whole or not there
        found[step] = target
    return found


def _train_to(settings: TrainSettings, run: Path) -> None:
    from knapsack_rl.training.recorder import Quiet
    from knapsack_rl.training.run import train

    checkpoints = complete_checkpoints(run)
    if checkpoints and steps_of(checkpoints[-1]) > settings.steps:
        raise ValueError(
            f"the run in {run} is past {settings.steps} steps, at {steps_of(checkpoints[-1])}; delete it to train anew"
        )
    if not checkpoints:
        # What a run left that was stopped before its first checkpoint is of no use.
        for name in (METRICS_FILE, ALLOCATION_LOG):
            (run / name).unlink(missing_ok=True)
    outcome = train(settings, run, Quiet(), resume=bool(checkpoints))
    if not outcome.finished:
        raise KeyboardInterrupt(f"the run in {run} was interrupted after {outcome.steps} steps")
