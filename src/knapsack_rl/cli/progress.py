"""Progress of long work other than training: a bar on a terminal, occasional plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_EVERY_SECONDS = 10.0
"""Least time between plain lines."""


@contextmanager
def progress(total: int, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Yield a function to call with a line of text after each of ``total`` pieces of work.

    All output goes to standard error, so results can be piped. Without rich or a terminal, a plain line is printed at
    most every ten seconds.

    Args:
        total: pieces of work.
        quiet: show nothing.
    """
    if quiet:
        yield lambda _: None
        return
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            pass
        else:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("", total=total)
                yield lambda text: bar.update(task, advance=1, description=text)
            return
    yield _Lines(total).done


class _Lines:
    def __init__(self, total: int) -> None:
        self._total, self._finished = total, 0
        self._started = self._shown = time.monotonic()

    def done(self, text: str) -> None:
        self._finished += 1
        now = time.monotonic()
        if now - self._shown < PLAIN_EVERY_SECONDS:
            return
        self._shown = now
        left = (now - self._started) / self._finished * (self._total - self._finished)
        print(f"{self._finished}/{self._total}, about {left:.0f} s left: {text}", file=sys.stderr, flush=True)
