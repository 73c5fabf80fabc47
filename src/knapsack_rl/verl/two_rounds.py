"""A step in two rounds: further rollouts of the prompts of a batch, asked for once the first ones are scored.

A worker of verl numbers the sessions of a prompt from 0, so a second request under the uid of the first would overwrite
its rows. The second round goes under a uid of its own for each prompt, is sampled like any batch, and its rows get the
first round's uid, by which verl groups them. Only the synchronous trainer does not generate while it trains, so only
there all rollouts of a step are of one policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import transfer_queue
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.ids import PromptId
from knapsack_rl.plan import Plan
from knapsack_rl.session import Session
from knapsack_rl.verl.fields import COUNT_FIELD, plain

SECOND = ".2"
"""End of the uid of a prompt in the second round; verl's keys end the uid at the first underscore."""


@dataclass
class FirstRound:
    """What was sent in the first round.

    Attributes:
        plan: its rollouts.
        ids: (B,) prompt of each row.
        prompts: verl's batch, a row for each prompt.
        mean: mean rollouts of a prompt in both rounds.
    """

    plan: Plan
    ids: list[PromptId]
    prompts: TensorDict
    mean: int


def second_request(first: FirstRound, session: Session, batch: Any, read: Callable[[Any], Any]) -> TensorDict | None:
    """Return the rows to send in the second round with their rollouts, None if there are none.

    Args:
        first: the first round.
        session: of the run.
        batch: the first round's rollouts, as sampled.
        read: returns (prompt ids, outcomes, lengths) of a batch's rollouts.
    """

    def outcomes() -> tuple[IntArray, FloatArray]:
        ids, outcome_R, _ = read(batch)
        place = {prompt_id: k for k, prompt_id in enumerate(first.plan.ids)}
        return np.array([place[prompt_id] for prompt_id in ids], dtype=np.int64), outcome_R

    unread = np.zeros(0, np.int64), np.zeros(0)  # the rest then follows the estimates from before the step
    prompt_R, outcome_R = session.survive("reading", outcomes) or unread
    plan = session.plan_rest(first.plan, first.mean * len(first.ids), prompt_R, outcome_R)
    rest = replace(plan, allocation=replace(plan.allocation, counts=plan.counts - first.plan.counts))
    count_B = rest.rows_of(first.ids)
    rows = np.flatnonzero(count_B)
    if not rows.size:
        return None
    prompts = tensordict_utils.index_select_tensor_dict(first.prompts, rows.tolist())
    tensordict_utils.assign_non_tensor_stack(prompts, "uid", [f"{uid}{SECOND}" for uid in plain(prompts, "uid")])
    tensordict_utils.assign_non_tensor_stack(prompts, COUNT_FIELD, count_B[rows].tolist())
    return prompts


def announce(prompts: TensorDict, step: int) -> None:
    """Register prompts in the transfer queue, as verl's trainer does before it sends them."""
    tag = {"is_prompt": True, "status": "pending", "global_steps": step}
    transfer_queue.kv_batch_put(
        keys=plain(prompts, "uid"), partition_id="train", tags=[dict(tag) for _ in range(len(prompts))]
    )


def joined(first: Any, second: Any) -> KVBatchMeta:
    """Return one batch of the rollouts of both rounds; those of the second join the groups of the first."""
    uids = [key.split("_")[0].removesuffix(SECOND) for key in second.keys]
    if uids:
        fields = tensordict_utils.get_tensordict({"uid": uids})
        transfer_queue.kv_batch_put(keys=second.keys, partition_id=second.partition_id, fields=fields)
    return KVBatchMeta(
        partition_id=first.partition_id, keys=[*first.keys, *second.keys], tags=[*first.tags, *second.tags]
    )
