"""What keeps an allocator whole: calls one after the other, and failures that are counted and do not end a run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
G = TypeVar("G", bound="Guarded")


def one_at_a_time(method: Callable[Concatenate[G, P], T]) -> Callable[Concatenate[G, P], T]:
    """A method that waits until the calls of other threads are over."""

    @wraps(method)
    def locked(self: G, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class Guarded:
    """Base of an object with a lock of its own and a count of failures that were survived."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._allocation_failures = 0
        self._failure_told = False

    def __getstate__(self) -> dict[str, Any]:
        """For copies: each has a lock of its own."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()

    def attempt(self, what: str, attempt: Callable[[], T]) -> T | None:
        """Do something that must not end a run: the result, or None if it raised, which is counted and logged once.

        Args:
            what: a noun for the log.
            attempt: called without arguments.
        """
        try:
            return attempt()
        except Exception:
            self._allocation_failures += 1
            if not self._failure_told:
                self._failure_told = True
                logger.exception(
                    "%s failed; the run goes on without it: budgets are divided evenly, estimates stay as they were "
                    "(logged once, counted as allocation_failures)",
                    what,
                )
            return None
