"""Pages written by hand with figures by name, filled in from the committed rows.

A name in double braces is an experiment and one of its figures, ``{{compute: knapsack - uniform, mean over the run}}``,
or one of its tables, ``{{compute: table accuracy}}``; ``{{claims}}`` is the table of all claims. The names are those of
``figures`` and ``tables`` of each experiment; for training runs see :mod:`experiments.measures`. ``{{plan: cost}}`` is
a table of :mod:`experiments.accelerator.plan`.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from experiments import catalogue
from experiments.accelerator import plan
from experiments.contract import Finding, markdown_table, seeds_of, select
from experiments.lab.evidence import HEADLINE
from experiments.names import fill
from knapsack_rl.report import uniform_runs

TEMPLATES = Path(__file__).parent / "pages"
PAGES = ("evidence.md", "estimation.md", "lab.md", "accelerator.md")
HEADER = ("claim", "paper", "here", "command", "seeds", "verdict")
TABLE = "table "
RECORDED = "headline-trl"
UNIFORM = {"uniform GRPO": "uniform", "uniform GRPO, two updates a step": "uniform-trl-twice"}
"""Experiment and arms of uniform allocation that are shipped with the package, by what a report calls them."""


class Evidence:
    """Figures and tables by name, from the rows in a folder; each file is read once.

    Args:
        folder: of the rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._of: dict[str, _Figures] = {}

    def __call__(self, name: str) -> str:
        """Return the text of a name.

        Raises:
            FileNotFoundError: the experiment has no rows.
            ValueError: no such experiment, figure or table.
        """
        if name == "claims":
            return self.claims()
        experiment, _, figure = name.partition(": ")
        if experiment == "plan":
            return plan.tables(self.folder)[figure]
        return self.of(experiment).text(figure)

    def of(self, experiment: str) -> _Figures:
        """Figures of one experiment."""
        if experiment not in self._of:
            self._of[experiment] = _Figures(experiment, self.folder)
        return self._of[experiment]

    def claims(self) -> str:
        """The table of claims of all experiments."""
        lines = []
        for name in catalogue.EXPERIMENTS:
            for found in self.of(name).findings:
                command, seeds = f"`python -m experiments {name}`", seeds_of(self.of(name).rows)
                lines.append((found.claim, found.paper, found.ours, command, seeds, found.verdict))
        return markdown_table(HEADER, lines)


class _Figures:
    """Figures, tables and findings of one experiment, each kind computed once."""

    def __init__(self, name: str, folder: Path) -> None:
        self._experiment = catalogue.load(name)
        self.rows = catalogue.read(name, folder)
        self._figure = self._experiment.figures(self.rows)

    @cached_property
    def findings(self) -> list[Finding]:
        return self._experiment.findings(self.rows)

    @cached_property
    def tables(self) -> dict[str, str]:
        return self._experiment.tables(self.rows)

    def text(self, name: str) -> str:
        if not name.startswith(TABLE):
            return self._figure(name)
        table = name.removeprefix(TABLE)
        if table not in self.tables:
            raise ValueError(f"no table {table!r}; there are {', '.join(self.tables)}")
        return self.tables[table]


def build(page: str, folder: Path) -> str:
    """A filled page.

    Args:
        page: of ``PAGES``.
        folder: of the rows.

    Raises:
        FileNotFoundError: an experiment that the page names has no rows.
        ValueError: the page names an unknown figure, or rows are those of a quick run.
    """
    note = f"<!-- Filled in by `python -m experiments page`; edit experiments/pages/{page}. -->\n\n"
    return note + fill((TEMPLATES / page).read_text(encoding="utf-8"), Evidence(folder))


def readme_table(folder: Path) -> str:
    """The table of results in the README."""
    return HEADLINE.overview(catalogue.read("lab-headline", folder))


def write_recorded(folder: Path, target: Path = uniform_runs.FILE) -> Path:
    """Write the runs of uniform allocation that the report of a run on the shipped task shows; returns the file."""
    rows = catalogue.read(RECORDED, folder)
    by_policy = {name: select(rows, arm=arm) for name, arm in UNIFORM.items()}
    runs = [run for own in by_policy.values() for run in own]
    (rollouts,) = {tuple(run["evaluations"]["rollouts"]) for run in runs}
    (task,) = {tuple(run["settings"][name] for name in uniform_runs.SAME_TASK) for run in runs}
    found = {
        "made by": f"python -m experiments {RECORDED} --seeds {seeds_of(rows)}",
        "task": dict(zip(uniform_runs.SAME_TASK, task, strict=True)),
        "rollouts": rollouts,
        "accuracy": {name: [run["evaluations"]["accuracy"] for run in own] for name, own in by_policy.items()},
    }
    target.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def write(folder: Path) -> list[Path]:
    """Write the pages beside the folder, and every plot anew; returns the pages.

    Raises:
        FileNotFoundError: an experiment has no rows.
        ImportError: matplotlib is not installed.
        ValueError: a page names an unknown figure, or rows are those of a quick run.
    """
    texts = {folder.parent / page: build(page, folder) for page in PAGES}
    for name in catalogue.EXPERIMENTS:
        catalogue.draw(name, catalogue.read(name, folder), folder)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)
