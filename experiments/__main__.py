"""``python -m experiments NAME``: measure a claim of the evidence page."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import catalogue
from experiments.contract import Options, markdown_table
from experiments.pool import UnfinishedRunsError, train
from experiments.trace import SPLITS
from knapsack_rl.cli.progress import progress

EXAMPLES = """examples:
  python -m experiments fallback --quick                       a first look, under a minute; its figures mean nothing
  python -m experiments fallback --output docs/evidence        five seeds; runs on record there are used again
  python -m experiments all --output docs/evidence             every experiment; continues where it stopped
  python -m experiments page                                   fill in the pages from docs/evidence/, without training
  python -m experiments readme                                 print the table of results of the README
  python -m experiments recorded                               write the uniform runs that the report of a run shows
  python -m experiments estimation --split development         estimators on a recorded run; the half for choosing
"""

FROM_ROWS = ("page", "readme", "recorded")
OTHERS = ("all", *FROM_ROWS)
PAGE_FOLDER = Path("docs/evidence")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; exit status 0 done, 1 if training runs did not finish, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Measure the claims of the evidence page, by experiment; all: every experiment; page: fill in the "
        "pages from rows measured before; readme: print the README's table of results; recorded: write the uniform "
        "runs that a report shows.",
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
                        f"(default: runs/experiments; of {', '.join(FROM_ROWS)}: {PAGE_FOLDER})")  # fmt: skip
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
    """Run a command, print the results, write the files; exit status 1 if training runs did not finish."""
    for name in ("seeds", "workers"):
        if getattr(parsed, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(parsed, name)}")
    if parsed.name in FROM_ROWS:
        from experiments import page

        folder = parsed.output or PAGE_FOLDER
        if parsed.name == "readme":
            print(page.readme_table(folder))
        else:
            written = page.write(folder) if parsed.name == "page" else [page.write_recorded(folder)]
            print(f"wrote {', '.join(map(str, written))}")
        return 0
    output = parsed.output or Path("runs/experiments")
    options = Options(parsed.seeds, parsed.quick, parsed.workers, parsed.runs, output, parsed.split)
    try:
        if parsed.name == "all":
            runs = catalogue.shared_runs(options)
            with progress(len(runs), quiet=parsed.quiet) as done:
                train(runs, options, done)
        for name in catalogue.EXPERIMENTS if parsed.name == "all" else [parsed.name]:
            _measure(name, options, output, quiet=parsed.quiet)
    except UnfinishedRunsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _measure(name: str, options: Options, output: Path, *, quiet: bool) -> None:
    experiment, started = catalogue.load(name), time.monotonic()
    with progress(experiment.pieces(options), quiet=quiet) as done:
        rows = catalogue.run(name, options, done)
    data, plot = catalogue.write(name, rows, output)
    print(f"## {name}\n")
    found = [(one.claim, one.paper, one.ours, one.verdict) for one in experiment.findings(rows)]
    if found:
        print(markdown_table(("claim", "paper", "here", "verdict"), found) + "\n")
    for title, table in experiment.tables(rows).items():
        print(f"{title}:\n\n{table}\n")
    print(f"{time.monotonic() - started:.0f} s; rows: {data}; plot: {plot}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
