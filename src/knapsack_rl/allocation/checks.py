"""Array types, and checks of arguments shared by all parts of the package."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LARGEST_AMOUNT = 1e300
"""Leaves room for the sum of 1e8 items."""


RESOLUTION = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
"""Relative distance of neighbouring numbers in floating-point types whose rounding is visible beside float64."""


def as_float64(values: Any) -> tuple[FloatArray, float]:
    """Return numbers as float64, and the resolution of the type that they come in (0 for one as fine as float64).

    Tensors of any type and device, lists of them and tensors that require a gradient are converted without importing
    their library. None becomes NaN.

    Raises:
        TypeError: an entry is not a number.
        ValueError: the entries have no common shape.
    """
    if isinstance(values, (list, tuple)) and any(hasattr(kind, "detach") for kind in {*map(type, values)}):
        parts = [as_float64(value) for value in values]
        return np.array([part.item() for part, _ in parts]), max(resolution for _, resolution in parts)
    given = values if hasattr(values, "dtype") else np.asarray(values)
    kind = str(given.dtype).rpartition(".")[2]  # a tensor's is "torch.bfloat16"
    if kind.startswith("complex"):
        raise TypeError(f"type {kind} does not hold real numbers")
    array = np.asarray(given.detach().cpu().double() if hasattr(given, "detach") else given)
    if array.dtype.kind not in "biufO" and kind not in RESOLUTION:
        raise TypeError(f"type {kind} does not hold numbers")
    return array.astype(np.float64, copy=False), RESOLUTION.get(kind, 0.0)


def check_success_rates(success_rates: ArrayLike, *, allow_nan: bool = False) -> FloatArray:
    """Return success rates as float64.

    Args:
        success_rates: any shape, entries in [0, 1].
        allow_nan: whether NaN is allowed; it marks a prompt never seen.

    Raises:
        ValueError: an entry is not a number in [0, 1], or is NaN where NaN is not allowed.
    """
    try:
        rates, _ = as_float64(success_rates)
    except (TypeError, ValueError) as error:
        raise ValueError(f"success_rates must be numbers in [0, 1], got {success_rates!r}") from error
    valid = (rates >= 0.0) & (rates <= 1.0)
    if allow_nan:
        valid |= np.isnan(rates)
    if not valid.all():
        where = tuple(int(k) for k in np.argwhere(~valid)[0])
        hint = "NaN marks an unseen prompt" if allow_nan else "NaN is allowed only in allocate, for unseen prompts"
        raise ValueError(f"success_rates{list(where)} is {rates[where]!r}; allowed are numbers in [0, 1] ({hint})")
    return rates


def check_counts(counts: ArrayLike) -> IntArray:
    """Return rollout counts as int64.

    Raises:
        ValueError: an entry is negative, fractional or not a number.
    """
    array = np.asarray(counts)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"counts must be whole numbers >= 0, got {counts!r}")
    with np.errstate(invalid="ignore"):  # the cast of NaN is caught just below
        whole = array.astype(np.int64)
    if array.size and not ((whole == array) & (whole >= 0)).all():
        first = array[~((whole == array) & (whole >= 0))].flat[0]
        raise ValueError(f"counts must be whole numbers >= 0, got {first!r}")
    return whole


def check_whole(name: str, number: Any, *, minimum: int, maximum: int | None = None) -> int:
    """Return a whole number as int.

    Raises:
        ValueError: ``number`` is not an integer, is a bool, is below ``minimum`` or above ``maximum``.
    """
    whole = isinstance(number, (int, np.integer)) and not isinstance(number, (bool, np.bool_))
    if not whole or number < minimum or (maximum is not None and number > maximum):
        allowed = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} must be a whole number {allowed}, got {number!r}")
    return int(number)


def check_amounts(values: ArrayLike, name: str, largest: float = LARGEST_AMOUNT) -> FloatArray:
    """Return amounts (counts, lengths, work) as a float64 vector.

    Args:
        values: (n,) numbers from 0 to ``largest``.
        name: their name in an error.
        largest: largest amount allowed.

    Raises:
        ValueError: they are not one-dimensional, or an entry is out of range or NaN.
    """
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} has shape {vector.shape}; allowed: one dimension; flatten it first")
    bad = ~((vector >= 0.0) & (vector <= largest))  # true for NaN
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"{name}[{i}] is {vector[i]}; allowed: numbers from 0 to {largest:g}; correct that entry")
    return vector


LARGEST_STEP = 2**24
"""Rollouts of one step; tables of values grow with it, and a mistaken number must not fill the memory."""


def check_step_budget(budget: Any) -> int:
    """Return the rollouts of a step as int.

    Raises:
        ValueError: ``budget`` is not a whole number from 0 to 2^24.
    """
    number = check_whole("budget", budget, minimum=0)
    if number > LARGEST_STEP:
        raise ValueError(f"budget must be at most {LARGEST_STEP} rollouts a step, got {budget}")
    return number
