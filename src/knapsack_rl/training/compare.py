"""Train several policies from the same start over several seeds, processes side by side."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from knapsack_rl.runs.files import (
    ALLOCATION_LOG,
    CONFIG_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    SAMPLES_FILE,
    WARNINGS_FILE,
    complete_checkpoints,
)
from knapsack_rl.training.lock import refuse_if_owned
from knapsack_rl.training.settings import TrainSettings, read_yaml, settings_from

POLICIES = ("uniform", "uniform-mean", "uniform-2n", "paper", "knapsack")

GRPO = {"advantage": "group-std", "value": "auto", "rounds": 1, "feature_columns": "auto", "prior": ""}
"""Settings of the policies that are GRPO's or the paper's, whatever the shared ones are."""

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        settings: of the run.
        folder: its run folder.
        module: what ``python -m`` starts to train it, and arguments before those of ``knapsack-rl train``.
    """

    settings: TrainSettings
    folder: Path
    module: tuple[str, ...] = ("knapsack_rl", "train")

    @property
    def finished(self) -> bool:
        """Whether the run trained all its steps."""
        return (self.folder / MODEL_FOLDER).is_dir()

    @property
    def steps_done(self) -> int:
        """Newest step in the metrics; 0 without one."""
        path = self.folder / METRICS_FILE
        if not path.is_file():
            return 0
        # The last line may be incomplete; the one before it is complete.
        for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()[-2:]):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return 0


class Progress(Protocol):
    """Receives the progress of a comparison."""

    def started(self, run: Run) -> None:
        """Report that the process of a run was started."""
        ...

    def advanced(self, running: Sequence[Run]) -> None:
        """Report the runs in progress, about once per second."""
        ...

    def ended(self, run: Run, status: int) -> None:
        """Report that the process of a run ended with this exit status."""
        ...


def plan(
    settings: TrainSettings, policies: Sequence[str], seeds: Sequence[int], output: Path, rollouts: int | None = None
) -> list[Run]:
    """Return the runs of a comparison: every policy with every seed, seeds in the outer loop.

    All but ``"uniform-2n"`` generate the same number of rollouts a step. The knapsack gives hard prompts what they
    need, so that it can do with fewer rollouts per prompt on average, and take more prompts.

    Args:
        settings: of the knapsack, and shared ones; allocation, seed, and prompts and rollouts of a step vary, and
            advantage, value, rounds, feature columns and prior are those of the knapsack alone. ``"uniform-mean"`` has
            its advantage, if that is over a mean, and then what the advantage goes by.
        policies: from ``POLICIES``.
        seeds: distinct seeds.
        output: parent of the run folders.
        rollouts: N of the other policies, doubled for ``"uniform-2n"``; a divisor of the rollouts of a step. By default
            twice the mean of the knapsack.

    Raises:
        ValueError: a policy is unknown, a policy or seed repeats, or ``rollouts`` does not divide a step.
    """
    n = 2 * settings.rollouts_per_prompt if rollouts is None else rollouts
    if n < 2 or settings.budget % n:
        raise ValueError(
            "rollouts per prompt of the policies without the knapsack must be at least 2 and divide the "
            f"{settings.budget} rollouts of a step, got {n}; set --other-rollouts"
        )
    unknown = [policy for policy in policies if policy not in POLICIES]
    if unknown or len(set(policies)) < len(policies) or len(set(seeds)) < len(seeds) or not policies or not seeds:
        raise ValueError(
            f"give distinct policies from {', '.join(POLICIES)} and distinct seeds, got {policies} and {seeds}"
        )
    runs = []
    for seed in seeds:
        for policy in policies:
            size = {"prompts_per_step": settings.budget // n, "rollouts_per_prompt": n * (1 + policy.endswith("-2n"))}
            own: dict[str, Any] = {} if policy == "knapsack" else GRPO | size
            if policy == "uniform-mean":
                own |= _over_mean(settings)
            chosen = dataclasses.replace(
                settings,
                allocation=policy.removesuffix("-2n").removesuffix("-mean"),
                seed=seed,
                threads=1,
                **own,
            )
            runs.append(Run(chosen, output / chosen.label))
    return runs


def _over_mean(settings: TrainSettings) -> dict[str, Any]:
    """Return the advantage of the knapsack, or the plain one over the mean of the group if it has GRPO's."""
    if settings.chosen_advantage != "posterior-mean":
        return {"advantage": "group-mean"}
    named = ("estimator", "estimator_settings", "feature_columns", "prior")
    return {"advantage": "posterior-mean", **{name: getattr(settings, name) for name in named}}


def execute(runs: Sequence[Run], *, jobs: int, progress: Progress) -> list[Run]:
    """Train every run that is not finished, ``jobs`` processes at a time; interrupted ones are resumed.

    SIGINT (Ctrl-C) and SIGTERM let the runs finish their step and save, and end the comparison.

    Args:
        runs: from :func:`plan`.
        jobs: parallel processes, each with one torch thread; 0 trains in this process, one run after another and
            without reports, which saves small runs the start of a process.
        progress: receives the progress.

    Returns:
        The runs that did not finish.

    Raises:
        ValueError: a folder holds a run with other settings.
        KeyboardInterrupt: the signal came.
    """
    for run in runs:
        _check_same_settings(run)
    waiting = [run for run in runs if not run.finished]
    if not jobs:
        for run in waiting:
            _train_here(run, progress)
        return [run for run in runs if not run.finished]
    running: dict[subprocess.Popen[bytes], Run] = {}
    with _termination_passed_on(running):
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[_start(run)] = run
                    progress.started(run)
                time.sleep(POLL_SECONDS)
                progress.advanced(list(running.values()))
                for process in [process for process in running if process.poll() is not None]:
                    progress.ended(running.pop(process), process.returncode)
        finally:
            # After Ctrl-C the children have received the signal too: they finish their step and save.
            for process in running:
                process.wait()
    return [run for run in runs if not run.finished]


@contextmanager
def _termination_passed_on(running: Collection[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hand SIGTERM to the processes, which a terminal's Ctrl-C reaches by itself, and go on as after Ctrl-C."""

    def handle(number: int, frame: Any) -> None:
        for process in running:
            process.terminate()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_same_settings(run: Run) -> None:
    path = run.folder / CONFIG_FILE
    if path.exists() and not settings_from(read_yaml(path), str(path)).trains_like(run.settings):
        raise ValueError(f"{run.folder} holds a run with other settings; choose another output folder")


def _resumes(run: Run) -> bool:
    """Return whether the run continues from a checkpoint; otherwise prepare its folder for a fresh start."""
    run.folder.mkdir(parents=True, exist_ok=True)
    refuse_if_owned(run.folder)
    if complete_checkpoints(run.folder):
        return True
    # Files of a run that was stopped before its first checkpoint are useless.
    for name in (METRICS_FILE, ALLOCATION_LOG, WARNINGS_FILE, SAMPLES_FILE):
        (run.folder / name).unlink(missing_ok=True)
    (run.folder / CONFIG_FILE).write_text(run.settings.to_yaml(), encoding="utf-8")
    return False


def _train_here(run: Run, progress: Progress) -> None:
    from knapsack_rl.training.recorder import Quiet
    from knapsack_rl.training.run import train

    progress.started(run)
    if run.module == Run.module:
        outcome = train(run.settings, run.folder, Quiet(), resume=_resumes(run), report=False)
        status = 0 if outcome.finished else 130
    else:
        arguments = [*run.module[1:], *_arguments(run)]
        with (run.folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log):
            status = import_module(run.module[0]).main(arguments)
    progress.ended(run, status)


def _arguments(run: Run) -> list[str]:
    """Return the arguments of ``knapsack-rl train`` that start or resume a run."""
    if _resumes(run):
        return ["--quiet", "--resume", str(run.folder)]
    return ["--quiet", "--config", str(run.folder / CONFIG_FILE), "--output", str(run.folder)]


def _start(run: Run) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", *run.module, *_arguments(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (run.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)  # noqa: S603
