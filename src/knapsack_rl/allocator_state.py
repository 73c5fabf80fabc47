"""The header of an allocator's state: what it holds, by version, its checks, and what an equal allocator is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from knapsack_rl.allocation.value import ValueLike
from knapsack_rl.estimation.named import make_estimator
from knapsack_rl.estimation.protocol import Estimator
from knapsack_rl.groups import SuccessRule

STATE_VERSION = 3
"""Raised whenever what a state holds changes; states of other versions are refused."""

STATE_FORMAT = "knapsack-rl allocator"

COUNTERS = ("visits_since_refit", "prompts_at_refit", "degraded_batches", "unscored_rollouts", "allocation_failures")
"""Whole numbers of an allocator that its state holds."""


def check_header(header: Any) -> Mapping[str, Any]:
    """Refuse a header that is foreign, of another version or incomplete.

    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(header, Mapping) or header.get("format") != STATE_FORMAT:
        found = header.get("format") if isinstance(header, Mapping) else header
        raise ValueError(f"this is no allocator state: its format is {found!r}, expected {STATE_FORMAT!r}")
    version = header.get("version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"the allocator state names no version, got {version!r}")
    if version != STATE_VERSION:
        remedy = "upgrade knapsack-rl" if version > STATE_VERSION else "start a new allocator"
        raise ValueError(f"the state has version {version}, this package reads version {STATE_VERSION}; {remedy}")
    kinds: dict[str, Any] = {"settings": dict, "min_rollouts": int, "max_rollouts": int} | dict.fromkeys(COUNTERS, int)
    for name in ("estimator", "success", "budget_unit", "value", *kinds):
        if name not in header:
            raise ValueError(f"the allocator state lacks {name!r} in its header")
        if name in kinds and not isinstance(header[name], kinds[name]):
            raise ValueError(f"{name!r} of the allocator state must be {kinds[name].__name__}, got {header[name]!r}")
        if name in COUNTERS and header[name] < 0:
            raise ValueError(f"{name!r} of the allocator state must be >= 0, got {header[name]}")
    return header


def check_same_estimator(header: Mapping[str, Any], name: str | None, settings: dict[str, Any]) -> None:
    """Refuse the state of another estimator than the one of this name and these settings.

    Raises:
        ValueError: it is another.
    """
    given, own = (header["estimator"], header["settings"]), (name, settings)
    if given[0] == name is not None:
        # An older version may not have known every setting: those have their defaults.
        given = (name, make_estimator(name, **given[1]).settings())
    if given != own:
        raise ValueError(f"the state belongs to estimator {given}, this allocator uses {own}; make it with the same")


def arguments_of(
    header: Mapping[str, Any], *, success: SuccessRule | None, estimator: Estimator | None, value: ValueLike | None
) -> dict[str, Any]:
    """Arguments of an allocator that the state fits: those given, else the saved ones.

    Raises:
        ValueError: one was a function or an object, which no state holds, and is not given.
    """
    success = header["success"] if success is None else success
    if success is None:
        raise ValueError("the state was saved with a success function; pass it again as success=...")
    value = header["value"] if value is None else value
    if value is None:
        raise ValueError("the state was saved with a value function of your own; pass it again as value=...")
    name, settings = (header["estimator"], header["settings"]) if estimator is None else (estimator, {})
    if name is None:
        raise ValueError("the state was saved with an estimator object; pass an equal one as estimator=...")
    kept = {key: header[key] for key in ("min_rollouts", "max_rollouts", "budget_unit")}
    return {"estimator": name, "success": success, "value": value} | kept | settings


def section(arrays: Any, prefix: str) -> dict[str, np.ndarray]:
    """The arrays under a prefix, without it.

    Raises:
        ValueError: they are no arrays by name.
    """
    if not isinstance(arrays, Mapping):
        raise ValueError(f"the arrays of the allocator state must be a mapping, got {type(arrays).__name__}")
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
