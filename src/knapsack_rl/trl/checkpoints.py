"""Checkpoints of the trainer: the allocator's state in each, and exact resuming."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from knapsack_rl.ids import PromptId
from knapsack_rl.runs.files import SAMPLES_FILE
from knapsack_rl.runs.samples import SampleStore

logger = logging.getLogger(__name__)


class SaveAllocator(TrainerCallback):
    """Writes the allocator's state into each checkpoint, last, so that its presence marks a complete one.

    Args:
        save: writes it into the folder of a checkpoint.
        root: returns the folder of the checkpoints.
    """

    def __init__(self, save: Callable[[Path], None], root: Callable[[], Path]) -> None:
        self._save, self._root = save, root

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save, on the main process."""
        if state.is_world_process_zero:
            folder = self._root() / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            try:
                self._save(folder)
            except OSError as error:
                # If training continued, the rotation of checkpoints would remove the complete ones.
                raise OSError(
                    error.errno,
                    f"{folder} is not complete, its allocator state could not be written: {error}. Earlier checkpoints "
                    "are untouched: make room, then resume",
                ) from error


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
    path = checkpoint / TRAINER_STATE_NAME
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


def warn_of_split_generations(args: Any, iterations: int) -> None:
    """Warn where checkpoints fall between the updates that one generation serves, as it is not part of a checkpoint."""
    batches = args.steps_per_generation * iterations
    if args.save_strategy == "steps" and args.save_steps * args.gradient_accumulation_steps % batches:
        logger.warning(
            "a generation serves %d batches and save_steps=%g saves within one: a run resumed there generates again, "
            "so these prompts are visited twice. Make save_steps x gradient_accumulation_steps a multiple of %d",
            *(batches, args.save_steps, batches),
        )
