"""Work in pieces whose rows are kept: an experiment that was stopped goes on where it stopped."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from experiments.contract import Row

THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Piece:
    """One piece of an experiment, run in a separate process.

    Attributes:
        name: of the piece; its file and its line of progress.
        work: function of a module that returns rows.
        arguments: of the function; rows are kept for arguments of the same ``repr``.
    """

    name: str
    work: Callable[..., list[Row]]
    arguments: tuple[Any, ...]

    @property
    def identity(self) -> str:
        """The question that kept rows answer."""
        return f"{self.work.__module__}.{self.work.__qualname__}{self.arguments!r}"


def run_pieces(pieces: Sequence[Piece], folder: Path, workers: int, done: Callable[[str], None]) -> list[Row]:
    """The rows of all pieces, in the order of the pieces; what the folder holds is not done again.

    Args:
        pieces: of distinct names.
        folder: where rows are kept, one file per piece.
        workers: processes side by side, >= 1; 1 works in this process.
        done: called with the name of each finished piece.
    """
    found: dict[str, list[Row]] = {}
    for piece in pieces:
        kept = _kept(folder, piece)
        if kept is not None:
            found[piece.name] = kept
            done(f"{piece.name}: kept from an earlier run")
    waiting = [piece for piece in pieces if piece.name not in found]
    for piece, rows in _finished(waiting, workers):
        _keep(folder, piece, rows)
        found[piece.name] = rows
        done(piece.name)
    return [row for piece in pieces for row in found[piece.name]]


def _finished(pieces: Sequence[Piece], workers: int) -> Iterator[tuple[Piece, list[Row]]]:
    if workers == 1 or len(pieces) < 2:
        for piece in pieces:
            yield piece, piece.work(*piece.arguments)
        return
    with one_thread_each(), processes(min(workers, len(pieces))) as pool:
        running = {pool.submit(piece.work, *piece.arguments): piece for piece in pieces}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def processes(workers: int) -> ProcessPoolExecutor:
    """Processes side by side that end with this one, however it ends: those of Python would work on without it."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes started meanwhile inherit one thread per library."""
    before = {name: os.environ.get(name) for name in THREAD_SETTINGS}
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, "1"))
    try:
        yield
    finally:
        for name, setting in before.items():
            if setting is None:
                del os.environ[name]
            else:
                os.environ[name] = setting


def _file(folder: Path, piece: Piece) -> Path:
    return folder / f"{piece.name}.jsonl"


def _kept(folder: Path, piece: Piece) -> list[Row] | None:
    """Rows of an earlier run of the same piece; None if there are none, or they answer something else."""
    path = _file(folder, piece)
    if not path.is_file():
        return None
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    if json.loads(first) != {"piece": piece.identity}:
        return None
    return [json.loads(line) for line in rest]


def _keep(folder: Path, piece: Piece, rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = _file(folder, piece)
    lines = [json.dumps({"piece": piece.identity}), *(json.dumps(row) for row in rows)]
    half = path.with_suffix(".partial")
    half.write_text("\n".join(lines) + "\n", encoding="utf-8")
    half.replace(path)  # so that a file is whole or not there
