"""The rollout loop of TRL's asynchronous trainer with groups of allocated sizes; it lives in the spawned process.

TRL's loop calls a group complete when it has ``num_generations`` rollouts. Here TRL generates groups of one, and the
loop joins them when all rollouts of a prompt are in, before TRL scores them and computes their advantages.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from trl.experimental.async_grpo.async_rollout_worker import (
    AsyncRolloutWorker,
    RolloutGroup,
    RolloutSample,
    _AsyncRolloutLoop,
)

from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.ids import PromptId
from knapsack_rl.metrics import LOGGED, select_metrics
from knapsack_rl.offline.earlier import earlier_rates
from knapsack_rl.runs.files import finite_or_none
from knapsack_rl.session import Session
from knapsack_rl.settings import AllocationSettings, check_fields, option
from knapsack_rl.state import atomic_file
from knapsack_rl.trl.identity import Identity

logger = logging.getLogger(__name__)

STATE_FOLDER = "rollout_worker"
"""Folder of the newest state, inside that of the run."""

GROUPS_FILE = "rollout_groups.json"
"""Number of windows so far, and the newest groups, beside the allocator's state."""

GROUPS_KEPT = 1024
"""Most groups in it. A resumed run generates the groups again that were not trained on before the checkpoint."""

GROUP_RATE, GROUP_LENGTH = "knapsack/group_success_rate", "knapsack/group_length"
"""Metrics of each row: estimated success rate and mean tokens of its group."""


@dataclass(kw_only=True)
class AsyncSettings(AllocationSettings):
    """Settings of :class:`~knapsack_rl.trl.async_worker.KnapsackRolloutWorker`.

    The fields of :class:`~knapsack_rl.settings.AllocationSettings`, and the following.

    Attributes:
        window: consecutive prompts of the data set whose rollouts are allocated together, >= 2.
        prompt_id_column: column of a stable id; a row without an id is identified by a hash of its columns.
        outcome_reward: name of the reward function that decides success; learned by default.
        log_metrics: metrics in the log, ``"core"`` or ``"all"``.
        log_allocations: append the outcome of each window to allocations.jsonl in the output folder.

    Raises:
        ValueError: a setting is out of range, or cannot work with TRL's asynchronous trainer.
    """

    window: int = option(32, "prompts whose rollouts are allocated together")
    prompt_id_column: str = option("prompt_id", "column of a stable id")
    outcome_reward: str = option("", "reward function that decides success; learned by default")
    log_metrics: str = option("core", "metrics in the log", LOGGED)
    log_allocations: bool = option(False, "append to allocations.jsonl in the output folder")

    def __post_init__(self) -> None:
        check_fields(self, type(self))
        self.check_allocation()
        if self.window < 2:
            raise ValueError(f"window must be at least 2 prompts, got {self.window}")
        if self.min_rollouts < 1:
            raise ValueError(
                "min_rollouts must be at least 1, got 0: TRL resumes at the first prompt that was not trained on, and "
                "a skipped prompt never is"
            )
        if self.rounds != 1:
            raise ValueError(
                f"rounds must be 1, got {self.rounds}: asynchronous generation has no end of a first round"
            )


def check_async_internals() -> None:
    """Check that the internals of TRL's asynchronous trainer are those that this module relies on.

    Raises:
        RuntimeError: this TRL release differs.
    """
    expected = {
        (_AsyncRolloutLoop, "_repeat_iterator"): ["self"],
        (_AsyncRolloutLoop, "_score_group"): ["self", "group"],
        (_AsyncRolloutLoop, "_push_metrics"): ["self", "values"],
        (AsyncRolloutWorker, "start"): ["self"],
        (AsyncRolloutWorker, "update_model_version"): ["self", "model_version"],
    }
    for (owner, name), parameters in expected.items():
        found = list(inspect.signature(getattr(owner, name)).parameters) if hasattr(owner, name) else None
        _expect(found == parameters, f"{owner.__name__}.{name} takes {found}, expected {parameters}")
    arguments = {"num_generations", "score_queue_maxsize", "dataset_start_index", "dataset"}
    missing = arguments - set(inspect.signature(_AsyncRolloutLoop.__init__).parameters)
    _expect(not missing, f"_AsyncRolloutLoop takes no {', '.join(sorted(missing))}")
    _expect(getattr(AsyncRolloutWorker, "_loop_cls", None) is _AsyncRolloutLoop, "AsyncRolloutWorker has no _loop_cls")
    for kind, names in (
        (RolloutGroup, {"completions", "completions_ids", "completions_sequences", "group_id", "model_version"}),
        (RolloutSample, {"group_id", "model_version", "metrics"}),
    ):
        missing = names - {spec.name for spec in dataclasses.fields(kind)}
        _expect(not missing, f"{kind.__name__} has no {', '.join(sorted(missing))}")


def _expect(holds: bool, difference: str) -> None:
    if not holds:
        raise RuntimeError(
            f"{difference}: this TRL release is not supported by the asynchronous worker; install trl==1.16.* and the "
            "newest knapsack-rl"
        )


@dataclass
class _Group:
    """A prompt with its allocated rollouts.

    Attributes:
        number: of the prompt, from 0 at the start of this process.
        key: its identity.
        row: of the data set.
        size: rollouts allocated.
        rate: estimated success rate; NaN if unknown.
        length: mean tokens of its rollouts; NaN until they are scored.
        parts: its rollouts so far, each a group of one.
    """

    number: int
    key: PromptId
    row: dict[str, Any]
    size: int
    rate: float
    length: float = float("nan")
    parts: list[RolloutGroup] = field(default_factory=list)


class KnapsackRolloutLoop(_AsyncRolloutLoop):
    """TRL's rollout loop with groups of allocated sizes.

    The rollouts of a window of prompts are allocated when its first prompt is submitted, after all outcomes that have
    arrived by then are observed, and the allocator's state is written at that moment.

    Args:
        settings: of the allocation.
        folder: of the run, for the log; the state goes into :data:`STATE_FOLDER` inside.
        proven: whether ids are known to name one prompt each.
        state: an allocator's state to continue from, with :data:`GROUPS_FILE` beside it.
        num_generations: mean rollouts of a prompt.
        score_queue_maxsize: most groups that wait for their scores.
        dataset_start_index: number of the first prompt.
        **kwargs: as TRL's loop.
    """

    def __init__(
        self,
        *,
        settings: AsyncSettings,
        folder: Path,
        proven: bool = True,
        state: Path | None = None,
        num_generations: int = 8,
        score_queue_maxsize: int = 16,
        dataset_start_index: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_generations=1,
            score_queue_maxsize=score_queue_maxsize * num_generations,
            dataset_start_index=dataset_start_index,
            **kwargs,
        )
        names = self.reward_func_names
        if settings.outcome_reward and settings.outcome_reward not in names:
            self._loop.close()
            raise ValueError(f"outcome_reward {settings.outcome_reward!r} is not one of {', '.join(names)}")
        self.outcomes = [settings.outcome_reward] if settings.outcome_reward else names
        self.settings, self.folder = settings, folder / STATE_FOLDER
        self.mean, self.first = num_generations, dataset_start_index
        self.knapsack = Session(  # TRL's own attribute session is its connection to the server
            settings,
            folder=folder,
            log_allocations=settings.log_allocations,
            rewards=self.outcomes,
            earlier=earlier_rates(settings.prior) if settings.prior else None,
        )
        self.identity = Identity(settings.prompt_id_column, proven=proven)
        self.window = 0
        self._newest: deque[_Group] = deque(maxlen=GROUPS_KEPT)
        self._group_of: dict[int, _Group] = {}  # by number of the rollout
        self._scored: list[tuple[_Group, FloatArray, list[int]]] = []  # group, (N_i, F) outcomes, tokens
        if state is not None:
            self.knapsack.restore(state)
            self.window = read_groups(state)[0]

    # -- groups out -------------------------------------------------------------------------------------------------

    def _repeat_iterator(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield a number and the row for each rollout; for TRL each is a group of its own."""
        rollout = 0
        for window in self._windows(super()._repeat_iterator()):
            for group in self._allocated(window):
                for _ in range(group.size):
                    self._group_of[rollout] = group
                    yield rollout, group.row
                    rollout += 1

    def _windows(
        self, rows: Iterable[tuple[int, dict[str, Any]]]
    ) -> Iterator[dict[PromptId, tuple[int, dict[str, Any]]]]:
        """Cut the stream of prompts into windows; one ends early before a prompt comes again."""
        window: dict[PromptId, tuple[int, dict[str, Any]]] = {}
        for number, row in rows:
            blocks = self.identity.blocks([row], 1)
            (key,) = self.identity.settle(blocks, 1, lambda message: self.knapsack.warn_once("ids", message))
            assert key is not None  # rows without an id are hashed
            if key in window or len(window) == self.settings.window:
                yield window
                window = {}
            window[key] = number, row

    def _allocated(self, window: dict[PromptId, tuple[int, dict[str, Any]]]) -> list[_Group]:
        """Observe what has arrived, write the state, and allocate the rollouts of a window."""
        self._observe()
        self.knapsack.survive("saving", self._save)
        self.window += 1
        features: dict[str, Any] = {
            name: [row.get(name) for _, row in window.values()] for name in self.settings.columns
        }
        plan = self.knapsack.plan([*window], self.mean, features=features)
        rates = plan.allocation.success_rates
        found = [
            _Group(number, key, row, int(plan.counts[k]), float("nan" if rates is None else rates[k]))
            for k, (key, (number, row)) in enumerate(window.items())
        ]
        self._newest.extend(found)
        return found

    # -- outcomes in ------------------------------------------------------------------------------------------------

    async def _score_group(self, group: RolloutGroup) -> list[RolloutSample]:
        """Keep a rollout until its group is complete; then score the group, and keep its outcomes."""
        _expect(len(group.completions) == 1, f"a group of one rollout has {len(group.completions)}")
        planned = self._group_of.pop(group.group_id)
        planned.parts.append(group)
        if len(planned.parts) < planned.size:
            return []
        whole, planned.parts = joined(planned.parts, planned.number), []
        samples = await super()._score_group(whole)
        tokens = [len(ids) for ids in whole.completions_ids]
        planned.length = float(np.mean(tokens))
        self._scored.append((planned, self._outcomes(whole, samples), tokens))
        for sample in samples:
            sample.metrics |= {GROUP_RATE: planned.rate, GROUP_LENGTH: planned.length}
        return samples

    def _outcomes(self, group: RolloutGroup, samples: Sequence[RolloutSample]) -> FloatArray:
        """Return the (N_i, F) outcomes of a group's rollouts, NaN for one that made no row to train on."""
        outcomes, rows = np.full((len(group.completions), len(self.outcomes)), np.nan), iter(samples)
        for rollout, sequences in enumerate(group.completions_sequences):
            for sample in [next(rows) for _ in sequences][:1]:
                outcomes[rollout] = [sample.metrics[f"rewards/{name}"] for name in self.outcomes]
        _expect(next(rows, None) is None, "a group has more rows than its rollouts")
        return outcomes

    def _observe(self) -> None:
        """Learn from the groups that were scored since the last window."""
        scored, self._scored = self._scored, []
        if not scored:
            return
        plan, prompt_R = self.knapsack.arrived([group.key for group, _, tokens in scored for _ in tokens])
        outcomes = np.concatenate([outcomes for _, outcomes, _ in scored])
        lengths = np.concatenate([tokens for _, _, tokens in scored])
        metrics = self.knapsack.observe(plan, prompt_R, outcomes, lengths, self.window).metrics
        shown = select_metrics(metrics, self.settings.log_metrics)
        self._push_metrics({f"knapsack/{name}": number for name, number in shown.items()})

    # -- state ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the state as it is between two windows."""
        groups = [
            [self.first + group.number, finite_or_none(group.rate), finite_or_none(group.length)]
            for group in self._newest
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / GROUPS_FILE) as file:
            file.write(json.dumps({"window": self.window, "groups": groups}).encode())
        self.knapsack.save(self.folder)


def joined(parts: Sequence[RolloutGroup], number: int) -> RolloutGroup:
    """Return one group of several: lists follow each other, and the policy is the oldest of theirs."""
    found = dataclasses.replace(parts[0], group_id=number, model_version=min(part.model_version for part in parts))
    for spec in dataclasses.fields(RolloutGroup):
        values = [getattr(part, spec.name) for part in parts]
        if isinstance(values[0], list):
            setattr(found, spec.name, [item for value in values for item in value])
        elif isinstance(values[0], dict):
            setattr(found, spec.name, {key: [item for value in values for item in value[key]] for key in values[0]})
    return found


def read_groups(state: Path) -> tuple[int, list[tuple[int, float, float]]]:
    """Return what :data:`GROUPS_FILE` beside a state says: windows so far, and (number, rate, length) of groups."""
    try:
        found = json.loads((state.parent / GROUPS_FILE).read_text(encoding="utf-8"))
        groups = [tuple(float("nan") if x is None else x for x in group) for group in found["groups"]]
        return int(found["window"]), groups  # type: ignore[return-value] # written by _save
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s beside %s cannot be read (%s): lost groups are not counted", GROUPS_FILE, state, error)
        return 0, []
