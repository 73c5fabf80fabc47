"""``knapsack-rl replay``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from knapsack_rl.cli.log_flags import KINDS_OF_LOGS, add_log_flags, column_names
from knapsack_rl.cli.parser import ALLOCATION_FLAGS, add_command, add_settings
from knapsack_rl.cli.progress import progress
from knapsack_rl.settings import AllocationSettings

EXAMPLES = """examples:
  knapsack-rl replay runs/uniform-n8-seed0                      a run folder of this package
  knapsack-rl replay outputs/my-grpo-run                        TRL with log_completions=True: completions_*.parquet
  knapsack-rl replay dumps/rollouts --reward-column acc         verl with trainer.rollout_data_dir: 1.jsonl, ...
  knapsack-rl replay rewards.csv.gz --id-column question        any table with one row per rollout
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "replay",
        run,
        summary="estimate from an earlier run's reward log what other allocations would have achieved",
        description="A dry run on the rewards of an earlier run, before paying for any rollout: effective ratios and "
        "value of the recorded run and of each policy, at the same budget and at half of it, and the rollouts saved at "
        "equal value. Assumes that success rates do not react to the allocation.",
        examples=EXAMPLES,
        extras="plots",
    )
    parser.add_argument("logs", type=Path, metavar="LOGS", help=KINDS_OF_LOGS)
    add_log_flags(parser)
    add_settings(parser, AllocationSettings, ALLOCATION_FLAGS)
    parser.add_argument(
        "--bandwidth", type=float, default=2.5, metavar="X", help="bandwidth of the smoothing, in visits (default: 2.5)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="replays of each policy (default: 3)")
    parser.add_argument(
        "--output", type=Path, default=Path("replay.html"), metavar="FILE", help="page to write (default: %(default)s)"
    )
    parser.add_argument("--no-page", action="store_true", help="write no page (then matplotlib is not needed)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def run(parsed: argparse.Namespace) -> int:
    """Replay, print the table and write the page."""
    from knapsack_rl.offline.dry_run import Settings, dry_run, simulations
    from knapsack_rl.offline.reward_logs import read_reward_log
    from knapsack_rl.offline.rollouts import READ_STEPS
    from knapsack_rl.report.dry_run_page import summary, write_dry_run

    with progress(READ_STEPS, quiet=parsed.quiet) as done:
        log = read_reward_log(parsed.logs, column_names(parsed), parsed.success_threshold, done)
    chosen = {name: getattr(parsed, name) for name in ALLOCATION_FLAGS}
    settings = Settings(bandwidth=parsed.bandwidth, seeds=parsed.seeds, **chosen)
    with progress(simulations(settings), quiet=parsed.quiet) as done:
        result = dry_run(log, settings, done)
    print(json.dumps(result.as_dict(), indent=2) if parsed.json else summary(result))
    if not parsed.no_page:
        page = write_dry_run(result, parsed.output)
        if not parsed.json:
            print(f"\nreport: {page}")
    return 0
