"""The worker processes in which answers are checked, as their client sees them.

Equality of formulas is decided by the package math-verify, which builds on sympy. Neither bounds time or memory, and
parts of both evaluate text as Python. So they run in a separate process, :mod:`knapsack_rl.tasks.math_worker`. It has a
memory limit, receives the text of the two formulas and nothing else, and is killed and forked again when a comparison
takes too long. The verifiers of reasoning-gym run in another such process, for the same reasons.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Longest wait for each line of a starting worker, which imports sympy; on a busy machine that takes its time."""

GRACE_SECONDS = 5.0
"""Time after the end of a check in which the worker may still reply before it is killed itself."""


LONGEST_LINE = 2**24
"""Bytes of a line that a worker writes."""


class GuardedProcess:
    """Checks answers in a worker process, which starts with the first one.

    Use it as a context manager, or call :meth:`close`; the worker also ends with the process that made it. Calls from
    several threads wait for each other.

    Args:
        module: the worker, run as ``python -m MODULE MEGABYTES SECONDS ARGUMENTS``.
        arguments: what the worker needs to know; never text of a model.
        seconds: wall-clock time per check, > 0; an answer whose check takes longer is wrong.
        megabytes: address space of the worker, >= 512; an answer whose check needs more is wrong.

    Attributes:
        refused: checks that ran out of time or memory, or killed the worker in another way.

    Raises:
        ImportError: the system cannot fork processes (Windows).
        ValueError: a limit is out of range.
    """

    def __init__(self, module: str, arguments: Sequence[str], seconds: float, megabytes: int) -> None:
        if not hasattr(os, "fork"):
            raise ImportError("checking answers needs a system that can fork processes, such as Linux or macOS")
        if not 0.0 < seconds < float("inf") or megabytes < 512:
            raise ValueError(f"seconds must be > 0 and megabytes >= 512, got {seconds} and {megabytes}")
        self.module, self.arguments = module, list(arguments)
        self.seconds, self.megabytes = seconds, megabytes
        self.refused = 0
        self._worker: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._lock = threading.Lock()

    def holds(self, *arguments: Any) -> bool:
        """Return what the worker's check says; False if it takes too much time or memory."""
        with self._lock:
            return self._ask(arguments)

    def start(self) -> None:
        """Start the worker now, so that the first answer need not wait for it."""
        with self._lock:
            self._wait_until_ready()

    def close(self) -> None:
        """End the worker; a later answer starts another."""
        with self._lock:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, arguments: Sequence[Any]) -> bool:
        worker = self._wait_until_ready()
        reply = self._exchange(worker, json.dumps(arguments).encode() + b"\n", self.seconds + GRACE_SECONDS)
        if reply not in (b"1\n", b"0\n"):
            self.refused += 1
        if not reply.endswith(b"\n"):  # the worker itself is gone: another starts while the caller continues
            self._end()
            self._worker = self._launch()
        return reply == b"1\n"

    def _wait_until_ready(self) -> subprocess.Popen[bytes]:
        worker = self._worker or self._launch()
        self._worker = worker
        if not self._ready:
            while (line := self._exchange(worker, b"", START_SECONDS)) != b"ready\n":
                if not line:
                    self._end()
                    raise RuntimeError(
                        f"the process that checks answers did not start, or not within {START_SECONDS:.0f} s; try: "
                        + shlex.join(self._command())
                    )
                self._greeted(line)
            self._ready = True
        return worker

    def _greeted(self, line: bytes) -> None:
        """Take a line that the worker writes before it is ready."""
        raise RuntimeError(f"{self.module} wrote {line[:80]!r} before it was ready")

    def _command(self) -> list[str]:
        limits = [str(self.megabytes), str(self.seconds)]
        return [sys.executable, "-P", "-m", self.module, *limits, *self.arguments]

    def _launch(self) -> subprocess.Popen[bytes]:
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        # A new session, so that it can be ended together with its child. No text of a model is in the command. Problems
        # that depend on the order of sets are the same in every process only with a fixed seed of hashes.
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        worker = subprocess.Popen(  # noqa: S603
            self._command(), stdin=pipe, stdout=pipe, stderr=nothing, start_new_session=True, env=environment
        )
        self._end_worker = weakref.finalize(self, _end, worker, os.getpid())
        return worker

    @staticmethod
    def _exchange(worker: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
        """Send a line and read one; killing the worker after ``seconds`` ends the wait with an empty reply."""
        assert worker.stdin is not None and worker.stdout is not None
        clock = threading.Timer(seconds, _kill, (worker,))
        clock.start()
        try:
            worker.stdin.write(request)
            worker.stdin.flush()
            return worker.stdout.readline(LONGEST_LINE)
        except BrokenPipeError:
            return b""
        finally:
            clock.cancel()

    def _end(self) -> None:
        worker, self._worker, self._ready = self._worker, None, False
        if worker is not None:
            self._end_worker()


def _end(worker: subprocess.Popen[bytes], owner: int) -> None:
    """End a worker; a process that was forked from its owner leaves it alone."""
    if os.getpid() != owner:
        return
    _kill(worker)
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except BrokenPipeError:  # an unsent request that nobody will read
            logger.debug("the worker was gone before its request was sent")


class MathProcess(GuardedProcess):
    """Compares formulas in a worker process.

    Args:
        seconds: wall-clock time per comparison, > 0; one that takes longer is wrong.
        megabytes: address space of the worker, >= 512; a comparison that needs more is wrong.

    Raises:
        ImportError: math-verify is not installed, or the system cannot fork processes (Windows).
        ValueError: a limit is out of range.
    """

    def __init__(self, seconds: float = 0.8, megabytes: int = 2048) -> None:
        require_math()
        super().__init__("knapsack_rl.tasks.math_worker", [], seconds, megabytes)

    def equal(self, given: str, right: str) -> bool:
        """Return whether two formulas in LaTeX are equal; False if comparing them takes too much time or memory."""
        return self.holds(right, given)

    def readable(self, right: str, *, number: bool) -> bool:
        """Return whether a gold answer is a formula or, with ``number``, a number."""
        return self.holds(right, None, number)


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """End a worker and its child, unless the worker is known to be gone: its number may be another's by now."""
    if worker.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # dead already, and nobody is left in its group
            os.killpg(worker.pid, signal.SIGKILL)


def require_math() -> None:
    """Check that formulas can be compared here.

    Raises:
        ImportError: math-verify is not installed, or the system cannot fork processes (Windows).
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError(
            "No module named math_verify. Comparing answers as numbers or formulas needs: "
            'pip install "knapsack-rl[math]"'
        )
    if not hasattr(os, "fork"):
        raise ImportError("comparing formulas needs a system that can fork processes, such as Linux or macOS")


def shared_process() -> MathProcess:
    """Return the one worker of the calling process, with the default limits; a process that was forked gets another."""
    return _process_of(os.getpid())


def patient_process() -> MathProcess:
    """Return a worker with so much time that a busy machine does not decide which gold answers can be read."""
    return _process_of(os.getpid(), 20.0)


@functools.cache
def _process_of(pid: int, seconds: float = 0.8) -> MathProcess:
    return MathProcess(seconds)
