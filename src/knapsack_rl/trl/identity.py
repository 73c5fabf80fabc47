"""The identity of prompts: which rows of a batch belong to the same one.

Rows are one prompt only if everything that the reward or the environment sees is the same. An id column says so for its
rows; where there is none, a row is identified by a hash of all its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knapsack_rl.ids import PromptId, hash_of, plain_id, refusal

IMAGE_COLUMNS = ("image", "images")
"""Columns that TRL reads images from."""

NOT_DATA = ("prompts", "completions", "completion_ids", "environments")
"""Arguments of a reward function that are no columns of the data set."""

Row = dict[str, Any]


class BrokenGroupError(ValueError):
    """The rows of one group are different prompts."""


def given_id(row: Row, id_column: str) -> PromptId | None:
    """Return the id in a row, None if it has none.

    Raises:
        ValueError: the id is not a string or whole number.
    """
    given: PromptId | None = plain_id(row.get(id_column))
    if given is not None and (reason := refusal(given)):
        raise ValueError(f"column {id_column!r} must hold strings or whole numbers: an id {reason}")
    return given


def prompt_key(row: Row, id_column: str) -> PromptId:
    """Return the stable identity of a prompt: its id, else a hash of its row.

    Raises:
        ValueError: the id is not a string or whole number, or is missing and the row holds images.
    """
    given = given_id(row, id_column)
    if given is not None:
        return given
    if any(name in row for name in IMAGE_COLUMNS):
        raise ValueError(advice(id_column))
    try:
        return content_hash(row, id_column)
    except ValueError as error:
        raise ValueError(f"{advice(id_column)} ({error})") from error


def prompt_name(columns: Mapping[str, Any], row: int, id_column: str) -> PromptId:
    """Return the identity of a row of the columns that a reward function gets, for a message: it never raises."""
    size = len(columns["prompts"])
    found = {
        name: values[row]
        for name, values in columns.items()
        if isinstance(values, list) and len(values) == size and name not in NOT_DATA
    }
    try:
        return prompt_key(found | {"prompt": columns["prompts"][row]}, id_column)
    except ValueError:
        return "without id"


def advice(id_column: str) -> str:
    """Return what to do where rows cannot be hashed."""
    return (
        f"prompts with images need an id: add a column {id_column!r} that names each prompt by a string or a whole "
        "number, or name the column with prompt_id_column"
    )


def content_hash(row: Row, id_column: str) -> str:
    """Return a hash of everything in a row but its id.

    Raises:
        ValueError: the row holds an object without a stable text, such as an image.
    """
    return hash_of({name: value for name, value in row.items() if name != id_column and value is not None})


@dataclass(frozen=True)
class Block:
    """The rows of one group, or those of them that a process holds.

    Attributes:
        number: of the block in the batch of all processes.
        key: the prompt; None if it has no id and is not to be hashed.
        content: hash of the row, where an id alone does not prove that rows are the same.
        start: first of its rows, among those of the process.
        features: value of each feature column.
    """

    number: int
    key: PromptId | None
    content: str | None
    start: int
    features: tuple[Any, ...] = ()


class Identity:
    """Tells the prompts of a run apart.

    Args:
        id_column: column of ids.
        hashed: identify a row without an id by a hash; otherwise it has no identity.
        proven: the data set was compared, so that an id is one prompt; otherwise rows are compared as they come.
        features: columns by which prompts are alike.
    """

    def __init__(
        self, id_column: str, *, hashed: bool = True, proven: bool = True, features: Sequence[str] = ()
    ) -> None:
        self.id_column, self.hashed, self.proven, self.features = id_column, hashed, proven, tuple(features)
        self._content: dict[PromptId, str] = {}

    def blocks(self, rows: Sequence[Row], size: int, first: int = 0) -> list[Block]:
        """Return the blocks of which a process holds rows, in order.

        Args:
            rows: of this process.
            size: rows of a whole block.
            first: rows of the batch before these, held by other processes.

        Raises:
            BrokenGroupError: a block holds several prompts.
            ValueError: a prompt cannot be identified.
        """
        found: list[Block] = []
        for position, row in enumerate(rows):
            number = (first + position) // size
            if not found or found[-1].number != number:
                features = tuple(row.get(name) for name in self.features)
                found.append(Block(number, *self._identified(row), position, features))
            elif not self._alike(rows[found[-1].start], row):
                raise BrokenGroupError(broken_group(size, found[-1].key))
        return found

    def _identified(self, row: Row) -> tuple[PromptId | None, str | None]:
        if not self.hashed:
            return given_id(row, self.id_column), None
        key = prompt_key(row, self.id_column)
        if self.proven or row.get(self.id_column) is None:
            return key, None
        try:
            return key, content_hash(row, self.id_column)
        except ValueError:  # images: the id has to do
            return key, None

    def _alike(self, one: Row, other: Row) -> bool:
        """Return whether two rows are the same prompt, in the time of a comparison where that is enough."""
        given = given_id(one, self.id_column)
        if given != given_id(other, self.id_column):
            return False
        if not self.hashed or (given is not None and self.proven):
            return True
        try:
            if one == other:
                return True
        except (ValueError, RuntimeError):  # arrays have no single truth value: their hashes are compared
            pass
        return self._identified(one) == self._identified(other)

    def settle(self, blocks: Sequence[Block], size: int, warn: Callable[[str], None]) -> list[PromptId | None]:
        """Return the prompt of each block of the batch from the parts of all processes; all make the same call.

        An id that comes with other content than before names another prompt, whose id has the hash attached.

        Args:
            blocks: those of all processes, in order; one that straddles processes has several parts.
            size: rows of a whole block.
            warn: takes a warning about an id.

        Raises:
            BrokenGroupError: the parts of a block are different prompts.
        """
        whole: dict[int, Block] = {}
        for part in blocks:
            block = whole.setdefault(part.number, part)
            if (block.key, block.content) != (part.key, part.content):
                raise BrokenGroupError(broken_group(size, block.key))
        return [self._settled(block.key, block.content, warn) for block in whole.values()]

    def _settled(self, key: PromptId | None, content: str | None, warn: Callable[[str], None]) -> PromptId | None:
        if key is None or content is None or self._content.setdefault(key, content) == content:
            return key
        warn(
            f"column {self.id_column!r}: id {key!r} names different prompts of the stream; make ids unique over all "
            "sources, for example by putting the source in front"
        )
        return f"{key}/{content}"


def broken_group(size: int, key: PromptId | None) -> str:
    """Explain that a block of rows holds several prompts."""
    return (
        f"one block of num_generations={size} rows holds different prompts (prompt {key!r}): the data loader broke a "
        "group. With an IterableDataset, make every process read whole groups"
    )
