"""State on disk: one npz file of plain arrays, written atomically. Never a pickle."""

from __future__ import annotations

import json
import os
import threading
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

HEADER = "header"


def write_state(path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays and a JSON header to ``path``: a temporary file in the same folder, fsync, rename.

    A reader sees the old file or the new one, never a part.

    Args:
        path: file to write; its folder must exist.
        header: JSON values.
        arrays: plain arrays by name; object arrays are refused.

    Raises:
        OSError: the file cannot be written.
        ValueError: an array holds Python objects.
    """
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"array {name!r} holds Python objects, which only a pickle could store")
    target = Path(path)
    encoded = np.frombuffer(json.dumps(dict(header)).encode(), dtype=np.uint8)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            named: dict[str, Any] = {HEADER: encoded, **arrays}
            np.savez(file, **named)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what :func:`write_state` wrote.

    Returns:
        (header, arrays by name).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or none of ours; it is left as it is.
    """
    if Path(path).is_dir():
        raise ValueError(f"{os.fspath(path)} is a folder, not a state file")
    damage = (OSError, ValueError, KeyError, EOFError, NotImplementedError, TypeError, zipfile.BadZipFile, zlib.error)
    with Path(path).open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            header = json.loads(arrays.pop(HEADER).tobytes())
            if not isinstance(header, dict):
                raise ValueError(f"its header is a {type(header).__name__}, not a mapping")
        except (*damage, AttributeError) as error:
            raise ValueError(
                f"{os.fspath(path)} is no readable allocator state ({error}); the file was left as it is"
            ) from error
    return header, arrays
