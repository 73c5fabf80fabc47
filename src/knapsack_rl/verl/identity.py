"""The identity of prompts in verl's data: which rows belong to the same one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knapsack_rl.ids import hash_of, plain_id, refusal
from knapsack_rl.offline.tables import read_columns

logger = logging.getLogger(__name__)

ADVICE = (
    "give every prompt a whole number or string extra_info.{key} that is unique within its data_source, or "
    "identify prompts by their text with ++trainer.v1.sampler.sampler_kwargs.prompt_id=hash"
)


UNHASHED = "a prompt with images or sounds cannot be hashed; " + ADVICE.format(key="index")

SEEN = ("raw_prompt", "data_source", "reward_model", "extra_info", "agent_name", "tools_kwargs", "interaction_kwargs")
"""Columns of verl's batch that the rollout or the reward sees."""

MEDIA = ("images", "videos", "audios")
"""Columns of a training file that verl puts into the prompt."""


def prompt_ids(rows: Mapping[str, Sequence[Any]], how: str) -> list[str]:
    """Return a stable id for each row of a batch.

    Args:
        rows: columns of verl's batch: :data:`SEEN` for ``"hash"``, else ``extra_info`` and ``data_source``.
        how: ``"hash"``, or the key of extra_info that holds the id (``"index"``).

    Raises:
        ValueError: a row has no id, an id is not a string or whole number, or a prompt to be hashed holds images.
    """
    if how == "hash":
        return [_hash(rows, row) for row in range(len(_column(rows, "raw_prompt", how)))]
    extras = _column(rows, "extra_info", how)
    sources = rows.get("data_source") or [None] * len(extras)
    return [_named(extra, source, how) for extra, source in zip(extras, sources, strict=True)]


def apart(ids: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the ids of a batch with a hash behind those of rows that differ from the first row of their id.

    Rows with images, which cannot be hashed, count as the same.

    Args:
        ids: (B,) of the rows.
        rows: columns of verl's batch.
    """
    times, found = Counter(ids), list(ids)
    first: dict[str, str] = {}
    for row, prompt_id in enumerate(ids):
        if times[prompt_id] > 1:
            try:
                content = _hash(rows, row)
            except ValueError:
                continue
            if first.setdefault(prompt_id, content) != content:
                found[row] = f"{prompt_id}/{content}"
    return found


def _column(rows: Mapping[str, Sequence[Any]], name: str, how: str) -> Sequence[Any]:
    if name not in rows:
        raise ValueError(f"the batch has no column {name!r}, which prompt_id={how} needs; it has {sorted(rows)}")
    return rows[name]


def _named(extra: Any, source: Any, key: str) -> str:
    given = extra.get(key) if isinstance(extra, Mapping) else None
    given = plain_id(given)
    if given is None:
        raise ValueError(f"a prompt of data_source {source!r} has no extra_info.{key}; {ADVICE.format(key=key)}")
    if refusal(given):
        raise ValueError(f"extra_info.{key} of a prompt of {source!r} is {given!r}; {ADVICE.format(key=key)}")
    return f"{source}/{given}"


def _hash(rows: Mapping[str, Sequence[Any]], row: int) -> str:
    """Return a hash of everything in a row that the rollout or the reward sees, except for its number."""
    seen = {name: rows[name][row] for name in SEEN if name in rows}
    if isinstance(seen.get("extra_info"), Mapping):
        seen["extra_info"] = {key: value for key, value in seen["extra_info"].items() if key != "index"}
    prompt = seen.get("raw_prompt")
    for message in prompt if isinstance(prompt, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, (list, tuple)) and any(_not_text(part) for part in content):
            raise ValueError(UNHASHED)
    return hash_of({k: v for k, v in seen.items() if v is not None and not (isinstance(v, Mapping) and not v)})


def _not_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") != "text"


def check_files(files: str | Sequence[str] | None, how: str) -> None:
    """Refuse training files in which a prompt has no id or shares it with another row, or has images to be hashed.

    Files that are not on a local disk are only checked batch by batch.

    Raises:
        ValueError: an id is missing, or is in several rows; or prompts with images are to be hashed.
    """
    if not files:
        return
    times: Counter[str] = Counter()
    for name in [files] if isinstance(files, str) else files:
        path = Path(name).expanduser()
        if not path.is_file() or path.suffix not in (".parquet", ".jsonl"):
            logger.info("%s is not checked for repeated prompt ids", name)
            continue
        if how == "hash":
            if _holds_media(path):
                raise ValueError(f"{name}: {UNHASHED}")
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


def _holds_media(path: Path) -> bool:
    """Return whether rows of a file have images, videos or sounds; of a parquet file only the statistics are read."""
    if path.suffix != ".parquet":
        columns = read_columns(path)
        return any(any(columns.get(name, ())) for name in MEDIA)
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    for part in (group.column(number) for group in groups for number in range(metadata.num_columns)):
        nulls = part.statistics.null_count if part.statistics else None
        if part.path_in_schema.split(".")[0] in MEDIA and nulls != part.num_values:
            return True
    return False


def _identifying_columns(path: Path) -> Mapping[str, Sequence[Any]]:
    if path.suffix != ".parquet":
        return read_columns(path)
    from pyarrow import parquet

    wanted = {"data_source", "extra_info"} & set(parquet.read_schema(path).names)
    return parquet.read_table(path, columns=sorted(wanted)).to_pydict()
