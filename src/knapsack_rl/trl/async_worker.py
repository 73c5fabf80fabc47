"""The rollout worker of TRL's asynchronous trainer with an allocated number of rollouts for each prompt.

``AsyncGRPOTrainer`` generates in another process (:mod:`knapsack_rl.trl.async_loop`) and trains on what arrives. That
process allocates and observes; the trainer's side, here, counts the groups that are lost and keeps the allocator's
state with the checkpoints::

    worker = KnapsackRolloutWorker(settings=AsyncSettings(), model_name=..., dataset=..., ...)
    trainer = AsyncGRPOTrainer(..., rollout_worker=worker, callbacks=[worker.callback])
"""

from __future__ import annotations

import logging
import multiprocessing.queues
import queue
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker, RolloutSample

from knapsack_rl.metrics import LostGroups
from knapsack_rl.runs.files import STATE_FILE
from knapsack_rl.trl.async_loop import (
    GROUP_LENGTH,
    GROUP_RATE,
    GROUPS_FILE,
    STATE_FOLDER,
    AsyncSettings,
    KnapsackRolloutLoop,
    check_async_internals,
    read_groups,
)
from knapsack_rl.trl.checkpoints import newest_state
from knapsack_rl.trl.data_checks import check_dataset

__all__ = ["AsyncSettings", "KnapsackRolloutWorker"]

logger = logging.getLogger(__name__)


class KnapsackRolloutWorker(AsyncRolloutWorker):
    """TRL's rollout worker with an allocated number of rollouts for each prompt.

    The rollouts of ``settings.window`` consecutive prompts sum to ``num_generations`` times their number, exactly.

    Args:
        settings: of the allocation.
        **kwargs: as TRL's worker; ``num_generations`` is the mean of rollouts of a prompt.

    Attributes:
        callback: for the trainer's ``callbacks``; without it the worker does not start.
        lost: groups that are trained on or lost.

    Raises:
        RuntimeError: this TRL release differs.
        ValueError: the bounds exclude ``num_generations``, prompts cannot be told apart, or the data set lacks a
            feature column.
    """

    _loop_cls = KnapsackRolloutLoop

    def __init__(self, *, settings: AsyncSettings | None = None, **kwargs: Any) -> None:
        check_async_internals()
        settings = settings or AsyncSettings()
        self.mean = kwargs.setdefault("num_generations", 8)
        settings.check_allocation(self.mean, "num_generations")
        if (present := kwargs["dataset"].column_names) is not None:
            settings.check_columns(present)
        proven = check_dataset(kwargs["dataset"], settings.prompt_id_column)
        super().__init__(settings=settings, proven=proven, **kwargs)
        self.callback = RolloutState(self)
        self.lost = LostGroups()
        self.max_staleness: int | None = None
        self.rollout_buffer = _Buffer(kwargs.get("queue_maxsize", 0), ctx=self._mp_ctx)
        self.rollout_buffer.worker = self
        self._judged: int | None = None  # newest group that was counted

    def prepare(self, folder: Path, state: Path | None, max_staleness: int) -> None:
        """Say where a run writes, what it continues from, and what the trainer drops; the callback calls this.

        Args:
            folder: for the newest state and the log of allocations.
            state: of the allocator, None for a new run.
            max_staleness: the trainer's.
        """
        self.max_staleness = max_staleness
        (folder / STATE_FOLDER / STATE_FILE).unlink(missing_ok=True)  # of an earlier run
        self._loop_kwargs |= {"folder": folder, "state": state}

    def start(self) -> None:
        """Start the process; the groups that a resumed run generates again are counted as lost.

        Raises:
            RuntimeError: the trainer lacks the callback, or the process fails at once.
        """
        if self.max_staleness is None:
            raise RuntimeError(
                "the trainer does not know the worker's callback, so checkpoints would lack the allocator's state: "
                "AsyncGRPOTrainer(..., rollout_worker=worker, callbacks=[worker.callback])"
            )
        if self._loop_kwargs["state"] is not None:
            for number, rate, length in read_groups(self._loop_kwargs["state"])[1]:
                if number >= self._loop_kwargs["dataset_start_index"]:
                    self.lost.lose("resumed", [rate], [length])
        super().start()

    def stop(self) -> None:
        """As TRL's, which waits forever for a process that has failed."""
        if self._process is not None and self._failed_event.is_set():
            self._process.join(timeout=15)
            self._process.kill()
            self._process = None
        super().stop()

    def update_model_version(self, model_version: int) -> None:
        """As TRL's; the groups lost since the last call go to the log."""
        super().update_model_version(model_version)
        found = self.lost.metrics()
        if found:
            try:
                self.metrics_queue.put_nowait({f"knapsack/{name}": number for name, number in found.items()})
            except queue.Full:
                logger.debug("the queue of metrics is full")

    def count(self, sample: RolloutSample) -> None:
        """Count the group of a row that the trainer takes; rows of a group follow each other."""
        if sample.group_id == self._judged or self.max_staleness is None:
            return
        self._judged = sample.group_id
        numbers = [sample.metrics[GROUP_RATE]], [sample.metrics[GROUP_LENGTH]]
        if self.model_version - sample.model_version > self.max_staleness:
            self.lost.lose("stale", *numbers)
        else:
            self.lost.arrive(*numbers)


class _Buffer(multiprocessing.queues.Queue):
    """The queue of rows, which shows the worker each row that the trainer takes."""

    worker: KnapsackRolloutWorker

    def get(self, block: bool = True, timeout: float | None = None) -> RolloutSample:
        """As the parent."""
        sample: RolloutSample = super().get(block, timeout)
        self.worker.count(sample)
        return sample


class RolloutState(TrainerCallback):
    """Keeps the allocator's state with the checkpoints, and prepares the worker before TRL starts it.

    Args:
        worker: of the trainer.
    """

    def __init__(self, worker: KnapsackRolloutWorker) -> None:
        self._worker = worker

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the state to continue from.

        Raises:
            ValueError: the trainer's ``num_generations`` is not that of the worker.
        """
        if args.num_generations != self._worker.mean:
            raise ValueError(
                f"num_generations is {args.num_generations} in the trainer's configuration and {self._worker.mean} in "
                "the worker; pass the same to both"
            )
        if not state.is_world_process_zero:
            return
        folder, found = Path(args.output_dir), None
        if state.global_step:
            checkpoint = folder / f"checkpoint-{state.global_step}"
            found = newest_state(checkpoint)
            if found is None:
                logger.warning("%s has no %s: nothing is known of the prompts", checkpoint, STATE_FILE)
        self._worker.prepare(folder, found, args.max_staleness)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the newest state into the checkpoint."""
        if not state.is_world_process_zero:
            return
        newest = Path(args.output_dir) / STATE_FOLDER
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for name in (GROUPS_FILE, STATE_FILE):
            try:
                shutil.copyfile(newest / name, checkpoint / name)
            except OSError as error:
                logger.warning("%s lacks the state of the allocator (%s); the run continues", checkpoint, error)
