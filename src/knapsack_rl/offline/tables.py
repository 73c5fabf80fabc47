"""CSV, JSON and parquet files, compressed or not, read into columns: as a whole, or in chunks of bounded size."""

from __future__ import annotations

import codecs
import csv
import io
import json
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.ids import PromptId, refusal
from knapsack_rl.runs.files import decompressed, read_lines

Columns = dict[str, list[Any]]
T = TypeVar("T")

CHUNK_ROWS = 1024
"""Rows of a chunk; completions may have a megabyte each."""

LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field; Python's own limit is 131,072, and completions are longer."""

WORDS = {"": np.nan, "none": np.nan, "null": np.nan, "true": 1.0, "false": 0.0}
"""Texts, in lower case, that stand for numbers."""

TORN_END = "knapsack-rl.torn-end"
"""Name of the rule by which a text is decoded whose last character is torn: that character is left out."""


class TableError(ValueError):
    """A file is malformed, holds no rows, or lacks a column."""


def read_columns(path: str | Path) -> Columns:
    """Read a table by its file name: ``.csv``, ``.jsonl``, ``.json`` or ``.parquet``, each also with ``.gz`` behind it.

    JSON holds an object a line, a list of objects, or a table as wandb exports it (``columns`` and ``data``).

    Returns:
        Column name to values; a key missing from a JSON object is ``None``. CSV values are strings.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the suffix is unknown, the file is malformed, or it holds no rows.
        ImportError: parquet needs pyarrow.
    """
    chunks = list(read_chunks(path))
    names = dict.fromkeys(name for chunk in chunks for name in chunk)
    return {name: [value for chunk in chunks for value in chunk.get(name, [None] * rows_of(chunk))] for name in names}


def rows_of(columns: Columns) -> int:
    """Return the number of rows."""
    return len(next(iter(columns.values()), ()))


def table_suffix(path: Path) -> str | None:
    """Return the suffix that says how a file is read, without that of its compression; None for other files."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in READABLE else None


def read_chunks(
    path: str | Path,
    names: Collection[str] | None = None,
    *,
    torn: Callable[[str], None] | None = None,
    position: Callable[[int], None] | None = None,
) -> Generator[Columns]:
    """Yield a table in chunks of at most :data:`CHUNK_ROWS` rows; see :func:`read_columns`.

    Args:
        path: the file.
        names: columns needed; of a parquet file that has them all, no others are read.
        torn: called with a remark if incomplete rows were skipped, as a killed writer leaves them; None refuses them.
        position: called with the bytes of the file read so far, after each chunk.

    Raises:
        FileNotFoundError: the file does not exist.
        TableError: the suffix is unknown, the file is malformed, or it holds no rows.
        ImportError: parquet needs pyarrow.
    """
    path = Path(path)
    suffix = table_suffix(path)
    if suffix is None:
        raise TableError(f"{path}: the file name must end in {', '.join(READABLE)}, or in one of them and .gz")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    rows, incomplete = 0, Incomplete(path, torn)
    with path.open("rb") as raw:
        try:
            for chunk in READABLE[suffix](raw, incomplete, names):
                rows += rows_of(chunk)
                if position is not None:
                    position(raw.tell())
                yield chunk
        except (OSError, zlib.error) as error:  # of compressed data
            raise TableError(f"{path} is damaged: {error}") from error
    incomplete.close(rows)
    if not rows:
        raise TableError(f"{path} holds no rows")


class Incomplete:
    """The incomplete rows of a file: a few are skipped and reported, as killed writers leave them; many are refused.

    Args:
        path: the file.
        report: called with a remark if rows were skipped; None refuses the first one.
    """

    def __init__(self, path: Path, report: Callable[[str], None] | None) -> None:
        self.path, self.report = path, report
        self._rows, self._first = 0, ""

    def skip(self, reason: str) -> None:
        """Note a row that is skipped.

        Raises:
            TableError: incomplete rows are refused.
        """
        if self.report is None:
            raise TableError(f"{self.path}{reason}")
        self._rows, self._first = self._rows + 1, self._first or reason

    def close(self, rows: int) -> None:
        """Report what was skipped beside this number of complete rows.

        Raises:
            TableError: there are more incomplete rows than one and one in a hundred, or no others.
        """
        if self._rows > (1 + rows // 100 if rows else 0):
            raise TableError(f"{self.path}{self._first}")
        if self._rows and self.report is not None:
            were = "1 incomplete row was" if self._rows == 1 else f"{self._rows} incomplete rows were"
            self.report(f"{were} skipped: {self.path.name}{self._first}")


def _read_csv(raw: BufferedReader, incomplete: Incomplete, _: Collection[str] | None) -> Iterator[Columns]:
    path = incomplete.path
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))  # the limit is one for the whole process
    text = io.TextIOWrapper(
        decompressed(raw), "utf-8-sig", "strict" if incomplete.report is None else TORN_END, newline=""
    )
    try:
        rows = _csv_rows(csv.reader(text), incomplete)
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise TableError(f"{path}: column names repeat: {', '.join(header)}")
        for chunk in _chunks(_whole_rows(rows, len(header), incomplete)):
            yield {name: [row[k] for row in chunk] for k, name in enumerate(header)}
    finally:
        text.detach()  # the caller closes the file


def _csv_rows(reader: Any, incomplete: Incomplete) -> Iterator[list[str]]:
    try:
        yield from filter(None, reader)
    except EOFError:
        incomplete.skip(": its compressed data end early")
    except (csv.Error, UnicodeDecodeError) as error:
        raise TableError(f"{incomplete.path}, line {reader.line_num} is not valid CSV: {error}") from error


def _whole_rows(rows: Iterable[list[str]], columns: int, incomplete: Incomplete) -> Iterator[list[str]]:
    for row in rows:
        if len(row) == columns:
            yield row
            continue
        reason = f": a row has {len(row)} values, the header names {columns}: {','.join(row)[:80]}"
        if len(row) > columns:
            raise TableError(f"{incomplete.path}{reason}")
        incomplete.skip(reason)


def _leave_out_torn_end(error: UnicodeError) -> tuple[str, int]:
    if isinstance(error, UnicodeDecodeError) and error.reason == "unexpected end of data":
        return "", error.end
    raise error


codecs.register_error(TORN_END, _leave_out_torn_end)


def _read_json(raw: BufferedReader, incomplete: Incomplete, _: Collection[str] | None) -> Iterator[Columns]:
    for chunk in _chunks(_json_objects(raw, incomplete)):
        names = dict.fromkeys(name for row in chunk for name in row)
        yield {name: [row.get(name) for row in chunk] for name in names}


def _json_objects(raw: BufferedReader, incomplete: Incomplete) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file: one a line, or those of the list or table that the whole file is."""
    lines = _lines(raw, incomplete)
    head = list(islice(lines, 2))
    if head and (head[0][1].startswith(b"[") or (len(head) == 2 and not head[1][1].lstrip().startswith(b"{"))):
        head += lines  # a document of several lines, or a list
    document = _document(b"".join(line for _, line in head)) if head else None
    if document is not None:
        yield from document
        return
    for number, line in chain(head, lines):
        where = f", line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # broken, a number of 5,000 digits, or endless nesting
            incomplete.skip(f"{where} is not valid JSON: {error}")
            continue
        if isinstance(row, dict):
            yield row
        else:
            incomplete.skip(f"{where} must be a JSON object, got {type(row).__name__}")


def _document(text: bytes) -> list[dict[str, Any]] | None:
    """Return the rows of a list of objects, or of a table with columns and data; None for anything else."""
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and isinstance(found.get("columns"), list) and isinstance(found.get("data"), list):
        names, rows = found["columns"], found["data"]
        if all(isinstance(name, str) for name in names) and all(
            isinstance(row, list) and len(row) == len(names) for row in rows
        ):
            return [dict(zip(names, row, strict=True)) for row in rows]
    return found if isinstance(found, list) and found and all(isinstance(row, dict) for row in found) else None


def _lines(raw: BufferedReader, incomplete: Incomplete) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers."""
    for number, line in enumerate(read_lines(raw, incomplete.path, lambda remark: incomplete.skip(f": {remark}")), 1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield number, text


def _read_parquet(raw: BufferedReader, incomplete: Incomplete, names: Collection[str] | None) -> Iterator[Columns]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f'{error}. Reading parquet needs: pip install "knapsack-rl[data]"') from error
    content = decompressed(raw)
    try:
        file = parquet.ParquetFile(raw if content is raw else io.BytesIO(content.read()))
        # Where one is missing the others are read too, for the message that lists them.
        columns = list(names) if names is not None and {*names} <= {*file.schema_arrow.names} else None
        for batch in file.iter_batches(CHUNK_ROWS, columns=columns):
            yield batch.to_pydict()
    except (pyarrow.ArrowException, ValueError, OSError, EOFError) as error:  # damaged data is an OSError
        raise TableError(f"{incomplete.path} is not a readable parquet file: {error}") from error


def _chunks(rows: Iterable[T]) -> Iterator[list[T]]:
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


READABLE: dict[str, Callable[[BufferedReader, Incomplete, Collection[str] | None], Iterator[Columns]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def column(columns: Columns, name: str, path: str | Path) -> list[Any]:
    """Return a column by name.

    Raises:
        TableError: the column does not exist; the message lists those that do.
    """
    if name not in columns:
        raise TableError(f"{path} has no column {name!r}; its columns are {', '.join(columns)}")
    return columns[name]


def numbers(values: Sequence[Any], name: str, first_row: int = 1) -> FloatArray:
    """Return values as (R,) float64; ``None``, "", "none", "null" and "nan" become NaN, true and false 1 and 0.

    Args:
        values: numbers, booleans or their texts.
        name: of the column, for errors.
        first_row: number of the first row, for errors.

    Raises:
        ValueError: a value is not a number; the message names its row.
    """
    parsed = np.empty(len(values))
    for row, value in enumerate(values):
        try:
            parsed[row] = (
                np.nan if value is None else WORDS.get(value.lower(), value) if isinstance(value, str) else value
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"column {name!r}, row {first_row + row}: {value!r} is not a number") from error
    return parsed


def identities(values: Sequence[Any], name: str, first_row: int = 1) -> list[PromptId]:
    """Return values as prompt ids; a conversation (a list of messages) is identified by its JSON text.

    Args:
        values: strings, whole numbers, or conversations.
        name: of the column, for errors.
        first_row: number of the first row, for errors.

    Raises:
        ValueError: a value is empty or cannot be a prompt id (see :mod:`knapsack_rl.ids`); the message names its row.
    """
    ids = [
        json.dumps(value, sort_keys=True, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value
        for value in values
    ]
    for row, value in enumerate(ids, start=first_row):
        reason = "is empty; every row needs a prompt id" if value in ("", None, "[]", "{}") else refusal(value)
        if reason:
            raise ValueError(f"column {name!r}, row {row} {reason}")
    return ids
