"""A table of a run that ``make test-verl`` left behind: ``python tests/verl_harness/summary.py FOLDER``."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from verl_harness.launch import Finished

METRICS = {
    "rollouts with a gradient": "knapsack/effective_gradient_ratio",
    "prompts with a gradient": "knapsack/effective_prompt_ratio",
    "prompts seen": "knapsack/prompts_seen",
    "mean reward": "critic/rewards/mean",
    "gradient norm": "actor/grad_norm",
}


def table(folder: Path) -> str:
    """Markdown, a row for each step: process, group sizes as verl had them, and verl's metrics."""
    run = Finished(folder, 0, "")
    metrics = {line["step"]: line for line in run.metrics()}
    processes = list(dict.fromkeys(line["pid"] for line in run.recorded()))
    lines = [
        f"| step | start | group sizes | total | {' | '.join(METRICS)} |",
        "| --- " * (4 + len(METRICS)) + "|",
    ]
    for line in run.recorded():
        sizes = sorted(Counter(row["prompt"] for row in line["rows"]).values(), reverse=True)
        found = [f"{metrics[line['step']][name]:.3g}" for name in METRICS.values()]
        cells = [line["step"], processes.index(line["pid"]) + 1, " ".join(map(str, sizes)), sum(sizes), *found]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table(Path(sys.argv[1])) + "\n")
