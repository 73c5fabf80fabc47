"""The interface of an experiment to the command and the pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from experiments.trace import Split

Row = dict[str, Any]
"""One line of an experiment's JSONL file: plain JSON values."""

Verdict = Literal["holds", "holds in part", "does not hold", "undecided"]

QUICK_SEEDS = 2


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
        split: prompts of the recorded run on which estimators are compared.
    """

    seeds: int = 5
    quick: bool = False
    workers: int = 2
    runs: Path = Path("runs/experiments")
    record: Path | None = None
    split: Split = "report"

    @property
    def seed_range(self) -> range:
        """Seeds that run: at most two in the quick version."""
        return range(min(self.seeds, QUICK_SEEDS) if self.quick else self.seeds)


@dataclass(frozen=True)
class Finding:
    """One line of the table of claims.

    Attributes:
        claim: one sentence.
        paper: the paper's figure, or "–" where it has none.
        ours: measured here, with its spread.
        verdict: whether the claim held here.
    """

    claim: str
    paper: str
    ours: str
    verdict: Verdict


class Experiment(Protocol):
    """A module or an object with these functions; everything after ``measure`` is computed from the rows alone."""

    def pieces(self, options: Options) -> int:
        """Number of calls of ``done`` in ``measure``, for a progress bar."""
        ...

    def measure(self, options: Options, done: Callable[[str], None]) -> list[Row]:
        """Do the work; ``done`` is called with a line of text after each piece."""
        ...

    def findings(self, rows: Sequence[Row]) -> list[Finding]:
        """Claims and verdicts."""
        ...

    def figures(self, rows: Sequence[Row]) -> Callable[[str], str]:
        """Return a function from the name of a figure to its text; it raises ValueError for an unknown name."""
        ...

    def tables(self, rows: Sequence[Row]) -> dict[str, str]:
        """Markdown tables by name."""
        ...


def by_name(figures: dict[str, str]) -> Callable[[str], str]:
    """Look a figure up.

    Args:
        figures: text by name.

    Returns:
        A function that raises ValueError for an unknown name and lists the nearest ones.
    """
    from difflib import get_close_matches

    def text(name: str) -> str:
        if name not in figures:
            near = get_close_matches(name, figures, 3, 0.0)
            raise ValueError(f"no figure {name!r}; the closest names are {', '.join(map(repr, near))}")
        return figures[name]

    return text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def select(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Rows with the given values under the given keys."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def seeds_of(rows: Sequence[Row]) -> int:
    """Number of seeds in the rows that are compared."""
    return len({row["seed"] for row in rows if row.get("part", "training") == "training"})
