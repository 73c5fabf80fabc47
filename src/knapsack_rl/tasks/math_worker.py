"""The process that compares formulas: ``python -m knapsack_rl.tasks.math_worker MEGABYTES SECONDS``.

Reads a JSON line ``[right, given]`` of LaTeX texts, writes ``1``, ``0``, or ``-`` where it ran out of time or memory.

Formulas are parsed by math-verify's LaTeX grammar alone: its other way, for plain expressions, hands text to Python's
``eval``. sympy has more places that do, so before the first formula its evaluating parser is replaced by one for
digits, and an audit hook refuses to compile text, to write files, to start processes and to open connections.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from typing import Any

REFUSED = (
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn"),
    *("subprocess.", "socket.", "shutil.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.truncate", "os.chmod", "os.chown", "os.kill", "ctypes.dlopen", "webbrowser.", "urllib.", "code."),
)
"""Audit events that no comparison of formulas needs, by their beginnings."""


class OutOfTime(BaseException):
    """Not an ``Exception``, so that no handler inside the libraries swallows it."""


def _only_numbers(text: Any, *arguments: Any, **settings: Any) -> Any:
    """In place of sympy's evaluating parser, which sympy uses for every number that it is given as text."""
    import sympy

    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,400}(\.[0-9]{0,400})?", text.strip()):
        raise ValueError("text is never evaluated")
    return sympy.Float(text.strip()) if "." in text else sympy.Integer(int(text))


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    refused = event.startswith(REFUSED)
    if event == "compile":
        refused = arguments[1] == "<string>"
    elif event == "exec":
        refused = getattr(arguments[0], "co_filename", "") == "<string>"
    elif event == "open":
        mode, flags = arguments[1] or "", arguments[2]
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        refused = any(letter in mode for letter in "wax+") or bool(isinstance(flags, int) and flags & writing)
    if refused:
        raise PermissionError(f"{event} is refused while formulas are compared")


def _limit_memory(megabytes: int) -> None:
    try:
        import resource
    except ImportError:  # no such limits on Windows; time stays bounded
        return
    size = megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _make_comparison() -> Any:
    import sympy.physics.units  # noqa: F401 - parses names of its own when loaded, so it comes first
    from sympy import parsing
    from sympy.parsing import sympy_parser

    for module, name in ((sympy_parser, "parse_expr"), (sympy_parser, "eval_expr"), (parsing, "parse_expr")):
        assert hasattr(module, name), f"sympy has no {module.__name__}.{name}: this release is not supported"
        setattr(module, name, _only_numbers)
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]

    def equal(right: str, given: str) -> bool:
        one, other = (
            parse(f"\\boxed{{{text}}}", latex, fallback_mode="no_fallback", parsing_timeout=None)
            for text in (right, given)
        )
        return bool(one and other and verify(one, other, timeout_seconds=None))

    assert equal("\\frac{1}{2}", "0.5") and equal("x^2-1", "(x-1)(x+1)") and not equal("\\pi", "3.14"), "self-check"
    return equal


def main(megabytes: int, seconds: float) -> None:
    """Answer requests until the input ends."""
    # Replies go to a copy of standard output that no library knows; what libraries print goes nowhere.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    sys.setrecursionlimit(2000)
    _limit_memory(megabytes)
    equal = _make_comparison()
    sys.addaudithook(_guard)

    def out_of_time(number: int, frame: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    replies.write("ready\n")
    for line in sys.stdin:
        right, given = json.loads(line)
        try:
            # Most endless work stops here; the parent kills what does not listen, such as one huge multiplication.
            signal.setitimer(signal.ITIMER_REAL, 0.75 * seconds)
            try:
                reply = "1" if equal(right, given) else "0"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
        except (OutOfTime, MemoryError, RecursionError):
            reply = "-"
        except Exception:  # noqa: BLE001 - whatever a parser says of a hostile text, the text is not right
            reply = "0"
        replies.write(reply + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
