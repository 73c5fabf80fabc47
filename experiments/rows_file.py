"""Training runs whose rows are appended to one file as they finish; what the file holds is not run again."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments.contract import Row, select
from experiments.pieces import one_thread_each, processes
from knapsack_rl.runs.files import append_row

MARGIN = 1.15
"""A run is started only if the slowest one so far, times this, fits into the time that is left."""


def is_of(row: Row, piece: Any) -> bool:
    """Whether a row is of a piece; settings that were added since it was written have their default in it.

    Args:
        row: with the settings of its piece.
        piece: a dataclass of settings.
    """
    return {spec.name: spec.default for spec in fields(piece)} | row["settings"] == vars(piece)


class RowsFile:
    """Measures pieces that have no row yet, several side by side.

    A piece is a dataclass of settings, which its row holds under ``settings``. A row with a false ``finished`` was cut
    short: it is kept beside the file, and its piece is measured again.

    Args:
        file: JSON lines.
        until: time (of ``time.time``) at which all work has ended.
        workers: processes side by side; 1 works in this process.
    """

    def __init__(self, file: Path, until: float, workers: int) -> None:
        self.file, self.until, self.workers = file, until, workers

    def rows(self, part: str) -> list[Row]:
        """Rows of a part that are in the file; a line torn by a crash is named and passed over."""
        text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
        found = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{self.file}, line {number} is torn and passed over", file=sys.stderr)
        return select(found, part=part)

    def summary(self, row: Row) -> str:
        """What is printed of a row."""
        raise NotImplementedError

    def measure(self, part: str, wanted: Sequence[Any], work: Callable[[Any], Row], *, alone: bool = False) -> int:
        """Measure what has no row in a part; returns the number of pieces that were not finished in time.

        Args:
            part: of the file.
            wanted: pieces, in the order in which they are started.
            work: makes the row of a piece; a function that another process can be given.
            alone: one piece at a time.
        """
        known = self.rows(part)
        waiting = [one for one in wanted if not any(is_of(row, one) for row in known)]
        finished = 0
        for settings, row in self._results(waiting, work, 1 if alone else self.workers):
            whole = row.get("finished", True)
            line = row | {"part": part}
            # What ran out of time is kept beside the rows; it is measured again.
            append_row(self.file if whole else self.file.with_suffix(".unfinished"), line)
            finished += whole
            print(f"{part}: {settings.arm}, seed {settings.seed}, {self.summary(line)}", flush=True)
        return len(waiting) - finished

    def _results(self, waiting: Sequence[Any], work: Callable[[Any], Row], workers: int) -> Iterator[tuple[Any, Row]]:
        """Results in the order in which they end; a piece for which there is no time is not started."""
        todo, slowest = list(waiting), 0.0
        running: dict[Future[Row], tuple[Any, float]] = {}
        with one_thread_each(), _pool(workers) as pool:
            while todo or running:
                while todo and len(running) < workers and time.time() + MARGIN * slowest < self.until:
                    settings, started = todo.pop(0), time.time()
                    running[pool.submit(work, settings)] = (settings, started)
                if not running:
                    return
                future = next(as_completed(running))
                settings, started = running.pop(future)
                slowest = max(slowest, time.time() - started)
                try:
                    row = future.result()
                except RuntimeError:  # such as no memory: the other pieces go on
                    traceback.print_exc()
                else:
                    yield settings, row


def _pool(workers: int) -> Executor:
    """Processes side by side; a single worker is in this process."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    return processes(workers)
