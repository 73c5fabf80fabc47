"""Checkpoints of the trainer: the allocator's state in each, and exact resuming."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from knapsack_rl.ids import PromptId
from knapsack_rl.runs.files import (
    SAMPLES_FILE,
    STATE_FILE,
    TRAINER_STATE_FILE,
    all_checkpoints,
    complete_checkpoints,
    steps_of,
)
from knapsack_rl.runs.samples import SampleStore

logger = logging.getLogger(__name__)


def begin_checkpoint(folder: Path, save: Callable[[Path], None]) -> None:
    """Write the state of the run into a checkpoint, before the files of transformers.

    The last of those completes the checkpoint. So a complete one that the trainer wrote has the allocator's state, one
    without it is of another trainer, and older ones are only removed once the new one is complete.

    Args:
        folder: of the checkpoint; made if missing.
        save: writes the state into it.

    Raises:
        OSError: the state cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TRAINER_STATE_FILE).unlink(missing_ok=True)  # of an earlier attempt
        save(folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{folder} is not complete, its allocator state could not be written: {error}. Earlier checkpoints are "
            "untouched: make room, then resume",
        ) from error


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, whichever trainer wrote it, or None if there are no checkpoints at all.

    Raises:
        ValueError: none of the checkpoints is complete.
    """
    complete = complete_checkpoints(folder)
    newer = [path for path in all_checkpoints(folder) if not complete or steps_of(path) > steps_of(complete[-1])]
    if not newer:
        return complete[-1] if complete else None
    fault = (
        f"{', '.join(path.name for path in newer)} in {folder}: no readable {TRAINER_STATE_FILE}, saving was cut off"
    )
    if not complete:
        raise ValueError(f"no checkpoint to resume from. {fault}. Train without resume_from_checkpoint")
    logger.warning("%s; resuming from %s", fault, complete[-1].name)
    return complete[-1]


def newest_state(checkpoint: Path) -> Path | None:
    """Return the allocator's state of a checkpoint, else that of the newest older one beside it, else None."""
    beside = all_checkpoints(checkpoint.parent)
    older = beside[: beside.index(checkpoint) + 1] if checkpoint in beside else [checkpoint]
    states = [path / STATE_FILE for path in older if (path / STATE_FILE).exists()]
    return states[-1] if states else None


class SaveSamples(TrainerCallback):
    """Writes the sample completions beside each checkpoint and at the end, and reads them when resuming."""

    def __init__(self, samples: SampleStore) -> None:
        self._samples = samples

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the samples of the interrupted run."""
        if state.global_step:
            self._samples.read(Path(args.output_dir) / SAMPLES_FILE)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write beside the checkpoint."""
        self._write(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write once more."""
        self._write(args)

    def _write(self, args: Any) -> None:
        try:
            self._samples.write(Path(args.output_dir) / SAMPLES_FILE)
        except OSError as error:
            logger.warning("%s could not be written (%s); the run continues", SAMPLES_FILE, error)


def finished_epochs(checkpoint: Path) -> int:
    """Return the number of whole epochs before a checkpoint; 0 if it does not say."""
    path = checkpoint / TRAINER_STATE_FILE
    return int(TrainerState.load_from_json(str(path)).epoch or 0) if path.is_file() else 0


def log_changed_data(known: Iterable[PromptId], present: set[PromptId]) -> None:
    """Log how the prompts of the data set differ from those that the allocator knows."""
    seen = set(known)
    removed, added = len(seen - present), len(present - seen)
    logger.log(
        logging.WARNING if removed else logging.INFO,
        "resumed: of %d prompts %d are known, %d are new (added, or not visited yet); %d known prompts are no longer "
        "in the data set",
        *(len(present), len(seen & present), added, removed),
    )


class WarnOfSplitGenerations(TrainerCallback):
    """Warns where checkpoints fall between the updates that one generation serves, as it is not part of a checkpoint.

    Args:
        iterations: updates that each batch of a generation serves.
    """

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare; only now a ``save_steps`` below 1, a share of all steps, is a number of steps."""
        batches = args.steps_per_generation * self._iterations
        if args.save_strategy == "steps" and state.save_steps * args.gradient_accumulation_steps % batches:
            logger.warning(
                "a generation serves %d batches and saving every %d steps falls within one: a run resumed there "
                "generates again, so these prompts are visited twice. Make save_steps x gradient_accumulation_steps a "
                "multiple of %d",
                *(batches, state.save_steps, batches),
            )
