"""What a training run writes down while it trains: a line per step and per evaluation."""

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
    """Where progress goes; every row is one line of ``metrics.jsonl``."""

    def start(self, settings: TrainSettings, first_step: int) -> None:
        """The run starts, or goes on, after ``first_step`` steps."""
        ...

    def row(self, row: dict[str, Any]) -> None:
        """A step was trained or an evaluation made."""
        ...

    def warn(self, finding: Finding) -> None:
        """Something goes wrong in the run; told once."""
        ...

    def stop(self) -> None:
        """The run ended, however it did."""
        ...


class Quiet:
    """Prints nothing; what goes wrong goes to the log."""

    def start(self, settings: TrainSettings, first_step: int) -> None:
        """Nothing to show."""

    def row(self, row: dict[str, Any]) -> None:
        """Nothing to show."""

    def warn(self, finding: Finding) -> None:
        """Log it."""
        logger.warning("%s", finding)

    def stop(self) -> None:
        """Nothing is left open."""


def all_done(settings: TrainSettings, steps: int, generated: Generated) -> bool:
    """Whether a run has trained all its steps, or generated all its rollouts where those end it."""
    return steps >= settings.steps or 0 < settings.rollout_limit <= generated.rollouts


class Recorder(TrainerCallback):
    """Writes ``metrics.jsonl``, evaluates on held-out prompts, and turns an interruption into a checkpoint."""

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
        """Set once the trainer is there, before it trains."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the model that the run starts from."""
        self._looks = self._looks_due(state.global_step // self.settings.updates_per_step)
        if state.global_step == 0:
            self._evaluate(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate when it is due; end the run when all is done."""
        step, updates = divmod(state.global_step, self.settings.updates_per_step)
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
        """Evaluations due by now: at equal distances in steps, or in rollouts where those end the run."""
        every = self.settings.eval_every
        if not every:
            return 0
        if not self.settings.rollout_limit:
            return step // every
        return self.trainer.generated.rollouts // (every * self.settings.budget)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the line of a step."""
        # A step of several updates is one row, that of the update which generated.
        step, updates = divmod(state.global_step - 1, self.settings.updates_per_step)
        if logs and "loss" in logs and not updates:
            self._write(step + 1, {name: number for name, number in logs.items() if isinstance(number, (int, float))})
        if world_size() == 1:  # several processes agree at the end of a step only
            self._stop_if_interrupted(state, control)

    def _stop_if_interrupted(self, state: Any, control: Any) -> None:
        # Only after a whole step: a checkpoint between its updates would generate the step again.
        if self.interrupted and state.global_step and state.global_step % self.settings.updates_per_step == 0:
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
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        row |= {name: number if math.isfinite(number) else None for name, number in numbers.items() if name != "step"}
        append_row(self._metrics, row)
        self._display.row(row)
        self._warnings.row(row)
