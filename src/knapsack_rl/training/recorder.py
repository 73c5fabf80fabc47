"""The record of a training run: a line per step and per evaluation."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import gather_object
from transformers import TrainerCallback

from knapsack_rl.runs.files import METRICS_FILE, WARNINGS_FILE, append_row
from knapsack_rl.runs.watch import Finding, WarningLog
from knapsack_rl.tasks.data import TaskData
from knapsack_rl.training.evaluate import held_out_accuracy
from knapsack_rl.training.processes import is_main_process, world_size
from knapsack_rl.training.settings import TrainSettings
from knapsack_rl.trl import KnapsackGRPOTrainer
from knapsack_rl.trl.generated import Generated

logger = logging.getLogger(__name__)


class Display(Protocol):
    """Receives the progress of a run; every row is one line of ``metrics.jsonl``."""

    def start(self, settings: TrainSettings, first_step: int) -> None:
        """Start the display of a run that has already trained ``first_step`` steps."""
        ...

    def row(self, row: dict[str, Any]) -> None:
        """Show the row of a step or an evaluation."""
        ...

    def warn(self, finding: Finding) -> None:
        """Show a finding of the watch; each comes once."""
        ...

    def stop(self) -> None:
        """Close the display; called however the run ends."""
        ...


class Quiet:
    """Prints nothing; findings go to the log."""

    def start(self, settings: TrainSettings, first_step: int) -> None:
        """Do nothing."""

    def row(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def warn(self, finding: Finding) -> None:
        """Log the finding."""
        logger.warning("%s", finding)

    def stop(self) -> None:
        """Do nothing."""


def all_done(settings: TrainSettings, steps: int, generated: Generated) -> bool:
    """Return whether a run has trained all its steps, or generated all the rollouts it may."""
    return steps >= settings.steps or 0 < settings.rollout_limit <= generated.rollouts


class Recorder(TrainerCallback):
    """Writes ``metrics.jsonl``, evaluates on held-out prompts, and saves a checkpoint when interrupted."""

    def __init__(self, settings: TrainSettings, folder: Path, task: TaskData, tokenizer: Any, display: Display) -> None:
        self.interrupted = False
        self.settings = settings
        self._metrics = folder / METRICS_FILE
        self._task = task
        self._tokenizer = tokenizer
        self._display = display
        self._started = time.perf_counter()
        self._looks = 0
        self._warnings = WarningLog(folder / WARNINGS_FILE, display.warn)
        self.trainer: KnapsackGRPOTrainer
        """Set after the trainer is made, before it trains."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the model at the start of a run."""
        self._looks = self._looks_due(state.global_step // self.settings.updates)
        if state.global_step == 0:
            self._evaluate(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate when due, and end a run that is complete."""
        step, updates = divmod(state.global_step, self.settings.updates)
        if not updates:
            due, done = self._looks_due(step), all_done(self.settings, step, self.trainer.generated)
            if due > self._looks or done:
                self._evaluate(kwargs["model"], step)
            if done:
                control.should_training_stop = True
            self._looks = due
        self.interrupted = any(gather_object([self.interrupted]))  # all processes stop after the same step
        self._stop_if_interrupted(state, control)

    def _looks_due(self, step: int) -> int:
        """Return the number of evaluations due so far: spaced evenly in steps, or in rollouts if those end the run."""
        every = self.settings.eval_every
        if not every:
            return 0
        if not self.settings.rollout_limit:
            return step // every
        return self.trainer.generated.rollouts // (every * self.settings.budget)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line of a step."""
        # A step of several updates gives one row, that of the update that generated.
        step, updates = divmod(state.global_step - 1, self.settings.updates)
        if logs and "loss" in logs and not updates:
            self._write(step + 1, {name: number for name, number in logs.items() if isinstance(number, (int, float))})
        if world_size() == 1:  # several processes agree only at the end of a step
            self._stop_if_interrupted(state, control)

    def _stop_if_interrupted(self, state: Any, control: Any) -> None:
        # Only after a complete step: resuming between its updates would generate the step again.
        if self.interrupted and state.global_step and state.global_step % self.settings.updates == 0:
            control.should_save = control.should_training_stop = True

    def _evaluate(self, model: Any, step: int) -> None:
        if not self._task.held_out:
            return
        accuracy = held_out_accuracy(
            model,
            self._tokenizer,
            self._task.held_out,
            self._task.reward,
            samples=self.settings.eval_samples,
            temperature=self.settings.temperature,
            max_new_tokens=self._task.max_completion_tokens,
        )
        self._write(step, {"held_out/accuracy": accuracy.sampled, "held_out/greedy_accuracy": accuracy.greedy})

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        if not is_main_process():
            return
        row: dict[str, Any] = {
            "step": step,
            "rollouts": self.trainer.generated.rollouts,
            "tokens": self.trainer.generated.tokens,
            "training_seconds": round(self.trainer.generated.seconds, 3),
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        row |= {name: number if math.isfinite(number) else None for name, number in numbers.items() if name != "step"}
        append_row(self._metrics, row)
        self._display.row(row)
        self._warnings.row(row)
