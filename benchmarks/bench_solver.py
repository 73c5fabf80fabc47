"""Time kr.allocate against a heap and the paper's dynamic program, side by side in one run.

    python benchmarks/bench_solver.py
    python benchmarks/bench_solver.py --huge              # ten million prompts, too
    python benchmarks/bench_solver.py --check             # fail where a ratio is twice as bad as the committed one
    python benchmarks/bench_solver.py --write-baselines

All get the same success rates and find the same optimum, which is checked. Rounds alternate between the methods, so
that a drift of the machine hits all alike; medians over rounds of warm calls are printed, and ratios of them.
Milliseconds depend on the machine: ``--check`` compares ratios with ``benchmarks/baselines.json``; growth and memory
have limits.

The methods: ``allocate`` is the public function, with all its checks and its certificate; ``kernel`` is the compiled
solver within it; ``heap`` pops the best rollout from a heap and is given a table of all marginals for free; ``heap,
own`` computes its marginals as it goes; ``dynamic program`` is the paper's, O(M B N_up), with a table for free.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
import numpy as np

import knapsack_rl as kr
from experiments.paper_solver import paper_dynamic_program
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.policies import _selection
from knapsack_rl.allocation.value import marginal_values
from knapsack_rl.allocation.value import KNAPSACK

MIN_ROLLOUTS, MAX_ROLLOUTS = 2, 128
SIZES = (64, 256, 1024, 10_000, 100_000, 1_000_000)
HUGE = 10_000_000
DYNAMIC_PROGRAM_UP_TO = 1024
TABLE_UP_TO = 100_000  # beyond, the heap computes its own marginals: a table would take a gigabyte and more
ROLLOUTS_PER_ROUND = 20_000_000  # small sizes are repeated more often
SECONDS_PER_METHOD = 2.0
SECONDS_PER_TURN = 0.005
BASELINES = Path(__file__).with_name("baselines.json")
TARGETS = {
    "dynamic program / allocate, 256 prompts": 500.0,
    "dynamic program / allocate, 1024 prompts": 3000.0,
    "heap, own / kernel, 256 prompts": 1.0,
    "heap / allocate, 1024 prompts": 1.0,
    "heap, own / allocate, 1000000 prompts": 1.0,
}
MOST_MEGABYTES, MOST_EXPONENT = 400.0, 1.1


@numba.njit(cache=True)
def heap_greedy(marginals: FloatArray, budget: int, low: int, high: int) -> IntArray:
    """Pop the best marginal rollout until the budget is spent: O(M + B log M)."""
    prompts = marginals.shape[0]
    counts = np.full(prompts, low)
    heap = np.arange(prompts)
    keys = marginals[:, low].copy()
    size = prompts
    for start in range(size // 2 - 1, -1, -1):
        _sink(heap, keys, size, start)
    for _ in range(budget - prompts * low):
        top = heap[0]
        counts[top] += 1
        if counts[top] < high:
            keys[top] = marginals[top, counts[top]]
        else:
            size -= 1
            heap[0] = heap[size]
        _sink(heap, keys, size, 0)
    return counts


@numba.njit(cache=True)
def heap_with_own_marginals(rates: FloatArray, budget: int, low: int, high: int) -> IntArray:
    """The same, with the two powers of each prompt carried along."""
    prompts = rates.size
    counts = np.full(prompts, low)
    heap = np.arange(prompts)
    by_p, by_q, keys = np.empty(prompts), np.empty(prompts), np.empty(prompts)
    for i in range(prompts):
        p, q = rates[i], 1.0 - rates[i]
        start = p * q * q * p * q
        by_p[i], by_q[i] = start * p ** (low - 1), start * q ** (low - 1)
        keys[i] = by_p[i] + by_q[i]
    size = prompts
    for start_at in range(size // 2 - 1, -1, -1):
        _sink(heap, keys, size, start_at)
    for _ in range(budget - prompts * low):
        top = heap[0]
        counts[top] += 1
        if counts[top] < high:
            by_p[top] *= rates[top]
            by_q[top] *= 1.0 - rates[top]
            keys[top] = by_p[top] + by_q[top]
        else:
            size -= 1
            heap[0] = heap[size]
        _sink(heap, keys, size, 0)
    return counts


@numba.njit(cache=True)
def _sink(heap: IntArray, keys: FloatArray, size: int, at: int) -> None:
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and keys[heap[child + 1]] > keys[heap[child]]:
            child += 1
        if keys[heap[child]] <= keys[heap[at]]:
            return
        heap[at], heap[child] = heap[child], heap[at]
        at = child


def success_rates(prompts: int, seed: int) -> FloatArray:
    """A late-training mixture: 38 % near one, 22 % near zero, the rest spread."""
    rng = np.random.default_rng(seed)
    kind = rng.random(prompts)
    rates = rng.random(prompts)
    rates[kind < 0.38] = rng.beta(30, 1, (kind < 0.38).sum())
    rates[kind > 0.78] = rng.beta(1, 30, (kind > 0.78).sum())
    return rates


def methods_at(prompts: int, seed: int) -> dict[str, Callable[[], IntArray]]:
    """What is timed at a size; each returns counts."""
    budget, rates = 8 * prompts, success_rates(prompts, seed)
    rows, low, high = tuple(KNAPSACK.rows(rates)), np.full(prompts, MIN_ROLLOUTS), np.full(prompts, MAX_ROLLOUTS)
    tier = np.zeros(prompts, np.int64)
    found: dict[str, Callable[[], IntArray]] = {
        "allocate": lambda: kr.allocate(rates, budget, MIN_ROLLOUTS, MAX_ROLLOUTS).counts,
        "kernel": lambda: _selection.take_best(rows, low, high, budget, tier, rates),
        "heap, own": lambda: heap_with_own_marginals(rates, budget, MIN_ROLLOUTS, MAX_ROLLOUTS),
    }
    if prompts <= TABLE_UP_TO:
        table = marginal_values(rates, MAX_ROLLOUTS)
        found["heap"] = lambda: heap_greedy(table, budget, MIN_ROLLOUTS, MAX_ROLLOUTS)
    if prompts <= DYNAMIC_PROGRAM_UP_TO:
        values = np.concatenate([np.zeros((prompts, 1)), np.cumsum(table, axis=1)], axis=1)
        found["dynamic program"] = lambda: paper_dynamic_program(values, budget, MIN_ROLLOUTS, MAX_ROLLOUTS)
    optimum = {name: float(kr.value(method(), rates).sum()) for name, method in found.items()}  # and compiles
    if not np.allclose(list(optimum.values()), optimum["allocate"], rtol=1e-10):
        raise AssertionError(f"the methods disagree at {prompts} prompts: {optimum}")
    return found


def seconds_of(method: Callable[[], IntArray], calls: int = 1) -> float:
    """Wall time of a call, the mean of so many."""
    started = time.perf_counter()
    for _ in range(calls):
        method()
    return (time.perf_counter() - started) / calls


def median_milliseconds(prompts: int, rounds: int, seed: int) -> dict[str, float]:
    """Median of each method, rounds interleaved."""
    methods = methods_at(prompts, seed)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(max(3, min(rounds, ROLLOUTS_PER_ROUND // (8 * prompts)))):
        for name, method in methods.items():
            if sum(seconds[name]) > SECONDS_PER_METHOD:
                continue  # slow, and its time hardly varies
            elapsed = seconds_of(method)
            # The method before has swept the caches and the timer is coarse: what is short is timed on further calls.
            calls = int(SECONDS_PER_TURN / elapsed)
            seconds[name].append(seconds_of(method, calls) if calls else elapsed)
    return {name: 1e3 * float(np.median(times)) for name, times in seconds.items()}


def extra_megabytes(prompts: int, seed: int) -> float:
    """Peak resident memory that one call adds, measured in a process of its own after a small call."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import bench_solver, knapsack_rl as kr;"
        "rates = bench_solver.success_rates(int(sys.argv[2]), int(sys.argv[3]));"
        "kr.allocate(rates[:1000], 8000); before = bench_solver.peak();"
        "kr.allocate(rates, 8 * rates.size); print(bench_solver.peak() - before)"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(prompts), str(seed)]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout) / 1e6


def peak() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands the peak that getrusage tells down from the parent process
        return 1024 * int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds_to_start() -> dict[str, float]:
    """Import, first call with compiled code at hand, and calls after it, in a process of their own."""
    code = (
        "import time; a = time.perf_counter(); import knapsack_rl as kr; b = time.perf_counter();"
        "kr.allocate([0.5, 0.1], 8); c = time.perf_counter(); print(b - a, c - b)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return {"import": float(out[0]), "first call": float(out[1])}


def ratios_of(rows: dict[int, dict[str, float]]) -> dict[str, float]:
    """How many times as long the others take, per size: larger is better for us."""
    found = {}
    for prompts, row in rows.items():
        for other, ours in (
            ("dynamic program", "allocate"),
            ("heap", "allocate"),
            ("heap", "kernel"),
            ("heap, own", "allocate"),
            ("heap, own", "kernel"),
        ):
            if other in row:
                found[f"{other} / {ours}, {prompts} prompts"] = row[other] / row[ours]
    return found


def fitted_exponent(rows: dict[int, dict[str, float]]) -> float:
    """Slope of log time over log prompts, from 1000 prompts on."""
    sizes = [size for size in rows if size >= 1000]
    return float(np.polyfit(np.log(sizes), np.log([rows[size]["allocate"] for size in sizes]), 1)[0])


def failures_of(ratios: dict[str, float], baselines: dict[str, float] | None) -> list[str]:
    """Targets missed and ratios that are twice as bad as the committed ones."""
    found = [
        f"{name}: {ratios[name]:.2f}, target {target:g}"
        for name, target in TARGETS.items()
        if name in ratios and ratios[name] < target
    ]
    for name, committed in (baselines or {}).items():
        if name in ratios and ratios[name] < committed / 2:
            found.append(f"{name}: {ratios[name]:.2f}, less than half of the committed {committed:.2f}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; exit status 1 if a target is missed or, with --check, a ratio got twice as bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="timed calls per method at small sizes (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the success rates (default: 0)")
    parser.add_argument("--huge", action="store_true", help="also ten million prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers as JSON")
    parser.add_argument("--check", action="store_true", help="compare ratios with the committed ones")
    parser.add_argument("--write-baselines", action="store_true", help="commit this run's ratios")
    parsed = parser.parse_args(arguments)
    print(f"N_low={MIN_ROLLOUTS}, N_up={MAX_ROLLOUTS}, budget 8 per prompt, median ms (times as long as kr.allocate)")
    print(
        f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, numba {numba.__version__}"
    )
    names = ("allocate", "kernel", "heap", "heap, own", "dynamic program")
    print(f"{'prompts':>9}" + "".join(f"{name:>22}" for name in names))
    rows: dict[int, dict[str, float]] = {}
    for prompts in SIZES + (HUGE,) * parsed.huge:
        rows[prompts] = row = median_milliseconds(prompts, parsed.rounds, parsed.seed)
        cells = (f"{row[name]:.3f} ({row[name] / row['allocate']:.2f}x)" if name in row else "-" for name in names)
        print(f"{prompts:>9}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    ratios, exponent = ratios_of(rows), fitted_exponent(rows)
    megabytes, start = extra_megabytes(1_000_000, parsed.seed), seconds_to_start()
    print(f"cost grows as prompts^{exponent:.2f} from 1000 prompts on; 1000000 prompts add {megabytes:.0f} MB")
    print(f"import {start['import']:.2f} s; first call with compiled code at hand {start['first call']:.2f} s")
    if parsed.json:
        report = {"milliseconds": rows, "ratios": ratios, "exponent": exponent, "megabytes": megabytes, "start": start}
        parsed.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if parsed.write_baselines:
        BASELINES.write_text(json.dumps({"solver": ratios}, indent=2) + "\n", encoding="utf-8")
    baselines = json.loads(BASELINES.read_text(encoding="utf-8"))["solver"] if parsed.check else None
    failed = failures_of(ratios, baselines)
    if exponent > MOST_EXPONENT:
        failed.append(f"exponent {exponent:.2f}, target {MOST_EXPONENT}")
    if megabytes > MOST_MEGABYTES:
        failed.append(f"{megabytes:.0f} MB at 1000000 prompts, target {MOST_MEGABYTES:.0f}")
    for failure in failed:
        print(failure, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
