"""The identity of prompts in verl's data: which rows belong to the same one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knapsack_rl.ids import hash_of
from knapsack_rl.offline.tables import read_columns

logger = logging.getLogger(__name__)

ADVICE = (
    "give every prompt a whole number or string extra_info.{key} that is unique within its data_source, or "
    "identify prompts by their text with ++trainer.v1.sampler.sampler_kwargs.prompt_id=hash"
)


def prompt_ids(rows: Mapping[str, Sequence[Any]], how: str) -> list[str]:
    """Return a stable id for each row of a batch.

    Args:
        rows: columns of verl's batch: ``raw_prompt`` for ``"hash"``, else ``extra_info`` and ``data_source``.
        how: ``"hash"``, or the key of extra_info that holds the id (``"index"``).

    Raises:
        ValueError: a row has no id, an id is not a string or whole number, or a prompt to be hashed holds images.
    """
    if how == "hash":
        return [_hash(prompt) for prompt in _column(rows, "raw_prompt", how)]
    extras = _column(rows, "extra_info", how)
    sources = rows.get("data_source") or [None] * len(extras)
    return [_named(extra, source, how) for extra, source in zip(extras, sources, strict=True)]


def _column(rows: Mapping[str, Sequence[Any]], name: str, how: str) -> Sequence[Any]:
    if name not in rows:
        raise ValueError(f"the batch has no column {name!r}, which prompt_id={how} needs; it has {sorted(rows)}")
    return rows[name]


def _named(extra: Any, source: Any, key: str) -> str:
    given = extra.get(key) if isinstance(extra, Mapping) else None
    if given is not None and hasattr(given, "item"):
        given = given.item()
    if given is None:
        raise ValueError(f"a prompt of data_source {source!r} has no extra_info.{key}; {ADVICE.format(key=key)}")
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise ValueError(f"extra_info.{key} of a prompt of {source!r} is {given!r}; {ADVICE.format(key=key)}")
    return f"{source}/{given}"


def _hash(prompt: Any) -> str:
    for message in prompt if isinstance(prompt, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, (list, tuple)) and any(_not_text(part) for part in content):
            raise ValueError("a prompt with images or sounds cannot be hashed; " + ADVICE.format(key="index"))
    return hash_of(prompt)


def _not_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") != "text"


def check_files(files: str | Sequence[str] | None, how: str) -> None:
    """Refuse training files in which a prompt has no id or shares it with another row, before anything is generated.

    Files that are not on a local disk are only checked batch by batch.

    Raises:
        ValueError: an id is missing, or is in several rows.
    """
    if how == "hash" or not files:
        return
    times: Counter[str] = Counter()
    for name in [files] if isinstance(files, str) else files:
        path = Path(name).expanduser()
        if not path.is_file() or path.suffix not in (".parquet", ".jsonl"):
            logger.info("%s is not checked for repeated prompt ids", name)
            continue
        try:
            times.update(prompt_ids(_identifying_columns(path), how))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    repeated = [prompt_id for prompt_id, n in times.items() if n > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} of {len(times)} prompt ids are in several rows of data.train_files, for example "
            f"{repeated[0]!r} in {times[repeated[0]]}: their histories would be mixed. Keep one row of each prompt; if "
            f"they are different prompts, {ADVICE.format(key=how)}"
        )


def _identifying_columns(path: Path) -> Mapping[str, Sequence[Any]]:
    if path.suffix != ".parquet":
        return read_columns(path)
    from pyarrow import parquet

    wanted = {"data_source", "extra_info"} & set(parquet.read_schema(path).names)
    return parquet.read_table(path, columns=sorted(wanted)).to_pydict()
