"""Estimators of verl's registry: advantages over a mean of outcomes, every prompt of the same weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from verl.trainer.ppo.core_algos import register_adv_est

from knapsack_rl.advantages import Advantage, advantages_of
from knapsack_rl.groups import of_outcomes
from knapsack_rl.ids import numbered
from knapsack_rl.verl import session
from knapsack_rl.verl.launch import ESTIMATORS_OVER_MEAN

if TYPE_CHECKING:
    import torch


def _register(name: str, advantage: Advantage) -> None:
    @register_adv_est(name)
    def estimator(
        token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, config: Any = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the advantage of each rollout, on every token of its response, as verl's registry wants it.

        Args:
            token_level_rewards: (R, T) rewards, whose sum over a row is judged by the success rule of the run.
            response_mask: (R, T) 1 for a token that is trained on.
            index: (R,) uid of each row's prompt.
            config: of verl's algorithm; not needed.
            **_: what else verl passes.

        Returns:
            (R, T) advantages, twice: verl also asks for returns.
        """
        scores = token_level_rewards.sum(dim=-1).detach().double().cpu().numpy()
        uids, group_R = numbered([str(uid) for uid in np.asarray(index, dtype=object).tolist()])
        opened = session.current()
        groups = of_outcomes(opened.judged(group_R, np.where(np.isfinite(scores), scores, np.nan), len(uids)))
        baseline = None
        if advantage == "posterior-mean":
            by_group = zip(uids, groups.expected_alone, strict=True)  # for prompts without an id
            expected = [opened.expected.get(str(uid), alone) for uid, alone in by_group]
            baseline = groups.by_outcome(np.array(expected))
        advantages = advantages_of(groups, advantage=advantage, baseline=baseline)
        per_token = token_level_rewards.new_tensor(advantages)[:, None] * response_mask
        return per_token, per_token


for _name, _advantage in ESTIMATORS_OVER_MEAN.items():
    _register(_name, _advantage)
