"""``knapsack-rl allocate``."""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.allocation.policies import Allocation, allocate
from knapsack_rl.cli.parser import ALLOCATION_FLAGS, add_command, add_settings
from knapsack_rl.ids import PromptId
from knapsack_rl.offline.reward_logs import ColumnNames, read_reward_log
from knapsack_rl.offline.tables import Columns, column, identities, numbers, read_columns
from knapsack_rl.runs.files import ALLOCATION_LOG
from knapsack_rl.session import AllocationSettings

DEFAULT_ROLLOUTS = 8
ID_COLUMN, STEP_COLUMN, REWARD_COLUMN = "prompt_id", "step", "reward"

EXAMPLES = """examples:
  knapsack-rl allocate rates.csv --budget 2048            columns prompt_id, success_rate (empty = unseen)
  knapsack-rl allocate rewards.jsonl                      columns prompt_id, reward and, if there, step
  knapsack-rl allocate rewards.parquet --reward-column score --success-threshold 0.5 --format json
  knapsack-rl allocate runs/knapsack-n8-seed0             the prompts of a run, or a folder of TRL or verl
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "allocate",
        run,
        summary="success rates or reward logs in, rollouts per prompt out",
        description="Allocate a rollout budget over the prompts of a file. Success rates in a column are used as they "
        "are. Rewards, one row per rollout, pass through an estimator step by step, and so do a run folder, TRL's "
        "completions and verl's dumps.",
        examples=EXAMPLES,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="CSV, JSONL or parquet file, or a folder")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget", type=int, metavar="N", help="total number of rollouts")
    budget.add_argument("--rollouts-per-prompt", type=int, metavar="N", help="mean rollouts per prompt (default: 8)")
    add_settings(parser, AllocationSettings, ALLOCATION_FLAGS)
    parser.add_argument("--fallback", action="store_true", help="for success rates: apply the paper's fallback rule")
    parser.add_argument(
        "--success-threshold",
        type=float,
        default=0.0,
        metavar="X",
        help="a reward above this is a success (default: 0)",
    )
    parser.add_argument("--id-column", default=ID_COLUMN, metavar="NAME", help="prompt ids (default: %(default)s)")
    parser.add_argument(
        "--rate-column", default="success_rate", metavar="NAME", help="success rates (default: %(default)s)"
    )
    parser.add_argument("--reward-column", default=REWARD_COLUMN, metavar="NAME", help="rewards (default: %(default)s)")
    parser.add_argument("--step-column", default=STEP_COLUMN, metavar="NAME", help="training steps (default: step)")
    parser.add_argument("--format", choices=("csv", "json"), default="csv", help="format of the output (default: csv)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: standard output)")


def run(parsed: argparse.Namespace) -> int:
    """Print one line per prompt: id, estimated success rate, rollouts."""
    if parsed.file.is_dir() or parsed.file.name == ALLOCATION_LOG:
        ids, allocation = _from_folder(parsed)
    else:
        columns = read_columns(parsed.file)
        read = _from_rates if parsed.rate_column in columns else _from_rewards
        ids, allocation = read(columns, parsed)
    rates = np.full(len(ids), np.nan) if allocation.success_rates is None else allocation.success_rates
    rows = [
        {"prompt_id": prompt_id, "success_rate": None if np.isnan(rate) else float(rate), "rollouts": int(count)}
        for prompt_id, rate, count in zip(ids, rates, allocation.counts, strict=True)
    ]
    text = _as_json(rows, allocation) if parsed.format == "json" else _as_csv(rows)
    if parsed.output:
        parsed.output.write_bytes(text.encode())  # an encoding error comes before the file is opened
    else:
        sys.stdout.write(text)
    if allocation.reason:
        print(allocation.reason, file=sys.stderr)
    return 0


def _budget(parsed: argparse.Namespace, prompts: int) -> int:
    if parsed.budget is not None:
        return parsed.budget
    return prompts * (DEFAULT_ROLLOUTS if parsed.rollouts_per_prompt is None else parsed.rollouts_per_prompt)


def _from_rates(columns: Columns, parsed: argparse.Namespace) -> tuple[list[PromptId], Allocation]:
    rates = numbers(columns[parsed.rate_column], parsed.rate_column)
    ids = identities(columns[parsed.id_column], parsed.id_column) if parsed.id_column in columns else range(len(rates))
    found = allocate(
        rates,
        _budget(parsed, len(rates)),
        parsed.min_rollouts,
        parsed.max_rollouts,
        value=parsed.value,
        fallback=parsed.fallback,
    )
    return list(ids), found


def _from_rewards(columns: Columns, parsed: argparse.Namespace) -> tuple[list[PromptId], Allocation]:
    ids = identities(_column(columns, parsed.id_column, parsed.file, "--id-column"), parsed.id_column)
    flag = f"--reward-column, or name a column of success rates instead of {parsed.rate_column!r} with --rate-column"
    rewards = numbers(_column(columns, parsed.reward_column, parsed.file, flag), parsed.reward_column)
    steps = np.zeros(len(ids))
    if parsed.step_column in columns:
        steps = numbers(columns[parsed.step_column], parsed.step_column)
        if np.isnan(steps).any():
            row = int(np.flatnonzero(np.isnan(steps))[0]) + 1
            raise ValueError(
                f"column {parsed.step_column!r}, row {row} is empty; give every row a step, or remove the column"
            )
    return _observed(ids, rewards, steps, parsed.success_threshold, parsed)


def _from_folder(parsed: argparse.Namespace) -> tuple[list[PromptId], Allocation]:
    names = {
        "prompt": parsed.id_column if parsed.id_column != ID_COLUMN else None,
        "step": parsed.step_column if parsed.step_column != STEP_COLUMN else None,
        "reward": parsed.reward_column if parsed.reward_column != REWARD_COLUMN else None,
    }
    log = read_reward_log(parsed.file, ColumnNames(**names), parsed.success_threshold or None)
    failures = log.totals - log.successes
    ids = [log.prompt_ids[prompt] for prompt in np.repeat(log.prompt, log.totals).tolist()]
    rewards = np.repeat(np.tile([1.0, 0.0], log.totals.size), np.stack([log.successes, failures], axis=1).ravel())
    return _observed(ids, rewards, np.repeat(log.step, log.totals), 0.0, parsed)


def _observed(
    ids: list[PromptId], rewards: FloatArray, steps: NDArray[Any], success: float, parsed: argparse.Namespace
) -> tuple[list[PromptId], Allocation]:
    """Return the next allocation of an allocator that observed these rollouts step by step."""
    if parsed.fallback:
        raise ValueError("--fallback applies to success rates; for rewards use --estimator window, the paper's rule")
    settings = AllocationSettings(
        success_threshold=success, **{name: getattr(parsed, name) for name in ALLOCATION_FLAGS}
    )
    allocator = settings.make_allocator()
    for step in np.unique(steps):
        rows = np.flatnonzero(steps == step)
        allocator.observe([ids[row] for row in rows], rewards[rows])
    prompts = list(dict.fromkeys(ids))
    with _quiet("knapsack_rl.allocator"):  # its warning is the reason that is printed
        return prompts, allocator.allocate(prompts, _budget(parsed, len(prompts)))


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Silence a logger below errors while the body runs."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _column(columns: Columns, name: str, path: Path, flag: str) -> list[Any]:
    """Return a column whose name a flag sets."""
    try:
        return column(columns, name, path)
    except ValueError as error:
        raise ValueError(f"{error} (name another with {flag})") from error


def _as_json(rows: list[dict[str, Any]], allocation: Allocation) -> str:
    summary = {"expected_value": allocation.expected_value, "reason": allocation.reason, "prompts": rows}
    return json.dumps(summary, indent=2) + "\n"


def _as_csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["prompt_id", "success_rate", "rollouts"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
