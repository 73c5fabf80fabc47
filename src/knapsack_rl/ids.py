"""Prompt ids: which values are allowed, and an order that depends on the ids alone."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

PromptId = str | int
"""A string or a whole number that names the same prompt in every epoch; ``7`` and ``"7"`` are different prompts."""

LARGEST_ID = 10**300
"""Python refuses to print whole numbers much longer than this, so they could be neither logged nor saved."""


def plain_id(value: Any) -> Any:
    """Return a scalar of numpy, torch or pandas as a value of Python, and anything else as it is."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return value.item()
    return str(value) if isinstance(value, str) else value


def refusal(prompt_id: Any) -> str | None:
    """Return why a value cannot be a prompt id, with a remedy, or None if it can."""
    if isinstance(prompt_id, bool) or not isinstance(prompt_id, (str, int, np.integer)):
        remedy = "decode it" if isinstance(prompt_id, bytes) else "convert it with str() or int()"
        return (
            f"is {prompt_id!r} ({type(prompt_id).__name__}); a prompt id is a string or a whole number that stays the "
            f"same in every epoch: {remedy}"
        )
    if not isinstance(prompt_id, str) and abs(int(prompt_id)) > LARGEST_ID:
        return "is a number of more than 300 digits; give such an id as a string"
    return None


def check_prompt_ids(prompt_ids: Iterable[Any], name: str = "prompt_ids") -> list[PromptId]:
    """Return ids as plain ``str`` and ``int``; integers and strings of numpy, torch and pandas become Python's.

    Args:
        prompt_ids: the ids.
        name: how an error refers to them.

    Raises:
        ValueError: an id is neither a string nor a whole number, or a single string is given instead of several ids.
    """
    if isinstance(prompt_ids, (str, bytes)):
        raise ValueError(f"{name} must be a sequence of ids, got the single string {prompt_ids!r}")
    if not hasattr(prompt_ids, "__iter__") or getattr(prompt_ids, "ndim", 1) == 0:
        raise ValueError(f"{name} must be a sequence of ids, got {prompt_ids!r}")
    ids = list(prompt_ids.tolist() if hasattr(prompt_ids, "tolist") else prompt_ids)
    kinds = {*map(type, ids)}
    if kinds <= {str} or (kinds == {int} and min(ids) >= -LARGEST_ID and max(ids) <= LARGEST_ID):  # the usual cases
        return ids
    for position, prompt_id in enumerate(ids):
        ids[position] = plain_id(prompt_id)
        reason = refusal(ids[position])
        if reason:
            raise ValueError(f"{name}[{position}] {reason}")
    return ids


def check_batch(prompt_ids: Iterable[Any]) -> list[PromptId]:
    """Return the ids of a batch after checking that there is at least one and that none repeats.

    Raises:
        ValueError: the batch is empty, an id repeats, or a value cannot be an id.
    """
    ids = check_prompt_ids(prompt_ids)
    if not ids:
        raise ValueError("prompt_ids is empty; a batch needs at least one prompt")
    if len(set(ids)) < len(ids):
        twice = next(prompt_id for prompt_id, times in Counter(ids).items() if times > 1)
        raise ValueError(
            f"prompt id {twice!r} appears twice in the batch; give every prompt its own id and list it once"
        )
    return ids


def hash_of(content: Any) -> str:
    """Return an id for content without one: text, messages or a whole row, of JSON values, arrays, bytes and dates.

    Raises:
        ValueError: the content holds an object, such as an image, that has no stable text.
    """
    try:
        text = json.dumps(content, sort_keys=True, default=_as_json)
    except TypeError as error:
        raise ValueError(f"the content has no stable hash: {error}") from error
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _as_json(value: Any) -> Any:
    """Return values that JSON lacks as values that it has; ``str`` would cut arrays and show addresses."""
    if hasattr(value, "tolist"):  # arrays, tensors and scalars of numpy, torch and pandas
        return value.tolist()
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": hashlib.blake2b(value, digest_size=16).hexdigest()}
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID, PurePath)):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be hashed")


def numbered(prompt_ids: Sequence[PromptId]) -> tuple[list[PromptId], NDArray[np.int64]]:
    """Return the distinct ids in the order of their first row, and (R,) the index of each row's id among them."""
    place = {prompt_id: k for k, prompt_id in enumerate(dict.fromkeys(prompt_ids))}
    return list(place), np.array([place[prompt_id] for prompt_id in prompt_ids], dtype=np.int64)


def stable_order(prompt_ids: Sequence[PromptId]) -> NDArray[np.float64]:
    """Return (P,) numbers that depend on the ids alone, the same in every process: the last tie-break."""
    crc32 = zlib.crc32
    # Numbers and strings start from different checksums, so 7 and "7" differ.
    order = [
        crc32(i.encode("utf-8", "surrogatepass")) if isinstance(i, str) else crc32(b"%d" % i, 1) for i in prompt_ids
    ]
    return np.array(order, dtype=np.float64)


def in_id_order(prompt_ids: Sequence[PromptId], order: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return (P,) places of distinct ids that sort them by their :func:`stable_order`, and equal ones by the ids."""
    places = np.argsort(order, kind="stable")
    if (np.diff(order[places]) == 0.0).any():
        ranked = sorted(range(len(prompt_ids)), key=lambda k: (order[k], str(prompt_ids[k]), str(type(prompt_ids[k]))))
        places = np.array(ranked)
    return places


def other_type(prompt_id: PromptId) -> PromptId | None:
    """Return the id of the other type that looks the same (``"7"`` for 7 and the reverse), or None."""
    if not isinstance(prompt_id, str):
        return str(prompt_id)
    digits = prompt_id.removeprefix("-")
    if len(digits) > 300 or not (digits.isascii() and digits.isdigit()):
        return None
    number = int(prompt_id)
    return number if str(number) == prompt_id else None


def twin_warning(new: PromptId, known: PromptId) -> str:
    """Explain that an id is new although one that looks the same is known."""
    return (
        f"prompt id {new!r} is new, but {known!r} is known: they differ in type, so observations of {known!r} do not "
        f"count for {new!r}. Give every id the same type in every epoch"
    )
