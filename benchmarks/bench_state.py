"""Measure the time to save and load the state of many prompts, and the size of the file.

The Bayes filter keeps 57 numbers per prompt, so its state is the largest. The file is written to ``--folder`` and
synced, so the time to save includes the disk; the time of the disk alone is measured by writing as many zeros. On a
busy machine processor time is more meaningful than wall-clock time.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from knapsack_rl import KnapsackAllocator
from knapsack_rl.state import atomic_file

T = TypeVar("T")


def known(prompts: int) -> KnapsackAllocator:
    """Return an allocator that has seen every prompt once."""
    allocator = KnapsackAllocator()
    rng = np.random.default_rng(0)
    for start in range(0, prompts, 50_000):
        ids = [f"data-set/train:{k}" for k in range(start, min(start + 50_000, prompts))]
        allocator.observe(ids, rng.integers(0, 2, len(ids)))
    return allocator


def write(path: Path, content: bytes) -> None:
    """Only write and sync."""
    with atomic_file(path) as file:
        file.write(content)


def measure(prompts: int, folder: Path, repeats: int) -> dict[str, float]:
    """Return the best of several repeats in seconds, and the size in bytes."""
    allocator = known(prompts)
    path = folder / "state.npz"
    seconds: dict[str, list[float]] = {"save": [], "load": [], "disk": [], "save_cpu": [], "load_cpu": []}

    def timed(name: str, call: Callable[[], T]) -> T:
        started, worked = time.perf_counter(), time.process_time()
        result = call()
        seconds[name].append(time.perf_counter() - started)
        if f"{name}_cpu" in seconds:
            seconds[f"{name}_cpu"].append(time.process_time() - worked)
        return result

    for _ in range(repeats):
        timed("save", lambda: allocator.save(path))
        twin = timed("load", lambda: KnapsackAllocator.load(path))
        zeros = bytes(path.stat().st_size)
        timed("disk", lambda zeros=zeros: write(folder / "zeros", zeros))
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
                    f"{prompts:>9} prompts: save {found['save']:.2f} s (processor {found['save_cpu']:.2f} s, the disk "
                    f"alone {found['disk']:.2f} s), load {found['load']:.2f} s (processor {found['load_cpu']:.2f} s), "
                    f"{found['bytes'] / prompts:.0f} bytes per prompt"
                )


if __name__ == "__main__":
    main()
