"""All experiments by name, and their files: rows as ``NAME.jsonl``, the plot as ``NAME.svg``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments import estimation, gradient_value, optimality, pool, robustness
from experiments.accelerator.evidence import ACCELERATOR
from experiments.claims import TRAINING
from experiments.contract import Experiment, Options, Row
from experiments.lab.evidence import HEADLINE

if TYPE_CHECKING:
    from knapsack_rl.training.compare import Run

EXPERIMENTS: dict[str, Experiment] = {
    **TRAINING,
    "robustness": cast(Experiment, robustness),
    "optimality": cast(Experiment, optimality),
    "gradient-value": cast(Experiment, gradient_value),
    "estimation": cast(Experiment, estimation),
    "accelerator": ACCELERATOR,
    "lab-headline": cast(Experiment, HEADLINE),
}
"""All experiments by name, in the order of the claims."""


def load(name: str) -> Experiment:
    """Return an experiment by name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    return EXPERIMENTS[name]


def shared_runs(options: Options) -> list[Run]:
    """Training runs of all experiments on the shared task, each once.

    Trained before any experiment, they keep all workers busy; one experiment after the other leaves them idle while its
    last run ends.
    """
    arms = [arm for experiment in TRAINING.values() if not experiment.task for arm in experiment.arms]
    return pool.plan(list(dict.fromkeys(arms)), options)


def run(name: str, options: Options, done: Callable[[str], None]) -> list[Row]:
    """Measure; rows of a quick run are marked, which keeps them off the pages.

    Args:
        name: of ``EXPERIMENTS``.
        options: how much to measure.
        done: called with a line of text after each piece of work.
    """
    rows = load(name).measure(options, done)
    return [row | {"quick": True} for row in rows] if options.quick else rows


def write(name: str, rows: Sequence[Row], folder: Path) -> tuple[Path, Path]:
    """Write rows and plot; returns both paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    text = "".join(json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n" for row in rows)
    data.write_text(text, encoding="utf-8")
    return data, draw(name, rows, folder)


def draw(name: str, rows: Sequence[Row], folder: Path) -> Path:
    """Write the plot; the same rows give the same bytes with the same matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    from experiments import plots

    path = folder / f"{name}.svg"
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        plots.PLOTS[name](rows).savefig(path, dpi=200, metadata={"Date": None})
    return path


def read(name: str, folder: Path) -> list[Row]:
    """Read the rows that :func:`write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the rows are those of a quick run.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; run `python -m experiments {name} --output {folder}`")
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if any(row.get("quick") for row in rows):
        raise ValueError(f"{path} holds a quick run, whose figures mean nothing; run `python -m experiments {name}`")
    return rows


def on_record(name: str, folder: Path | None, made_by: str) -> list[Row]:
    """Read the rows of an experiment that another command makes.

    Args:
        name: of the experiment.
        folder: of the rows; None for no such folder.
        made_by: how they are made, with ``{rows}`` for the file.

    Raises:
        FileNotFoundError: there are no rows on record.
    """
    if folder is None or not (folder / f"{name}.jsonl").is_file():
        file = f"{folder or 'FOLDER'}/{name}.jsonl"
        raise FileNotFoundError(f"no rows of {name} in {folder}; they are made {made_by.format(rows=file)}")
    return read(name, folder)
