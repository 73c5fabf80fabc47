"""Help for tests that loop over cases: an assertion must name the case that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def named_case(**values: Any) -> Iterator[None]:
    """Name a case of a loop in the error of whatever fails inside."""
    try:
        yield
    except BaseException as error:  # pytest's own failures are not of the class Exception
        error.add_note(f"case: {', '.join(f'{name}={value!r}' for name, value in values.items())}")
        raise


def message_of(kind: type[Exception], call: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
    """Return the message of the error that a call must raise."""
    try:
        found = call(*arguments, **settings)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} for {arguments} {settings}: returned {found!r}")
