"""The worker process that compares formulas: ``python -m knapsack_rl.tasks.math_worker MEGABYTES SECONDS``.

Reads a JSON line ``[right, given]`` of LaTeX texts, writes ``1``, ``0``, or ``-`` where it ran out of time or memory.
The process itself only imports sympy, which takes seconds, and forks a child that compares. A child that takes too long
is killed and forked again, which takes hundredths of a second, so no answer waits for the one before it.

Formulas are parsed by math-verify's LaTeX grammar alone: its other way, for plain expressions, hands text to Python's
``eval``. sympy has more places that do, so before the first formula its evaluating parser is replaced by one for
digits, and an audit hook refuses to compile text, to write files, to start processes and to open connections.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

Equal = Callable[[str, str], bool]

OUT = b"-\n"
"""Reply for a formula that ran out of time or memory."""

REFUSED = (
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn"),
    *("subprocess.", "socket.", "shutil.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.truncate", "os.chmod", "os.chown", "os.kill", "ctypes.dlopen", "webbrowser.", "urllib.", "code."),
)
"""Audit events that no comparison of formulas needs, by their beginnings."""


class OutOfTime(BaseException):
    """Not an ``Exception``, so that no handler inside the libraries swallows it."""


def _only_numbers(text: Any, *arguments: Any, **settings: Any) -> Any:
    """Return the number in a text; replaces the evaluating parser that sympy uses for every number given as text."""
    import sympy

    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,400}(\.[0-9]{0,400})?", text.strip()):
        raise ValueError("text is never evaluated")
    return sympy.Float(text.strip()) if "." in text else sympy.Integer(int(text))


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
        raise PermissionError(f"{event} is refused while formulas are compared")


def _limit_memory(megabytes: int) -> None:
    import resource

    size = megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _make_comparison() -> Equal:
    import sympy
    import sympy.physics.units  # parses names when it is loaded, so it comes first
    from sympy import parsing
    from sympy.parsing import sympy_parser

    for module, name in ((sympy_parser, "parse_expr"), (sympy_parser, "eval_expr"), (parsing, "parse_expr")):
        assert hasattr(module, name), f"sympy has no {module.__name__}.{name}: this release is not supported"
        setattr(module, name, _only_numbers)
    _without_generated_code()
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]

    def equal(right: str, given: str) -> bool:
        one, other = (
            parse(f"\\boxed{{{text}}}", latex, fallback_mode="no_fallback", parsing_timeout=None)
            for text in (right, given)
        )
        return bool(one and other and verify(one, other, timeout_seconds=None)) and not far(one[0], other[0])

    def far(one: Any, other: Any) -> bool:
        # math-verify rounds decimals to six places, and takes exact numbers that differ by less than 1e-15 for equal,
        # whatever their size, which makes every tiny number equal to 0.
        both = (one, other)
        if one == other or not all(getattr(number, "is_number", False) for number in both):
            return False
        exact = not any(number.has(sympy.Float) for number in both)
        if exact and any(number.has(sympy.UnevaluatedExpr) for number in both):  # 50% may be 50, too
            return False
        a, b, difference = (number.doit().evalf(20) for number in (one, other, one - other))
        # A difference that is exactly 0 may come out as a number of no significant digit, far below 1e-90.
        return bool(abs(difference) > max((1e-15 if exact else 1e-6) * max(abs(a), abs(b)), 1e-90))

    assert equal("\\frac{1}{2}", "0.5") and equal("x^2-1", "(x-1)(x+1)") and not equal("\\pi", "3.14"), "self-check"
    return equal


def _without_generated_code() -> None:
    """Replace the code that sympy writes and executes for polynomials of several symbols by functions of sympy."""
    from sympy.polys import monomials

    def mulpow(one: tuple[int, ...], other: tuple[int, ...], power: int) -> tuple[int, ...]:
        return tuple(a + b * power for a, b in zip(one, other, strict=True))

    functions: dict[str, Callable[..., Any]] = {"mulpow": mulpow}
    for name in ("mul", "pow", "ldiv", "div", "lcm", "gcd"):
        functions[name] = getattr(monomials, f"monomial_{name}")
    for name, function in functions.items():
        assert hasattr(monomials.MonomialOps, name), f"sympy has no MonomialOps.{name}: this release is not supported"
        setattr(monomials.MonomialOps, name, lambda operations, function=function: function)


class _Child:
    """A copy of this process, sympy loaded, that compares formulas under guard until one takes too much."""

    def __init__(self, equal: Equal, megabytes: int, seconds: float) -> None:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                for own in (0, self._requests, self._replies):
                    os.close(own)
                _compare(equal, requests, replies, megabytes, seconds)
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


def _compare(equal: Equal, requests: int, replies: int, megabytes: int, seconds: float) -> None:
    """Answer requests until the input ends; the life of a child."""

    def out_of_time(number: int, frame: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    _limit_memory(megabytes)
    lines = os.fdopen(requests, "rb")
    sys.addaudithook(_guard)
    for line in lines:
        right, given = json.loads(line)
        try:
            # Most endless work stops here; the parent kills what does not listen, such as one huge multiplication.
            signal.setitimer(signal.ITIMER_REAL, 0.75 * seconds)
            try:
                reply = b"1\n" if equal(right, given) else b"0\n"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
        except (OutOfTime, MemoryError, RecursionError):
            reply = OUT
        except Exception:  # noqa: BLE001 - whatever a parser says of a hostile text, the text is not right
            reply = b"0\n"
        os.write(replies, reply)


def main(megabytes: int, seconds: float) -> None:
    """Answer requests until the input ends."""
    # Replies go to a copy of standard output that no library knows; what libraries print goes nowhere.
    replies = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    sys.setrecursionlimit(2000)
    equal = _make_comparison()
    child = _Child(equal, megabytes, seconds)
    assert child.ask(b'["x+y", "\\\\frac{x^2-y^2}{x-y}"]\n', 60.0) == b"1\n", "self-check under guard and limits"
    os.write(replies, b"ready\n")
    for line in sys.stdin.buffer:
        try:
            reply = child.ask(line, seconds)
        except BrokenPipeError:  # it died while it had nothing to do, so the formula is not to blame
            child.end()
            child = _Child(equal, megabytes, seconds)
            reply = child.ask(line, seconds)
        lost = not reply.endswith(b"\n")
        os.write(replies, OUT if lost else reply)
        if lost:  # the next child starts while the caller continues
            child.end()
            child = _Child(equal, megabytes, seconds)
    child.end()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
