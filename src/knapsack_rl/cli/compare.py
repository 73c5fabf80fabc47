"""``knapsack-rl compare``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from knapsack_rl.cli.parser import add_command
from knapsack_rl.cli.settings_flags import SETTINGS_USAGE, add_flags, settings_of
from knapsack_rl.training.compare import POLICIES, Run, execute, plan

EXAMPLES = """examples:
  knapsack-rl compare                                     five policies x three seeds, two at a time
  knapsack-rl compare --policies uniform knapsack --seeds 0 1 2 3 4 --steps 200
  knapsack-rl compare --output runs/mine                  repeated after an interruption: resumes where it stopped
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "compare",
        run,
        usage="%(prog)s [--policies POLICY ...] [--seeds SEED ...] [--jobs N] [--output FOLDER] "
        "[--other-rollouts N] " + SETTINGS_USAGE,
        summary="train several policies over several seeds and report them side by side",
        description="Train uniform N (GRPO, and with the advantage of the knapsack), uniform 2N, the paper's rule and "
        "the knapsack from the same start over several seeds, one torch thread each, and write one report. Finished "
        "runs in the output folder are kept.",
        examples=EXAMPLES,
        extras="trl,plots",
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        default=list(POLICIES),
        choices=POLICIES,
        metavar="POLICY",
        help=f"policies to train (default: {' '.join(POLICIES)})",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="seeds (default: 0 1 2)"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="parallel runs (default: 2)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/compare"),
        metavar="FOLDER",
        help="parent of the run folders (default: %(default)s)",
    )
    parser.add_argument(
        "--other-rollouts",
        type=int,
        metavar="N",
        help="rollouts per prompt of the policies without the knapsack, on as many fewer prompts (default: twice the "
        "knapsack's)",
    )
    add_flags(parser, without=("allocation", "seed", "threads"))


def run(parsed: argparse.Namespace) -> int:
    """Train the missing runs, write the comparison and print its table; exit status 1 if a run failed."""
    settings = settings_of(parsed)
    if parsed.print_config:
        sys.stdout.write(settings.to_yaml())
        return 0
    if parsed.jobs < 1:
        raise ValueError(f"--jobs must be >= 1, got {parsed.jobs}")
    from knapsack_rl.training.checks import check_inputs

    check_inputs(settings)
    runs = plan(settings, parsed.policies, parsed.seeds, parsed.output, parsed.other_rollouts)
    failed = execute(runs, jobs=parsed.jobs, progress=Lines())
    for bad in failed:
        print(f"{bad.settings.label} did not finish; its output is in {bad.folder / 'log.txt'}", file=sys.stderr)
    done = [run.folder for run in runs if run.finished]
    if done:
        from knapsack_rl.cli.report import print_comparison
        from knapsack_rl.runs.log import RunLog

        print_comparison([RunLog.load(folder) for folder in done], parsed.output / "comparison.html")
    return 1 if failed else 0


class Lines:
    """Prints a line when a run starts or ends, and on a terminal a status line with the steps done."""

    def started(self, run: Run) -> None:
        """Print that a run started."""
        self._print(f"started {run.settings.label} ({run.settings.steps} steps of {run.settings.budget} rollouts)")

    def advanced(self, running: Sequence[Run]) -> None:
        """Rewrite the status line."""
        if sys.stdout.isatty():
            parts = [f"{run.settings.label} {run.steps_done}/{run.settings.steps}" for run in running]
            print("\r\x1b[K" + "   ".join(parts), end="", flush=True)

    def ended(self, run: Run, status: int) -> None:
        """Print how a run ended."""
        self._print(f"{'finished' if run.finished else f'stopped (exit status {status})'} {run.settings.label}")

    def _print(self, text: str) -> None:
        print(("\r\x1b[K" if sys.stdout.isatty() else "") + text, flush=True)
