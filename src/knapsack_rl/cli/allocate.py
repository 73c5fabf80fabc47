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

from knapsack_rl.allocation.policies import Allocation, allocate
from knapsack_rl.cli.log_flags import KINDS_OF_LOGS, add_log_flags, column_names
from knapsack_rl.cli.parser import ALLOCATION_FLAGS, add_command, add_settings
from knapsack_rl.cli.progress import progress
from knapsack_rl.ids import PromptId
from knapsack_rl.offline.log_files import first_rows, is_allocation_log
from knapsack_rl.offline.rollouts import READ_STEPS, Rollouts, read_rollouts
from knapsack_rl.offline.tables import TableError, identities, numbers, read_columns, table_suffix
from knapsack_rl.settings import AllocationSettings

DEFAULT_ROLLOUTS = 8
ID_COLUMN = "prompt_id"

EXAMPLES = """examples:
  knapsack-rl allocate rates.csv --budget 2048            columns prompt_id, success_rate (empty = unseen)
  knapsack-rl allocate rewards.jsonl                      a row per rollout: prompt, reward and, if there, step
  knapsack-rl allocate rewards.parquet --reward-column mark --success-threshold 0.5 --format json
  knapsack-rl allocate runs/knapsack-n4-seed0             the prompts of a run, or a folder of TRL or verl
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "allocate",
        run,
        summary="success rates or reward logs in, rollouts per prompt out",
        description="Allocate a rollout budget over the prompts of a file. Success rates in a column are used as they "
        "are. Rewards of an earlier run pass through an estimator step by step; logs are read as by replay.",
        examples=EXAMPLES,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help=f"success rates, or a log: {KINDS_OF_LOGS}")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget", type=int, metavar="N", help="total number of rollouts")
    budget.add_argument("--rollouts-per-prompt", type=int, metavar="N", help="mean rollouts per prompt (default: 8)")
    add_settings(parser, AllocationSettings, ALLOCATION_FLAGS)
    parser.add_argument("--fallback", action="store_true", help="for success rates: apply the paper's fallback rule")
    parser.add_argument(
        "--rate-column", default="success_rate", metavar="NAME", help="success rates (default: %(default)s)"
    )
    add_log_flags(parser)
    parser.add_argument("--quiet", action="store_true", help="print no progress and no notes on the log")
    parser.add_argument("--format", choices=("csv", "json"), default="csv", help="format of the output (default: csv)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: standard output)")


def run(parsed: argparse.Namespace) -> int:
    """Print one line per prompt: id, estimated success rate, rollouts."""
    ids, allocation = _from_rates(parsed) if _holds_rates(parsed) else _from_rewards(parsed)
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


def _holds_rates(parsed: argparse.Namespace) -> bool:
    """Return whether the file has a column of success rates."""
    if not parsed.file.is_file() or table_suffix(parsed.file) is None or is_allocation_log(parsed.file):
        return False
    return parsed.rate_column in first_rows(parsed.file)


def _from_rates(parsed: argparse.Namespace) -> tuple[list[PromptId], Allocation]:
    columns, id_column = read_columns(parsed.file), parsed.id_column or ID_COLUMN
    rates = numbers(columns[parsed.rate_column], parsed.rate_column)
    ids = identities(columns[id_column], id_column) if id_column in columns else range(len(rates))
    found = allocate(
        rates,
        _budget(parsed, len(rates)),
        parsed.min_rollouts,
        parsed.max_rollouts,
        value=AllocationSettings(value=parsed.value).chosen_value(),
        fallback=parsed.fallback,
    )
    return list(ids), found


def _from_rewards(parsed: argparse.Namespace) -> tuple[list[PromptId], Allocation]:
    """Return the next allocation of an allocator that observed the rollouts of a log step by step."""
    if parsed.fallback:
        raise ValueError("--fallback applies to success rates; for rewards use --estimator window, the paper's rule")
    settings = AllocationSettings(
        success_threshold=parsed.success_threshold, **{name: getattr(parsed, name) for name in ALLOCATION_FLAGS}
    )
    log = _read_log(parsed)
    allocator, prompts = settings.make_allocator(), list(log.prompt_ids)
    order = np.argsort(log.steps, kind="stable")
    _, starts = np.unique(log.steps[order], return_index=True)
    for rows in np.split(order, starts[1:]):
        allocator.observe([prompts[k] for k in log.prompt[rows]], log.rewards[rows])
    with _quiet("knapsack_rl.allocator"):  # its warning is the reason that is printed
        return prompts, allocator.allocate(prompts, _budget(parsed, len(prompts)))


def _read_log(parsed: argparse.Namespace) -> Rollouts:
    try:
        with progress(READ_STEPS, quiet=parsed.quiet) as done:
            log = read_rollouts(parsed.file, column_names(parsed), parsed.success_threshold, done, need_steps=False)
    except TableError as error:
        raise ValueError(f"{error} (or name a column of success rates with --rate-column)") from error
    scored = log.rewards[log.scored()]
    graded = ((scored > 0) & (scored < 1)).any()
    if parsed.reward_column is None and graded and log.rewards.size == len(log.prompt_ids):
        raise ValueError(
            f"{log.source} has a single row per prompt, with numbers between 0 and 1: name their column with "
            "--rate-column if they are success rates, with --reward-column if they are rewards"
        )
    if not parsed.quiet:
        for note in log.notes:
            print(f"Note: {note}.", file=sys.stderr)
    return log


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


def _as_json(rows: list[dict[str, Any]], allocation: Allocation) -> str:
    summary = {"expected_value": allocation.expected_value, "reason": allocation.reason, "prompts": rows}
    return json.dumps(summary, indent=2) + "\n"


def _as_csv(rows: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["prompt_id", "success_rate", "rollouts"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
