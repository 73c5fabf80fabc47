"""What an experiment of the evidence page offers, so that the command and the page treat all alike.

An experiment is a module with the functions of :class:`Experiment`; ``experiments.catalogue`` lists the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""One line of an experiment's JSONL file: plain JSON values, always with its seed."""

Verdict = Literal["holds", "holds in part", "does not hold", "undecided"]


@dataclass(frozen=True)
class Options:
    """How much to measure.

    Attributes:
        seeds: number of seeds, from 0 on.
        quick: the same code on less of everything, well under a minute; for tests and a first look.
        workers: processes side by side, each with one torch thread.
        runs: folder of the training runs; finished runs in it are used again, half-done ones resumed.
        record: folder of rows measured earlier; training runs on record there are not trained again. None for no such
            folder.
    """

    seeds: int = 5
    quick: bool = False
    workers: int = 2
    runs: Path = Path("runs/experiments")
    record: Path | None = None


@dataclass(frozen=True)
class Finding:
    """One line of the table on the evidence page.

    Attributes:
        claim: what is claimed, one sentence.
        paper: the paper's figure, or "-" where it has none.
        ours: what was measured, with spread and number of seeds.
        verdict: whether the claim held here.
    """

    claim: str
    paper: str
    ours: str
    verdict: Verdict


class Experiment(Protocol):
    """The functions of an experiment's module."""

    TITLE: str
    QUESTION: str

    def pieces(self, options: Options) -> int:
        """Pieces of work that ``measure`` reports, for a progress bar."""
        ...

    def measure(self, options: Options, done: Callable[[str], None]) -> list[Row]:
        """Do the work; ``done`` is called with a line of text after each piece."""
        ...

    def findings(self, rows: Sequence[Row]) -> list[Finding]:
        """Lines of the table, computed from the rows alone."""
        ...

    def paragraph(self, rows: Sequence[Row]) -> str:
        """Markdown: how it was measured, the result, what went against us; every figure computed from the rows."""
        ...

    def figure(self, rows: Sequence[Row]) -> Figure:
        """The plot of the page."""
        ...
