"""Time the allocation core: a fresh process, one batch, a run with many known prompts, a million prompts.

    python benchmarks/bench_solver.py

Exit status 1 if a target is missed. Set OMP_NUM_THREADS=1 for figures of one thread. The paper's dynamic program is
compiled with numba, which only this benchmark needs (dependency group ``bench``). Its optimum must be the same, and its
time does not include the table of values. Times are medians of warm calls, with the two methods in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import knapsack_rl as kr
from knapsack_rl.allocation.checks import FloatArray
from paper_solver import paper_dynamic_program

MIN_ROLLOUTS, MAX_ROLLOUTS, MEAN_ROLLOUTS = 2, 128, 8
SIZES = (64, 256, 1024, 10_000, 100_000, 1_000_000)
DYNAMIC_PROGRAM_UP_TO = 1024
KNOWN = (2_000, 20_000, 200_000)
BATCH = 256
SECONDS_PER_TURN = 0.01
TARGETS = {
    "import and first allocate of 256 prompts, seconds": 0.5,
    "allocate / dynamic program, 256 prompts": 0.01,
    "allocate of 100000 prompts, seconds": 1.0,
    "allocate of 1000000 prompts, seconds": 8.0,
    "memory of 1000000 prompts, MB": 600.0,
    "growth from 1000 prompts on, exponent": 1.1,
    "KnapsackAllocator.allocate, 256 of 20000 known, ms": 1.5,
    "KnapsackAllocator.observe, 2048 rollouts, ms": 3.0,
}


def success_rates(prompts: int, seed: int) -> FloatArray:
    """Draw from a late-training mixture: 38 % near one, 22 % near zero, the rest spread."""
    rng = np.random.default_rng(seed)
    kind = rng.random(prompts)
    rates = rng.random(prompts)
    rates[kind < 0.38] = rng.beta(30, 1, (kind < 0.38).sum())
    rates[kind > 0.78] = rng.beta(1, 30, (kind > 0.78).sum())
    return rates


def seconds_of(call: Callable[[], object], calls: int = 1) -> float:
    """Return the mean processor time of a call, which does not include waiting for a busy machine."""
    started = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - started) / calls


def in_new_process(code: str, *arguments: object) -> list[float]:
    """Return the numbers printed by a new Python process."""
    command = [sys.executable, "-c", code, str(Path(__file__).parent), *map(str, arguments)]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(word) for word in out.stdout.split()]


def fresh_process(runs: int) -> dict[str, float]:
    """Return median seconds of the import and of a first allocation, each in a new process."""
    code = (
        "import time; a = time.process_time(); import knapsack_rl as kr; b = time.process_time();"
        "kr.allocate([i / 255 for i in range(256)], 2048); c = time.process_time(); print(b - a, c - b)"
    )
    times = np.median([in_new_process(code) for _ in range(runs)], axis=0)
    return {"import": float(times[0]), "first allocate": float(times[1])}


def one_batch(prompts: int, rounds: int, seed: int) -> dict[str, float]:
    """Return median milliseconds of ``kr.allocate`` and of the dynamic program."""
    rates, budget = success_rates(prompts, seed), MEAN_ROLLOUTS * prompts
    methods: dict[str, Callable[[], np.ndarray]] = {
        "allocate": lambda: kr.allocate(rates, budget, MIN_ROLLOUTS, MAX_ROLLOUTS).counts
    }
    if prompts <= DYNAMIC_PROGRAM_UP_TO:
        values = kr.value(np.arange(MAX_ROLLOUTS + 1), rates[:, None])
        methods["dynamic program"] = lambda: paper_dynamic_program(values, budget, MIN_ROLLOUTS, MAX_ROLLOUTS)
    optima = [float(kr.value(method(), rates).sum()) for method in methods.values()]  # the first call compiles
    np.testing.assert_allclose(optima, optima[0], rtol=1e-10)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds if prompts < 10_000 else 3):
        for name, method in methods.items():
            if sum(seconds[name]) < 3.0:
                # The other method has replaced the caches, so short calls are timed after a first one.
                once = seconds_of(method)
                calls = int(SECONDS_PER_TURN / once)
                seconds[name].append(seconds_of(method, calls) if calls else once)
    return {name: 1e3 * float(np.median(times)) for name, times in seconds.items()}


def megabytes(prompts: int, seed: int) -> float:
    """Return the peak resident memory in MB that one call adds in a new process, after a small call."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bench_solver, knapsack_rl as kr;"
        "rates = bench_solver.success_rates(int(sys.argv[2]), int(sys.argv[3]));"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024;"
        "kr.allocate(rates[:1000], 8000); before = peak(); kr.allocate(rates, 8 * rates.size); print(peak() - before)"
    )
    return in_new_process(code, prompts, seed)[0]


def a_run(known: int, steps: int, seed: int) -> dict[str, float]:
    """Return median milliseconds of the calls of a step and of a refit, for a number of known prompts."""
    rng, rates = np.random.default_rng(seed), success_rates(known, seed)
    allocator = kr.KnapsackAllocator()

    def outcomes(ids: np.ndarray, counts: np.ndarray) -> tuple[list[int], FloatArray]:
        rollouts = np.repeat(ids, counts)
        return rollouts.tolist(), (rng.random(rollouts.size) < rates[rollouts]).astype(float)

    for first in range(0, known, 1000):
        ids = np.arange(first, min(first + 1000, known))
        allocator.observe(*outcomes(ids, np.full(ids.size, 4)))
    times: dict[str, list[float]] = {"allocate": [], "observe": []}
    for _ in range(steps):
        ids = rng.choice(known, BATCH, replace=False)
        batch = ids.tolist()
        times["allocate"].append(seconds_of(lambda batch=batch: allocator.allocate(batch, MEAN_ROLLOUTS * BATCH)))  # type: ignore[misc]
        observed = outcomes(ids, allocator.allocate(batch, MEAN_ROLLOUTS * BATCH).counts)
        times["observe"].append(seconds_of(lambda observed=observed: allocator.observe(*observed)))  # type: ignore[misc]
    found = {name: 1e3 * float(np.median(each)) for name, each in times.items()}
    records = allocator.tracker.records()
    refit = 1e3 * float(np.median([seconds_of(lambda: allocator.estimator.refit(records)) for _ in range(3)]))
    return found | {"refit": refit, "refit per step": refit * BATCH / known}  # once an epoch


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and the targets; exit status 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="timed calls per method below 10000 prompts (50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the success rates (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")
    parsed = parser.parse_args(arguments)
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}")
    fresh = fresh_process(5)
    print(f"new process: import {fresh['import']:.3f} s, first allocate {fresh['first allocate']:.3f} s")

    print(f"\nkr.allocate, budget {MEAN_ROLLOUTS} per prompt, N_low {MIN_ROLLOUTS}, N_up {MAX_ROLLOUTS}, ms")
    print(f"{'prompts':>9}{'allocate':>12}{'dynamic program':>18}{'ratio':>9}")
    batches: dict[int, dict[str, float]] = {}
    for prompts in SIZES:
        batches[prompts] = row = one_batch(prompts, parsed.rounds, parsed.seed)
        program = row.get("dynamic program")
        rest = f"{program:>18.1f}{program / row['allocate']:>8.0f}x" if program else f"{'-':>18}{'-':>9}"
        print(f"{prompts:>9}{row['allocate']:>12.2f}{rest}", flush=True)
    sizes = [size for size in SIZES if size >= 1000]
    exponent = float(np.polyfit(np.log(sizes), np.log([batches[size]["allocate"] for size in sizes]), 1)[0])
    memory = megabytes(SIZES[-1], parsed.seed)
    print(f"time grows as prompts^{exponent:.2f} from 1000 on; {SIZES[-1]} prompts add {memory:.0f} MB")

    print(f"\nKnapsackAllocator, {BATCH} prompts and {MEAN_ROLLOUTS * BATCH} rollouts a step, ms")
    print(f"{'known':>9}{'allocate':>12}{'observe':>12}{'refit':>12}{'refit / step':>15}")
    runs: dict[int, dict[str, float]] = {}
    for known in KNOWN:
        runs[known] = row = a_run(known, parsed.rounds, parsed.seed)
        print(f"{known:>9}" + "".join(f"{row[name]:>12.2f}" for name in ("allocate", "observe", "refit")), end="")
        print(f"{row['refit per step']:>15.3f}", flush=True)

    batch, run = batches[BATCH], runs[20_000]
    reached = (
        *(fresh["import"] + fresh["first allocate"], batch["allocate"] / batch["dynamic program"]),
        *(batches[100_000]["allocate"] / 1e3, batches[1_000_000]["allocate"] / 1e3, memory, exponent),
        *(run["allocate"], run["observe"]),
    )
    print()
    missed = 0
    for (name, target), found in zip(TARGETS.items(), reached, strict=True):
        missed += found > target
        print(f"{name}: {found:.3g}, target at most {target:g}{' MISSED' * (found > target)}")
    if parsed.json:
        report = {"new process": fresh, "batches": batches, "exponent": exponent, "megabytes": memory, "runs": runs}
        parsed.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
