"""One process per run folder: a lock file that the operating system releases when its owner ends, however it does."""

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
    """Another process writes this run folder."""


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Own a run folder while the body runs.

    The file names the process that holds it, for a reader. What counts is the system's lock on it, which a killed
    process cannot leave behind: a file without it is stale, is taken over, and that is logged. On Windows there is no
    such lock and nothing is refused.

    Raises:
        FolderInUseError: another process owns the folder; it is named.
    """
    path = folder / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, path)
        stale = _owner(descriptor)
        if stale:
            logger.warning("%s was left by a run that was killed (%s): taken over", path, stale)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)  # the file stays: removing it would let two others hold two different files
    finally:
        os.close(descriptor)


def refuse_if_owned(folder: Path) -> None:
    """Raise :class:`FolderInUseError` if another process owns the folder; leave no trace in it."""
    path = folder / LOCK_FILE
    if path.exists():
        descriptor = os.open(path, os.O_RDWR)
        try:
            _lock(descriptor, path)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Take the system's lock on the file, until it is closed."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderInUseError(
            f"{path.parent} is being written by another run: {_owner(descriptor)}. Wait for it, stop it, or choose "
            "another folder"
        ) from None
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): see to it that no other run writes there", path, error)


def _owner(descriptor: int) -> str:
    """What the file says of its owner; empty if it says nothing."""
    text = os.pread(descriptor, 1000, 0).decode(errors="replace")
    try:
        owner = json.loads(text)
        return f"process {int(owner['pid'])} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return text.strip()
