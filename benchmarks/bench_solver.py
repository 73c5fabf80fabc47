"""Time kr.allocate against the paper's dynamic program and a plain heap, side by side in one run.

    python benchmarks/bench_solver.py
    python benchmarks/bench_solver.py --rounds 50 --json solver.json

All three get the same success rates and find the same optimum, which is checked. Rounds alternate between the methods,
so that a drift of the machine hits all alike; medians are printed, and ratios of the medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
import numpy as np

import knapsack_rl as kr
from knapsack_rl.value import FloatArray, IntArray, marginal_values

MIN_ROLLOUTS, MAX_ROLLOUTS = 2, 128
SIZES = (64, 256, 1024)
# The dynamic program takes O(M B N_up): at 1024 prompts about a second.
TARGET_MILLISECONDS = 0.3


@numba.njit(cache=True)
def paper_dynamic_program(values: FloatArray, budget: int, low: int, high: int) -> IntArray:
    """Loop over prompts, budgets and rollouts, as the paper describes its solver: O(M B N_up)."""
    prompts = values.shape[0]
    best = np.full((prompts + 1, budget + 1), -np.inf)
    choice = np.zeros((prompts + 1, budget + 1), np.int64)
    best[0, 0] = 0.0
    for i in range(1, prompts + 1):
        for spent in range(budget + 1):
            for n in range(low, min(high, spent) + 1):
                candidate = best[i - 1, spent - n] + values[i - 1, n]
                if candidate > best[i, spent]:
                    best[i, spent] = candidate
                    choice[i, spent] = n
    counts = np.zeros(prompts, np.int64)
    spent = budget
    for i in range(prompts, 0, -1):
        counts[i - 1] = choice[i, spent]
        spent -= counts[i - 1]
    return counts


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


def run(sizes: Sequence[int] = SIZES, rounds: int = 30, seed: int = 0) -> list[dict[str, float]]:
    """Median milliseconds of each method per size, and ratios to ours."""
    rows = []
    for prompts in sizes:
        budget = 8 * prompts
        rates = success_rates(prompts, seed)
        marginals = marginal_values(rates, MAX_ROLLOUTS)
        values = np.concatenate([np.zeros((prompts, 1)), np.cumsum(marginals, axis=1)], axis=1)
        methods: dict[str, Callable[[], IntArray]] = {
            "ours": lambda r=rates, b=budget: kr.allocate(r, b, MIN_ROLLOUTS, MAX_ROLLOUTS).counts,
            "heap": lambda m=marginals, b=budget: heap_greedy(m, b, MIN_ROLLOUTS, MAX_ROLLOUTS),
            "dynamic_program": lambda v=values, b=budget: paper_dynamic_program(v, b, MIN_ROLLOUTS, MAX_ROLLOUTS),
        }
        optimum = {name: float(kr.value(method(), rates).sum()) for name, method in methods.items()}  # and compiles
        if not np.allclose(list(optimum.values()), optimum["ours"], rtol=1e-10):
            raise AssertionError(f"the methods disagree at {prompts} prompts: {optimum}")
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for turn in range(rounds):
            for name, method in methods.items():
                if name == "dynamic_program" and turn >= 5:
                    continue  # slow, and its time hardly varies
                started = time.perf_counter()
                method()
                seconds[name].append(time.perf_counter() - started)
        median = {name: 1e3 * float(np.median(times)) for name, times in seconds.items()}
        rows.append(
            {"prompts": prompts, "budget": budget}
            | {f"{name}_ms": value for name, value in median.items()}
            | {f"{name}_ratio": median[name] / median["ours"] for name in methods if name != "ours"}
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 if 256 prompts take longer than the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="timed calls per method (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the success rates (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parsed = parser.parse_args(arguments)
    rows = run(rounds=parsed.rounds, seed=parsed.seed)
    print(f"kr.allocate, N_low={MIN_ROLLOUTS}, N_up={MAX_ROLLOUTS}; {platform.machine()}, numba {numba.__version__}")
    print(f"{'prompts':>8} {'budget':>7} {'ours':>10} {'heap':>18} {'dynamic program':>24}")
    for row in rows:
        print(
            f"{row['prompts']:>8} {row['budget']:>7} {row['ours_ms']:>7.3f} ms {row['heap_ms']:>8.3f} ms "
            f"{row['heap_ratio']:>5.2f}x {row['dynamic_program_ms']:>11.2f} ms {row['dynamic_program_ratio']:>8.0f}x"
        )
    print(
        "ours includes validation, the marginal table and the total value; heap and dynamic program get theirs for free"
    )
    if parsed.json:
        parsed.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    slow = next(row for row in rows if row["prompts"] == 256)["ours_ms"] > TARGET_MILLISECONDS
    if slow:
        print(f"256 prompts took longer than {TARGET_MILLISECONDS} ms", file=sys.stderr)
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
