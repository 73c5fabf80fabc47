r"""The worker process that compares formulas: ``python -m knapsack_rl.tasks.math_worker MEGABYTES SECONDS``.

A request is a JSON line ``[right, given]`` of LaTeX texts, or ``[right, null, number]``: can this gold answer be read,
as a number if ``number`` is true? See :mod:`knapsack_rl.tasks.guarded_worker` for replies, limits and the guard.

Formulas are parsed by math-verify's LaTeX grammar alone: its other way, for plain expressions, hands text to Python's
``eval``. sympy has more places that do, so before the first formula its evaluating parser is replaced by one for
digits.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from knapsack_rl.tasks.guarded_worker import own_replies, serve

GOLDS = 1024
"""Gold answers that a worker remembers as formulas, so that each is parsed once for all rollouts of its prompt."""

_SYMBOL_AT_END = re.compile(r"(?:^|[^A-Za-z\\])[A-Za-z]\s*$")


def _only_numbers(text: Any, *arguments: Any, **settings: Any) -> Any:
    """Return the number in a text; replaces the evaluating parser that sympy uses for every number given as text."""
    import sympy

    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,400}(\.[0-9]{0,400})?", text.strip()):
        raise ValueError("text is never evaluated")
    return sympy.Float(text.strip()) if "." in text else sympy.Integer(int(text))


def _make_check() -> Callable[..., bool]:
    import sympy
    import sympy.physics.units  # parses names when it is loaded, so it comes first
    from sympy import parsing
    from sympy.parsing import sympy_parser

    for module, name in ((sympy_parser, "parse_expr"), (sympy_parser, "eval_expr"), (parsing, "parse_expr")):
        assert hasattr(module, name), f"sympy has no {module.__name__}.{name}: this release is not supported"
        setattr(module, name, _only_numbers)
    _without_generated_code()
    from math_verify import LatexExtractionConfig, parse, verify

    units = LatexExtractionConfig()
    # math-verify takes a last letter for a unit: it reads 3t as 3, and cannot read a+b+c. Units of one letter are rare.
    symbols = LatexExtractionConfig(normalization_config=replace(units.normalization_config, units=False))

    def read(text: str) -> list[Any]:
        config = symbols if _SYMBOL_AT_END.search(text) else units
        found = parse(f"\\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)
        return list(found)

    read_gold = functools.lru_cache(maxsize=GOLDS)(read)

    def check(right: str, given: str | None, number: bool = False) -> bool:
        one = read_gold(right)
        if given is None:
            return bool(one) and (not number or bool(getattr(one[0], "is_number", False)))
        other = read(given)
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

    assert check("\\frac{1}{2}", "0.5") and check("x^2-1", "(x-1)(x+1)") and not check("\\pi", "3.14"), "self-check"
    return check


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


def main(megabytes: int, seconds: float) -> None:
    """Answer requests until the input ends."""
    replies = own_replies()
    sys.setrecursionlimit(2000)
    serve(_make_check(), ["x+y", "\\frac{x^2-y^2}{x-y}"], replies, megabytes, seconds)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
