"""The public API: exactly these names, each documented and typed."""

from __future__ import annotations

import inspect
import re
import typing

import knapsack_rl as kr
from cases import named_case

PUBLIC = [
    "information_gain",
    "nonzero_gradient_probability",
    "value",
    "Allocation",
    "Certificate",
    "KnapsackAllocator",
    "allocate",
    "AllocationSettings",
    "Session",
    "GroupStatistics",
    "group_advantages",
    "group_statistics",
    "check_engine",
    "RolloutQueue",
]


def callables() -> list[tuple[str, typing.Any]]:
    """Public functions, and the public methods that public classes define."""
    found = []
    for name in PUBLIC:
        member = getattr(kr, name, None)
        if not inspect.isclass(member):
            found.append((name, member))
            continue
        for method, function in vars(member).items():
            if isinstance(function, property):
                function = function.fget  # noqa: PLW2901 - checked by its getter
            elif isinstance(function, (classmethod, staticmethod)):
                function = function.__func__  # noqa: PLW2901
            if inspect.isfunction(function) and (not method.startswith("_") or method == "__init__"):
                found.append((f"{name}.{method}", function))
    return found


def test_the_public_names_are_pinned() -> None:
    """A change here is a change for users: announce it."""
    assert kr.__all__ == PUBLIC


def test_a_star_import_gives_the_public_names() -> None:
    space: dict[str, typing.Any] = {}
    exec("from knapsack_rl import *", space)
    assert set(space) - {"__builtins__"} == set(PUBLIC)


def test_the_version_is_the_distributions() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", kr.__version__)


def test_public_names_are_documented() -> None:
    for name in PUBLIC:
        with named_case(name=name):
            member = getattr(kr, name)
            doc = inspect.getdoc(member)
            assert doc
            assert not doc.startswith(f"{name}(")  # the docstring that a dataclass generates
            assert member.__module__.startswith("knapsack_rl.")


def test_public_functions_and_methods_are_documented_and_typed() -> None:
    for name, function in callables():
        with named_case(name=name):
            dataclass_init = name.endswith("__init__") and function.__qualname__.startswith("__create_fn__")
            if not name.endswith("__init__"):
                assert inspect.getdoc(function), f"{name} has no docstring"
            signature = inspect.signature(function)
            hints = typing.get_type_hints(function)
            for parameter in signature.parameters.values():
                if parameter.name not in ("self", "cls"):
                    assert parameter.name in hints, f"{name}: {parameter.name} has no type"
            assert dataclass_init or "return" in hints, f"{name} has no return type"


def test_optional_switches_are_keyword_only() -> None:
    for function, names in (
        (kr.allocate, ("fallback", "method")),
        (kr.KnapsackAllocator, ("success",)),
        (kr.group_advantages, ("epsilon",)),
    ):
        parameters = inspect.signature(function).parameters
        for name in names:
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
