"""``knapsack-rl report``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """examples:
  knapsack-rl report runs/knapsack-n8-seed0               write report.html into the run folder
  knapsack-rl report runs/compare/*-seed*                 compare runs: comparison.html and a table
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="write the report of a run, or of several side by side",
        description="Write a self-contained HTML page: of one run its report, of several a comparison by policy.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="page to write, for several runs")
    parser.add_argument("--json", action="store_true", help="print the comparison table as JSON")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    if len(parsed.runs) == 1:
        if parsed.output or parsed.json:
            raise ValueError("--output and --json go with several runs; the report of one is written into its folder")
        from knapsack_rl.report import write_report

        print(f"report: {write_report(parsed.runs[0])}")
        return 0
    output = parsed.output or Path("comparison.html")
    print_comparison([str(folder) for folder in parsed.runs], output, as_json=parsed.json)
    return 0


def print_comparison(folders: Sequence[str], output: Path, *, as_json: bool = False) -> None:
    """Write the comparison page and print its table, as Markdown or JSON."""
    from knapsack_rl.report import RunLog, comparison_table, markdown_table, write_comparison

    rows = comparison_table([RunLog.load(folder) for folder in folders])
    page = write_comparison(folders, output)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print(markdown_table(rows))
    print(f"\nreport: {page}")
