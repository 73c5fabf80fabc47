"""Reward logs of earlier runs: which prompt got which rewards in which step, and how many of them were successes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.groups import group_outcomes
from knapsack_rl.ids import PromptId
from knapsack_rl.offline.environments import BoolArray
from knapsack_rl.offline.log_files import LogFiles, remark_on_unread
from knapsack_rl.offline.rollouts import ColumnNames, Done, Rollouts, open_log, read_tables
from knapsack_rl.runs.allocations import read_visits
from knapsack_rl.success import LearnedSuccess, SuccessRule


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
        success: SuccessRule | None = None,
        source: str = "rewards",
        notes: Iterable[str] = (),
    ) -> RewardLog:
        """Sum up rollouts; all rollouts of a prompt in a step form one group, in whatever order they come.

        Args:
            prompt_ids: (R,) prompt of each rollout.
            steps: (R,) whole numbers.
            rewards: (R,) finite, or NaN for a rollout without a reward.
            success: a reward above this is a success, or a function of the rewards; learned by default.
            source: description of the source.
            notes: remarks to keep.

        Raises:
            ValueError: a step is missing or not a whole number, or no rollout has a reward.
        """
        return cls.of(Rollouts.of(prompt_ids, steps, rewards, source=source, notes=notes), success)

    @classmethod
    def of(cls, rollouts: Rollouts, success: SuccessRule | None = None) -> RewardLog:
        """Sum up the rollouts of a log.

        Args:
            rollouts: as read.
            success: a reward above this is a success, or a function of the rewards; learned by default.

        Raises:
            ValueError: no rollout has a reward.
        """
        scored = rollouts.scored()
        scored = scored[np.argsort(rollouts.steps[scored], kind="stable")]
        known, step_R = np.unique(rollouts.steps[scored], return_inverse=True)
        seen, first, prompt_R = np.unique(rollouts.prompt[scored], return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))  # prompts in the order of their first visit
        prompt_R = rank[prompt_R]
        rewards, group_R = rollouts.rewards[scored], step_R * seen.size + prompt_R
        notes = rollouts.notes
        if success is None:
            learned = learned_success(step_R, group_R, rewards).deciding
            success = learned.cutoff
            if learned.low < learned.high and (learned.low, learned.high) != (0.0, 1.0):
                notes += (
                    f"a reward above {learned.cutoff:g} counts as a success: of the range from {learned.low:g} to "
                    f"{learned.high:g} it tells prompts apart best; --success-threshold names another",
                )
        groups = group_outcomes(group_R, rewards, success)
        return cls(
            source=rollouts.source,
            prompt_ids=tuple(rollouts.prompt_ids[k] for k in seen[np.argsort(rank)]),
            steps=known,
            step=step_R[groups.first_row],
            prompt=prompt_R[groups.first_row],
            totals=groups.totals,
            successes=groups.successes,
            effective=groups.effective,
            unscored=int(rollouts.rewards.size - scored.size),
            graded=np.unique(rewards).size > 2,
            notes=notes,
        )


def learned_success(step_R: IntArray, group_R: IntArray, rewards: FloatArray) -> LearnedSuccess:
    """Return the success rule that a run with these rewards would have learned by its end.

    Args:
        step_R: (R,) step of each rollout, ascending.
        group_R: (R,) group of each rollout.
        rewards: (R,) finite.
    """
    rule = LearnedSuccess()
    for rows in np.split(np.arange(step_R.size), np.flatnonzero(np.diff(step_R)) + 1):
        rule.learn(np.unique(group_R[rows], return_inverse=True)[1], rewards[rows, None])
    return rule


def read_reward_log(
    path: str | Path,
    names: ColumnNames | None = None,
    success: SuccessRule | None = None,
    done: Done | None = None,
) -> RewardLog:
    """Read the reward log at a path.

    Args:
        path: see :func:`knapsack_rl.offline.rollouts.read_rollouts`.
        names: columns to read instead of the usual ones.
        success: a reward above this is a success, or a function of the rewards; learned by default.
        done: called with a line of text up to :data:`knapsack_rl.offline.rollouts.READ_STEPS` times.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path holds no readable log, or a column is missing; the message lists what was found.
        ImportError: parquet needs pyarrow.
    """
    log, names = open_log(path, names, success)
    if log.kind == "allocations":
        return _read_run(log)
    return RewardLog.of(read_tables(log, names, done), success)


def _read_run(log: LogFiles) -> RewardLog:
    rows, prompt_ids, visits = read_visits(log.files[0])
    scored = visits.scored > 0
    if not scored.any():
        raise ValueError(f"{log.files[0]} holds no step with a scored rollout")
    kept, prompt = np.unique(visits.prompt[scored], return_inverse=True)
    present, step = np.unique(visits.step[scored], return_inverse=True)
    return RewardLog(
        source=log.source,
        prompt_ids=tuple(prompt_ids[k] for k in kept),
        steps=np.array([row["step"] for row in rows], dtype=np.int64)[present],
        step=step,
        prompt=prompt,
        totals=visits.scored[scored],
        successes=visits.successes[scored],
        effective=visits.effective[scored],
        unscored=int((visits.arrived - visits.scored).sum()),
        notes=(*visits.notes, *remark_on_unread(log)),
    )
