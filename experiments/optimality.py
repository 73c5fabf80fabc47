"""Is the solver optimal? Ours, the paper's dynamic program, enumeration and HiGHS on random knapsacks.

And what does the paper's rule lose: a mean of recent rewards taken for the truth, with its fallback, against the
optimum for the true success rates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.contract import Finding, Options, Row, by_name, markdown_table, select
from experiments.optimality_cases import (
    CASE_VALUES,
    EXACT,
    FALLBACK_ON_TRUTH,
    HIGHS,
    MIXTURES,
    OURS,
    PAPER,
    PAPER_RULE,
    PRICED_VALUES,
    RULES,
    Case,
    draw_case,
    solve_by_enumeration,
    solve_by_highs,
    solve_by_paper,
    solve_ours,
)
from experiments.pieces import Piece, run_pieces
from experiments.statistics import bootstrap_interval
from knapsack_rl.allocation.checks import IntArray
from knapsack_rl.allocation.degradation import uniform_counts
from knapsack_rl.allocation.policies import allocate
from knapsack_rl.allocation.value import value
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.offline.environments import draw_rates


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement per seed."""

    small: int = 500
    small_priced: int = 300
    medium: int = 16
    timed: tuple[int, ...] = (16, 64, 256, 1024)
    timed_priced: tuple[int, ...] = (64, 256, 1024)
    highs_up_to: int = 64
    repeats: int = 5
    population: int = 2048
    batches: int = 8

    @classmethod
    def of(cls, options: Options) -> Sizes:
        """The full sizes, or the quick ones."""
        return cls(20, 10, 1, (16, 64), (64,), 16, 2, 256, 1) if options.quick else cls()


def _pieces(options: Options) -> list[Piece]:
    sizes = Sizes.of(options)
    return [
        Piece(f"{part.__name__}-seed{seed}{'-quick' * options.quick}", part, (seed, sizes))
        for seed in options.seed_range
        for part in (small_gaps, medium_gaps, timed, rules)
    ]


def pieces(options: Options) -> int:
    """Pieces of work."""
    return len(_pieces(options))


def measure(options: Options, done: Callable[[str], None]) -> list[Row]:
    """Solve the random knapsacks.

    Raises:
        ImportError: scipy is not installed.
    """
    return run_pieces(_pieces(options), options.runs / "optimality", options.workers, done)


def small_gaps(seed: int, sizes: Sizes) -> list[Row]:
    """Small knapsacks against enumeration: one to four prompts, N_low 0 to 2, N_up up to 7."""

    def draw(rng: np.random.Generator, name: str, *, priced: bool) -> Case:
        low = int(rng.integers(0, 3))
        high = int(rng.integers(max(low, 1), 8))
        return draw_case(rng, name, int(rng.integers(1, 5)), low, high, priced=priced)

    return _gaps(seed, "small", draw, (sizes.small, sizes.small_priced))


def medium_gaps(seed: int, sizes: Sizes) -> list[Row]:
    """Medium knapsacks against HiGHS: 8 to 24 prompts, N_low 0 to 2, N_up 8 to 32."""

    def draw(rng: np.random.Generator, name: str, *, priced: bool) -> Case:
        prompts, low, high = (int(rng.integers(*ends)) for ends in ((8, 25), (0, 3), (8, 33)))
        return draw_case(rng, name, prompts, low, high, priced=priced)

    return _gaps(seed, "medium", draw, (sizes.medium, sizes.medium))


def _gaps(seed: int, size: str, draw: Callable[..., Case], instances: tuple[int, int]) -> list[Row]:
    """A row for each kind of value and method, without costs and with them."""
    rows: list[Row] = []
    for priced, names, many in ((False, CASE_VALUES, instances[0]), (True, PRICED_VALUES, instances[1])):
        for name in names:
            rng = np.random.default_rng([seed, size == "medium", priced, CASE_VALUES.index(name)])
            cases = [draw(rng, name, priced=priced) for _ in range(many)]
            about = {"part": "gaps", "seed": seed, "size": size, "costs": priced, "value": name}
            tallies = _compare(cases, enumerate_all=size == "small")
            rows += [about | {"method": method} | tally for method, tally in tallies.items()]
    return rows


def _compare(cases: Sequence[Case], *, enumerate_all: bool) -> dict[str, dict[str, Any]]:
    """Rows by method; the yardstick is enumeration, or the best that any method found."""
    gaps: dict[str, list[float]] = {}
    certified = false_certificates = 0
    for case in cases:
        ours, certificate = solve_ours(case)
        found: dict[str, IntArray | None] = {OURS: ours}
        if case.costs is None:
            found[PAPER] = solve_by_paper(case)
        if not enumerate_all:
            found[HIGHS] = solve_by_highs(case)
        candidates = [solve_by_enumeration(case)] if enumerate_all else list(found.values())
        best = max(case.worth(counts) for counts in candidates if counts is not None and case.feasible(counts))
        scale = max(abs(best), float(np.abs(case.table).max()), 1e-300)
        for method, counts in found.items():
            worth = case.worth(counts) if counts is not None and case.feasible(counts) else -math.inf
            gaps.setdefault(method, []).append((best - worth) / scale)
        assert certificate is not None, "the knapsack's allocation has a certificate"
        certified += certificate.optimal
        false_certificates += best > certificate.upper_bound + EXACT * scale
    return {
        method: {
            "instances": len(tally),
            "optimal": sum(gap <= EXACT for gap in tally),
            "failed": sum(gap == math.inf for gap in tally),  # infeasible, or nothing found in time
            "largest_gap": max((gap for gap in tally if gap < math.inf), default=0.0),
            "certified": certified if method == OURS else 0,
            "false_certificates": false_certificates if method == OURS else 0,
        }
        for method, tally in gaps.items()
    }


def timed(seed: int, sizes: Sizes) -> list[Row]:
    """Batches as in training: N = 8, N_low = 2, N_up = 128, the paper's value, late-training rates.

    Every method's median time and its value relative to the best; with costs, the certified gap.
    """
    rows: list[Row] = []
    rng = np.random.default_rng([seed, 2])
    for prompts, priced in [(m, False) for m in sizes.timed] + [(m, True) for m in sizes.timed_priced]:
        drawn = draw_case(rng, "knapsack", prompts, 2, 128, priced=priced)
        rates = draw_rates("late-training", prompts, rng)
        table = value(np.arange(129), rates[:, None])
        budget = 8 * (prompts if drawn.costs is None else int(drawn.costs.sum()))
        case = Case("knapsack", rates, table, budget, 2, 128, drawn.costs)
        methods: dict[str, Callable[[], IntArray | None]] = {OURS: lambda case=case: solve_ours(case)[0]}  # type: ignore[misc]
        if not priced:
            methods[PAPER] = lambda case=case: solve_by_paper(case)  # type: ignore[misc]
            if prompts <= sizes.highs_up_to:
                methods[HIGHS] = lambda case=case: solve_by_highs(case)  # type: ignore[misc]
        counts = {name: method() for name, method in methods.items()}  # and compiles
        worth = {name: case.worth(n) for name, n in counts.items() if n is not None and case.feasible(n)}
        certificate = solve_ours(case)[1]
        assert certificate is not None, "the knapsack's allocation has a certificate"
        for name, method in methods.items():
            rows.append(
                {
                    "part": "time",
                    "seed": seed,
                    "prompts": prompts,
                    "costs": priced,
                    "method": name,
                    "milliseconds": round(_milliseconds(method, sizes.repeats), 4),
                    "gap": (max(worth.values()) - worth[name]) / max(worth.values()) if name in worth else None,
                    "certified_gap": certificate.gap / certificate.upper_bound if name == OURS else None,
                }
            )
    return rows


def _milliseconds(method: Callable[[], object], repeats: int) -> float:
    seconds: list[float] = []
    while len(seconds) < repeats and (len(seconds) < 1 or sum(seconds) < 2.0):
        started = time.perf_counter()
        method()
        seconds.append(time.perf_counter() - started)
    return 1e3 * float(np.median(seconds))


def rules(seed: int, sizes: Sizes) -> list[Row]:
    """Value that rules lose against the optimum for the true rates, after one visit of 16 rollouts to every prompt.

    Rates are constant, so that all the loss is the rule's: the noise in 16 rewards, and its response to it.
    """
    rows: list[Row] = []
    size = min(256, sizes.population)
    for label, mixture in MIXTURES.items():
        rng = np.random.default_rng([seed, 3, list(MIXTURES).index(label)])
        rates = draw_rates(mixture, sizes.population, rng)
        outcome_R = rng.random((sizes.population, 16)) < rates[:, None]
        ids_R = np.repeat(np.arange(sizes.population), 16).tolist()
        allocators = {
            PAPER_RULE: KnapsackAllocator("window"),
            "window without fallback": KnapsackAllocator("window", fallback=False),
            "empirical Bayes": KnapsackAllocator("empirical-bayes"),
        }
        for allocator in allocators.values():
            allocator.observe(ids_R, outcome_R.ravel().astype(np.float64))
        sums = dict.fromkeys(RULES, 0.0)
        best = 0.0
        for at in range(sizes.batches):
            batch = np.arange(at * size, (at + 1) * size)
            truth, budget = rates[batch], 8 * size
            counts = {name: allocator.allocate(batch.tolist(), budget).counts for name, allocator in allocators.items()}
            counts["uniform"] = uniform_counts(size, budget)
            counts[FALLBACK_ON_TRUTH] = allocate(truth, budget, fallback=True).counts
            best += float(value(allocate(truth, budget).counts, truth).sum())
            for name in RULES:
                sums[name] += float(value(counts[name], truth).sum())
        rows += [
            {"part": "rules", "seed": seed, "mixture": label, "rule": name, "lost": round(1.0 - total / best, 6)}
            for name, total in sums.items()
        ]
    return rows


TIMED = 256
"""Prompts of the paper's batch."""


def tally(rows: Sequence[Row]) -> tuple[int, int, float]:
    """Count instances: (optimal, all, largest gap)."""
    return (
        sum(row["optimal"] for row in rows),
        sum(row["instances"] for row in rows),
        max((row["largest_gap"] for row in rows), default=0.0),
    )


def _gap(gap: float) -> str:
    return "0" if gap == 0.0 else f"{gap:.0e}" if gap < 1e-3 else f"{100 * gap:.1f} %"


def _share(rows: Sequence[Row]) -> str:
    optimal, every, largest = tally(rows)
    return f"{optimal:,} of {every:,} optimal, largest gap {_gap(largest)}"


def milliseconds(rows: Sequence[Row], prompts: int, method: str, *, costs: bool = False) -> float:
    """Median over the seeds; NaN where it was not measured."""
    found = select(rows, part="time", prompts=prompts, method=method, costs=costs)
    return float(np.median([row["milliseconds"] for row in found])) if found else float("nan")


def lost(rows: Sequence[Row], mixture: str, rule: str) -> tuple[float, float, float]:
    """Per cent of the value that a rule loses: (mean, lower, upper)."""
    return bootstrap_interval([100 * row["lost"] for row in select(rows, part="rules", mixture=mixture, rule=rule)])


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Optimality without and with costs, time, the loss of the paper's rule, and the certificate."""
    ours = select(rows, part="gaps", method=OURS)
    false = sum(row["false_certificates"] for row in ours)
    found = []
    for claim, paper, priced in (
        ("The solver's allocations are optimal (a rollout costs one)", "exact by dynamic programming", False),
        ("The solver's allocations are optimal where rollouts have costs", "–", True),
    ):
        which = select(ours, costs=priced)
        optimal, every, largest = tally(which)
        small, medium = (_share(select(which, size=size)) for size in ("small", "medium"))
        exact, near = optimal == every and false == 0, largest < 1e-3 and false == 0
        found.append(
            Finding(
                claim,
                paper,
                f"against enumeration: {small}; against HiGHS: {medium}",
                "holds" if exact else "holds in part" if near else "does not hold",
            )
        )
    prompts = max(row["prompts"] for row in select(rows, part="time", method=PAPER) if row["prompts"] <= TIMED)
    own, paper_own = milliseconds(rows, prompts, OURS), milliseconds(rows, prompts, PAPER)
    found.append(
        Finding(
            f"Solving is negligible ({prompts} prompts, budget {8 * prompts}, N_up 128)",
            "1 to 2 s",
            f"median {own:.2g} ms; the paper's dynamic program on the same machine {paper_own:.3g} ms",
            "holds" if own < 1000 else "does not hold",
        )
    )
    by_rule = {rule: [lost(rows, mixture, rule)[0] for mixture in MIXTURES] for rule in (PAPER_RULE, "empirical Bayes")}
    theirs, bayes = by_rule.values()
    better = sum(b < p for b, p in zip(bayes, theirs, strict=True))
    found.append(
        Finding(
            "A mean of 16 rewards with the fallback rule is enough: little value is lost against known rates",
            "–",
            f"{min(theirs):.1f} to {max(theirs):.1f} % lost over {len(MIXTURES)} mixtures of constant rates "
            f"(empirical Bayes: {min(bayes):.1f} to {max(bayes):.1f} %, less in {better})",
            "holds" if max(theirs) < 1 else "holds in part" if max(theirs) < 10 else "does not hold",
        )
    )
    proved, every = sum(row["certified"] for row in ours), tally(ours)[1]
    found.append(
        Finding(
            "The certificate never claims more than is true",
            "–",
            f"{false} false certificates for {every:,} allocations, {proved:,} of them proved optimal",
            "does not hold" if false else "holds",
        )
    )
    return found


def figures(rows: Sequence[Row]) -> Callable[[str], str]:
    """Certificates, and losses by rates and rule."""
    ours = select(rows, part="gaps", method=OURS)
    gaps = [row["certified_gap"] for row in select(rows, part="time", method=OURS, costs=True)]
    found = {
        "instances": f"{tally(ours)[1]:,}",
        "certified": f"{sum(row['certified'] for row in ours):,}",
        "false certificates": f"{sum(row['false_certificates'] for row in ours):,}",
        "largest certified gap": _gap(max(gaps, default=0.0)),
        "small, with costs": _share(select(ours, size="small", costs=True)),
        "medium, with costs": _share(select(ours, size="medium", costs=True)),
    }
    for mixture in MIXTURES:
        found |= {f"{mixture}: {rule}, lost": f"{lost(rows, mixture, rule)[0]:.1f} %" for rule in RULES}
    return by_name(found)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Times and losses."""
    methods = ((OURS, False), (PAPER, False), (HIGHS, False), (OURS, True))
    times = []
    for prompts in sorted({row["prompts"] for row in select(rows, part="time")}):
        cells = [milliseconds(rows, prompts, method, costs=costs) for method, costs in methods]
        times.append(
            (prompts, *("–" if np.isnan(cell) else f"{cell:.3g}" if cell < 1000 else f"{cell:,.0f}" for cell in cells))
        )
    losses = [(name, *("{:.1f} ({:.1f} to {:.1f})".format(*lost(rows, name, rule)) for rule in RULES))
              for name in MIXTURES]  # fmt: skip
    return {
        "times": markdown_table(("prompts", OURS, PAPER, HIGHS, f"{OURS}, with costs"), times),
        "losses": markdown_table(("rates", *RULES), losses),
    }
