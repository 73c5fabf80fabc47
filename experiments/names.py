"""Text with figures by name in double braces: ``held-out accuracy {{compute: knapsack, accuracy}}``."""

from __future__ import annotations

import re
from collections.abc import Callable

_NAME = re.compile(r"\{\{(.+?)\}\}")


def fill(text: str, figure: Callable[[str], str]) -> str:
    """Put figures in the place of their names.

    Args:
        text: with names in double braces.
        figure: maps a name to its text.

    Raises:
        ValueError: from ``figure``, for an unknown name.
    """
    return _NAME.sub(lambda found: figure(found[1]), text)


def all_names(text: str) -> list[str]:
    """The names in a text, in order."""
    return _NAME.findall(text)


def first_name(text: str) -> str:
    """The first name in a text.

    Raises:
        ValueError: the text names no figure.
    """
    found = all_names(text)
    if not found:
        raise ValueError(f"{text!r} must name a figure in double braces")
    return found[0]
