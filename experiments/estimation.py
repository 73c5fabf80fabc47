"""How much of the gain between uniform allocation and known success rates does each estimator capture?

Three kinds of true rates: the recorded run with its rates smoothed, static synthetic mixtures, and prompts that learn.
To see a new estimator in the table, name it in ``LISTED``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.contract import Finding, Options, Row, by_name, markdown_table
from experiments.trace import load_trace
from knapsack_rl.offline.environments import Environment, Replay, Sudden, Synthetic
from knapsack_rl.offline.scoring import HEADINGS, cell, compare
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

HARSH = {
    "collapse": Synthetic("late-training", prompts=512, epochs=20, changes=(Sudden(8.5, shift=-4.0),)),
    "format learned": Synthetic(
        "0.8*beta(1,30) + 0.2*uniform", prompts=512, epochs=20, changes=(Sudden(6.5, 0.7, "beta(2,2)"),)
    ),
    "another policy, twice": Synthetic(
        "late-training", prompts=512, epochs=20,
        changes=(Sudden(7.0, mixture="late-training"), Sudden(13.5, mixture="uniform")),
    ),
    "a tenth jumps each epoch": Synthetic(
        "late-training", prompts=512, epochs=20,
        changes=tuple(Sudden(float(epoch), 0.1, "late-training") for epoch in range(1, 20)),
    ),
    "fast walk": Synthetic("uniform", prompts=512, epochs=20, walk=0.8),
    "all prompts in every batch": Synthetic("uniform", prompts=512, epochs=20, batch_size=512, walk=0.3),
    "8192 retired prompts": Synthetic("late-training", prompts=512, epochs=20, walk=0.2, retired=8192),
    "batches drawn anew": Synthetic(
        "0.4*beta(1,30) + 0.6*beta(1,2)", prompts=512, epochs=20, gain=0.1, reshuffled=False
    ),
    "near 0.99": Synthetic("beta(200,2)", prompts=512, epochs=20),
}  # fmt: skip
"""Sudden changes, fast movement, unusual batches. The filter was made on smaller ones of other sizes and seeds."""

IN_HARSH = ("Beta", "Bayes filter", "Bayes filter, may skip")
"""Policies that are simulated there."""

WATCHED = ", uniform allocation watched"
"""Ending of the label of an environment in which the policies only predict."""

RECORDED = "recorded run"
ROLLOUTS_PER_PROMPT, MIN_ROLLOUTS, MAX_ROLLOUTS = 8, 2, 128


def policies() -> dict[str, PolicyMaker]:
    """The policies of the table."""
    bounds = (MIN_ROLLOUTS, MAX_ROLLOUTS)
    estimated = {label: allocated(name, *bounds, **settings) for label, (name, settings) in LISTED.items()}
    estimated["Bayes filter, may skip"] = allocated("bayes-filter", 0, MAX_ROLLOUTS)
    return {"uniform": uniform(), "uniform 2N": uniform(2), **estimated, "rates known": known_rates(*bounds)}


def watchers() -> dict[str, PolicyMaker]:
    """Uniform allocation, watched by each estimator.

    Brier scores of policies that allocate differently refer to different events; these refer to the same ones.
    """
    return {label: watching(name, **settings) for label, (name, settings) in LISTED.items()}


def environments(options: Options) -> dict[str, Environment]:
    """The environments of the table."""
    trace = load_trace(options.split)
    recorded = Replay(trace, epochs=12 if options.quick else None)
    found: dict[str, Environment] = {f"recorded run, {options.split} ({len(trace)} prompts)": recorded}
    for label, synthetic in (SYNTHETIC | HARSH).items():
        small = replace(synthetic, prompts=256, epochs=12, retired=min(synthetic.retired, 256))
        found[label] = small if options.quick else synthetic
    return found


def pieces(options: Options) -> int:
    """Number of simulations."""
    return sum(len(places) * len(chosen) for places, chosen in plans(options)) * len(options.seed_range)


def plans(options: Options) -> list[tuple[dict[str, Environment], dict[str, PolicyMaker]]]:
    """Environments, each with the policies that are simulated in it."""
    places, everyone = environments(options), policies()
    recorded = next(iter(places))
    return [
        ({where: places[where] for where in places if where not in HARSH}, everyone),
        ({where: places[where] for where in HARSH if where in places}, {name: everyone[name] for name in IN_HARSH}),
        ({recorded + WATCHED: places[recorded]}, watchers()),
    ]


def measure(options: Options, done: Callable[[str], None]) -> list[Row]:
    """Simulate every policy in every environment; a row has the figures of all seeds."""
    results = [
        result.as_dict()
        for where, chosen in plans(options)
        for result in compare(
            where,
            chosen,
            options.seed_range,
            budget=ROLLOUTS_PER_PROMPT,
            min_rollouts=MIN_ROLLOUTS,
            max_rollouts=MAX_ROLLOUTS,
            done=done,
        )
    ]
    return [json.loads(json.dumps(result)) for result in results]  # keys of seeds become text, as in a file


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Return no claims: those about estimators are of the experiment ``robustness``."""
    return []


def place(row: Row) -> str:
    """The environment of a row in words; "watched" is the recorded run under uniform allocation."""
    where = str(row["environment"])
    return ("watched" if where.endswith(WATCHED) else RECORDED) if where.startswith(RECORDED) else where


def _cell(row: Row, name: str) -> str:
    mean, deviation = (math.nan if row[part][name] is None else row[part][name] for part in ("mean", "deviation"))
    return cell(name, mean, deviation)


def figures(rows: Sequence[Row]) -> Callable[[str], str]:
    """Mean and deviation over seeds by name: "recorded run: Beta, gain captured", "watched: paper, Brier score"."""
    return by_name(
        {f"{place(row)}: {row['policy']}, {long}": _cell(row, name) for row in rows for name, long in HEADINGS.items()}
    )


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """The recorded run, the predictions while all watch uniform allocation, and the gain in every environment."""
    by_place: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_place.setdefault(place(row), {})[row["policy"]] = row
    synthetic = {where: found for where, found in by_place.items() if where not in (RECORDED, "watched", *HARSH)}
    harsh = {where: found for where, found in by_place.items() if where in HARSH}
    columns = ("gain_captured", "effective_rollouts", "effective_prompts")
    watched = ("predicted", "realised", "brier")
    recorded = list(by_place.get(RECORDED, {}).values())
    return {
        "recorded": markdown_table(
            ("policy", *(HEADINGS[name] for name in columns)),
            [(row["policy"], *(_cell(row, name) for name in columns)) for row in recorded],
        ),
        "watched": markdown_table(
            ("estimator", *(HEADINGS[name] for name in watched)),
            [(label, *(_cell(row, name) for name in watched)) for label, row in by_place.get("watched", {}).items()],
        ),
        **{name: markdown_table(
            ("environment", *next(iter(places.values()), {})),
            [(where, *(_cell(row, "gain_captured") for row in found.values())) for where, found in places.items()],
        ) for name, places in (("synthetic", synthetic), ("harsh", harsh))},
    }  # fmt: skip
