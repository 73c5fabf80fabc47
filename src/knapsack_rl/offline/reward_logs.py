"""Reward logs of earlier runs: which prompt got which rewards in which step.

The reader accepts run folders of this package, the completions that TRL writes (``log_completions=True``), the rollouts
that verl dumps (``trainer.rollout_data_dir``), and any CSV, JSONL or parquet file with one row per rollout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.groups import SuccessRule, group_outcomes
from knapsack_rl.ids import PromptId
from knapsack_rl.offline.environments import BoolArray
from knapsack_rl.offline.tables import Columns, column, identities, numbers, read_columns
from knapsack_rl.runs.allocations import read_visits
from knapsack_rl.runs.files import ALLOCATION_LOG

ID_NAMES = ("prompt_id", "id", "uid", "index", "problem_id", "question_id", "prompt", "input", "question", "problem")
STEP_NAMES = ("step", "global_step", "training_step", "iteration")
REWARD_NAMES = ("reward", "score", "acc", "accuracy", "correct", "success", "is_correct")
"""Column names tried in this order if none is given."""

TRL_OWN = {"step", "prompt", "completion", "advantage", "images", "image"}
"""Columns of TRL's completions that do not hold rewards; the others are reward functions, by name, and user columns."""

_TRL_FILE = re.compile(r"completions_(\d+)\.parquet")
_VERL_FILE = re.compile(r"(\d+)\.jsonl")


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
class RewardLog:
    """Groups of an earlier run; arrays over visits (one prompt in one step) have length V and ascend by step.

    Attributes:
        source: description of the source.
        prompt_ids: distinct prompts in order of first visit.
        steps: (T,) step numbers, ascending.
        step: (V,) index into ``steps``.
        prompt: (V,) index into ``prompt_ids``.
        totals: (V,) scored rollouts, >= 1.
        successes: (V,) successful ones.
        effective: (V,) whether the rewards of the group differed.
        unscored: rollouts without a reward, left out.
        graded: whether there are more than two distinct rewards.
        notes: remarks on how the log was read.
    """

    source: str
    prompt_ids: tuple[PromptId, ...]
    steps: IntArray
    step: IntArray
    prompt: IntArray
    totals: IntArray
    successes: IntArray
    effective: BoolArray
    unscored: int = 0
    graded: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def from_rollouts(
        cls,
        prompt_ids: Sequence[PromptId],
        steps: FloatArray,
        rewards: FloatArray,
        *,
        success: SuccessRule = 0.0,
        source: str = "rewards",
        notes: Iterable[str] = (),
    ) -> RewardLog:
        """Sum up rollouts; all rollouts of a prompt in a step form one group, in whatever order they come.

        Args:
            prompt_ids: (R,) prompt of each rollout.
            steps: (R,) whole numbers.
            rewards: (R,) finite, or NaN for a rollout without a reward.
            success: a reward above this is a success, or a function of the rewards.
            source: description of the source.
            notes: remarks to keep.

        Raises:
            ValueError: a step is missing or not a whole number, a reward is infinite, or no rollout has a reward.
        """
        whole = (np.abs(steps) < 2.0**53) & (steps == np.floor(steps))  # both are false for NaN
        if not whole.all():
            row = int(np.flatnonzero(~whole)[0])
            raise ValueError(
                f"{source}: the step of row {row + 1} is {steps[row]}; every row needs a whole number as its step"
            )
        scored = np.flatnonzero(~np.isnan(rewards))
        if not scored.size:
            raise ValueError(f"{source}: none of the {rewards.size} rollouts has a reward")
        scored = scored[np.argsort(steps[scored], kind="stable")]
        known, step_R = np.unique(steps[scored], return_inverse=True)
        number: dict[PromptId, int] = {}
        prompt_R = np.array(
            [number.setdefault(prompt_ids[row], len(number)) for row in scored.tolist()], dtype=np.int64
        )
        groups = group_outcomes(step_R * len(number) + prompt_R, rewards[scored], success)
        return cls(
            source=source,
            prompt_ids=tuple(number),
            steps=known.astype(np.int64),
            step=step_R[groups.first_row],
            prompt=prompt_R[groups.first_row],
            totals=groups.totals,
            successes=groups.successes,
            effective=groups.effective,
            unscored=int(rewards.size - scored.size),
            graded=np.unique(rewards[scored]).size > 2,
            notes=tuple(notes),
        )


def read_reward_log(
    path: str | Path, names: ColumnNames | None = None, success: SuccessRule | None = None
) -> RewardLog:
    """Read the reward log at a path.

    Args:
        path: a run folder or its allocation log, a folder of TRL's completions (or one that holds ``completions/``), a
            folder of verl's dumps, or a CSV, JSONL or parquet file with a row per rollout.
        names: columns to read instead of the usual ones.
        success: a reward above this is a success, or a function of the rewards; None means above 0.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path holds no readable log, or a column is missing; the message lists what was found.
        ImportError: parquet needs pyarrow.
    """
    path, names = Path(path), names or ColumnNames()
    if path.name == ALLOCATION_LOG:
        path = path.parent
    if path.is_file():
        return _from_tables([(path, read_columns(path))], names, success, source=str(path))
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if (path / ALLOCATION_LOG).is_file():
        if names != ColumnNames() or success is not None:
            raise ValueError(f"{path} is a run folder, which fixes columns and successes; give no options for them")
        return _read_run(path)
    for folder in (path, path / "completions"):
        files = _numbered(folder, _TRL_FILE)
        if files:
            return _read_trl(files, names, success, f"TRL completions in {folder}")
    files = _numbered(path, _VERL_FILE)
    if files:
        verl = ColumnNames(names.prompt or "input", names.step or "step", names.reward or "score")
        tables = ((file, read_columns(file)) for file in files)
        return _from_tables(tables, verl, success, source=f"verl rollouts in {path}")
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"{path} holds no readable log: expected a run folder ({ALLOCATION_LOG}), TRL's "
        f"completions_*.parquet or verl's N.jsonl; found {inside}"
    )


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return the files of a folder whose names match, ordered by the number in the name."""
    found = [(int(match[1]), file) for file in folder.glob("*") if (match := pattern.fullmatch(file.name))]
    return [file for _, file in sorted(found)]


def _read_run(folder: Path) -> RewardLog:
    rows, prompt_ids, visits = read_visits(folder / ALLOCATION_LOG)
    scored = visits.scored > 0
    if not scored.any():
        raise ValueError(f"{folder / ALLOCATION_LOG} holds no step with a scored rollout")
    kept, prompt = np.unique(visits.prompt[scored], return_inverse=True)
    present, step = np.unique(visits.step[scored], return_inverse=True)
    return RewardLog(
        source=f"run folder {folder}",
        prompt_ids=tuple(prompt_ids[k] for k in kept),
        steps=np.array([row["step"] for row in rows], dtype=np.int64)[present],
        step=step,
        prompt=prompt,
        totals=visits.scored[scored],
        successes=visits.successes[scored],
        effective=visits.effective[scored],
        unscored=int((visits.arrived - visits.scored).sum()),
    )


def _read_trl(files: Sequence[Path], names: ColumnNames, success: SuccessRule | None, source: str) -> RewardLog:
    tables: list[tuple[Path, Columns]] = []
    previous, repeated = 0, 0
    for file in files:
        columns = read_columns(file)
        # TRL logs its newest generation again at every later step that does not generate.
        rows = hash(repr([columns.get("prompt"), columns.get("completion")]))
        if rows == previous:
            repeated += 1
            continue
        previous = rows
        if not tables:
            reward = names.reward or _trl_reward(columns, file)
            names = ColumnNames(names.prompt or "prompt", names.step or "step", reward)
        # Completions are long; only the needed columns stay in memory.
        needed = (names.prompt, names.step, names.reward)
        tables.append((file, {name: column(columns, name, file) for name in needed if name is not None}))
    notes = [f"{repeated} files repeat the completions of the previous file and were left out"] if repeated else []
    log = _from_tables(tables, names, success, source=source)
    if log.steps.size > 1 and np.diff(log.steps).min() > 1:
        every = int(np.diff(log.steps).min())
        notes.append(f"the log holds at most every {every}th step; logging_steps=1 logs all of them")
    return replace(log, notes=(*log.notes, *notes))


def _trl_reward(columns: Columns, file: Path) -> str:
    """Return the only column that can hold rewards."""
    able = [name for name, values in columns.items() if name not in TRL_OWN and _numeric(values)]
    if len(able) == 1:
        return able[0]
    found = (
        f"several columns may hold it ({', '.join(able)})" if able else f"none of {', '.join(columns)} holds numbers"
    )
    raise ValueError(f"{file}: the reward column is unclear: {found}; name it with --reward-column")


def _numeric(values: Sequence[Any]) -> bool:
    return all(value is None or isinstance(value, (bool, int, float)) for value in values) and any(
        value is not None for value in values
    )


def _from_tables(
    tables: Iterable[tuple[Path, Columns]], names: ColumnNames, success: SuccessRule | None, *, source: str
) -> RewardLog:
    """Read tables with a row per rollout one after the other; the first determines the columns."""
    ids: list[PromptId] = []
    steps: list[FloatArray] = []
    rewards: list[FloatArray] = []
    chosen: dict[str, str] = {}
    for file, columns in tables:
        chosen = chosen or {
            "prompt": names.prompt or _usual(columns, ID_NAMES, file, "prompt", "--id-column"),
            "step": names.step or _usual(columns, STEP_NAMES, file, "step", "--step-column"),
            "reward": names.reward or _usual(columns, REWARD_NAMES, file, "reward", "--reward-column"),
        }
        ids += _prompts(column(columns, chosen["prompt"], file), chosen["prompt"])
        steps.append(numbers(column(columns, chosen["step"], file), chosen["step"]))
        rewards.append(_outcomes(column(columns, chosen["reward"], file), chosen["reward"]))
    read = ", ".join(f"{what} from column {name!r}" for what, name in chosen.items())
    return RewardLog.from_rollouts(
        ids,
        np.concatenate(steps),
        np.concatenate(rewards),
        success=0.0 if success is None else success,
        source=source,
        notes=(f"read {read}",),
    )


def _usual(columns: Columns, usual: Sequence[str], file: Path, what: str, flag: str) -> str:
    for name in usual:
        if name in columns:
            return name
    raise ValueError(
        f"{file} has none of the usual columns for the {what} ({', '.join(usual)}); its columns are "
        f"{', '.join(columns)}: name one with {flag}"
    )


def _prompts(values: Sequence[Any], name: str) -> list[PromptId]:
    """Return prompts as ids; a conversation (a list of messages) is identified by its JSON text."""
    if not any(isinstance(value, (list, dict)) for value in values):
        return identities(values, name)
    return [json.dumps(value, sort_keys=True, ensure_ascii=False) for value in values]


def _outcomes(values: Sequence[Any], name: str) -> FloatArray:
    """Return rewards as numbers; true and false, also as text, count as 1 and 0."""
    truth: dict[Any, float] = {"true": 1.0, "false": 0.0}
    return numbers([truth.get(value.lower(), value) if isinstance(value, str) else value for value in values], name)
