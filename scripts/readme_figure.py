"""Draw the picture of the README from the runs of a comparison.

knapsack-rl compare
python scripts/readme_figure.py runs/compare docs/images/compare.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from knapsack_rl.report import RunLog, plots
from knapsack_rl.report.comparison import accuracy_curve, policies
from knapsack_rl.runs.curves import mean_curve, moving_average


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the picture: where the budget went, the share of rollouts with a gradient, and the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the run folders")
    parser.add_argument("output", type=Path, help="PNG or SVG file")
    parsed = parser.parse_args(arguments)
    runs = [RunLog.load(path.parent) for path in sorted(parsed.runs.glob("*/config.yaml"))]
    groups = policies(runs)
    adaptive = next(policy for policy in groups if not policy.uniform and policy.label.startswith("knapsack"))
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    plots.budget_by_estimate(next(iter(adaptive.runs.values())).budget_by_estimate, left)
    window = plots.trend_window(max(run.steps.size for run in runs))
    ratios = {
        policy.label: mean_curve(
            (run.steps, moving_average(run.effective_rollout_ratio, window)) for run in policy.runs.values()
        )
        for policy in groups
    }
    plots.ratios_by_policy(ratios, middle, level="rollouts")
    plots.accuracy_by_policy({policy.label: accuracy_curve(policy, 3) for policy in groups}, right)
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(parsed.output, dpi=110)
    print(f"wrote {parsed.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
