"""``knapsack-rl report``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from knapsack_rl.cli.parser import add_command

FORMATS = ("html", "png", "svg", "json")
EXAMPLES = """examples:
  knapsack-rl report runs/knapsack-n8-seed0                write report.html into the run folder
  knapsack-rl report runs/compare/*-seed*                  compare runs: comparison.html and a table
  knapsack-rl report runs/knapsack-n8-seed0 --format png   write each plot as a picture into RUN/figures
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
        "Also writes the plots of that page as pictures, or its figures as JSON.",
        examples=EXAMPLES,
        extras="plots",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--format", choices=FORMATS, default="html", help="format of the report (default: html)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="page to write, or folder for the pictures (default: in the run folder; for several runs comparison.html "
        "or comparison-figures in the current folder)",
    )


def run(parsed: argparse.Namespace) -> int:
    """Write the page, pictures or figures and print where they are."""
    folders = [str(folder) for folder in parsed.runs]
    if parsed.format == "json":
        if parsed.output:
            raise ValueError("JSON goes to standard output; redirect it instead of giving --output")
        print_figures(folders)
    elif parsed.format != "html":
        print_pictures(folders, parsed.format, parsed.output)
    elif len(folders) == 1:
        from knapsack_rl.report import write_report

        print(f"report: {write_report(folders[0], parsed.output)}")
    else:
        print_comparison(folders, parsed.output or Path("comparison.html"))
    return 0


def print_comparison(folders: Sequence[str], output: Path) -> None:
    """Write the comparison page and print its table as Markdown."""
    from knapsack_rl.report import RunLog, comparison_table, markdown_table, write_comparison

    rows = comparison_table([RunLog.load(folder) for folder in folders])
    page = write_comparison(folders, output)
    print(markdown_table(rows))
    print(f"\nreport: {page}")


def print_figures(folders: Sequence[str]) -> None:
    """Print the summary of one run, or the comparison table of several, as JSON."""
    from knapsack_rl.report import RunLog, comparison_table, run_summary

    logs = [RunLog.load(folder) for folder in folders]
    print(json.dumps(run_summary(logs[0]) if len(logs) == 1 else comparison_table(logs), indent=2))


def print_pictures(folders: Sequence[str], kind: str, output: Path | None) -> None:
    """Write every plot of the page to a file and print the file names."""
    from knapsack_rl.report import RunLog
    from knapsack_rl.report.comparison import policies
    from knapsack_rl.report.comparison_page import comparison_plots
    from knapsack_rl.report.page import save_plots
    from knapsack_rl.report.run_page import run_plots

    logs = [RunLog.load(folder) for folder in folders]
    if len(logs) == 1:
        specs, target = run_plots(logs[0]), output or logs[0].folder / "figures"
    else:
        specs, target = comparison_plots(policies(logs)), output or Path("comparison-figures")
    for path in save_plots(specs, target, kind):
        print(path)
