"""Live progress of a training run: a panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from knapsack_rl.training.recorder import Display, Quiet
from knapsack_rl.training.settings import TrainSettings

PLAIN_EVERY_SECONDS = 10.0
BAR = 24


def make_display(*, quiet: bool) -> Display:
    """A display fit for standard output."""
    if quiet:
        return Quiet()
    return Panel() if sys.stdout.isatty() else PlainLines()


class PlainLines:
    """One line for every evaluation, and for a step now and then."""

    def start(self, settings: TrainSettings, first_step: int) -> None:
        """Say what runs."""
        self._steps = settings.steps
        self._shown = float("-inf")
        print(f"{settings.label}: {settings.steps} steps of {settings.budget} rollouts", flush=True)

    def row(self, row: dict[str, Any]) -> None:
        """Print an evaluation, or a step if the last line is some seconds old."""
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
                f"  largest budget {row['knapsack/budget_max']:.0f}  {row['step_time']:.2f} s/step",
                flush=True,
            )

    def stop(self) -> None:
        """Nothing is left open."""


class Panel:
    """A live panel: progress, rewards, effective ratios and where the budget goes."""

    def start(self, settings: TrainSettings, first_step: int) -> None:
        """Open the panel."""
        shape = f"{settings.prompts_per_step} prompts x {settings.rollouts_per_prompt} rollouts"
        self._title = f"{settings.label}: {shape}"
        self._progress = Progress(
            TextColumn("[bold]step"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn()
        )
        self._task = self._progress.add_task("steps", total=settings.steps, completed=first_step)
        self._newest: dict[str, Any] = {}
        self._live = Live(self._view(), console=Console(), refresh_per_second=4)
        self._live.start()

    def row(self, row: dict[str, Any]) -> None:
        """Show the newest numbers."""
        self._newest |= row
        self._progress.update(self._task, completed=row["step"])
        self._live.update(self._view())

    def stop(self) -> None:
        """Leave the last view standing."""
        self._live.stop()

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, key, form in (
            ("reward", "reward", "{:.3f}"),
            ("held-out accuracy", "held_out/accuracy", "{:.3f}"),
            ("effective gradient ratio", "knapsack/effective_gradient_ratio", "{:.2f}"),
            ("effective prompts", "knapsack/effective_prompt_ratio", "{:.2f}"),
            ("largest budget", "knapsack/budget_max", "{:.0f}"),
            ("seconds a step", "step_time", "{:.2f}"),
        ):
            number = self._newest.get(key)
            table.add_row(name, "-" if number is None else form.format(number))
        table.add_row("where the budget goes", "by estimated success rate")
        for name in ("hard", "medium", "easy", "unseen"):
            share = self._newest.get(f"knapsack/budget_to/{name}") or 0.0
            table.add_row(f"  {name}", f"{'█' * round(share * BAR):<{BAR}} {share:4.0%}")
        return Group(f"[bold]{self._title}", self._progress, table)
