"""What manager, replay buffer and checkpoint callback share: the allocator of the run, and how it may fail."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.groups import group_outcomes
from knapsack_rl.ids import PromptId, numbered
from knapsack_rl.runs.files import ALLOCATION_LOG, STATE_FILE, append_row
from knapsack_rl.state import read_state
from knapsack_rl.verl.identity import check_files
from knapsack_rl.verl.launch import VerlSettings, check_config, pick

logger = logging.getLogger(__name__)
# As verl's own modules: what a run restores from is worth a line in its output.
logging.getLogger("knapsack_rl.verl").setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))


class Session:
    """The allocator of one run of verl.

    A problem of allocation never ends the run: the batch gets rollout.n for every prompt, the reason is logged once
    and counted in ``knapsack/uniform_batches``. What must not go on is refused by the caller before the first batch.

    Args:
        settings: of the plug-in.
        allocator: one of your own; by default made from the settings.
    """

    def __init__(self, settings: VerlSettings, allocator: KnapsackAllocator | None = None) -> None:
        self.settings = settings
        self.allocator = allocator or KnapsackAllocator(
            settings.estimator,
            settings.min_rollouts,
            settings.max_rollouts,
            # verl holds rewards in float32: compared with a float64 threshold, 0.4 would lie above 0.4.
            success=float(np.float32(settings.success_threshold)),
        )
        self.log_folder: Path | None = None
        self.manager_attached = False
        self._checked = False
        self._planned: dict[PromptId, int] = {}
        self._uniform_batches = 0
        self._warned: set[str] = set()

    def check(self, config: Any) -> None:
        """Refuse a configuration or training files that cannot work; the first caller of the run does it.

        Args:
            config: verl's configuration.

        Raises:
            ValueError: the configuration cannot work, or training files lack or repeat a prompt id.
        """
        if self._checked:
            return
        check_config(config, self.settings)
        files = pick(config, "data.train_files")
        if pick(config, "data.custom_cls.path") is None:
            check_files(files if files is None or isinstance(files, str) else list(files), self.settings.prompt_id)
        self._checked = True

    def plan(self, ids: Sequence[PromptId] | None, prompts: int, mean: int) -> IntArray:
        """Rollouts for each prompt of a batch: they sum to prompts x mean, and none is 1.

        The second and later rows of one prompt, which a batch across the end of an epoch can hold, get the mean each.

        Args:
            ids: of the prompts; ``None`` if they could not be told, which gives each prompt the mean.
            prompts: rows of the batch.
            mean: rollout.n.
        """
        counts = np.full(prompts, mean, dtype=np.int64)
        if ids is None:
            self._uniform_batches += 1
            return counts
        first: dict[PromptId, int] = {}
        for row, prompt_id in enumerate(ids):
            first.setdefault(prompt_id, row)
        rows, distinct = np.fromiter(first.values(), dtype=np.int64), list(first)
        if self.settings.allocation == "uniform":
            self._guarded("predicting", lambda: self.allocator.adopt(distinct, counts[rows]))
        else:
            found = self._guarded("allocating", lambda: self._allocate(distinct, mean))
            if found is None:
                self._uniform_batches += 1
            else:
                counts[rows] = found
        if len(distinct) < prompts:
            self.warn("repeats", "a batch holds a prompt more than once; further rows of it get rollout.n each")
        self._planned |= {prompt_id: int(counts[row]) for prompt_id, row in first.items()}
        return counts

    def _allocate(self, ids: list[PromptId], mean: int) -> IntArray:
        counts = self.allocator.allocate(ids, mean * len(ids)).counts
        if int(counts.sum()) != mean * len(ids) or (counts == 1).any():
            raise ValueError(f"counts sum to {counts.sum()}, not {mean * len(ids)}, or a group has one rollout")
        return counts

    def observe(
        self, ids: Sequence[PromptId], outcomes: FloatArray, lengths: FloatArray | None = None, step: int = 0
    ) -> dict[str, float]:
        """Record the outcomes of a sampled batch and return the metrics, under ``knapsack/``.

        Args:
            ids: the prompt of each rollout.
            outcomes: of each rollout; NaN or infinite counts as unscored.
            lengths: tokens of each rollout.
            step: for the log of allocations.
        """
        outcomes = np.where(np.isfinite(outcomes), outcomes, np.nan)
        self._guarded("observing outcomes", lambda: self.allocator.observe(ids, outcomes, lengths))
        if self.settings.log_allocations and self.log_folder is not None:
            self._guarded("logging the allocation", lambda: self._log(ids, outcomes, step))
        for prompt_id in set(ids):
            self._planned.pop(prompt_id, None)
        numbers = self.allocator.metrics() | {"uniform_batches": float(self._uniform_batches)}
        return {f"knapsack/{name}": number for name, number in numbers.items()}

    def _log(self, ids: Sequence[PromptId], outcomes: FloatArray, step: int) -> None:
        distinct, prompt_R = numbered(ids)
        groups = group_outcomes(prompt_R, outcomes, self.allocator.success)
        record = {
            "step": step,
            "prompt_ids": distinct,
            "counts": [self._planned.get(prompt_id) for prompt_id in distinct],
            "arrived": np.bincount(groups.group_of_rollout, minlength=len(distinct)).tolist(),
            "scored": groups.totals.tolist(),
            "successes": groups.successes.tolist(),
            "effective": groups.effective.tolist(),
        }
        append_row(self._folder() / ALLOCATION_LOG, record)

    def _folder(self) -> Path:
        if self.log_folder is None:
            raise RuntimeError("the session was given no folder")
        self.log_folder.mkdir(parents=True, exist_ok=True)
        return self.log_folder

    def predicted_lengths(self, ids: Sequence[PromptId]) -> FloatArray | None:
        """Expected tokens of a rollout of each prompt, or ``None`` if they could not be predicted."""
        return self._guarded("predicting lengths", lambda: self.allocator.predicted_lengths(ids))

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint folder of verl."""
        self._guarded("saving the allocator", lambda: self.allocator.save(checkpoint / STATE_FILE))

    def restore(self, state: Path) -> None:
        """Load the state that a checkpoint holds.

        Raises:
            OSError: the file cannot be read.
            ValueError: the state is damaged or belongs to another estimator.
        """
        header, arrays = read_state(state)
        self.allocator.load_state_dict({"header": header, "arrays": arrays}, copy=False)

    def _guarded(self, doing: str, work: Callable[[], Any]) -> Any:
        """The result of the work, or ``None`` with a warning, once, if it failed."""
        try:
            return work()
        except Exception as error:  # a run does not die because of allocation
            if doing not in self._warned:
                self._warned.add(doing)
                logger.warning("%s failed: %s; verl goes on without (told once)", doing, error, exc_info=True)
            return None

    def warn(self, topic: str, message: str) -> None:
        """Log a warning once a run."""
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning("%s (told once)", message)


_open: list[Session] = []


def start(settings: VerlSettings) -> Session:
    """Open the session of a run; verl makes its replay buffer first, so that is where this is called."""
    _open[:] = [Session(settings)]
    return _open[0]


def current() -> Session:
    """The session of this run.

    Raises:
        RuntimeError: none was opened in this process: the replay buffer of the plug-in is missing.
    """
    if not _open:
        raise RuntimeError(
            "no Knapsack RL session in this process: set trainer.v1.sampler.custom_sampler.path and .name too, as "
            "`knapsack-rl verl-args` prints, and run manager and replay buffer in one process as verl's v1 trainer does"
        )
    return _open[0]
