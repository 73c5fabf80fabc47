"""One process per run folder: a lock file that the operating system releases however its owner ends."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"


class FolderInUseError(FileExistsError):
    """Another process is writing to this run folder."""


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Own a run folder while the body runs.

    The file names its owner for human readers. Ownership itself is the system's lock on the file, which a killed
    process cannot leave behind: a file without that lock is stale; it is taken over, which is logged. Windows has no
    such lock, so there nothing is refused.

    Raises:
        FolderInUseError: another process owns the folder; the message names it.
    """
    path = folder / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, path)
        stale = _owner(descriptor)
        if stale:
            logger.warning("%s was left behind by a killed run (%s); it is taken over", path, stale)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(
                descriptor, 0
            )  # the file stays: if it were removed, two processes could hold two different files
    finally:
        os.close(descriptor)


def refuse_if_owned(folder: Path) -> None:
    """Raise :class:`FolderInUseError` if another process owns the folder, without changing the folder."""
    path = folder / LOCK_FILE
    if path.exists():
        descriptor = os.open(path, os.O_RDWR)
        try:
            _lock(descriptor, path)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Take the system's lock on the file until the file is closed."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderInUseError(
            f"{path.parent} is in use by another run: {_owner(descriptor)}. Wait for it, stop it, or choose another "
            "folder"
        ) from None
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): make sure that no other run writes there", path, error)


def _owner(descriptor: int) -> str:
    """Return the owner named in the file; empty if there is none."""
    text = os.pread(descriptor, 1000, 0).decode(errors="replace")
    try:
        owner = json.loads(text)
        return f"process {int(owner['pid'])} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return text.strip()
