"""The files of a run folder: settings, and JSON lines that a crash may have truncated and that may be compressed."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
ALLOCATION_LOG = "allocations.jsonl"
WARNINGS_FILE = "warnings.jsonl"
SAMPLES_FILE = "samples.jsonl"
STATE_FILE = "knapsack_allocator.npz"
"""State of the allocator inside a checkpoint; absent in one of another trainer."""
TRAINER_STATE_FILE = "trainer_state.json"
"""State of transformers' trainer, the last file of a checkpoint: if it can be read, the checkpoint is complete."""
GENERATED_FILE = "generated.json"
"""Rollouts and tokens generated before a checkpoint."""
MODEL_FOLDER = "model"
"""The trained model; its presence marks a finished run."""

GZIP_MAGIC = b"\x1f\x8b"

SHOWN_FOLDERS = 5
"""Number of run folders that a message lists."""


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, complete or not, by ascending step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=steps_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints from which a run can resume, whichever trainer wrote them, by ascending step."""
    return [path for path in all_checkpoints(folder) if _is_complete(path)]


def _is_complete(checkpoint: Path) -> bool:
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):  # missing, or its writing was interrupted
        return False


def find_start(folder: Path, *, resume: bool) -> Path | None:
    """Return the checkpoint from which a run continues, or None for a new run.

    Raises:
        FileExistsError: the folder already holds a run and `resume` is false.
        FileNotFoundError: `resume` is true and the folder does not exist or holds no complete checkpoint.
    """
    if resume:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no run folder {folder} to resume")
        complete = complete_checkpoints(folder)
        if not complete:
            raise FileNotFoundError(
                f"{folder} holds no complete checkpoint to resume from; the run ended before its first one (see "
                "save_every). Start it again in another folder (--output), or delete this one"
            )
        return complete[-1]
    if (folder / METRICS_FILE).exists():
        resumable = complete_checkpoints(folder) and not (folder / MODEL_FOLDER).is_dir()
        resume_hint = f"resume it (--resume {folder}), " if resumable else ""
        raise FileExistsError(
            f"{folder} already holds a run; {resume_hint}delete it, or choose another folder (--output)"
        )
    return None


def steps_of(checkpoint: Path) -> int:
    """Return the number of optimizer updates before a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's settings.

    Raises:
        FileNotFoundError: If the file does not exist; the message lists run folders one level below.
        ValueError: If the file holds no mapping.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no run folder {path.parent}")
    if not path.is_file():
        inside = sorted(str(found.parent) for found in path.parent.glob(f"*/{path.name}"))
        hint = f"; run folders in it: {', '.join(inside[:SHOWN_FOLDERS])}" if inside else ""
        more = f", and {len(inside) - SHOWN_FOLDERS} more" if len(inside) > SHOWN_FOLDERS else ""
        raise FileNotFoundError(f"{path.parent} is not a run folder: it has no {path.name}{hint}{more}")
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(config).__name__}")
    return {str(key): value for key, value in config.items()}


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values; objects are never constructed.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not YAML.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def finite_number(value: object) -> float | None:
    """Return a finite number, None for anything else (bool included)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def finite_or_none(number: float) -> float | None:
    """Return a number for JSON: None in place of NaN and infinities, which JSON lacks."""
    return float(number) if math.isfinite(number) else None


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line; a line torn by a crash is ended first, so that no other line is lost with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def decompressed(raw: BufferedReader) -> BufferedReader | gzip.GzipFile:
    """Return the content of an open file; gzip is recognised by its first two bytes, whatever the file's name."""
    return gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == GZIP_MAGIC else raw


def read_lines(raw: BufferedReader, path: Path, torn: Callable[[str], None]) -> Iterator[bytes]:
    """Yield the lines of an open file, compressed or not.

    Args:
        raw: the file, at its start.
        path: its name, for errors.
        torn: called with a remark if compressed data end early, as those of a killed writer do.

    Raises:
        ValueError: compressed data are damaged.
    """
    try:
        yield from decompressed(raw)
    except EOFError:
        torn("its compressed data end early")
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def stored(path: Path) -> Path:
    """Return the path of a log, or that of its compressed form (``.gz``) if only that exists."""
    compressed = path.with_name(path.name + ".gz")
    return compressed if compressed.is_file() and not path.is_file() else path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, none if the file is missing; a line that is not a JSON object (a torn write) is skipped.

    A file that exists only in compressed form is read from there.

    Raises:
        ValueError: If a row has no whole number under `step`, or compressed data are damaged.
    """
    path = stored(path)
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    with path.open("rb") as raw:
        lines = read_lines(raw, path, lambda remark: logger.warning("%s: %s", path, remark))
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))  # torn inside a character, it cannot be decoded
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                logger.warning("%s, line %d is not a complete JSON object: skipped", path, number)
                continue
            if not isinstance(row.get("step"), int):
                raise ValueError(f"{path}, line {number}: step must be an integer, got {row.get('step')!r}")
            rows.append(row)
    return rows


def by_step(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Merge the rows of each step, ascending by step; later values replace earlier ones.

    Where the step falls, the run was resumed from a checkpoint: earlier rows from that step on belong to work that the
    checkpoint does not contain, and are left out.
    """
    joined: dict[int, dict[str, Any]] = {}
    newest = -1
    for row in rows:
        step = row["step"]
        if step < newest:
            joined = {known: kept for known, kept in joined.items() if known < step}
        newest = step
        joined.setdefault(step, {}).update(row)
    return [joined[step] for step in sorted(joined)]
