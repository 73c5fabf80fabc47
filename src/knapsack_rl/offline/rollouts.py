"""The rewards of an earlier run, rollout by rollout: the one reader behind every command that takes a log.

It accepts allocation logs of this package, the completions that TRL writes (``log_completions=True``), the rollouts
that verl dumps (``trainer.rollout_data_dir``), and any CSV, JSON or parquet file with a row per rollout, compressed or
not.
What counts as a success is decided later, see :mod:`knapsack_rl.offline.reward_logs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.ids import PromptId
from knapsack_rl.offline.log_files import (
    SHOWN_FILES,
    LogFiles,
    find_log,
    first_rows,
    number_in_name,
    remark_on_unread,
)
from knapsack_rl.offline.tables import Columns, TableError, column, identities, numbers, read_chunks, rows_of
from knapsack_rl.runs.allocations import read_visits
from knapsack_rl.success import SuccessRule

ID_NAMES = (
    *("prompt_id", "id", "example_id", "index", "problem_id", "question_id"),
    *("prompt", "input", "question", "problem", "uid"),  # verl draws a new uid in every step
)
STEP_NAMES = ("step", "global_step", "training_step", "iteration")
REWARD_NAMES = ("reward", "score", "acc", "accuracy", "correct", "success", "is_correct")
"""Column names tried in this order if none is given."""

FIRST_NAMES = {"trl": {"prompt": ("prompt",)}, "verl": {"prompt": ("input",), "reward": ("score",)}}
"""Column names that come before the others, by kind of log."""

TRL_OWN = {"step", "prompt", "completion", "advantage", "images", "image"}
"""Columns of TRL's completions that do not hold rewards; the others are reward functions, by name, and user columns."""

READ_STEPS = 100
"""How often reading reports its progress, over the whole log."""

FEWEST_STEPS_BETWEEN_RESUMES = 4
"""A log that goes back more often than this, on average, is taken for one in another order."""

Done = Callable[[str], None]
Part = tuple[IntArray, IntArray, FloatArray]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class ColumnNames:
    """Names of the columns to read; None looks for the usual ones.

    Attributes:
        prompt: the id of a prompt, the same in every step.
        step: the training step.
        reward: the outcome.
    """

    prompt: str | None = None
    step: str | None = None
    reward: str | None = None


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Rewards of an earlier run, one row per rollout, in the order of the log.

    Attributes:
        source: description of the log.
        prompt_ids: distinct prompts in the order of their first row.
        prompt: (R,) index into ``prompt_ids``.
        steps: (R,) training step.
        rewards: (R,) finite, or NaN for a rollout without a reward.
        notes: remarks on how the log was read.
    """

    source: str
    prompt_ids: tuple[PromptId, ...]
    prompt: IntArray
    steps: IntArray
    rewards: FloatArray
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        prompt_ids: Sequence[PromptId],
        steps: ArrayLike,
        rewards: ArrayLike,
        *,
        source: str = "rewards",
        notes: Iterable[str] = (),
    ) -> Rollouts:
        """Return rollouts given row by row; an infinite reward counts as a missing one.

        Args:
            prompt_ids: (R,) prompt of each rollout.
            steps: (R,) whole numbers.
            rewards: (R,) NaN for a rollout without a reward.
            source: description of the log.
            notes: remarks to keep.

        Raises:
            ValueError: a step is missing or not a whole number.
        """
        number: dict[PromptId, int] = {}
        prompt = np.array([number.setdefault(prompt_id, len(number)) for prompt_id in prompt_ids], dtype=np.int64)
        step_R, reward_R = np.asarray(steps, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
        row = _first_broken(step_R)
        if row is not None:
            raise ValueError(
                f"{source}: the step of row {row + 1} is {step_R[row]}; every row needs a whole number as its step"
            )
        infinite = np.isinf(reward_R)
        if infinite.any():
            notes = (*notes, f"{_many(infinite.sum(), 'infinite reward')} taken for missing")
        return cls(
            source, tuple(number), prompt, step_R.astype(np.int64), np.where(infinite, np.nan, reward_R), tuple(notes)
        )

    def scored(self) -> IntArray:
        """Return the rows with a reward.

        Raises:
            ValueError: there are none.
        """
        rows = np.flatnonzero(~np.isnan(self.rewards))
        if not rows.size:
            raise ValueError(f"{self.source}: none of the {self.rewards.size} rollouts has a reward")
        return rows


def read_rollouts(
    path: str | Path,
    names: ColumnNames | None = None,
    success: SuccessRule | None = None,
    done: Done | None = None,
    *,
    need_steps: bool = True,
) -> Rollouts:
    """Read the log at a path, rollout by rollout.

    Of an allocation log, which only counts, successes have the reward 1, other scored rollouts 0.

    Args:
        path: a run folder or its allocation log, a folder of TRL's completions (or one that holds ``completions/``), a
            folder of verl's dumps or of other numbered files, or a CSV, JSON or parquet file with a row per rollout.
        names: columns to read instead of the usual ones.
        success: the success rule that the rewards will meet, if one is given; an allocation log has its own.
        done: called with a line of text up to :data:`READ_STEPS` times while the log is read.
        need_steps: refuse a log without steps; otherwise all its rows have step 0.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path holds no readable log, or a column is missing; the message lists what was found.
        ImportError: parquet needs pyarrow.
    """
    log, names = open_log(path, names, success)
    if log.kind == "allocations":
        return _counted(log)
    return read_tables(log, names, done, need_steps=need_steps)


def open_log(path: str | Path, names: ColumnNames | None, success: SuccessRule | None) -> tuple[LogFiles, ColumnNames]:
    """Return the files of the log at a path, and the columns to read; see :func:`read_rollouts`."""
    log, names = find_log(Path(path)), names or ColumnNames()
    if log.kind == "allocations":
        check_no_options(log.files[0], names, success)
    return log, names


def read_tables(log: LogFiles, names: ColumnNames, done: Done | None = None, *, need_steps: bool = True) -> Rollouts:
    """Read the files of a log that is not an allocation log, see :func:`read_rollouts`."""
    return _Reader(log, names, done or (lambda _: None), need_steps).read()


def _counted(log: LogFiles) -> Rollouts:
    rows, prompt_ids, visits = read_visits(log.files[0])
    steps = np.array([row["step"] for row in rows], dtype=np.int64)
    kinds = np.stack([visits.successes, visits.scored - visits.successes, visits.arrived - visits.scored], axis=1)
    return Rollouts(
        source=log.source,
        prompt_ids=prompt_ids,
        prompt=np.repeat(visits.prompt, kinds.sum(axis=1)),
        steps=np.repeat(steps[visits.step], kinds.sum(axis=1)),
        rewards=np.repeat(np.tile([1.0, 0.0, np.nan], visits.step.size), kinds.ravel()),
        notes=(*visits.notes, *remark_on_unread(log)),
    )


def check_no_options(path: Path, names: ColumnNames, success: SuccessRule | None) -> None:
    """Refuse options that the log of a run of this package has no use for.

    Raises:
        ValueError: there are some.
    """
    if names != ColumnNames() or success is not None:
        raise ValueError(f"{path} holds a run's allocations, which fix columns and successes; give no options for them")


class _Reader:
    """Reads the files of a log one after the other; of their rows only prompts, steps and rewards stay in memory.

    Args:
        log: the files.
        given: columns to read instead of the usual ones.
        done: called as reading goes on.
        need_steps: refuse a log without steps.
    """

    def __init__(self, log: LogFiles, given: ColumnNames, done: Done, need_steps: bool) -> None:
        self._log = log
        self._progress = _Progress(log.files, done)
        self._unreadable: list[TableError] = []
        self._remarks: list[str] = []
        self._number: dict[PromptId, int] = {}
        self._prompt, self._step, self._reward = self._columns(given, need_steps)

    def read(self) -> Rollouts:
        parts: list[Part] = []
        repeats, previous = 0, None
        for file in self._log.files:
            rows, generation = self._file(file)
            # TRL logs its newest generation again at every later step that does not generate.
            if generation is not None and generation == previous:
                repeats += 1
            else:
                parts += rows
            previous = generation
        if not parts:
            raise self._unreadable[0]
        prompt, steps, rewards = (np.concatenate(column) for column in zip(*parts, strict=True))
        kept = ~logged_again(prompt, steps)
        ids = list(self._number)
        found = Rollouts.of(
            [ids[k] for k in prompt[kept]],
            steps[kept],
            rewards[kept],
            source=self._log.source,
            notes=[self._choice(), *remark_on_unread(self._log), *self._remarks],
        )
        notes = [f"not read: {error}" for error in self._unreadable[:SHOWN_FILES]]
        if len(self._unreadable) > SHOWN_FILES:
            notes.append(f"{len(self._unreadable) - SHOWN_FILES} more files could not be read")
        if not kept.all():
            notes.append(
                f"steps from {steps[~kept].min()} on were logged again after a resume: the later rows count, and "
                f"{_many((~kept).sum(), 'earlier rollout')} left out"
            )
        if repeats:
            notes.append(f"{repeats} files repeat the completions of the previous file and were left out")
        gaps = np.diff(np.unique(found.steps))
        if self._log.kind == "trl" and gaps.size and gaps.min() > 1:
            notes.append(f"the log holds at most every {gaps.min()}th step; logging_steps=1 logs all of them")
        return replace(found, notes=(*found.notes, *notes))

    # -- columns ------------------------------------------------------------------------------------------------------

    def _columns(self, given: ColumnNames, need_steps: bool) -> tuple[str, str | None, str]:
        """Return the columns of prompt, step and reward; there is none for a step that is in the names of the files."""
        file, columns = self._first_readable()
        first = FIRST_NAMES.get(self._log.kind, {})
        prompt = given.prompt or _usual_prompt((*first.get("prompt", ()), *ID_NAMES), columns)
        step = given.step or _usual(STEP_NAMES, columns)
        if prompt is None:
            raise _no_usual(ID_NAMES, columns, file, "prompt", "--id-column")
        if step is None and need_steps and not self._log.numbered:
            raise _no_usual(STEP_NAMES, columns, file, "step", "--step-column")
        if given.reward is not None:
            return prompt, step, given.reward
        if self._log.kind == "trl":
            return prompt, step, self._reward_function()
        reward = _usual((*first.get("reward", ()), *REWARD_NAMES), columns)
        named = [name for name in columns if "reward" in name.lower()]
        if reward is None and len(named) != 1:
            if not named and "completion" in columns and _able(columns.get("advantage", ("",))):  # one file of TRL's
                return prompt, step, self._reward_function()
            raise _no_usual(REWARD_NAMES, columns, file, "reward", "--reward-column")
        return prompt, step, reward or named[0]

    def _first_readable(self) -> tuple[Path, Columns]:
        """Return the first file that can be read, and its first rows."""
        unreadable = []
        for file in self._log.files:
            try:
                return file, first_rows(file)
            except TableError as error:
                unreadable.append(error)
        raise unreadable[0]

    def _reward_function(self) -> str:
        """Return the only column of TRL's completions that can hold rewards; some files may hold only missing ones."""
        able: list[str] = []
        for file in self._log.files:
            try:
                columns = first_rows(file)
            except TableError:
                continue
            able = [name for name, values in columns.items() if name not in TRL_OWN and _able(values)]
            if any(value is not None for name in able for value in columns[name]):
                break
        if len(able) == 1:
            return able[0]
        file, columns = self._first_readable()
        found = (
            f"several columns may hold it ({', '.join(able)})"
            if able
            else f"none of {', '.join(columns)} holds numbers"
        )
        raise ValueError(f"{file}: the reward column is unclear: {found}; name it with --reward-column")

    def _choice(self) -> str:
        read = f"read prompt from column {self._prompt!r}, "
        if self._step is not None:
            read += f"step from column {self._step!r}, "
        elif self._log.numbered:
            read += "step from the names of the files, "
        read += f"reward from column {self._reward!r}"
        return read if self._step is not None or self._log.numbered else f"{read}; all rows count as one step"

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _file(self, file: Path) -> tuple[list[Part], int | None]:
        """Return the rows of a file in parts, and of TRL's a number for its prompts and completions.

        A file of several that cannot be read is left out.
        """
        trl = self._log.kind == "trl"
        needed = {self._prompt, self._step or self._prompt, self._reward, *(("prompt", "completion") if trl else ())}
        parts: list[Part] = []
        remarks: list[str] = []
        rows, generation = 0, None
        try:
            for chunk in read_chunks(file, needed, torn=remarks.append, position=self._progress.position):
                parts.append(self._part(chunk, file, rows))
                rows += rows_of(chunk)
                if trl:
                    generation = hash((generation, repr([chunk.get("prompt"), chunk.get("completion")])))
        except TableError as error:
            if len(self._log.files) == 1:
                raise
            self._unreadable.append(error)
            return [], None
        finally:
            self._progress.file_done(file)
        self._remarks += remarks
        return parts, generation

    def _part(self, chunk: Columns, file: Path, before: int) -> Part:
        """Return prompts, steps and rewards of a chunk with this number of rows before it in the file."""

        def values(name: str) -> list[Any]:
            # Rows of JSON may leave out a key, but not all rows of a file.
            return column(chunk, name, file) if name in chunk or not before else [None] * rows_of(chunk)

        prompts = values(self._prompt)
        rewards = values(self._reward)
        steps = [None] * len(prompts) if self._step is None else values(self._step)
        in_name = number_in_name(file) if self._log.numbered else None
        missing = in_name if in_name is not None else 0 if self._step is None else np.nan
        number = self._number
        try:
            ids = identities(prompts, self._prompt, before + 1)
            prompt = np.array([number.setdefault(prompt_id, len(number)) for prompt_id in ids], dtype=np.int64)
            step = numbers(steps, str(self._step), before + 1)
            step[np.isnan(step)] = missing
            broken = _first_broken(step)
            if broken is not None:
                found = "empty" if np.isnan(step[broken]) else step[broken]
                where = f"column {self._step!r}, row {before + broken + 1}"
                raise ValueError(f"{where} is {found}; every row needs a whole number as its step")
            return prompt, step.astype(np.int64), numbers(rewards, self._reward, before + 1)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def logged_again(prompt: IntArray, steps: IntArray) -> BoolArray:
    """Return (R,) which rows a resumed run logged again further down.

    A resumed run that appends to its log goes back to an earlier step and repeats what its checkpoint does not contain:
    the same steps with the same prompts. What it repeats, and whatever followed, is superseded. Rows in another order
    (shuffled, sorted by prompt, one process after the other, processes that overtake each other) are all kept.

    Args:
        prompt: (R,) index of the prompt of each row.
        steps: (R,) step of each row, in the order of the log.
    """
    again = np.zeros(steps.size, dtype=np.bool_)
    starts = np.flatnonzero(np.diff(steps) < 0) + 1
    if not starts.size or starts.size > 1 + np.unique(steps).size // FEWEST_STEPS_BETWEEN_RESUMES:
        return again
    pair = steps * (prompt.max(initial=0) + 1) + prompt
    for start, end in zip(starts, [*starts[1:], steps.size], strict=True):
        earlier = np.flatnonzero(~again[:start])
        repeated = earlier[steps[earlier] >= steps[start]]
        if not _resumed(pair, steps, repeated, slice(start, end), whole=repeated.size == earlier.size):
            return np.zeros_like(again)
        again[repeated] = True
    return again


def _resumed(pair: IntArray, steps: IntArray, earlier: IntArray, later: slice, *, whole: bool) -> bool:
    """Return whether later rows repeat earlier ones, up to the last step of either, which may be incomplete."""
    if not earlier.size:
        return False
    newest = steps[earlier].max()
    if whole and steps[later].max() < newest + 2:  # other processes log the same steps from the first to the last
        return False
    last = min(newest, steps[later].max())
    upto = last if last > steps[later][0] else last + 1
    one, other = pair[earlier][steps[earlier] < upto], pair[later][steps[later] < upto]
    shared = np.intersect1d(one, other).size
    return 2 * shared >= max(np.unique(one).size, np.unique(other).size) and 2 * other.size >= one.size


class _Progress:
    """Reports the bytes read, as shares of all files."""

    def __init__(self, files: Sequence[Path], done: Done) -> None:
        self._total = max(1, sum(file.stat().st_size for file in files))
        self._done, self._before, self._now, self._shown = done, 0, 0, 0

    def position(self, position: int) -> None:
        """Note the position in the file that is read."""
        self._now = max(self._now, position)
        while self._shown < READ_STEPS * min(1.0, (self._before + self._now) / self._total):
            self._shown += 1
            self._done("reading the log")

    def file_done(self, file: Path) -> None:
        """Note that a file is read."""
        self.position(file.stat().st_size)
        self._before, self._now = self._before + self._now, 0


def _usual(names: Iterable[str], columns: Columns) -> str | None:
    return next((name for name in names if name in columns), None)


def _usual_prompt(names: Iterable[str], columns: Columns) -> str | None:
    """Return the first column in which a value repeats, as prompts do: an ``index`` may number the rows."""
    found = [name for name in names if name in columns]
    repeating = (name for name in found if len({*map(repr, columns[name])}) < len(columns[name]))
    return next(repeating, found[0] if found else None)


def _no_usual(names: Sequence[str], columns: Columns, file: Path, what: str, flag: str) -> TableError:
    return TableError(
        f"{file} has none of the usual columns for the {what} ({', '.join(names)}); its columns are "
        f"{', '.join(columns)}: name one with {flag}"
    )


def _able(values: Sequence[Any]) -> bool:
    """Return whether values can be rewards, missing ones included."""
    return all(value is None or isinstance(value, (bool, int, float)) for value in values)


def _first_broken(steps: FloatArray) -> int | None:
    """Return the first row whose step is not a whole number."""
    broken = np.flatnonzero(~((np.abs(steps) < 2.0**53) & (steps == np.floor(steps))))  # both are false for NaN
    return int(broken[0]) if broken.size else None


def _many(count: int, what: str) -> str:
    return f"1 {what} was" if count == 1 else f"{count:,} {what}s were"
