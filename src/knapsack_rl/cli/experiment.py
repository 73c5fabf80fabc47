"""``knapsack-rl experiment``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from knapsack_rl.cli.progress import progress
from knapsack_rl.experiments.trace import SPLITS

EXAMPLES = """examples:
  knapsack-rl experiment estimation --quick                     a first look, well under a minute
  knapsack-rl experiment estimation                             five seeds; prompts on which nothing was chosen
  knapsack-rl experiment estimation --split development         the half on which settings may be chosen
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "experiment",
        help="compare policies without training a model",
        description="estimation: how much of the gain between uniform allocation and known success rates each "
        "estimator captures, on a recorded run, on synthetic prompts, and on prompts that learn.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=list(EXPERIMENTS), help="which experiment")
    parser.add_argument("--quick", action="store_true", help="small environments and at most two seeds")
    parser.add_argument(
        "--split", choices=SPLITS, default="report", help="prompts of the recorded run (default: report)"
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1 (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("runs/experiments"), metavar="DIR")
    parser.add_argument("--quiet", action="store_true", help="print no progress")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the experiment, print its table, write its files."""
    return EXPERIMENTS[parsed.name](parsed)


def _estimation(parsed: argparse.Namespace) -> int:
    from knapsack_rl.experiments import estimation

    if parsed.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {parsed.seeds}")
    options = estimation.Options(split=parsed.split, seeds=parsed.seeds, quick=parsed.quick)
    started = time.monotonic()
    with progress(estimation.simulations(options), quiet=parsed.quiet) as done:
        results = estimation.run(options, done)
    print(estimation.table(results))
    lines, page = estimation.write(results, parsed.output)
    print(f"\n{time.monotonic() - started:.0f} s; figures: {lines}; page: {page}")
    return 0


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], int]] = {"estimation": _estimation}
