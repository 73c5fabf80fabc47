"""A limit on the time of a call in this process, for reward functions that hang.

After the time the main thread gets a signal, whose handler raises :class:`OutOfTime` wherever the call is: it ends
loops, sleeps, network reads and regular expressions that backtrack forever. Code that ignores signals (one
multiplication of huge numbers, some C extensions) continues until it returns.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


class OutOfTime(BaseException):
    """A call took longer than it may. Not an ``Exception``: ``except Exception`` inside the call lets it pass."""


def can_interrupt() -> bool:
    """Return whether a call can be ended here: in the main thread, and not on Windows."""
    return hasattr(signal, "SIGVTALRM") and threading.current_thread() is threading.main_thread()


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """End the body after so many seconds, or never with None; needs :func:`can_interrupt`, and cannot be nested.

    The signal is SIGVTALRM, which hardly anything else uses; SIGALRM stays free for the body. Two clocks send it: a
    thread, which works while the body waits, and the timer of the processor time, which works while the body keeps all
    other threads from running.

    Raises:
        OutOfTime: the body took longer, even if it caught the exception that was meant to end it.
    """
    if seconds is None:
        yield
        return
    # The handler may run between any two instructions of this thread. While it may raise, nothing here takes a lock:
    # one taken just before it raised would never be given back. So a plain flag says whether it may, and the event that
    # ends the watcher is touched only when it may not.
    armed = late = False
    end = time.monotonic() + seconds
    caller = threading.get_ident()
    over = threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        nonlocal late, end
        if not armed or time.monotonic() < end:  # processor time of several threads runs faster than the clock
            return
        if late:
            logger.error("a call limited to %g s was interrupted and is still running", seconds)
        late = True
        end = time.monotonic() + seconds  # two clocks strike: the second stroke must not hit the way out
        raise OutOfTime

    def watch() -> None:
        while not over.wait(seconds):
            signal.pthread_kill(caller, signal.SIGVTALRM)

    before = signal.signal(signal.SIGVTALRM, interrupt)
    watcher = threading.Thread(target=watch, name="deadline", daemon=True)
    watcher.start()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        armed = True
        try:
            yield
        finally:
            armed = False
    finally:
        armed = False  # again: the signal may have come just before the first
        over.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        watcher.join()
        signal.signal(signal.SIGVTALRM, before)
    if late:
        raise OutOfTime
