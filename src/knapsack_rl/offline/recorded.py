"""A recorded run for the report: everything in a run folder, or the rollouts of any other reward log."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from knapsack_rl.offline.log_files import NoLogError
from knapsack_rl.offline.reward_logs import RewardLog
from knapsack_rl.offline.rollouts import ColumnNames, Done, check_no_options, open_log, read_tables
from knapsack_rl.runs.allocations import Visits
from knapsack_rl.runs.files import CONFIG_FILE, METRICS_FILE
from knapsack_rl.runs.log import RunLog
from knapsack_rl.success import SuccessRule


def read_run(
    path: str | Path,
    names: ColumnNames | None = None,
    success: SuccessRule | None = None,
    done: Done | None = None,
) -> RunLog:
    """Read a run folder, or any other reward log as a run of which only the rollouts are known.

    Args:
        path: see :func:`knapsack_rl.offline.rollouts.read_rollouts`.
        names: columns to read instead of the usual ones.
        success: a reward above this is a success, or a function of the rewards; learned by default.
        done: called with a line of text up to :data:`knapsack_rl.offline.rollouts.READ_STEPS` times.

    Raises:
        FileNotFoundError: there is no log at the path.
        ValueError: the log cannot be read, or options are given that it has no use for.
        ImportError: parquet needs pyarrow.
    """
    path, names = Path(path), names or ColumnNames()
    if all((path / name).is_file() for name in (CONFIG_FILE, METRICS_FILE)):
        check_no_options(path, names, success)
        return RunLog.load(path)
    try:
        log, names = open_log(path, names, success)
    except (FileNotFoundError, NoLogError):
        return RunLog.load(path)  # a run without a step yet; else its error names the run folders in this one
    if log.kind == "allocations":
        return RunLog.load(path)
    return of_rewards(RewardLog.of(read_tables(log, names, done), success), path)


def of_rewards(log: RewardLog, path: Path) -> RunLog:
    """Return a reward log as a run: of each group the scored rollouts, without estimates and predictions."""
    unknown = np.full(log.step.size, np.nan)
    notes = list(log.notes)
    if log.unscored:
        rollouts = (
            "1 rollout without a reward was"
            if log.unscored == 1
            else f"{log.unscored:,} rollouts without a reward were"
        )
        notes.append(f"{rollouts} left out")
    return RunLog.of_visits(
        [{"step": int(step)} for step in log.steps],
        log.prompt_ids,
        Visits(
            step=log.step,
            prompt=log.prompt,
            counts=log.totals,
            arrived=log.totals,
            successes=log.successes,
            scored=log.totals,
            effective=log.effective,
            estimate=unknown,
            predicted=unknown,
        ),
        folder=path if path.is_dir() else path.parent,
        file=None if path.is_dir() else path,
        notes=tuple(notes),
    )
