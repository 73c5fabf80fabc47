"""Checks of a data set before a run: ids that cannot work, and processes that see other data."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from knapsack_rl.allocation.checks import IntArray
from knapsack_rl.ids import PromptId, hash_of
from knapsack_rl.trl.equal_rows import first_difference, rows_of
from knapsack_rl.trl.identity import IMAGE_COLUMNS, Identity, advice, prompt_key

logger = logging.getLogger(__name__)

MEDIA = tuple(getattr(datasets, name) for name in ("Image", "Audio", "Video", "Pdf") if hasattr(datasets, name))

TEXT = ("string", "large_string", "string_view")
"""Arrow's types of text."""

HASHED_ROWS = 10_000
"""Most rows without an id that are hashed to say what changed since a checkpoint: well under a second."""

HASHED_BYTES = 2**26
"""Most bytes of them."""


def check_dataset(dataset: Any, id_column: str, gather: Callable[[list[Any]], list[Any]] | None = None) -> bool:
    """Refuse a data set whose prompts cannot be told apart, as far as it can be known without reading the rows.

    Args:
        dataset: as the reward functions see it.
        id_column: column of ids.
        gather: joins the lists of all processes, which all call this at the same time; None for one process.

    Returns:
        Whether every id is proven to name one prompt; otherwise rows must be compared as they come.

    Raises:
        ValueError: prompts with images lack an id, an id is not a string or whole number, or rows of one id differ;
            raised on all processes.
    """
    if is_transformed(dataset):
        return False  # the rows that come are not those that are stored
    problem = None
    try:
        check_images(dataset, id_column)
        if isinstance(dataset, Dataset):
            check_ids(dataset, id_column)
    except ValueError as error:
        problem = str(error)
    for found in [problem] if gather is None else gather([problem]):
        if found is not None:
            raise ValueError(found)
    return isinstance(dataset, Dataset) and (gather is None or check_same_data(dataset, id_column, gather))


def is_transformed(dataset: Any) -> bool:
    """Return whether rows are computed when they are read (``with_transform``)."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def check_images(dataset: Any, id_column: str) -> None:
    """Refuse images without ids.

    Raises:
        ValueError: a column holds images, or other media, and rows have no id.
    """
    media = media_columns(dataset)
    if not media:
        return
    if id_column not in dataset.features:
        raise ValueError(f"{advice(id_column)}; column {media[0]!r} holds images, and the data set has no ids")
    missing = rows_without_id(dataset, id_column) if isinstance(dataset, Dataset) else np.zeros(0, np.int64)
    if missing.size:
        raise ValueError(f"{advice(id_column)}; {missing.size} rows have none, the first is row {missing[0]}")


def media_columns(dataset: Any) -> list[str]:
    """Return the columns that hold images, or other media, as far as the types of the columns are known."""
    features = dataset.features or {}
    return [name for name, feature in features.items() if name in IMAGE_COLUMNS or holds_media(feature)]


def holds_media(feature: Any) -> bool:
    """Return whether values of a feature are decoded to images, sounds or videos, at any depth."""
    if isinstance(feature, MEDIA):
        return True
    if isinstance(feature, Mapping):
        return any(map(holds_media, feature.values()))
    parts = feature if isinstance(feature, (list, tuple)) else [getattr(feature, "feature", None)]
    return any(holds_media(part) for part in parts if part is not None)


def stored_rows(dataset: Any) -> IntArray:
    """Return (N,) the row of the stored table behind each row of a data set, which may be shuffled or selected."""
    if dataset._indices is None:
        return np.arange(dataset.data.num_rows)
    return np.asarray(dataset._indices.column(0).to_numpy(), dtype=np.int64)


def ids_of(dataset: Any, id_column: str) -> pa.Array:
    """Return the ids of all rows without decoding anything else."""
    column = dataset.data.column(id_column).combine_chunks()
    return column if dataset._indices is None else column.take(pa.array(stored_rows(dataset)))


def rows_without_id(dataset: Any, id_column: str) -> IntArray:
    """Return the rows whose id is null."""
    return np.flatnonzero(np.asarray(ids_of(dataset, id_column).is_null()))


def check_ids(dataset: Any, id_column: str) -> None:
    """Refuse ids that are no strings or whole numbers, or that name several prompts; their histories would be mixed.

    Raises:
        ValueError: the column has another type, or two rows share an id and differ.
    """
    if id_column not in (dataset.column_names or []):
        logger.info("no column %r: prompts are identified by a hash of their rows", id_column)
        return
    kind = dataset.data.schema.field(id_column).type
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (str(value_kind) in TEXT or pa.types.is_integer(value_kind) or pa.types.is_null(value_kind)):
        raise ValueError(
            f"column {id_column!r} must hold strings or whole numbers, got {value_kind}; an id stays the same in every "
            f"epoch. Convert the column, for example with dataset.map(lambda row: {{{id_column!r}: "
            f"str(row[{id_column!r}])}}), or name another column with prompt_id_column"
        )
    ids = ids_of(dataset, id_column)
    if pa.types.is_null(kind):
        return
    encoded = ids if pa.types.is_dictionary(kind) else pc.dictionary_encode(ids)
    again, first = repeats(np.asarray(pc.fill_null(encoded.indices, -1)))
    rows, others = stored_rows(dataset), [name for name in dataset.column_names if name != id_column]
    difference = first_difference(dataset.data.select(others), rows[first], rows[again])
    if difference is not None:
        at, column = difference
        raise ValueError(
            f"column {id_column!r}: id {ids[int(again[at])].as_py()!r} names different prompts (rows {first[at]} "
            f"and {again[at]}), which differ in column {column!r}. Make ids unique over all files, for example by "
            f"putting the source in front; if it is one prompt, drop one of the rows, or the column {column!r}"
        )


def repeats(code: IntArray) -> tuple[IntArray, IntArray]:
    """Return the rows whose value is in an earlier row, and the first such row of each.

    Args:
        code: (N,) number of each row's value, negative for none.
    """
    _, first, place = np.unique(code, return_index=True, return_inverse=True)
    again = np.flatnonzero((first[place] != np.arange(code.size)) & (code >= 0))
    return again, first[place][again]


def check_same_data(dataset: Any, id_column: str, gather: Callable[[list[Any]], list[Any]]) -> bool:
    """Compare this process's data set with those of the others, which all call this at the same time.

    Different prompts are allowed, with a warning: every process trains on rows of all.

    Args:
        dataset: of this process.
        id_column: without it prompts are identified by a hash, which cannot clash.
        gather: joins the lists of all processes.

    Returns:
        Whether an id is known to name the same prompt everywhere.

    Raises:
        ValueError: an id names different prompts on two processes; raised on all of them.
    """
    named = id_column in (dataset.column_names or [])
    marks = gather([(digest_of(dataset, [id_column, "prompt"]) if named else "", dataset._fingerprint)])
    if len(set(marks)) == 1 or not any(digest for digest, _ in marks):
        return True
    if len({digest for digest, _ in marks}) == 1:
        return False
    own = prompts_by_id(dataset, id_column) if named else {}
    seen: dict[PromptId, str] = {}
    for names in gather([own]):
        for prompt_id, prompt in names.items():
            if seen.setdefault(prompt_id, prompt) != prompt:
                raise ValueError(
                    f"column {id_column!r}: id {prompt_id!r} names different prompts on two processes; give all "
                    "processes the same data set, or make ids unique over all of them"
                )
    logger.warning("the processes have different data sets, together %d prompts; all train on rows of all", len(seen))
    return False


def digest_of(dataset: Any, columns: list[str]) -> str:
    """Return a hash of stored columns and of the order of rows; equal data stored in another way may differ."""
    kept = [name for name in columns if name in dataset.column_names]
    digest = hashlib.blake2b()
    table = pa.Table.from_batches(dataset.data.select(kept).to_batches()).replace_schema_metadata(None)
    for batch in table.to_batches(max_chunksize=10_000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        digest.update(sink.getvalue())
    digest.update(stored_rows(dataset).tobytes())
    return digest.hexdigest()


def prompts_by_id(dataset: Any, id_column: str) -> dict[PromptId, str]:
    """Return a hash of the prompt of each id."""
    table = dataset.data.select([name for name in (id_column, "prompt") if name in dataset.column_names])
    order = stored_rows(dataset)
    found = {}
    for start in range(0, len(order), 1_000):
        for row in rows_of(table, order[start : start + 1_000]).to_pylist():
            if row[id_column] is not None:
                found[row[id_column]] = hash_of(row.get("prompt"))
    return found


def prompt_keys(dataset: Any, identity: Identity) -> set[PromptId] | None:
    """Return the identities of all prompts of a data set, decoding no image; None where rows would have to be read."""
    if not isinstance(dataset, Dataset) or is_transformed(dataset):
        return None
    id_column = identity.id_column
    missing = np.arange(len(dataset))
    found: set[PromptId] = set()
    if id_column in (dataset.column_names or []):
        ids = ids_of(dataset, id_column)
        found = set(ids.drop_null().to_pylist())
        missing = rows_without_id(dataset, id_column)
    if missing.size and not identity.hashed:
        return None
    if missing.size > HASHED_ROWS or missing.size * dataset.data.nbytes > HASHED_BYTES * max(dataset.data.num_rows, 1):
        return None
    for start in range(0, missing.size, 1_000):
        rows = dataset.__getitems__(missing[start : start + 1_000].tolist())  # as a data loader reads them
        found.update(prompt_key(row, id_column) for row in rows)
    return found
