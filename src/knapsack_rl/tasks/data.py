"""The data of a training run, and how rows are read from the hub, a folder or a file."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from knapsack_rl.offline.tables import READABLE, read_columns
from knapsack_rl.tasks.math_process import patient_process
from knapsack_rl.tasks.verifier import Reward, Verifier, answer_text, gold_answer, is_missing, literal

logger = logging.getLogger(__name__)

Row = dict[str, Any]
T = TypeVar("T")

FILE_SETTINGS = ("path", "config", "split", "verifier", "prompt_column", "answer_column")
"""Settings that mean nothing to a task whose problems are generated."""

SHOWN_ROWS = 3
"""Rows that cannot be used and are named in the log."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The rows that a run trains on and is evaluated on, and their reward.

    Attributes:
        train: rows with ``prompt``, ``answer`` and ``prompt_id``; other columns go to the reward function.
        held_out: rows of the same kind, never trained on.
        reward: TRL reward function; above 0 for a right answer, 0 for a wrong one.
        max_completion_tokens: longest answer.
        chat: whether prompts are meant for a chat model, where the model has a chat template.
        stop: text of one token that ends an answer besides the model's own end; empty for none.
    """

    train: Sequence[Row]
    held_out: Sequence[Row]
    reward: Reward
    max_completion_tokens: int
    chat: bool = False
    stop: str = ""


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """The data a run asks for; the fields are those of the training settings.

    Attributes:
        dataset: name of a task, with what follows a colon; or a file, or a hub data set.
        path: file or folder to read instead of the hub; empty for none.
        config: configuration of a hub data set; empty for the task's own.
        split: split that is trained on; empty for ``train``.
        prompt_column: column of the prompt in a file or hub data set.
        answer_column: column of the answer.
        verifier: how answers of a file or hub data set are checked: a verifier's name, or ``auto`` for exact.
        template: text with ``{prompt}`` in it, put around each prompt; empty for the task's own.
        train_prompts: rows to train on.
        held_out_prompts: rows to hold out.
        features: columns of the rows to keep beside prompt, answer and id.
    """

    dataset: str
    train_prompts: int
    held_out_prompts: int
    path: str = ""
    config: str = ""
    split: str = ""
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    verifier: str = "auto"
    template: str = ""
    features: tuple[str, ...] = ()

    def features_of(self, row: Row) -> Row:
        """Return the columns to keep of a row."""
        return {name: row[name] for name in self.features if name in row}

    @property
    def wanted(self) -> int:
        """Rows to train on and rows to hold out."""
        return self.train_prompts + self.held_out_prompts

    def framed(self, prompt: str, own_template: str = "{prompt}") -> str:
        """Return the prompt inside the template."""
        return (self.template or own_template).replace("{prompt}", prompt)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The place of a data set on the hub.

    Attributes:
        hub: repository name.
        config: configuration, None for the only one.
        held_out_split: split to hold out from, None to hold out rows of the training split.
    """

    hub: str
    config: str | None = None
    held_out_split: str | None = None


def read_rows(request: DataRequest, source: Source, split: str) -> list[Row]:
    """Return all rows of a split: of the file or folder that the request names, else of the hub.

    Args:
        request: names the file or folder, and may override the configuration.
        source: where the rows are on the hub.
        split: ``train`` or ``test``, for example; a file has no splits.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: the hub did not deliver; the message says what to do.
        ValueError: the data cannot be read, or the configuration or split does not exist.
    """
    place = request.path or source.hub
    if Path(place).suffix in READABLE:
        columns = read_columns(place)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if request.path and not Path(place).is_dir():
        raise FileNotFoundError(f"there is no file or folder {place}; the name of a file ends in {', '.join(READABLE)}")
    if Path(place).is_dir() and not (Path(place) / "README.md").exists():
        # By name: datasets itself looks for "train" and "test" anywhere in the path.
        for builder, pattern in _LAYOUTS:
            files = sorted(str(path) for path in Path(place).rglob(pattern.format(split)))
            if files:
                return _load(builder, None, split, data_files={split: files})
    # A clone of a hub repository has a README that lists its configurations.
    configured = not request.path or (Path(place) / "README.md").exists()
    return _load(place, request.config or (source.config if configured else None), split)


_LAYOUTS = (("parquet", "{}*.parquet"), ("json", "{}*.jsonl"), ("json", "{}*.json"), ("csv", "{}*.csv"))


def _load(place: str, config: str | None, split: str, **options: Any) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f'{error}. The data set {place} needs: pip install "knapsack-rl[trl]"') from error
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        rows = load_dataset(place, config, split=split, **options)
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, FileNotFoundError) as error:
        raise OSError(
            f"the data set {place} could not be loaded: {' '.join(str(error).split())[:300]}. Check its name and the "
            "network, or download it elsewhere and name the copy with dataset_path (a folder laid out as on the hub, "
            f"or one file of {', '.join(READABLE)})"
        ) from error
    except DatasetGenerationError as error:
        raise ValueError(f"the data set {place} could not be read: {error.__cause__ or error}") from error
    return list(rows)


def read_splits(request: DataRequest, source: Source, as_row: Callable[[Row, str], Row]) -> tuple[list[Row], list[Row]]:
    """Return rows to train on and to hold out of a published data set, each in an order that is the same for every run.

    Args:
        request: how many, and whether from a copy.
        source: where the data set is on the hub.
        as_row: makes a row with prompt, answer and id from a row as stored and from the name of that row in errors.

    Raises:
        ValueError: there are too few rows, or none can be used.
        OSError: neither the hub nor the copy delivered.
    """
    skipped: list[str] = []

    def rows_of(split: str) -> list[Row]:
        rows = usable(read_rows(request, source, split), as_row, request.path or request.dataset, skipped)
        return shuffled(distinct(rows), random.Random(0))  # noqa: S311 - reproducible data, not a secret

    no_splits = Path(request.path).suffix in READABLE
    held_out = None
    if source.held_out_split and request.held_out_prompts and not no_splits:
        held_out = rows_of(source.held_out_split)
    return split_rows(request, rows_of(request.split or "train"), held_out, skipped)


def usable(
    stored: Iterable[Row],
    as_row: Callable[[Row, str], Row],
    place: str,
    skipped: list[str],
    most: int | None = None,
) -> list[Row]:
    """Return the rows that can be used; the others are skipped, and counted in one line of the log.

    Args:
        stored: rows as stored.
        as_row: makes a row with prompt, answer and id from a row as stored and from its name in errors.
        place: name of the data in errors; rows are counted from 1.
        skipped: gets one message for each row that cannot be used.
        most: number of rows after which no more is read, None for all.

    Raises:
        ValueError: there are rows, and none can be used.
    """
    found: list[Row] = []
    odd: list[str] = []
    for number, row in enumerate(stored, start=1):
        if len(found) == most:
            break
        try:
            found.append(as_row(row, f"{place}, row {number}"))
        except ValueError as error:
            odd.append(str(error))
    read = len(found) + len(odd)
    if odd and not found:
        raise ValueError(f"{odd[0]} (none of {read} rows can be used)")
    if odd:
        logger.warning("%d of %d rows of %s cannot be used and are skipped: %s", len(odd), read, place, _first(odd))
    skipped += odd
    return found


def _first(messages: Sequence[str]) -> str:
    return "; ".join([*messages[:SHOWN_ROWS], *(["..."] if len(messages) > SHOWN_ROWS else [])])


def split_rows(
    request: DataRequest, train: Sequence[Row], held_out: Sequence[Row] | None, skipped: Sequence[str] = ()
) -> tuple[list[Row], list[Row]]:
    """Return the first rows for training, and the rows held out: those of ``held_out``, else the next ones.

    Rows to train on whose prompt is also held out are left out. ``skipped`` says why rows could not be used; it is part
    of the error where too few are left.

    Raises:
        ValueError: there are too few rows.
    """
    reason = f". {len(skipped)} rows cannot be used: {_first(skipped)}" if skipped else ""
    if held_out is None:
        if len(train) < request.wanted:
            raise ValueError(
                f"{request.dataset} holds {len(train)} rows, but train_prompts + held_out_prompts is {request.wanted}; "
                f"lower them{_proposal(len(train))}{reason}"
            )
        return list(train[: request.train_prompts]), list(train[request.train_prompts : request.wanted])
    kept_out = list(held_out[: request.held_out_prompts])
    prompts = {row["prompt"] for row in kept_out}
    kept = [row for row in train if row["prompt"] not in prompts][: request.train_prompts]
    for name, found, wanted in (
        ("train_prompts", len(kept), request.train_prompts),
        ("held_out_prompts", len(kept_out), request.held_out_prompts),
    ):
        if found < wanted:
            raise ValueError(f"{request.dataset} holds {found} rows for {name}, which is {wanted}; lower it{reason}")
    return kept, kept_out


def _proposal(rows: int) -> str:
    """Return a proposal for few rows, four fifths of them to train on."""
    held_out = rows // 5
    return f", for example --train-prompts {rows - held_out} --held-out-prompts {held_out}" if held_out else ""


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Return rows with a prompt that no earlier row has."""
    found: dict[Any, Row] = {}
    for row in rows:
        found.setdefault(row["prompt"], row)
    return list(found.values())


def shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    """Return the items in random order; the same state of ``rng`` gives the same order in every version of Python."""
    order = sorted((rng.random(), position) for position in range(len(items)))
    return [items[position] for _, position in order]


def text_id(source: str, text: str) -> str:
    """Return an id for a prompt that does not depend on the order of the rows."""
    return f"{source}/{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def column(row: Row, name: str, where: str) -> Any:
    """Return a required value of a row.

    Raises:
        ValueError: it is missing; the message lists the columns.
    """
    if name not in row:
        raise ValueError(f"{where}: no column {name!r}; columns are {', '.join(row)}")
    if is_missing(row[name]):
        raise ValueError(f"{where}: no value in column {name!r}; columns are {', '.join(row)}")
    return row[name]


def checked_answer(answer: Any, verifier: Verifier, where: str) -> str:
    """Return the answer of a row as text, if a completion can match it.

    A gold answer for ``number`` that is not a plain number is read once by the process that compares formulas.

    Raises:
        ValueError: it can never be matched; the row is named.
    """
    try:
        text = answer_text(answer)
        found = gold_answer(text, verifier)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if verifier == "number" and literal(found) is None and not patient_process().readable(found, number=True):
        raise ValueError(f"{where}: gold must be a number, got {text[-80:]!r}")
    return text


def refuse(request: DataRequest, *names: str) -> None:
    """Refuse settings that do not apply to a task.

    Raises:
        ValueError: one of them was given.
    """
    plain = {"path": "", "config": "", "split": "", "verifier": "auto", "template": "", "prompt_column": "prompt",
             "answer_column": "answer"}  # fmt: skip
    spelled = {
        "path": "dataset_path",
        "config": "dataset_config",
        "split": "dataset_split",
        "template": "prompt_template",
    }
    for name in names:
        if getattr(request, name) != plain[name]:
            raise ValueError(
                f"{spelled.get(name, name)} does not apply to the data set {request.dataset!r}, got "
                f"{getattr(request, name)!r}; leave it out"
            )
