"""State on disk: one npz file of plain arrays, written atomically. Never a pickle."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
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
    target = Path(path)
    encoded = np.frombuffer(json.dumps(dict(header)).encode(), dtype=np.uint8)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, allow_pickle=False, **{HEADER: encoded}, **arrays)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read what :func:`write_state` wrote.

    Returns:
        (header, arrays by name).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged or none of ours; it is left as it is.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop(HEADER).tobytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{os.fspath(path)} is no readable allocator state ({error}); the file was left as it is"
        ) from error
    return header, arrays
