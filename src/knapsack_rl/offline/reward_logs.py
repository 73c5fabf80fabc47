"""Reward logs of earlier runs: which prompt got which rewards in which step, and how many of them were successes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.groups import SuccessRule, group_outcomes
from knapsack_rl.ids import PromptId
from knapsack_rl.offline.environments import BoolArray
from knapsack_rl.offline.log_files import LogFiles, find_log, remark_on_unread
from knapsack_rl.offline.rollouts import ColumnNames, Done, Rollouts, check_no_options, read_tables
from knapsack_rl.runs.allocations import read_visits


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
            ValueError: a step is missing or not a whole number, or no rollout has a reward.
        """
        return cls.of(Rollouts.of(prompt_ids, steps, rewards, source=source, notes=notes), success)

    @classmethod
    def of(cls, rollouts: Rollouts, success: SuccessRule = 0.0) -> RewardLog:
        """Sum up the rollouts of a log.

        Args:
            rollouts: as read.
            success: a reward above this is a success, or a function of the rewards.

        Raises:
            ValueError: no rollout has a reward.
        """
        scored = rollouts.scored()
        scored = scored[np.argsort(rollouts.steps[scored], kind="stable")]
        known, step_R = np.unique(rollouts.steps[scored], return_inverse=True)
        seen, first, prompt_R = np.unique(rollouts.prompt[scored], return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))  # prompts in the order of their first visit
        prompt_R = rank[prompt_R]
        groups = group_outcomes(step_R * seen.size + prompt_R, rollouts.rewards[scored], success)
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
            graded=np.unique(rollouts.rewards[scored]).size > 2,
            notes=rollouts.notes,
        )


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
        success: a reward above this is a success, or a function of the rewards; None means above 0.
        done: called with a line of text up to :data:`knapsack_rl.offline.rollouts.READ_STEPS` times.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path holds no readable log, or a column is missing; the message lists what was found.
        ImportError: parquet needs pyarrow.
    """
    log, names = find_log(Path(path)), names or ColumnNames()
    if log.kind == "allocations":
        check_no_options(log, names, success)
        return _read_run(log)
    return RewardLog.of(read_tables(log, names, done), 0.0 if success is None else success)


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
