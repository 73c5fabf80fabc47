"""An experiment that trains arms: its claims, tables and plots are data, see ``experiments.claims``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from experiments import measures, pool
from experiments.contract import Finding, Options, Row, Verdict, markdown_table
from experiments.names import all_names, fill, first_name
from experiments.statistics import Estimate

if TYPE_CHECKING:
    from knapsack_rl.training.compare import Run


@dataclass(frozen=True)
class Claim:
    """A claim about training runs.

    Attributes:
        text: one sentence.
        here: what was measured, with figures by name in double braces; the first figure decides.
        rule: the verdict that follows from the deciding figure.
        paper: the paper's figure.
        decided_by: name of the deciding figure, if it is not the first one of ``here``.
    """

    text: str
    here: str
    rule: Callable[[Estimate], Verdict]
    paper: str = "–"
    decided_by: str = ""

    @property
    def arms(self) -> frozenset[str]:
        """Arms that its figures name."""
        return frozenset(arm for figure in all_names(self.here) for arm in measures.arms_of(figure))


@dataclass(frozen=True)
class Table:
    """A table of named figures.

    Attributes:
        columns: heading of a column to the name of its figures, with ``{row}`` for the key of a row.
        rows: label of each row to its key; by default the labels and names of the experiment's arms.
        corner: heading of the first column.
    """

    columns: dict[str, str]
    rows: dict[str, str] = field(default_factory=dict)
    corner: str = "policy"


@dataclass(frozen=True)
class Training:
    """An experiment that trains arms.

    Attributes:
        arms: names of ``experiments.pool.ARMS``, in the order of tables and plots.
        claims: about the runs.
        layout: tables by name.
        panels: of the plot, see :func:`experiments.plots.training`.
        task: first part of the names of the runs' folders, if they are not on the shared task.
        changes: shared settings that differ on that task.
        prepare: called before runs are trained on that task.
        seeds: at most as many.
    """

    arms: tuple[str, ...]
    claims: tuple[Claim, ...]
    layout: dict[str, Table]
    panels: tuple[str, ...] = ("accuracy",)
    task: str = ""
    changes: Callable[[Options], dict[str, Any]] = lambda _: {}
    prepare: Callable[[Options], None] = lambda _: None
    seeds: int = 1000

    def plan(self, options: Options) -> list[Run]:
        """The runs."""
        return pool.plan(self.arms, self._fewer(options), self.task, **self.changes(options))

    def _fewer(self, options: Options) -> Options:
        return replace(options, seeds=min(options.seeds, self.seeds))

    def pieces(self, options: Options) -> int:
        """Number of runs."""
        return len(self.plan(options))

    def measure(self, options: Options, done: Callable[[str], None]) -> list[Row]:
        """Train the arms; one row per run."""
        runs = self.plan(options)
        if pool.missing(runs, options):
            self.prepare(options)
        return pool.measure(self.arms, runs, self._fewer(options), done)

    def findings(self, rows: Sequence[Row]) -> list[Finding]:
        """Claims with their figures and verdicts."""
        known = measures.with_shortest(rows)
        return [
            Finding(
                claim.text,
                claim.paper,
                fill(claim.here, self.figures(rows)),
                claim.rule(measures.estimate(known, claim.decided_by or first_name(claim.here))[0]),
            )
            for claim in self.claims
        ]

    def figures(self, rows: Sequence[Row]) -> Callable[[str], str]:
        """Figures by the grammar of ``experiments.measures``."""
        known = measures.with_shortest(rows)
        return lambda name: measures.estimate(known, name)[1]

    def _table(self, table: Table, rows: Sequence[Row]) -> str:
        """A table as Markdown; the difference or ratio of an arm to itself is left out."""
        text = self.figures(rows)
        body = []
        for label, key in (table.rows or pool.labels(self.arms)).items():
            names = [name.format(row=key) for name in table.columns.values()]
            own = [name.startswith((f"{key} - {key},", f"{key} / {key},")) for name in names]
            body.append([label, *("–" if same else text(name) for name, same in zip(names, own, strict=True))])
        return markdown_table((table.corner, *table.columns), body)

    def tables(self, rows: Sequence[Row]) -> dict[str, str]:
        """Tables by name."""
        return {name: self._table(table, rows) for name, table in self.layout.items()}
