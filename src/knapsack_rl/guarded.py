"""A base class: calls from threads run one after the other, warnings appear once, failures are counted and survived."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
G = TypeVar("G", bound="Guarded")


def one_at_a_time(method: Callable[Concatenate[G, P], T]) -> Callable[Concatenate[G, P], T]:
    """Make a method wait until the calls of other threads are over."""

    @wraps(method)
    def locked(self: G, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


_living: weakref.WeakSet[Guarded] = weakref.WeakSet()


def _unlock_after_fork() -> None:
    """Give every object of a forked child a new lock: the thread that held the old one exists in the parent only."""
    for each in [*_living]:
        each._lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_unlock_after_fork)


class Guarded:
    """Base of objects with a lock, whose failures are counted by kind and do not end a run.

    A process forked while another thread is in a call gets the object as it is at that moment, unlocked.

    Attributes:
        failures: number of failures survived, by kind.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _living.add(self)
        self.failures: Counter[str] = Counter()
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock; a copy gets a new one."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.RLock()
        _living.add(self)

    def survive(self, what: str, call: Callable[[], T]) -> T | None:
        """Return the result of a call that must not end a run, or None if it raised.

        A failure is counted by its kind; the first of each kind is logged with its traceback.

        Args:
            what: the kind, a noun such as ``"allocation"``.
            call: called without arguments.
        """
        try:
            return call()
        except Exception:
            self.failures[what] += 1
            if self.failures[what] == 1:
                self._logger.exception(
                    "%s failed; the run continues without it (logged once, counted as failures/%s)", what, what
                )
            return None

    def warn_once(self, topic: str, message: str) -> None:
        """Log a warning, unless there was one on this topic before."""
        if topic not in self._warned:
            self._warned.add(topic)
            self._logger.warning("%s (logged once)", message)

    @property
    def _logger(self) -> logging.Logger:
        return logging.getLogger("knapsack_rl.allocator")
