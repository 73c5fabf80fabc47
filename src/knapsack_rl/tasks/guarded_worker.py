"""What every worker that checks answers shares: a child that is killed when it takes too long, and a guard.

A worker reads JSON lines, each a list of arguments of its check, and writes ``1``, ``0``, or ``-`` where the check ran
out of time or memory. The worker itself only imports libraries, which takes seconds, and forks a child that checks. A
child that takes too long is killed and forked again, which takes hundredths of a second, so no answer waits for the one
before it.

In the child an audit hook refuses to compile text, to write files, to start processes and to open connections.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

Check = Callable[..., bool]

OUT = b"-\n"
"""Reply for a check that ran out of time or memory."""

REFUSED = (
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn"),
    *("subprocess.", "socket.", "shutil.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.truncate", "os.chmod", "os.chown", "os.kill", "ctypes.dlopen", "webbrowser.", "urllib.", "code."),
)
"""Audit events that no comparison of formulas needs, by their beginnings."""


class OutOfTime(BaseException):
    """Not an ``Exception``, so that no handler inside the libraries swallows it."""


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    refused = event.startswith(REFUSED)
    if event in ("compile", "exec"):  # code of a module has the path of its file, all other was made from text
        name = arguments[1] if event == "compile" else getattr(arguments[0], "co_filename", "")
        refused = not (isinstance(name, str) and name.startswith("/"))
    elif event == "open":
        mode, flags = arguments[1] or "", arguments[2]
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        refused = any(letter in mode for letter in "wax+") or bool(isinstance(flags, int) and flags & writing)
    if refused:
        raise PermissionError(f"{event} is refused while answers are checked")


def _limit_memory(megabytes: int) -> None:
    import resource

    size = megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class _Child:
    """A copy of this process, sympy loaded, that checks under guard until one check takes too much."""

    def __init__(self, check: Check, megabytes: int, seconds: float) -> None:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                for own in (0, self._requests, self._replies):
                    os.close(own)
                _answer(check, requests, replies, megabytes, seconds)
            except BaseException:  # noqa: BLE001 - printed, and then the child ends without its parent's clean-up
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(requests)
        os.close(replies)

    def ask(self, line: bytes, seconds: float) -> bytes:
        """Return the reply to a request; it is incomplete if ``seconds`` have passed or the child has died."""
        os.write(self._requests, line)
        ready = select.select([self._replies], [], [], seconds)[0]
        return os.read(self._replies, 2) if ready else b""

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._requests)
        os.close(self._replies)


def _answer(check: Check, requests: int, replies: int, megabytes: int, seconds: float) -> None:
    """Answer requests until the input ends; the life of a child."""

    def out_of_time(number: int, frame: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    _limit_memory(megabytes)
    lines = os.fdopen(requests, "rb")
    sys.addaudithook(_guard)
    for line in lines:
        arguments = json.loads(line)
        try:
            # Most endless work stops here; the parent kills what does not listen, such as one huge multiplication.
            signal.setitimer(signal.ITIMER_REAL, 0.75 * seconds)
            try:
                reply = b"1\n" if check(*arguments) else b"0\n"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
        except (OutOfTime, MemoryError, RecursionError):
            reply = OUT
        except Exception:  # noqa: BLE001 - whatever a check says of a hostile text, the text is not right
            reply = b"0\n"
        os.write(replies, reply)


def own_replies() -> int:
    """Return a copy of standard output that no library knows; what libraries print goes nowhere from here on."""
    replies = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    return replies


def serve(check: Check, trial: list[Any], replies: int, megabytes: int, seconds: float) -> None:
    """Answer requests until the input ends.

    Args:
        check: called in the child with the arguments of a request.
        trial: arguments for which the check is true, as a self-check under guard and limits.
        replies: of :func:`own_replies`.
        megabytes: address space of the child.
        seconds: wall-clock time of a check.
    """
    child = _Child(check, megabytes, seconds)
    assert child.ask(json.dumps(trial).encode() + b"\n", 60.0) == b"1\n", "self-check under guard and limits"
    os.write(replies, b"ready\n")
    for line in sys.stdin.buffer:
        try:
            reply = child.ask(line, seconds)
        except BrokenPipeError:  # it died while it had nothing to do, so the answer is not to blame
            child.end()
            child = _Child(check, megabytes, seconds)
            reply = child.ask(line, seconds)
        lost = not reply.endswith(b"\n")
        os.write(replies, OUT if lost else reply)
        if lost:  # the next child starts while the caller continues
            child.end()
            child = _Child(check, megabytes, seconds)
    child.end()
