"""Live progress of a training run: a panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from knapsack_rl.cli.progress import PLAIN_EVERY_SECONDS
from knapsack_rl.metrics import PARTS
from knapsack_rl.runs.watch import Finding
from knapsack_rl.training.models import chosen_threads
from knapsack_rl.training.recorder import Display, Quiet
from knapsack_rl.training.settings import TrainSettings

BAR = 24
TREND = 32
"""Steps in a trend line."""
LEVELS = "▁▂▃▄▅▆▇█"
SMOOTHING = 0.9
"""Weight of the past in the running mean of the seconds a step takes."""


def make_display(*, quiet: bool) -> Display:
    """Return a display that fits standard output."""
    if quiet:
        return Quiet()
    return Panel() if sys.stdout.isatty() else PlainLines()


class Pace:
    """Seconds per step, evaluations included, and figures derived from them; the first step, a warm-up, is left out.

    Args:
        settings: of the run.
        clock: returns seconds; for tests.
    """

    def __init__(self, settings: TrainSettings, clock: Any = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._newest: float | None = None
        self.seconds = math.nan
        self.step = 0

    def row(self, row: Mapping[str, Any]) -> None:
        """Take in the row of a step or an evaluation."""
        if "loss" not in row:
            return
        now = self._clock()
        if self._newest is not None:
            took = now - self._newest
            self.seconds = took if math.isnan(self.seconds) else SMOOTHING * self.seconds + (1 - SMOOTHING) * took
        self._newest, self.step = now, row["step"]

    @property
    def rollouts_per_second(self) -> float:
        """Rollouts generated and trained on per second; NaN before the second step."""
        return self._settings.budget / self.seconds if self.seconds > 0 else math.nan

    @property
    def left(self) -> str:
        """Remaining time of the run in words; empty before the second step."""
        if math.isnan(self.seconds):
            return ""
        minutes, seconds = divmod(round(self.seconds * (self._settings.steps - self.step)), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours} h {minutes:02d} min"
        return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


class PlainLines:
    """Prints a line for every evaluation and warning, and for some steps."""

    def start(self, settings: TrainSettings, first_step: int) -> None:
        """Print the shape of the run."""
        self._steps, self._pace = settings.steps, Pace(settings)
        self._shown = float("-inf")
        print(f"{settings.label}: {settings.steps} steps of {settings.budget} rollouts", flush=True)
        print(_threads(settings), flush=True)

    def row(self, row: dict[str, Any]) -> None:
        """Print an evaluation, or a step if the last line is at least some seconds old."""
        self._pace.row(row)
        if "held_out/accuracy" in row:
            print(
                f"step {row['step']}/{self._steps}  held-out accuracy {row['held_out/accuracy']:.3f}  "
                f"greedy {row['held_out/greedy_accuracy']:.3f}",
                flush=True,
            )
        elif time.monotonic() - self._shown > PLAIN_EVERY_SECONDS:
            self._shown = time.monotonic()
            print(
                f"step {row['step']}/{self._steps}  reward {row['reward']:.3f}  effective gradient ratio "
                f"{row['knapsack/effective_gradient_ratio']:.2f} (prompts {row['knapsack/effective_prompt_ratio']:.2f})"
                f"  largest budget {row['knapsack/budget_max']:.0f}  {row['step_time']:.2f} s/step"
                + (f" ({parts})" if (parts := _parts(row)) else "")
                + (f"  about {self._pace.left} left" if self._pace.left else ""),
                flush=True,
            )

    def warn(self, finding: Finding) -> None:
        """Print the finding."""
        print(f"warning, {finding}", flush=True)

    def stop(self) -> None:
        """Do nothing."""


class Panel:
    """A live panel with progress, throughput, rewards, effective ratios, the split of the budget, and warnings."""

    def start(self, settings: TrainSettings, first_step: int) -> None:
        """Open the panel."""
        shape = f"{settings.prompts_per_step} prompts x {settings.rollouts_per_prompt} rollouts"
        self._title = f"{settings.label}: {shape}"
        self._threads = _threads(settings)
        self._pace = Pace(settings)
        self._progress = Progress(
            *(TextColumn("[bold]step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
            *(TextColumn("ETA"), TimeRemainingColumn()),
        )
        self._task = self._progress.add_task("steps", total=settings.steps, completed=first_step)
        self._newest: dict[str, Any] = {}
        self._past = {key: deque[float](maxlen=TREND) for _, key, _ in TRENDS}
        self._warnings: list[Finding] = []
        self._tokens = (0.0, 0.0)
        self._live = Live(self._view(), console=Console(), refresh_per_second=4)
        self._live.start()
        # Log lines would garble the panel, so they go through it and appear above.
        self._handlers = [
            (handler, handler.setStream(sys.stderr))
            for handler in logging.getLogger().handlers
            if type(handler) is logging.StreamHandler
        ]

    def row(self, row: dict[str, Any]) -> None:
        """Show the newest numbers."""
        self._newest |= row
        self._pace.row(row)
        for key, past in self._past.items():
            if row.get(key) is not None:
                past.append(row[key])
        self._tokens = (self._tokens[1], row["num_tokens"]) if row.get("num_tokens") else self._tokens
        self._progress.update(self._task, completed=row["step"])
        self._live.update(self._view())

    def warn(self, finding: Finding) -> None:
        """Show the finding below the numbers."""
        self._warnings.append(finding)
        self._live.update(self._view())

    def stop(self) -> None:
        """Close the panel; its last view stays on screen."""
        self._live.stop()
        for handler, stream in self._handlers:
            if stream is not None:
                handler.setStream(stream)

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_row("rollouts per second", _form(self._pace.rollouts_per_second, "{:,.0f}"), self._tokens_text())
        for name, key, form in NUMBERS:
            table.add_row(name, _form(self._newest.get(key), form), _parts(self._newest) if key == "step_time" else "")
        for name, key, form in TRENDS:
            table.add_row(name, _form(self._newest.get(key), form), _trend(self._past[key]))
        budget = Table.grid(padding=(0, 2))
        budget.add_row("where the budget goes", "by estimated success rate")
        for name in ("hard", "medium", "easy", "unseen"):
            share = self._newest.get(f"knapsack/budget_to/{name}") or 0.0
            budget.add_row(f"  {name}", f"{'█' * round(share * BAR):<{BAR}} {share:4.0%}")
        warnings = [Text(f"! {finding}", style="yellow") for finding in self._warnings]
        return Group(f"[bold]{escape(self._title)}", escape(self._threads), self._progress, table, budget, *warnings)

    def _tokens_text(self) -> str:
        before, now = self._tokens
        rate = (now - before) / self._pace.seconds if before and self._pace.seconds > 0 else math.nan
        return f"{rate:,.0f} tokens per second" if math.isfinite(rate) else ""


def _parts(row: Mapping[str, Any]) -> str:
    """Return the seconds of a step by part, in words."""
    seconds = {part: row.get(f"knapsack/{part}_seconds") for part in PARTS if part != "allocation"}
    return ", ".join(f"{part} {spent:.2f}" for part, spent in seconds.items() if spent is not None)


def _threads(settings: TrainSettings) -> str:
    """Return how many torch threads the run uses and why, in words."""
    count, reason = torch.get_num_threads(), chosen_threads(settings)[1]
    return f"{count} torch thread{'s' if count > 1 else ''} ({reason})"


NUMBERS = (
    ("seconds per step", "step_time", "{:.2f}"),
    ("rows left out of updates", "knapsack/rows_skipped", "{:.0%}"),
    ("held-out accuracy", "held_out/accuracy", "{:.3f}"),
    ("largest budget", "knapsack/budget_max", "{:.0f}"),
)
TRENDS = (
    ("reward", "reward", "{:.3f}"),
    ("effective gradient ratio", "knapsack/effective_gradient_ratio", "{:.2f}"),
    ("effective prompts", "knapsack/effective_prompt_ratio", "{:.2f}"),
)


def _form(number: float | None, form: str) -> str:
    return form.format(number) if number is not None and math.isfinite(number) else "-"


def _trend(past: deque[float]) -> str:
    """Return shares from 0 to 1 as a line of blocks; values outside are clipped."""
    top = len(LEVELS) - 1
    return "".join(LEVELS[min(max(round(number * top), 0), top)] for number in past)
