"""Checks of reward functions: their results, their time, and the prompt behind a fault."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

from knapsack_rl.trl.deadline import OutOfTime, deadline
from knapsack_rl.trl.identity import prompt_name

EXCERPT = 120


class RewardError(ValueError):
    """A reward function raised, hung or returned something other than rewards; names function, prompt, completion."""


def watched(
    function: Callable[..., Any], name: str, id_column: str, seconds: float | None = None
) -> Callable[..., Any]:
    """Return the reward function with its result checked, its time limited and its faults attributed to a prompt.

    Numbers, booleans and one-element tensors are rewards; ``None`` and NaN mean no reward. To find the prompt behind an
    exception or a hang, the function is called again with one row at a time until it fails again.

    Args:
        function: as TRL calls it; may be asynchronous.
        name: name of the function in errors.
        id_column: column of prompt ids, which errors name if it is there.
        seconds: longest time of a call; None for no limit. A synchronous function needs
            :func:`~knapsack_rl.trl.deadline.can_interrupt`.

    Raises:
        RewardError: raised by the returned function.
    """
    if is_asynchronous(function):

        async def limited_wait(columns: dict[str, Any]) -> Any:
            try:
                async with asyncio.timeout(seconds) as limit:
                    return await function(**columns)
            except TimeoutError as error:
                raise OutOfTime if limit.expired() else error from None

        @wraps(function)
        async def asynchronous(**columns: Any) -> list[float | None]:
            try:
                returned = await limited_wait(columns)
            except (Exception, OutOfTime) as error:
                for row in range(len(columns["prompts"])):
                    try:
                        await limited_wait(_one_row(columns, row))
                    except (Exception, OutOfTime) as again:  # noqa: BLE001 - it is raised as a RewardError
                        raise _error(name, columns, id_column, seconds, again, row) from error
                raise _error(name, columns, id_column, seconds, error) from error
            return _checked(returned, name, columns, id_column)

        return asynchronous

    def limited(columns: dict[str, Any]) -> Any:
        with deadline(seconds):
            return function(**columns)

    @wraps(function)
    def synchronous(**columns: Any) -> list[float | None]:
        try:
            returned = limited(columns)
        except (Exception, OutOfTime) as error:
            for row in range(len(columns["prompts"])):
                try:
                    limited(_one_row(columns, row))
                except (Exception, OutOfTime) as again:  # noqa: BLE001 - it is raised as a RewardError
                    raise _error(name, columns, id_column, seconds, again, row) from error
            raise _error(name, columns, id_column, seconds, error) from error
        return _checked(returned, name, columns, id_column)

    return synchronous


def check_awaited(functions: Sequence[Any], names: Sequence[str], loop: Any) -> None:
    """Refuse an asynchronous reward function that TRL has no event loop for, as it takes it for a synchronous one.

    Args:
        functions: the reward functions.
        names: of the functions.
        loop: TRL's event loop; None if it has none.

    Raises:
        ValueError: it would not be awaited.
    """
    for function, name in zip(functions, names, strict=True):
        if loop is None and is_asynchronous(function):
            raise ValueError(
                f"this release of TRL does not await {name}, an object or a partial; install trl>=1.14, or pass an "
                "async function that calls it"
            )


def is_asynchronous(function: Callable[..., Any]) -> bool:
    """Return whether a call must be awaited: an async function, an object with such a method, a partial of either."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _one_row(columns: dict[str, Any], row: int) -> dict[str, Any]:
    """Return the arguments of a call for one completion; its loggers do nothing, as the first call has logged."""
    size = len(columns["prompts"])
    cut = {
        key: [value[row]] if isinstance(value, list) and len(value) == size else value for key, value in columns.items()
    }
    for logger in ("log_extra", "log_metric"):
        if logger in cut:
            cut[logger] = lambda *arguments, **settings: None
    return cut


def _error(
    name: str,
    columns: dict[str, Any],
    id_column: str,
    seconds: float | None,
    error: BaseException,
    row: int | None = None,
) -> RewardError:
    """Return the error for a fault in a row, or in the whole batch alone if there is no row."""
    fault = f"took more than {seconds:g} s" if isinstance(error, OutOfTime) else f"raised {error!r}"
    if row is None:
        where = f"a batch of {len(columns['prompts'])} completions, but for none of them alone"
    else:
        where = _described(columns, row, id_column)
    return RewardError(f"reward function {name} {fault} for {where}")


def _described(columns: dict[str, Any], row: int, id_column: str) -> str:
    return f"prompt {prompt_name(columns, row, id_column)!r}, completion {_excerpt(columns['completions'][row])}"


def _excerpt(value: Any) -> str:
    text = repr(value if not isinstance(value, str) else value[: EXCERPT + 1])
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "…"


def _checked(returned: Any, name: str, columns: dict[str, Any], id_column: str) -> list[float | None]:
    size = len(columns["prompts"])
    if isinstance(returned, (str, bytes, dict)) or not hasattr(returned, "__iter__"):
        raise RewardError(
            f"reward function {name} returned {_excerpt(returned)} ({type(returned).__name__}); return a list of "
            f"{size} numbers, one per completion"
        )
    values = list(returned)
    if len(values) != size:
        raise RewardError(
            f"reward function {name} returned {len(values)} rewards for {size} completions; return one per completion, "
            "None for one without a reward. Groups differ in size, so do not reshape by num_generations"
        )
    return [
        None if value is None else _number(value, row, name, columns, id_column) for row, value in enumerate(values)
    ]


def _number(value: Any, row: int, name: str, columns: dict[str, Any], id_column: str) -> float:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("text is not a number")
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RewardError(
            f"reward function {name} returned {_excerpt(value)} ({type(value).__name__}) for "
            f"{_described(columns, row, id_column)}; a reward is a number, or None for no reward"
        ) from error
