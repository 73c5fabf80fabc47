"""An estimator of verl's registry: advantages over the mean of a group's outcomes, every prompt of the same weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from verl.trainer.ppo.core_algos import register_adv_est

from knapsack_rl.groups import advantages_of, of_outcomes
from knapsack_rl.ids import numbered
from knapsack_rl.verl import session
from knapsack_rl.verl.launch import GROUP_MEAN

if TYPE_CHECKING:
    import torch


@register_adv_est(GROUP_MEAN)
def group_mean_advantages(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, config: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A = (outcome - mean) / mean of each group, on every token of the response, as verl's registry wants it.

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
    prompts, group_R = numbered([str(uid) for uid in np.asarray(index, dtype=object).tolist()])
    groups = session.current().judged(group_R, np.where(np.isfinite(scores), scores, np.nan), len(prompts))
    advantages = advantages_of(of_outcomes(groups), advantage="group-mean")
    per_token = token_level_rewards.new_tensor(advantages)[:, None] * response_mask
    return per_token, per_token
