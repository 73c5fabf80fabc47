"""Wall-clock time of ``knapsack-rl train`` as it is and as it was at an earlier commit, in turns.

Whole processes with the defaults of each, threads included, without evaluations and saves. Needs an idle machine, a
git checkout, and an environment that serves both versions.

    python benchmarks/train_time.py ff73358^                             before rows without a gradient were left out
    python benchmarks/train_time.py ff73358^ --now="--num-iterations 1"  with one update a step, as then
    python benchmarks/train_time.py HEAD --rounds 5                      two equal versions: the machine's noise
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]


def seconds_of(checkout: Path, steps: int, output: Path, more: str = "") -> float:
    """Return the seconds of a run of the version in a checkout.

    Args:
        checkout: folder of the version.
        steps: of training.
        output: folder of the run, which must not exist.
        more: further flags.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    command = [sys.executable, "-m", "knapsack_rl", "train", "--steps", str(steps), "--eval-every", "0"]
    command += ["--save-every", "0", "--output", str(output), *shlex.split(more)]
    place = {**os.environ, "PYTHONPATH": str(checkout / "src")}  # before what is installed
    started = time.perf_counter()
    subprocess.run(command, cwd=checkout, env=place, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Print the times and their ratio."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n    ")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="the earlier version, such as ff73358^")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each version (default: %(default)s)")
    parser.add_argument("--now", metavar="FLAGS", default="", help="further flags of this version's runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before, git = Path(folder) / "before", ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), args.commit], check=True)
        try:
            versions = {"before": before, "now": ROOT}
            taken: dict[str, list[float]] = {name: [] for name in versions}
            for number, name in tqdm([(k, name) for k in range(args.rounds) for name in versions], unit="run"):
                output, more = Path(folder) / f"{name}-{number}", args.now if name == "now" else ""
                taken[name].append(seconds_of(versions[name], args.steps, output, more))
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    for name, found in taken.items():
        print(f"{name:7s} {statistics.median(found):6.1f} s  {', '.join(f'{one:.1f}' for one in found)}")
    ratios = [now / then for then, now in zip(taken["before"], taken["now"], strict=True)]
    print(f"ratio   {statistics.median(ratios):6.2f}    {', '.join(f'{one:.2f}' for one in ratios)}")


if __name__ == "__main__":
    main()
