"""Allocator state on disk: one npz file of plain arrays, written atomically, with a checksum. Never a pickle.

The file is an uncompressed zip archive of npy members, which ``numpy.load`` reads too, and a member ``header.npy`` with
JSON. Zip stores a crc32 of every member; the header, written last, holds one over names, sizes and checksums of all the
others. So changed bytes, surplus, missing and swapped members are all detected.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import IO, Any

import numpy as np

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

HEADER = "header"
"""Name of the member that holds the header."""

CHECKSUM = "checksum"
"""Key of the checksum in the header."""


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write a file in one piece: a temporary file in the same folder, fsync, rename, fsync of the folder.

    A reader sees the old file or the new one, never a part of it. If the body raises, the old file stays. A symbolic
    link keeps pointing to its target, which is written; an existing file keeps its mode. Temporary files that killed
    processes left are removed.

    Raises:
        OSError: the file cannot be written, or something other than a file is there.
    """
    target = Path(os.path.realpath(path))
    mode = stat.S_IMODE(target.stat().st_mode) if target.is_file() else None
    if mode is None and target.exists():
        raise FileExistsError(f"{target} exists and is not a file; choose another path")
    _remove_leftovers(target)
    process = os.getpid()
    temporary = target.with_name(f".{target.name}.{process}-{threading.get_ident()}.tmp")
    try:
        with _claimed(temporary) as file:
            if mode is not None:
                temporary.chmod(mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        if os.getpid() == process:  # not a child that was forked in the body
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _claimed(temporary: Path) -> IO[bytes]:
    """Open a temporary file and lock it as long as it is open, so that no other process takes it for a leftover."""
    while True:
        file = temporary.open("wb")
        if not _lock(file) or os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed between opening and locking


def _lock(file: IO[bytes], *, wait: bool = True) -> bool:
    """Take the system's lock on a file, which a killed process does not keep; false if it cannot be had."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another process, or the file system has no locks
        return False
    return True


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of a target that no process has locked."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"\d+-\d+\.tmp")
    for leftover in [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]:
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            if _lock(file, wait=False):
                leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable where a folder can be opened (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_state(path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays and a JSON header to ``path``, see :func:`atomic_file`. The same state gives the same bytes.

    Args:
        path: file to write; its folder must exist.
        header: JSON values.
        arrays: plain arrays by name.

    Raises:
        OSError: the file cannot be written.
        ValueError: an array holds Python objects or has the name of the header.
    """
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"array {name!r} holds Python objects, which only a pickle could store; convert it")
        if name == HEADER:
            raise ValueError(f"an array is named {HEADER!r}, a reserved name; choose another one")
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            _write_array(archive, name, array)
        text = json.dumps(dict(header) | {CHECKSUM: _checksum(archive.infolist())})
        _write_array(archive, HEADER, np.frombuffer(text.encode(), dtype=np.uint8))


def _write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    plain = np.require(array, requirements="C")
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, np.lib.format.header_data_from_array_1_0(plain))
        member.write(plain.reshape(-1).view(np.uint8).data)


def _checksum(members: Iterable[zipfile.ZipInfo]) -> int:
    """Return one checksum over names, sizes and checksums of all members except the header."""
    listed = sorted((m.filename, m.file_size, m.CRC) for m in members if m.filename != f"{HEADER}.npy")
    return zlib.crc32(json.dumps(listed).encode())


DAMAGE = (
    *(OSError, ValueError, KeyError, IndexError, EOFError, NotImplementedError, TypeError, AttributeError),
    *(RuntimeError, OverflowError, MemoryError, SyntaxError, zipfile.BadZipFile, zlib.error),
)
"""Exceptions that reading a damaged archive may raise; an encrypted member, for example, raises RuntimeError."""


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a file that :func:`write_state` wrote.

    Compressed members are refused, so memory is bounded by the size of the file.

    Returns:
        (header, arrays by name).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, damaged or not a state file; it is left unchanged.
    """
    if Path(path).is_dir():
        raise ValueError(f"{os.fspath(path)} is a folder, not a state file")
    with Path(path).open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                arrays = {m.filename.removesuffix(".npy"): _read_array(archive, m) for m in members}
            if len(arrays) < len(members):
                raise ValueError("two of its members have the same name")
            header = json.loads(arrays.pop(HEADER).tobytes())
            if not isinstance(header, dict):
                raise ValueError(f"its header is a {type(header).__name__}, not a mapping")
            if CHECKSUM not in header:
                raise ValueError("its checksum is missing")
            if header.pop(CHECKSUM) != _checksum(members):
                raise ValueError("its checksum does not match its content")
        except (*DAMAGE, RecursionError) as error:
            raise ValueError(
                f"{os.fspath(path)} is not a readable allocator state ({error}); the file was left unchanged. Use an "
                "earlier checkpoint, or start with a new allocator"
            ) from error
    return header, arrays


PIECE = 2**22
"""Bytes read at a time."""


def _check_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Return the bytes of a member, which cannot exceed the size of the file."""
    assert archive.fp is not None
    if member.file_size > os.fstat(archive.fp.fileno()).st_size:
        raise ValueError(f"{member.filename} is longer than the file")
    return member.file_size


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename} is compressed; state files are not")
    content = np.empty(_check_size(archive, member), np.uint8)
    at = 0
    with archive.open(member) as file:  # zipfile compares the checksum at the end of the member
        while piece := file.read(PIECE):
            content[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
    if at < content.size:
        raise ValueError(f"{member.filename} ends early")
    start = io.BytesIO(content[:4096].tobytes())
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(start)
    if version not in readers:
        raise ValueError(f"{member.filename} has npy version {version}")
    shape, fortran, dtype = readers[version](start)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds a pickle, which is never loaded")
    data = content[start.tell() :].view(dtype)
    return data.reshape(shape, order="F" if fortran else "C")


FORMAT = "knapsack-rl allocator"
VERSION = 5

LARGEST_NUMBER = 2**53
"""Counts in a state are at most this, so that sums of them are exact as floats."""

COUNTERS = ("batches_at_refit", "prompts_at_refit", "degraded_batches", "unscored_rollouts")
"""Counters of an allocator in the header, whole numbers >= 0."""

HEADER_TYPES: dict[str, Any] = {
    "estimator": (str, NoneType),
    "settings": dict,
    "min_rollouts": int,
    "max_rollouts": int,
    "success": (str, int, float, NoneType),
    "budget_unit": str,
    "value": (str, NoneType),
    "failures": dict,
} | dict.fromkeys(COUNTERS, int)
"""Types of the values in the header of an allocator state, besides its format and version."""


def check_header(header: Any) -> Mapping[str, Any]:
    """Return the header of an allocator state.

    Raises:
        ValueError: it is foreign, of another version or incomplete, or a counter is impossible.
    """
    found = header.get("format") if isinstance(header, Mapping) else header
    if not isinstance(header, Mapping) or found != FORMAT:
        raise ValueError(f"this is not an allocator state: its format is {found!r}, expected {FORMAT!r}")
    if header.get("version") != VERSION:
        raise ValueError(
            f"the allocator state has version {header.get('version')!r}, this package reads version {VERSION}; use the "
            "knapsack-rl that wrote it, or start with a new allocator"
        )
    for key, kind in HEADER_TYPES.items():
        if key not in header:
            raise ValueError(f"the allocator state lacks {key!r} in its header")
        if not isinstance(header[key], kind) or isinstance(header[key], bool):
            raise ValueError(f"{key!r} of the allocator state has the wrong type, {type(header[key]).__name__}")
    for name, times in ({name: header[name] for name in COUNTERS} | header["failures"]).items():
        if not isinstance(times, int) or isinstance(times, bool) or not 0 <= times <= LARGEST_NUMBER:
            raise ValueError(
                f"{name!r} of the allocator state must be a whole number from 0 to {LARGEST_NUMBER}, got {times!r}"
            )
    return header


def section(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays whose names start with a prefix, named without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
