"""Reward functions under watch: what they may return, and which prompt a fault belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from knapsack_rl.trl.identity import prompt_key

EXCERPT = 120


class RewardError(ValueError):
    """A reward function raised, or returned something that is no reward; names function, prompt and completion."""


def watched(function: Callable[..., Any], name: str, id_column: str) -> Callable[..., Any]:
    """The reward function, with its result checked and its faults told apart by prompt.

    Numbers, booleans and one-element tensors are rewards; ``None`` and NaN stand for no reward. To find the prompt
    behind an exception the function is called again with one row at a time until it raises.

    Args:
        function: as TRL calls it; may be asynchronous.
        name: what an error calls it.
        id_column: column of prompt ids, named in errors if it is there.

    Raises:
        RewardError: by the function returned.
    """
    call = getattr(function, "__call__", None)  # noqa: B004 - the method itself may be asynchronous
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call):

        @wraps(function)
        async def asynchronous(**columns: Any) -> list[float | None]:
            try:
                returned = await function(**columns)
            except Exception as error:
                found = None
                for row in range(len(columns["prompts"])):
                    try:
                        await function(**_one_row(columns, row))
                    except Exception as again:  # noqa: BLE001 - told below, with the first one as its cause
                        found = row, again
                        break
                raise _raised(name, columns, id_column, error, found) from error
            return _checked(returned, name, columns, id_column)

        return asynchronous

    @wraps(function)
    def synchronous(**columns: Any) -> list[float | None]:
        try:
            returned = function(**columns)
        except Exception as error:
            found = None
            for row in range(len(columns["prompts"])):
                try:
                    function(**_one_row(columns, row))
                except Exception as again:  # noqa: BLE001 - told below, with the first one as its cause
                    found = row, again
                    break
            raise _raised(name, columns, id_column, error, found) from error
        return _checked(returned, name, columns, id_column)

    return synchronous


def _one_row(columns: dict[str, Any], row: int) -> dict[str, Any]:
    """The arguments of a call about one completion; nothing is logged twice."""
    size = len(columns["prompts"])
    cut = {
        key: [value[row]] if isinstance(value, list) and len(value) == size else value for key, value in columns.items()
    }
    for logger in ("log_extra", "log_metric"):
        if logger in cut:
            cut[logger] = lambda *arguments, **settings: None
    return cut


def _raised(
    name: str, columns: dict[str, Any], id_column: str, error: Exception, found: tuple[int, Exception] | None
) -> RewardError:
    if found is None:
        return RewardError(
            f"reward function {name} raised {error!r} for a batch of {len(columns['prompts'])} completions, and for "
            "none of them alone"
        )
    row, again = found
    return RewardError(f"reward function {name} raised {again!r} for {_described(columns, row, id_column)}")


def _described(columns: dict[str, Any], row: int, id_column: str) -> str:
    ids = columns.get(id_column)
    prompt = columns["prompts"][row]
    key = ids[row] if isinstance(ids, Sequence) and ids[row] is not None else prompt_key({"prompt": prompt}, id_column)
    return f"prompt {key!r}, completion {_excerpt(columns['completions'][row])}"


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
            raise TypeError("text is no number")
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RewardError(
            f"reward function {name} returned {_excerpt(value)} ({type(value).__name__}) for "
            f"{_described(columns, row, id_column)}; a reward is a number, or None where there is none"
        ) from error
