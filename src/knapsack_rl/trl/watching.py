"""A callback that watches a run of the trainer for signs of trouble."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from knapsack_rl.runs.files import WARNINGS_FILE
from knapsack_rl.runs.watch import WINDOW, Finding, WarningLog


class WatchCallback(TrainerCallback):
    """Reports collapse, stragglers, oscillation and miscalibration once each, and writes ``warnings.jsonl``.

    Reads the log of the trainer, so ``logging_steps`` should be 1. Only the main process reports.

    Args:
        on_finding: called with each finding; by default it is logged as a warning.
        window: logged steps averaged before anything is reported, >= 1.
    """

    def __init__(self, on_finding: Callable[[Finding], None] | None = None, *, window: int = WINDOW) -> None:
        self._on_finding, self._window = on_finding, window
        self._log: WarningLog | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Look at a row of the log."""
        if not state.is_world_process_zero or not logs:
            return
        if self._log is None:
            self._log = WarningLog(Path(args.output_dir) / WARNINGS_FILE, self._on_finding, window=self._window)
        self._log.row({"step": state.global_step} | logs)
