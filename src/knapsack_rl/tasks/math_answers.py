r"""Verifier for MATH-style answers: formulas that are equal though written differently.

Equality of formulas is decided by the package math-verify, which builds on sympy. Neither bounds time or memory, and
parts of both evaluate text as Python, so they run in a process of their own, see
:mod:`knapsack_rl.tasks.math_worker`: it has a memory limit, gets a formula's text and nothing else, and is killed and
forked anew if an answer takes too long. What can be decided without it is: answers equal as text or as numbers.

The answer is the content of the last ``\boxed{}``, else the last line. A completion of more than 100,000 characters or
an answer of more than 512 is wrong without being parsed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from knapsack_rl.tasks.extraction import BOX, MAX_ANSWER, MAX_TEXT, last_boxed, same_length, text_of
from knapsack_rl.tasks.gsm8k import final_number

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Longest start of the worker, which imports sympy; on a busy machine that takes its time."""

GRACE_SECONDS = 5.0
"""How much longer than a formula's time the worker may take to say that the time is over, before it is ended itself."""


class MathVerifier:
    """Compares MATH-style answers; formulas in a worker process, which starts with the first one.

    Use it as a context manager, or call :meth:`close`; the worker also ends with the process that made it. Calls from
    several threads wait for each other.

    Args:
        seconds: wall-clock time per formula, > 0; a formula that takes longer is wrong.
        megabytes: address space of the worker, >= 512; a formula that needs more is wrong.

    Attributes:
        refused: formulas that ran out of time or memory, or killed the worker in another way.

    Raises:
        ImportError: math-verify is not installed, or the system cannot fork processes (Windows).
        ValueError: a limit is out of range.
    """

    def __init__(self, seconds: float = 0.8, megabytes: int = 2048) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError('No module named math_verify. MATH-style answers need: pip install "knapsack-rl[math]"')
        if not hasattr(os, "fork"):
            raise ImportError("MATH-style answers need a system that can fork processes, such as Linux or macOS")
        if not 0.0 < seconds < float("inf") or megabytes < 512:
            raise ValueError(f"seconds must be > 0 and megabytes >= 512, got {seconds} and {megabytes}")
        self.seconds, self.megabytes = seconds, megabytes
        self.refused = 0
        self._worker: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._lock = threading.Lock()

    def is_correct(self, completion: Any, answer: str) -> bool:
        r"""Whether the answer in a completion equals the right one, as text, as a number or as a formula.

        Args:
            completion: text, or messages of which the last one counts; of any length.
            answer: the right answer, or a solution with it in ``\boxed{}``.

        Raises:
            ValueError: the right answer is empty or longer than 512 characters.
        """
        right = _answer(answer)
        if not right:
            raise ValueError(f"answer must hold 1 to {MAX_ANSWER} characters, got {answer[:80]!r}")
        given = _answer(text_of(completion))
        if not given:
            return False
        if given == right:
            return True
        one, other = _number(given), _number(right)
        if one is not None and other is not None:
            return one == other
        with self._lock:
            return self._ask(given, right)

    def start(self) -> None:
        """Start the worker now, so that the first formula need not wait for it."""
        with self._lock:
            self._wait_until_ready()

    def close(self) -> None:
        """End the worker; a later formula starts another."""
        with self._lock:
            self._end()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, given: str, right: str) -> bool:
        worker = self._wait_until_ready()
        reply = self._exchange(worker, json.dumps([right, given]).encode() + b"\n", self.seconds + GRACE_SECONDS)
        if reply not in (b"1\n", b"0\n"):
            self.refused += 1
        if not reply.endswith(b"\n"):  # the worker itself is gone: another starts while the caller goes on
            self._end()
            self._worker = self._launch()
        return reply == b"1\n"

    def _wait_until_ready(self) -> subprocess.Popen[bytes]:
        worker = self._worker or self._launch()
        self._worker = worker
        if not self._ready:
            if self._exchange(worker, b"", START_SECONDS) != b"ready\n":
                self._end()
                raise RuntimeError(
                    f"the process that compares formulas did not start within {START_SECONDS:.0f} s; try: "
                    f"{sys.executable} -m knapsack_rl.tasks.math_worker {self.megabytes}"
                )
            self._ready = True
        return worker

    def _launch(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "knapsack_rl.tasks.math_worker", str(self.megabytes), str(self.seconds)]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        # A session of its own, so that it can be ended together with its child. No text of a model is in the command.
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing, start_new_session=True)  # noqa: S603

    @staticmethod
    def _exchange(worker: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
        """Send a line and read one; killing the worker after ``seconds`` ends the wait with an empty reply."""
        assert worker.stdin is not None and worker.stdout is not None
        clock = threading.Timer(seconds, _kill, (worker,))
        clock.start()
        try:
            worker.stdin.write(request)
            worker.stdin.flush()
            return worker.stdout.readline(16)
        except BrokenPipeError:
            return b""
        finally:
            clock.cancel()

    def _end(self) -> None:
        worker, self._worker, self._ready = self._worker, None, False
        if worker is None:
            return
        _kill(worker)
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # an unsent request; there is nobody left to read it
                logger.debug("the worker was gone before its request was sent")


def _kill(worker: subprocess.Popen[bytes]) -> None:
    """End a worker and its child, unless the worker is known to be gone: its number may be another's by now."""
    if worker.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # dead already, and nobody is left in its group
            os.killpg(worker.pid, signal.SIGKILL)


def _answer(text: str) -> str:
    """The answer in a text without white space and dollar signs around it; empty where there is none."""
    if len(text) > MAX_TEXT:
        return ""
    found = (last_boxed(text) or "") if BOX in text else text.rstrip().rpartition("\n")[2]
    found = found.strip().strip("$").strip()
    return found if len(found) <= MAX_ANSWER else ""


def _number(answer: str) -> Any:
    """An answer that is nothing but a number, as a fraction; None for any other."""
    return final_number(f"#### {answer}") if set(answer) <= set("0123456789.,/-+") else None


_shared: list[MathVerifier] = []
_shared_lock = threading.Lock()


def math_reward(completions: Sequence[Any], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1.0 where the completion's answer equals the right one, else 0.0; one worker per process.

    Args:
        completions: generated texts or messages.
        answer: right answers, one per completion.
        **kwargs: the other columns and objects TRL passes; not used.

    Raises:
        ValueError: the numbers of completions and answers differ, or an answer is empty or too long.
        ImportError: math-verify is not installed.
    """
    same_length(completions, answer)
    with _shared_lock:
        if not _shared:
            _shared.append(MathVerifier())
    return [float(_shared[0].is_correct(text, right)) for text, right in zip(completions, answer, strict=True)]
