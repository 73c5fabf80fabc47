"""How long saving and loading the state of many prompts takes, and how large the file is.

The Bayes filter keeps 57 numbers per prompt, which makes its state the largest. The file is written to ``--folder``
and synced, so the time of saving includes the disk; the part that is the disk's own is measured beside it by writing
as many zeros.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from knapsack_rl import KnapsackAllocator
from knapsack_rl.statefile import atomic_file


def known(prompts: int) -> KnapsackAllocator:
    """An allocator that has seen every prompt once."""
    allocator = KnapsackAllocator()
    rng = np.random.default_rng(0)
    for start in range(0, prompts, 50_000):
        ids = [f"data-set/train:{k}" for k in range(start, min(start + 50_000, prompts))]
        allocator.observe(ids, rng.integers(0, 2, len(ids)))
    return allocator


def measure(prompts: int, folder: Path, repeats: int) -> dict[str, float]:
    """Best of some repeats, in seconds; size in bytes."""
    allocator = known(prompts)
    path = folder / "state.npz"
    seconds: dict[str, list[float]] = {"save": [], "load": [], "disk": []}
    for _ in range(repeats):
        started = time.perf_counter()
        allocator.save(path)
        seconds["save"].append(time.perf_counter() - started)
        started = time.perf_counter()
        twin = KnapsackAllocator.load(path)
        seconds["load"].append(time.perf_counter() - started)
        zeros = bytes(path.stat().st_size)
        started = time.perf_counter()
        with atomic_file(folder / "zeros") as file:
            file.write(zeros)
        seconds["disk"].append(time.perf_counter() - started)
    assert len(twin.tracker) == prompts
    return {name: min(times) for name, times in seconds.items()} | {"bytes": float(path.stat().st_size)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=parsed.folder) as folder:
        for prompts in parsed.prompts:
            found = measure(prompts, Path(folder), parsed.repeats)
            if parsed.json:
                print(json.dumps({"prompts": prompts, "cores": os.cpu_count()} | found))
            else:
                print(
                    f"{prompts:>9} prompts: save {found['save']:.2f} s (the disk alone {found['disk']:.2f} s), "
                    f"load {found['load']:.2f} s, {found['bytes'] / prompts:.0f} bytes per prompt"
                )


if __name__ == "__main__":
    main()
