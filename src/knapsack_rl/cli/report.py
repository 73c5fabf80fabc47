"""``knapsack-rl report``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from knapsack_rl.cli.log_flags import KINDS_OF_LOGS, add_log_flags, column_names
from knapsack_rl.cli.parser import add_command
from knapsack_rl.cli.progress import progress
from knapsack_rl.runs.log import RunLog

FORMATS = ("html", "png", "svg", "json")
EXAMPLES = """examples:
  knapsack-rl report runs/knapsack-n4-seed0                write report.html into the run folder
  knapsack-rl report runs/compare/*-seed*                  compare runs: comparison.html and a table
  knapsack-rl report outputs/my-grpo-run                   a run of TRL alone: completions_*.parquet
  knapsack-rl report runs/knapsack-n4-seed0 --format png   write each plot as a picture into RUN/figures
  knapsack-rl report runs/compare/*-seed* --format json    print the figures for other programs
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "report",
        run,
        summary="write the report of a run, or compare several runs",
        description="Write a self-contained HTML page: the report of one run, or a comparison of several by policy. "
        "Also writes the plots of that page as pictures, or its figures as JSON. Takes every log that replay takes.",
        examples=EXAMPLES,
        extras="plots",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=KINDS_OF_LOGS)
    add_log_flags(parser)
    parser.add_argument("--format", choices=FORMATS, default="html", help="format of the report (default: html)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="page to write, or folder for the pictures (default: in the run folder; for several runs comparison.html "
        "or comparison-figures in the current folder)",
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def run(parsed: argparse.Namespace) -> int:
    """Write the page, pictures or figures and print where they are."""
    from knapsack_rl.offline.rollouts import READ_STEPS
    from knapsack_rl.report import read_run

    if parsed.format == "json" and parsed.output:
        raise ValueError("JSON goes to standard output; redirect it instead of giving --output")
    runs = []
    for path in parsed.runs:
        with progress(READ_STEPS, quiet=parsed.quiet) as done:
            runs.append(read_run(path, column_names(parsed), parsed.success_threshold, done))
    if parsed.format == "json":
        print_figures(runs)
    elif parsed.format != "html":
        print_pictures(runs, parsed.format, parsed.output)
    elif len(runs) == 1:
        from knapsack_rl.report import write_report

        print(f"report: {write_report(runs[0], parsed.output)}")
    else:
        print_comparison(runs, parsed.output or Path("comparison.html"))
    return 0


def print_comparison(runs: Sequence[RunLog], output: Path) -> None:
    """Write the comparison page and print its table as Markdown."""
    from knapsack_rl.report import comparison_table, markdown_table, write_comparison

    rows = comparison_table(runs)
    page = write_comparison(runs, output)
    print(markdown_table(rows))
    print(f"\nreport: {page}")


def print_figures(runs: Sequence[RunLog]) -> None:
    """Print the summary of one run, or the comparison table of several, as JSON."""
    from knapsack_rl.report import comparison_table, run_summary

    print(json.dumps(run_summary(runs[0]) if len(runs) == 1 else comparison_table(runs), indent=2))


def print_pictures(runs: Sequence[RunLog], kind: str, output: Path | None) -> None:
    """Write every plot of the page to a file and print the file names."""
    from knapsack_rl.report.comparison import policies
    from knapsack_rl.report.comparison_page import comparison_plots
    from knapsack_rl.report.page import save_plots
    from knapsack_rl.report.run_page import run_plots

    if len(runs) == 1:
        specs, target = run_plots(runs[0]), output or runs[0].folder / "figures"
    else:
        specs, target = comparison_plots(policies(runs)), output or Path("comparison-figures")
    for path in save_plots(specs, target, kind):
        print(path)
