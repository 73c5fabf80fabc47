"""The identity of prompts: which rows belong to the same one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from knapsack_rl.ids import PromptId, hash_of

logger = logging.getLogger(__name__)


def prompt_key(row: dict[str, Any], id_column: str) -> PromptId:
    """Return the stable identity of a prompt: its id column, else a hash of the prompt itself.

    Raises:
        ValueError: the id is not a string or whole number, or is missing and the prompt holds images.
    """
    given = row.get(id_column)
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, (str, int)):
            raise ValueError(f"column {id_column!r} must hold strings or whole numbers, got {given!r}")
        return given
    if "image" in row or "images" in row:
        raise ValueError(f"prompts with images need an id: add a column {id_column!r} that names each prompt")
    return hash_of(row.get("prompt"))


def keys_of_blocks(rows: list[dict[str, Any]], size: int, id_column: str) -> list[PromptId]:
    """Return the prompt of each block of ``size`` rows, as TRL's sampler draws them.

    Raises:
        ValueError: a block holds several prompts.
    """
    keys = []
    for at in range(0, len(rows), size):
        first, *others = rows[at : at + size]
        key = prompt_key(first, id_column)
        for row in others:
            if row.get("prompt") != first.get("prompt") or prompt_key(row, id_column) != key:
                raise ValueError(
                    f"one block of num_generations={size} rows holds different prompts (prompt {key!r}): the "
                    "data loader broke a group. With an IterableDataset, make every process read whole groups"
                )
        keys.append(key)
    return keys


def rows_by_prompt(keys: list[PromptId], rows: list[dict[str, Any]]) -> dict[PromptId, dict[str, Any]]:
    """Return the first row of each prompt.

    Args:
        keys: (N,) prompt of each row.
        rows: (N,) of the data set.

    Raises:
        ValueError: rows of one id hold different prompts.
    """
    found: dict[PromptId, dict[str, Any]] = {}
    for key, row in zip(keys, rows, strict=True):
        if found.setdefault(key, row).get("prompt") != row.get("prompt"):
            raise ValueError(f"id {key!r} names different prompts in one batch; make ids unique over all sources")
    return found


def prompt_keys(dataset: Any, id_column: str) -> set[PromptId]:
    """Return the identities of all prompts of a data set."""
    columns = [name for name in (id_column, "prompt", "image", "images") if name in (dataset.column_names or [])]
    return {prompt_key(row, id_column) for row in dataset.select_columns(columns)}


def check_ids(dataset: Any, id_column: str) -> None:
    """Refuse an id that names several prompts; their histories would be mixed.

    Raises:
        ValueError: two rows share an id and differ in their prompt.
    """
    if id_column not in (dataset.column_names or []):
        logger.info("no column %r: prompts are identified by a hash of their text", id_column)
        return
    seen: dict[Any, int] = {}
    for position, prompt_id in enumerate(dataset[id_column]):
        if prompt_id is None:
            continue  # identified by its hash
        first = seen.setdefault(prompt_id, position)
        if first != position and dataset[first]["prompt"] != dataset[position]["prompt"]:
            raise ValueError(
                f"column {id_column!r}: id {prompt_id!r} names different prompts (rows {first} and {position}); make "
                "ids unique over all files, for example by putting the source in front"
            )


def check_same_data(dataset: Any, id_column: str, gather: Callable[[list[Any]], list[Any]]) -> None:
    """Compare this process's data set with those of the others, which all call this at the same time.

    Different prompts are allowed, with a warning: every process trains on rows of all.

    Args:
        dataset: of this process.
        id_column: without it prompts are identified by a hash, which cannot clash.
        gather: joins the lists of all processes.

    Raises:
        ValueError: an id names different prompts on two processes; raised on all of them.
    """
    own: dict[PromptId, str] = {}
    if id_column in (dataset.column_names or []):
        own = {i: hash_of(p) for i, p in zip(dataset[id_column], dataset["prompt"], strict=True) if i is not None}
    if len(set(gather([hash_of(list(own.items()))]))) == 1:
        return
    seen: dict[PromptId, str] = {}
    for names in gather([own]):
        for prompt_id, prompt in names.items():
            if seen.setdefault(prompt_id, prompt) != prompt:
                raise ValueError(
                    f"column {id_column!r}: id {prompt_id!r} names different prompts on two processes; give all "
                    "processes the same data set, or make ids unique over all of them"
                )
    logger.warning("the processes have different data sets, together %d prompts; all train on rows of all", len(seen))
