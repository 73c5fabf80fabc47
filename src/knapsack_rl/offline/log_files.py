"""Which files are the log of a run: one named file, or the files of a folder that belong together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from knapsack_rl.offline.tables import Columns, read_chunks, table_suffix
from knapsack_rl.runs.files import ALLOCATION_LOG, METRICS_FILE, SAMPLES_FILE, WARNINGS_FILE, stored

NAMED_BY_NUMBER = re.compile(
    r"(?P<prefix>.*?)(?P<number>\d+)(_[0-9a-f]{8,})?(?P<suffix>(\.table)?\.(csv|jsonl|json|parquet))(\.gz)?"
)
"""``12.jsonl`` of verl, ``completions_00012.parquet`` of TRL, ``completions_12_5f3bda2c41.table.json`` of wandb."""

TRL_GROUP, VERL_GROUP = ("completions_", ".parquet"), ("", ".jsonl")
OF_A_RUN = {METRICS_FILE, SAMPLES_FILE, WARNINGS_FILE}
SHOWN_FILES = 5
"""Number of files that a remark lists."""


class NoLogError(ValueError):
    """A folder holds no log."""


@dataclass(frozen=True)
class LogFiles:
    """The files of a log.

    Attributes:
        kind: ``allocations`` is an allocation log of this package, ``trl`` TRL's completions, ``verl`` verl's dumps;
            ``table`` is anything else with a row per rollout.
        source: description of the log.
        files: in the order in which they are read.
        unread: names of files of the folder that look like logs and are not read.
        numbered: whether the number in the name of a file is its step, if its rows name none.
    """

    kind: Literal["allocations", "trl", "verl", "table"]
    source: str
    files: tuple[Path, ...]
    unread: tuple[str, ...] = ()
    numbered: bool = False


def find_log(path: Path) -> LogFiles:
    """Return the files of the log at a path.

    Args:
        path: a file, or a folder: of a run, of numbered files (or with those in ``completions/``), or with one table.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the folder holds no log, or several.
    """
    if path.is_file():
        if is_allocation_log(path):
            own = path.name.removesuffix(".gz") == ALLOCATION_LOG
            return LogFiles("allocations", f"run folder {path.parent}" if own else str(path), (path,))
        return LogFiles("table", str(path), (path,))
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")
    tables = [file for file in sorted(path.iterdir()) if table_suffix(file) and file.is_file()]
    own_log = stored(path / ALLOCATION_LOG)
    if own_log.is_file():
        completions = ("completions/",) if (path / "completions").is_dir() else ()
        return LogFiles("allocations", f"run folder {path}", (own_log,), (*completions, *_others(tables, [own_log])))
    for folder in (path, path / "completions"):
        files = _numbered(folder.glob("completions_*")).get(TRL_GROUP)
        if files:
            return LogFiles("trl", f"TRL completions in {folder}", tuple(files), _others(tables, files), True)
    groups = _numbered(tables)
    if VERL_GROUP in groups:
        files = groups[VERL_GROUP]
        return LogFiles("verl", f"verl rollouts in {path}", tuple(files), _others(tables, files), True)
    return _only(path, tables, groups)


def _only(path: Path, tables: Sequence[Path], groups: dict[tuple[str, str], list[Path]]) -> LogFiles:
    """Return the only numbered files of a folder, or its only table."""
    numbered = {file for files in groups.values() for file in files}
    single = [file for file in _logs(tables) if file not in numbered]
    if len(groups) == 1:
        ((prefix, suffix),) = groups
        files = groups[prefix, suffix]
        return LogFiles("table", f"{prefix}*{suffix} in {path}", tuple(files), _others(tables, files), True)
    if len(single) == 1 and not groups:
        return LogFiles("table", str(single[0]), (single[0],))
    if groups or single:
        several = [f"{prefix}*{suffix} ({len(files)} files)" for (prefix, suffix), files in groups.items()]
        raise ValueError(
            f"{path} holds several logs: {_listed([*several, *(file.name for file in single)])}; name one file, or a "
            "folder with one kind of file"
        )
    raise NoLogError(
        f"{path} holds no readable log: expected a run folder ({ALLOCATION_LOG}), TRL's completions_*.parquet, verl's "
        f"N.jsonl or a single table; found {_listed(sorted(entry.name for entry in path.iterdir())) or 'nothing'}"
    )


def is_allocation_log(path: Path) -> bool:
    """Return whether a file is an allocation log of this package, by its name or by its columns."""
    if path.name.removesuffix(".gz") == ALLOCATION_LOG:
        return True
    return table_suffix(path) in (".jsonl", ".json") and {"prompt_ids", "counts"} <= first_rows(path).keys()


def first_rows(path: Path) -> Columns:
    """Return the first rows of a table.

    Raises:
        TableError: the file is malformed, or holds no rows.
    """
    with closing(read_chunks(path, torn=lambda _: None)) as chunks:
        return next(chunks)


def number_in_name(path: Path) -> int | None:
    """Return the number with which the name of a file ends, None if it does not."""
    match = NAMED_BY_NUMBER.fullmatch(path.name)
    return None if match is None else int(match["number"])


def remark_on_unread(log: LogFiles) -> list[str]:
    """Return a remark on the files that were not read, if there are any."""
    if not log.unread:
        return []
    read = (
        log.files[0].name
        if len(log.files) == 1
        else f"{len(log.files)} files, {log.files[0].name} to {log.files[-1].name}"
    )
    return [f"read {read}; other files of the folder were not read: {_listed(log.unread)}"]


def _numbered(files: Iterable[Path]) -> dict[tuple[str, str], list[Path]]:
    """Return files whose names end in a number, by the rest of their name, ordered by number."""
    found: dict[tuple[str, str], list[tuple[int, Path]]] = {}
    for file in files:
        match = NAMED_BY_NUMBER.fullmatch(file.name)
        if match:
            found.setdefault((match["prefix"], match["suffix"]), []).append((int(match["number"]), file))
    return {
        key: [file for _, file in sorted(files)]
        for key, files in found.items()
        if key[1] != ".json" or len(files) > 1  # a single one may be anything
    }


def _logs(tables: Iterable[Path]) -> list[Path]:
    """Return the files that may be logs; of JSON files other than JSON lines, few are."""
    return [file for file in tables if file.name not in OF_A_RUN and table_suffix(file) != ".json"]


def _others(tables: Iterable[Path], read: Iterable[Path]) -> tuple[str, ...]:
    return tuple(file.name for file in _logs(tables) if file not in set(read))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_FILES
    return ", ".join(islice(names, SHOWN_FILES)) + (f" and {more} more" if more > 0 else "")
