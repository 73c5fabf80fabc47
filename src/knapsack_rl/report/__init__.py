"""Reports of runs from their folders: derived figures, plots, and self-contained HTML pages.

Plots need matplotlib (``pip install "knapsack-rl[plots]"``); it is imported when a page is drawn.
"""

from knapsack_rl.offline.recorded import read_run
from knapsack_rl.report.comparison import comparison_table
from knapsack_rl.report.comparison_page import markdown_table, write_comparison
from knapsack_rl.report.run_page import write_report
from knapsack_rl.report.summary import run_summary
from knapsack_rl.runs.log import RunLog

__all__ = [
    "RunLog",
    "comparison_table",
    "markdown_table",
    "read_run",
    "run_summary",
    "write_comparison",
    "write_report",
]
