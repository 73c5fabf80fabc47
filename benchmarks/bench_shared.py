"""Shared knowledge: time and memory of a step with features, and their worth in the simulator.

    python benchmarks/bench_shared.py
    python benchmarks/bench_shared.py --worlds --seeds 8

Without ``--worlds`` steps of 64 and of 512 prompts out of 10^5 are timed (``allocate`` and ``observe``, processor time
of one thread), without features, with one column of 100 values and with four, and the memory and the state file of
10^5 prompts are measured. With it, each line is a world of 1,024 prompts with 64 skills, and the value of all groups
(the sum of V at the true rates) with features relative to that without.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from knapsack_rl import KnapsackAllocator
from knapsack_rl.offline.environments import Sudden, Synthetic
from knapsack_rl.offline.simulate import allocated, simulate

PROMPTS, VALUES, MEAN, STEPS = 100_000, 100, 8, 40

SIZE = {"prompts": 1024, "epochs": 12, "batch_size": 64, "skills": 64}
WORLDS = {
    "static": Synthetic("bimodal", **SIZE),
    "static, wide skills": Synthetic("late-training", **SIZE, spread=1.5),
    "half of the skills jump, twice": Synthetic(
        "late-training", **SIZE, changes=(Sudden(4.5, 0.5, "late-training"), Sudden(8.5, 0.5, "late-training"))
    ),
    "half of the skills collapse": Synthetic("late-training", **SIZE, changes=(Sudden(5.5, 0.5, shift=-5.0),)),
    "skills are learned suddenly": Synthetic(
        "beta(1,30)", **SIZE, changes=tuple(Sudden(epoch + 0.5, 0.12, shift=5.0) for epoch in range(1, 11))
    ),
}
COLUMNS = (("skill",), ("useless",), ("misleading",), ("skill", "useless", "misleading"))


def time_steps(prompts: int, columns: int) -> tuple[float, float]:
    """Return the milliseconds of allocate and of observe in the second half of a run."""
    rng, allocator = np.random.default_rng(0), KnapsackAllocator()
    value, rates = rng.integers(0, VALUES, (columns, PROMPTS)), rng.random(PROMPTS)
    spent = np.zeros((STEPS, 2))
    for step in range(STEPS):
        ids = rng.choice(PROMPTS, prompts, replace=False).tolist()
        features = {f"column {k}": [f"value {v}" for v in value[k, ids]] for k in range(columns)} or None
        started = time.process_time()
        counts = allocator.allocate(ids, MEAN * prompts, features=features).counts
        spent[step, 0] = time.process_time() - started
        rows = np.repeat(ids, counts)
        rewards, names = rng.random(rows.size) < rates[rows], rows.tolist()
        started = time.process_time()
        allocator.observe(names, rewards)
        spent[step, 1] = time.process_time() - started
    allocate, observe = 1e3 * np.median(spent[STEPS // 2 :], axis=0)
    return float(allocate), float(observe)


def measure_memory(columns: int) -> tuple[float, float]:
    """Return megabytes that features of all prompts add to an allocator, and to its state file."""
    ids, sizes = list(range(PROMPTS)), []
    allocator = KnapsackAllocator()
    allocator.observe(ids, np.arange(PROMPTS) % 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.npz"
        for featured in (False, True):
            if featured:
                tracemalloc.start()
                features = {f"column {k}": np.arange(PROMPTS) % 2**k for k in range(12 - columns, 12)}
                allocator.note_features(ids, {name: [f"v{v}" for v in values] for name, values in features.items()})
                allocator.observe(ids, np.arange(PROMPTS) % 3 == 0)
                del features
                held = tracemalloc.get_traced_memory()[0]
                tracemalloc.stop()
            allocator.save(path)
            sizes.append(path.stat().st_size)
    return held / 1e6, (sizes[1] - sizes[0]) / 1e6


def worth(world: Synthetic, seeds: int) -> list[str]:
    """Return the change of value by each choice of columns, with its standard error over seeds."""

    def values(features: Sequence[str]) -> np.ndarray:
        return np.array([simulate(world, allocated(features=features), seed).values.sum() for seed in range(seeds)])

    without = values(())
    found = []
    for columns in COLUMNS:
        change = 100 * (values(columns) / without - 1)
        error = change.std(ddof=1) / seeds**0.5 if seeds > 1 else float("nan")
        found.append(f"{' + '.join(columns)} {change.mean():+.2f} ± {error:.2f} %")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print times and memory, or the worth of features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", action="store_true", help="simulate the worth of features instead")
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args(argv)
    if options.worlds:
        for name, world in WORLDS.items():
            print(f"{name}: {', '.join(worth(world, options.seeds))}", flush=True)
        return 0
    for prompts in (64, 512):
        for columns in (0, 1, 4):
            allocate, observe = time_steps(prompts, columns)
            print(f"{prompts} prompts, {columns} columns: allocate {allocate:.1f} ms, observe {observe:.1f} ms")
    for columns in (1, 4):
        memory, file = measure_memory(columns)
        print(f"{PROMPTS:,} prompts, {columns} columns: {memory:.0f} MB more memory, {file:.0f} MB more in the file")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
