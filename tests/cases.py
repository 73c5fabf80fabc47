"""Help for tests that loop over cases: an assertion must name the case that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def message_of(kind: type[Exception], call: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
    """Return the message of the error that a call must raise."""
    try:
        found = call(*arguments, **settings)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} for {arguments} {settings}: returned {found!r}")
