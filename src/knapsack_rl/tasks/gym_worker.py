"""The worker process that makes and scores problems of reasoning-gym.

``python -m knapsack_rl.tasks.gym_worker MEGABYTES SECONDS TASK SIZE KNOBS``, knobs as JSON. It makes all problems once,
writes a JSON line ``[question, answer]`` for each and ``ready``. A request is ``[index, answer]``: does the task's own
verifier give the full score? See :mod:`knapsack_rl.tasks.guarded_worker` for replies, limits and the guard.

Nine of these verifiers evaluate an answer as Python, five of them by sympy's parser. Both are replaced by arithmetic on
the syntax tree, and the guard refuses what is left.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import operator
import os
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from knapsack_rl.tasks.guarded_worker import own_replies, serve

SEED = 0
FULL_SCORE = 1.0

_NOT_A_NUMBER = re.compile(r"(?<![a-z])(?:nan|inf(?:inity)?)j?(?![a-z])", re.IGNORECASE)
_OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_NAMES = (
    *("Integer", "Float", "Rational", "Symbol", "factorial", "sqrt", "exp", "log", "ln", "pi", "E", "I", "Abs"),
    *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh"),
    "atanh",
)
"""Of sympy, what an answer may contain."""


COIN_TOLERANCE = Fraction(1, 10_000)
"""Largest error of a probability in ``coin_flip``, as in its own verifier."""


def has_full_score(problems: Any, entry: dict[str, Any], answer: str, name: str = "") -> bool:
    """Return whether the task's verifier gives an answer the full score, which must be a finite number.

    Some verifiers measure a distance, and take one that is not a number for none: an answer that is no number is wrong
    unless the right one is. ``coin_flip`` gives the full score to every beginning of the right number, such as ``0``:
    the answer must also be near.
    """
    right = str(entry["answer"])
    if _NOT_A_NUMBER.search(answer) and not _NOT_A_NUMBER.search(right):
        return False
    score = float(problems.score_answer(answer, entry))
    if not (math.isfinite(score) and score >= FULL_SCORE):
        return False
    return name != "coin_flip" or abs(Fraction(answer.replace(",", "")) - Fraction(right)) <= COIN_TOLERANCE


def value_of(code: str, names: dict[str, Any]) -> Any:
    """Return the value of arithmetic written as Python: lists, numbers, operators and known names alone.

    Raises:
        ValueError: the text holds anything else.
    """
    import sympy

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str() as constant):
                return constant
            case ast.List(elts=elements):
                return list(map(value, elements))
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Name(id=name) if name in _NAMES:
                return getattr(sympy, name)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _NAMES:
                return getattr(sympy, name)(*map(value, arguments))
            case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _OPERATIONS:
                return _OPERATIONS[type(sign)](value(operand))
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATIONS:
                return _OPERATIONS[type(sign)](value(left), value(right))
        raise ValueError(f"{type(node).__name__} is not arithmetic")

    # The guard lets pass what has the name of a file; a syntax tree is not code.
    return value(ast.parse(code.strip(), filename=str(Path(__file__).resolve()), mode="eval").body)


def _replace_evaluation() -> None:
    """Let reasoning-gym and sympy's parser compute with syntax trees, without an import statement for sympy's names."""
    import sympy
    from sympy.parsing import sympy_parser

    public = {name: getattr(sympy, name) for name in sympy.__all__}

    def add_names(statement: str, names: dict[str, Any]) -> None:
        names.update(public)

    assert hasattr(sympy_parser, "eval_expr"), "sympy has no eval_expr: this release is not supported"
    sympy_parser.eval_expr = lambda code, local_dict, global_dict: value_of(code, local_dict)
    sympy_parser.exec = add_names  # the parser calls it for "from sympy import *" alone
    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym."):
            module.eval = lambda code: value_of(code, {})  # type: ignore[attr-defined]


def main(megabytes: int, seconds: float, name: str, size: int, knobs: dict[str, Any]) -> None:
    """Write the problems, then answer requests until the input ends."""
    replies = own_replies()
    import reasoning_gym

    problems = reasoning_gym.create_dataset(name, seed=SEED, size=size, **knobs)
    entries = []
    for index in range(size):
        entries.append(problems[index])
        os.write(replies, json.dumps([str(entries[-1]["question"]), str(entries[-1]["answer"])]).encode() + b"\n")
    _replace_evaluation()

    def check(index: int, answer: str) -> bool:
        return index < 0 or has_full_score(problems, entries[index], answer, name)

    for entry in entries[:4]:  # what a verifier loads when it is first called, it loads before there is a guard
        with contextlib.suppress(
            Exception
        ):  # a verifier that fails on its own answer fails on all, which are wrong then
            problems.score_answer(str(entry["answer"]), entry)
    serve(check, [-1, ""], replies, megabytes, seconds)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5]))
