"""Flags of the commands that read the reward log of an earlier run."""

from __future__ import annotations

import argparse

from knapsack_rl.offline.rollouts import ColumnNames

KINDS_OF_LOGS = (
    "run folder or its allocations.jsonl, folder of TRL's completions or verl's dumps, or a CSV, JSON or parquet file "
    "with a row per rollout; each also compressed by gzip"
)


def add_log_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a log is read."""
    parser.add_argument(
        "--id-column", metavar="NAME", help="column of prompt ids, the same in every step (default: the usual names)"
    )
    parser.add_argument("--step-column", metavar="NAME", help="column of training steps (default: the usual names)")
    parser.add_argument("--reward-column", metavar="NAME", help="column of rewards (default: the usual names)")
    parser.add_argument(
        "--success-threshold", type=float, metavar="X", help="a reward above X is a success (default: 0)"
    )


def column_names(parsed: argparse.Namespace) -> ColumnNames:
    """Return the columns that the flags name."""
    return ColumnNames(parsed.id_column, parsed.step_column, parsed.reward_column)
