"""The session of a run of verl, shared by agent-loop manager, replay buffer and checkpoint callback."""

from __future__ import annotations

import logging
import os
from typing import Any

from knapsack_rl.advantages import Advantage
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.groups import GroupOutcomes, outcomes_by_position
from knapsack_rl.ids import PromptId
from knapsack_rl.offline.earlier import earlier_rates
from knapsack_rl.session import Session
from knapsack_rl.verl.identity import check_files
from knapsack_rl.verl.launch import ESTIMATORS_OVER_MEAN, VerlSettings, check_config, pick, without_effect

# As for verl's own modules: the output of a run says which state was restored.
logging.getLogger("knapsack_rl.verl").setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))


class VerlSession(Session):
    """The session of one run of verl.

    Args:
        settings: of the plug-in.

    Attributes:
        manager: the agent-loop manager, once it shares the session.
        first_round: the first of two rounds, between its start and that of the second.
        sent: prompt of each uid that is to have rollouts and was not sampled yet.
        observes: whether prompts have ids by which their rewards are recorded.
        advantage: of :mod:`knapsack_rl.verl.advantages`; None for one of verl's own.
        expected: of the newest batch, by uid: the chance that was given to a rollout that failed, and to one that
            succeeded.
    """

    settings: VerlSettings

    def __init__(self, settings: VerlSettings) -> None:
        super().__init__(
            settings,
            log_allocations=settings.log_allocations,
            watch=settings.watch,
            smallest_group=2,
            rewards=[settings.outcome],
            earlier=earlier_rates(settings.prior) if settings.prior else None,
        )
        self.manager: Any = None
        self.first_round: Any = None
        self.sent: dict[str, PromptId] = {}
        self.observes = True
        self.advantage: Advantage | None = None
        self.expected: dict[str, FloatArray] = {}
        self._checked = False

    def check(self, config: Any) -> None:
        """Refuse a configuration or training files that cannot work; only the first call of a run checks.

        Args:
            config: verl's configuration.

        Raises:
            ValueError: the configuration cannot work, or training files lack or repeat a prompt id.
        """
        if self._checked:
            return
        check_config(config, self.settings)
        self.advantage = ESTIMATORS_OVER_MEAN.get(pick(config, "algorithm.adv_estimator"))
        if self.advantage and (value := self.settings.chosen_value(self.advantage)) != self.allocator.value:
            self.allocator.use_value(value)
        for reason in without_effect(config, self.settings):
            self.warn_once(reason, reason)
        files = pick(config, "data.train_files")
        if pick(config, "data.custom_cls.path") is None and self.settings.allocation != "uniform":
            check_files(files if files is None or isinstance(files, str) else list(files), self.settings.prompt_id)
        self._checked = True

    def judged(self, prompt_R: IntArray, rewards: FloatArray, prompts: int) -> GroupOutcomes:
        """Group the rows of a batch, and judge them by the success rule as it is after what was observed.

        Args:
            prompt_R: (R,) position of each row's prompt.
            rewards: (R,) reward of each row, NaN for an unscored one.
            prompts: number of prompts.
        """
        learned = self.allocator.learned
        if learned is None or not self.observes:
            return self.allocator.outcomes_of(prompt_R, rewards, prompts)
        return outcomes_by_position(prompt_R, rewards, prompts, lambda whole: learned.successes(whole[:, None]))


_open: list[VerlSession] = []


def start(settings: VerlSettings) -> VerlSession:
    """Open the session of a run; the replay buffer calls this, because verl makes it first."""
    _open[:] = [VerlSession(settings)]
    return _open[0]


def current() -> VerlSession:
    """Return the session of this run.

    Raises:
        RuntimeError: none was opened in this process: the replay buffer of the plug-in is missing.
    """
    if not _open:
        raise RuntimeError(
            "no Knapsack RL session in this process: set trainer.v1.sampler.custom_sampler.path and .name too, as "
            "`knapsack-rl verl-args` prints, and run manager and replay buffer in one process as verl's v1 trainer does"
        )
    return _open[0]
