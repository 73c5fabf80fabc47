"""Compare how evenly ways of placing rollouts load the workers: makespan over its lower bound.

Lengths are synthetic and lognormal at both levels: the typical length varies between prompts, and the length of a
rollout varies around that of its prompt. Predictions use only one earlier visit to most prompts, with another ragged
size; some prompts are new. A worker processes one rollout at a time at constant speed, so the results do not apply to
engines whose speed depends on the batch. Lengths are not capped; a cap only makes balancing easier.

Ways compared:

* shuffle, equal shares: the rows of the batch in random order, cut into equal numbers of rows per worker;
* static, groups by N_i: all rollouts of a prompt on one worker, longest group first, counted in rollouts;
* static, predicted lengths: the longest first to the least-loaded worker, by `predict_work`; a prompt may be split;
* pull, random order; pull, longest predicted first: `RolloutQueue`;
* pull, longest first, true lengths: the result of perfect predictions.
"""

import argparse
import heapq
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knapsack_rl.balance import RolloutQueue
from knapsack_rl.estimation.lengths import predict_work

MEAN_COUNT, MIN_COUNT = 8, 2
BETWEEN_SIGMA, WITHIN_SIGMA, MEDIAN_TOKENS = 0.6, 0.5, 800.0
NEW_SHARE = 0.1  # of the prompts, without an earlier visit
TARGET = 1.05
TARGET_WAY = "pull, longest predicted first"


def ragged_counts(rng: np.random.Generator, prompts: int) -> NDArray[np.int64]:
    """Return (P,) rollouts per prompt: at least 2, mean 8, most near the minimum and a few above 40."""
    surplus = prompts * (MEAN_COUNT - MIN_COUNT)
    return MIN_COUNT + rng.multinomial(surplus, rng.dirichlet(np.full(prompts, 0.5)))


def simulate_pull(work: NDArray[np.float64], order: Iterable[int], workers: int) -> float:
    """Return when the last worker finishes if free workers pull items of (R,) true `work` in that order."""
    free = [0.0] * workers
    for item in order:
        heapq.heapreplace(free, free[0] + float(work[item]))
    return max(free)


def longest_first(work: NDArray[np.float64], workers: int) -> NDArray[np.int64]:
    """Return (R,) the worker of each item: longest item first, always to the least-loaded worker.

    Source: Graham 1969, *Bounds on multiprocessing timing anomalies* (the LPT rule).
    """
    free = [(0.0, worker) for worker in range(workers)]
    worker_of = np.empty(len(work), dtype=np.int64)
    for item in np.argsort(-work, kind="stable"):
        load, worker_of[item] = free[0]
        heapq.heapreplace(free, (load + float(work[item]), int(worker_of[item])))
    return worker_of


def lower_bound(work: NDArray[np.float64], workers: int) -> float:
    """Return a lower bound on the makespan of any placement of (R,) items on m workers.

    It is the largest of the mean load, the longest item and, with more items than workers, the sum of the m-th and
    (m + 1)-th longest, because two of the m + 1 longest must share a worker.
    """
    longest = np.sort(work)[::-1]
    pair = longest[workers - 1 : workers + 1].sum() if len(work) > workers else 0.0
    return float(max(work.sum() / workers, longest[0], pair))


def static_makespan(work: NDArray[np.float64], worker_of: NDArray[np.int64]) -> float:
    """Return when the last worker finishes if item r, of (R,) true `work`, runs on `worker_of[r]`."""
    return float(np.bincount(worker_of, weights=work).max())


def one_step(seed: int, prompts: int, workers: int) -> dict[str, float]:
    """Return makespan / lower bound of each way for one simulated step."""
    rng = np.random.default_rng(seed)
    typical_P = MEDIAN_TOKENS * rng.lognormal(0.0, BETWEEN_SIGMA, prompts)

    seen_P = ragged_counts(rng, prompts) * (rng.random(prompts) >= NEW_SHARE)
    seen_prompt = np.repeat(np.arange(prompts), seen_P)
    seen_length = typical_P[seen_prompt] * rng.lognormal(0.0, WITHIN_SIGMA, len(seen_prompt))
    total_P = np.bincount(seen_prompt, weights=seen_length, minlength=prompts)
    total_squared_P = np.bincount(seen_prompt, weights=seen_length**2, minlength=prompts)
    predicted_P = predict_work(seen_P, total_P, total_squared_P)

    count_P = ragged_counts(rng, prompts)
    prompt_R = np.repeat(np.arange(prompts), count_P)
    work_R = typical_P[prompt_R] * rng.lognormal(0.0, WITHIN_SIGMA, len(prompt_R))
    predicted_R = predicted_P[prompt_R]

    share_of_position = np.arange(len(work_R)) * workers // len(work_R)
    shuffled_worker_R = np.empty(len(work_R), dtype=np.int64)
    shuffled_worker_R[rng.permutation(len(work_R))] = share_of_position
    makespans = {
        "shuffle, equal shares": static_makespan(work_R, shuffled_worker_R),
        "static, groups by N_i": static_makespan(work_R, longest_first(count_P, workers)[prompt_R]),
        "static, predicted lengths": static_makespan(work_R, longest_first(predicted_R, workers)),
        "pull, random order": simulate_pull(work_R, rng.permutation(len(work_R)), workers),
        TARGET_WAY: simulate_pull(work_R, RolloutQueue(predicted_R, prompt_R.tolist()), workers),
        "pull, longest first, true lengths": simulate_pull(work_R, RolloutQueue(work_R), workers),
    }
    least = lower_bound(work_R, workers)
    return {way: makespan / least for way, makespan in makespans.items()}


def run(seeds: Iterable[int] = range(10), prompts: int = 256, workers: int = 32) -> list[dict[str, str | float]]:
    """Return one row per way: its name and the mean, min and max of makespan / lower bound over the seeds."""
    steps = [one_step(seed, prompts, workers) for seed in seeds]
    rows: list[dict[str, str | float]] = []
    for way in steps[0]:
        ratios = np.array([step[way] for step in steps])
        rows.append({"way": way, "mean": float(ratios.mean()), "min": float(ratios.min()), "max": float(ratios.max())})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if the pull queue misses its target at any seed."""
    parser = argparse.ArgumentParser(description="Makespan over lower bound of ways to place rollouts.")
    parser.add_argument("--seeds", type=int, default=10, help="simulated steps, seeds 0 to SEEDS - 1 (10)")
    parser.add_argument("--prompts", type=int, default=256, help="prompts per step, mean 8 rollouts (256)")
    parser.add_argument("--workers", type=int, default=32, help="workers (32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and settings to FILE")
    arguments = parser.parse_args(argv)
    for name in ("seeds", "prompts", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; allowed: a whole number >= 1")

    rows = run(range(arguments.seeds), arguments.prompts, arguments.workers)
    print(
        f"makespan / lower bound, {arguments.seeds} seeds: {arguments.prompts} prompts x {MEAN_COUNT} rollouts "
        f"on average, {arguments.workers} workers"
    )
    print(f"{'way':<36}{'mean':>8}{'min':>8}{'max':>8}")
    for row in rows:
        print(f"{row['way']:<36}{row['mean']:>8.3f}{row['min']:>8.3f}{row['max']:>8.3f}")
    worst = next(float(row["max"]) for row in rows if row["way"] == TARGET_WAY)
    met = worst <= TARGET
    print(f"target: {TARGET_WAY} within {TARGET} at every seed: {'met' if met else 'MISSED'} ({worst:.3f})")
    if arguments.json is not None:
        settings = {"seeds": arguments.seeds, "prompts": arguments.prompts, "workers": arguments.workers}
        report = {**settings, "target": TARGET, "target_met": met, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
