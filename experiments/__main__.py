"""``python -m experiments NAME``: measure a claim of the evidence page."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import catalogue
from experiments.contract import Options
from experiments.pool import UnfinishedRunsError, train
from experiments.statistics import markdown_table
from experiments.trace import SPLITS
from knapsack_rl.cli.progress import progress

EXAMPLES = """examples:
  python -m experiments fallback --quick                       a first look, under a minute; its figures mean nothing
  python -m experiments fallback --output docs/evidence        five seeds; runs on record there are used again
  python -m experiments all --output docs/evidence             every experiment of the page; goes on where it stopped
  python -m experiments page                                   docs/evidence.md from docs/evidence/, without training
  python -m experiments estimation --split development         estimators on a recorded run; the half for choosing
"""

OTHERS = ("estimation", "all", "page")
PAGE_FOLDER = Path("docs/evidence")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; exit status 0 done, 1 if training runs did not finish, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Experiments of the evidence page, by name; all: every one of them; page: write the page from rows "
        "already there; estimation: what share of the possible gain each estimator captures on a recorded run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=[*catalogue.EXPERIMENTS, *OTHERS], metavar="NAME",
                        help=", ".join([*catalogue.EXPERIMENTS, *OTHERS]))  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="the same code on next to nothing, at most two seeds")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1 (default: 5)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes side by side (default: 2)")
    parser.add_argument("--runs", type=Path, default=Options.runs, metavar="DIR",
                        help="training runs; finished ones are used again (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR",
                        help="rows and plots; training runs whose rows are in it are not trained again "
                        f"(default: runs/experiments; of page: {PAGE_FOLDER})")  # fmt: skip
    parser.add_argument(
        "--split", choices=SPLITS, default="report", help="of estimation: prompts of the recorded run (default: report)"
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress")
    try:
        return run(parser.parse_args(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2


def run(parsed: argparse.Namespace) -> int:
    """Run what was asked for, print what was found, write the files; exit status 1 if training runs did not finish."""
    for name in ("seeds", "workers"):
        if getattr(parsed, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(parsed, name)}")
    if parsed.name == "page":
        from experiments import page

        print(f"wrote {page.write(parsed.output or PAGE_FOLDER)}")
        return 0
    parsed.output = parsed.output or Path("runs/experiments")
    if parsed.name == "estimation":
        return _estimation(parsed)
    options = Options(
        seeds=parsed.seeds, quick=parsed.quick, workers=parsed.workers, runs=parsed.runs, record=parsed.output
    )
    try:
        if parsed.name == "all":
            runs = catalogue.shared_runs(options)
            with progress(len(runs), quiet=parsed.quiet) as done:
                train(runs, options, done)
        for name in catalogue.EXPERIMENTS if parsed.name == "all" else [parsed.name]:
            _measure(name, options, parsed)
    except UnfinishedRunsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _measure(name: str, options: Options, parsed: argparse.Namespace) -> None:
    experiment, started = catalogue.load(name), time.monotonic()
    with progress(experiment.pieces(options), quiet=parsed.quiet) as done:
        rows = catalogue.run(name, options, done)
    data, plot = catalogue.write(name, rows, parsed.output)
    print(f"## {experiment.TITLE}\n")
    found = [(one.claim, one.paper, one.ours, one.verdict) for one in experiment.findings(rows)]
    print(markdown_table(("claim", "paper", "here", "verdict"), found))
    print(f"\n{experiment.paragraph(rows).strip()}\n")
    print(f"{time.monotonic() - started:.0f} s; rows: {data}; plot: {plot}\n", flush=True)


def _estimation(parsed: argparse.Namespace) -> int:
    from experiments import estimation

    options = estimation.Options(split=parsed.split, seeds=parsed.seeds, quick=parsed.quick)
    started = time.monotonic()
    with progress(estimation.simulations(options), quiet=parsed.quiet) as done:
        results = estimation.run(options, done)
    print(estimation.table(results))
    lines, page = estimation.write(results, parsed.output)
    print(f"\n{time.monotonic() - started:.0f} s; figures: {lines}; page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
