"""How much of the gain between uniform allocation and known success rates does each estimator capture?

Three kinds of truth: the recorded run with its rates smoothed, static synthetic mixtures, and prompts that learn. To
see a new estimator in the table, name it in ``LISTED``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.trace import Split, load_trace
from knapsack_rl.offline.environments import Environment, Replay, Synthetic
from knapsack_rl.offline.scoring import Result, compare, markdown_tables
from knapsack_rl.offline.simulate import PolicyMaker, allocated, known_rates, uniform, watching

LISTED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "paper": ("window", {}),
    "paper without fallback": ("window", {"fallback": False}),
    "Beta": ("beta", {}),
    "empirical Bayes": ("empirical-bayes", {}),
    "Bayes filter": ("bayes-filter", {}),
}
"""Label in the table to a name of ``ESTIMATORS`` and its settings."""

SYNTHETIC = {
    "late in training": Synthetic("late-training", prompts=1024, epochs=30),
    "very late in training": Synthetic("0.38*beta(100,1) + 0.22*beta(1,100) + 0.4*uniform", prompts=1024, epochs=30),
    "any rate alike": Synthetic("uniform", prompts=1024, epochs=30),
    "too hard": Synthetic("hard", prompts=1024, epochs=30),
    "learning": Synthetic("0.4*beta(1,30) + 0.6*beta(1,2)", prompts=1024, epochs=30, gain=0.1),
    "learning and drifting": Synthetic(
        "0.4*beta(1,30) + 0.6*beta(1,2)", prompts=1024, epochs=30, gain=0.05, drift=0.03, walk=0.25
    ),
}

WATCHED = ", uniform allocation watched"
"""Ending of the label of an environment in which the policies only predict."""

RESULTS_FILE, PAGE_FILE = "estimation.jsonl", "estimation.html"


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        split: part of the recorded run's prompts.
        seeds: number of seeds, from 0 on.
        quick: fewer epochs, smaller synthetic environments, two seeds at most.
        rollouts_per_prompt: N.
        min_rollouts: N_low.
        max_rollouts: N_up.
    """

    split: Split = "report"
    seeds: int = 5
    quick: bool = False
    rollouts_per_prompt: int = 8
    min_rollouts: int = 2
    max_rollouts: int = 128

    @property
    def seed_list(self) -> list[int]:
        """The seeds that run."""
        return list(range(min(self.seeds, 2) if self.quick else self.seeds))


def policies(options: Options) -> dict[str, PolicyMaker]:
    """The policies of the table."""
    bounds = (options.min_rollouts, options.max_rollouts)
    estimated = {label: allocated(name, *bounds, **settings) for label, (name, settings) in LISTED.items()}
    estimated["Bayes filter, may skip"] = allocated("bayes-filter", 0, options.max_rollouts)
    return {"uniform": uniform(), "uniform 2N": uniform(2), **estimated, "rates known": known_rates(*bounds)}


def watchers() -> dict[str, PolicyMaker]:
    """Uniform allocation, watched by each estimator.

    Brier scores of policies that allocate differently are about different events; these are about the same ones.
    """
    return {label: watching(name, **settings) for label, (name, settings) in LISTED.items()}


def environments(options: Options) -> dict[str, Environment]:
    """The environments of the table."""
    trace = load_trace(options.split)
    recorded = Replay(trace, epochs=12 if options.quick else None)
    found: dict[str, Environment] = {f"recorded run, {options.split} ({len(trace)} prompts)": recorded}
    for label, synthetic in SYNTHETIC.items():
        found[label] = replace(synthetic, prompts=256, epochs=12) if options.quick else synthetic
    return found


def simulations(options: Options) -> int:
    """How many simulations :func:`run` makes."""
    pairs = len(environments(options)) * len(policies(options)) + len(watchers())
    return pairs * len(options.seed_list)


def run(options: Options, done: Callable[[str], None] | None = None) -> list[Result]:
    """Run everything.

    Args:
        options: what to run.
        done: called with a line of text after each simulation.
    """
    places = environments(options)
    recorded = next(iter(places))
    plans = ((places, policies(options)), ({recorded + WATCHED: places[recorded]}, watchers()))
    return [
        result
        for where, chosen in plans
        for result in compare(
            where,
            chosen,
            options.seed_list,
            budget=options.rollouts_per_prompt,
            min_rollouts=options.min_rollouts,
            max_rollouts=options.max_rollouts,
            done=done,
        )
    ]


def table(results: list[Result]) -> str:
    """Markdown tables, one for each environment."""
    return markdown_tables(results)


def write(results: list[Result], folder: Path) -> tuple[Path, Path]:
    """Write the figures as JSON lines and the page with plots.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from knapsack_rl.report.experiment_page import write_experiment

    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / RESULTS_FILE
    lines.write_text("".join(json.dumps(result.as_dict()) + "\n" for result in results), encoding="utf-8")
    lead = (
        "Share of the gain between uniform allocation (0) and known success rates (1) that each policy captures at the "
        'same budget, at visits 3 and later; "uniform 2N" spends twice the budget.'
    )
    return lines, write_experiment(results, folder / PAGE_FILE, title="Estimators compared", lead=lead)
