"""The agent-loop manager: verl's own, with a number of rollouts for each prompt of a training batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensordict import TensorDict
from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.utils import tensordict_utils

from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.ids import PromptId
from knapsack_rl.verl import session
from knapsack_rl.verl.checkpoint import state_to_resume
from knapsack_rl.verl.fields import COUNT_FIELD, ID_FIELD, plain
from knapsack_rl.verl.identity import SEEN, apart, prompt_ids
from knapsack_rl.verl.launch import pick, varying_rows_multiple
from knapsack_rl.verl.two_rounds import FirstRound

logger = logging.getLogger(__name__)


class KnapsackAgentLoopManager(AgentLoopManagerTQ):
    """``AgentLoopManagerTQ`` with a number of rollouts for each prompt of a training batch.

    The counts of a batch sum to its prompts x ``rollout.n``, or with a budget in tokens to a multiple of what verl
    divides an update into, so it pads nothing. Rows are ordered so that every agent-loop worker sends its longest
    predicted rollouts first; verl routes each request to the least-loaded replica. Validation is passed on untouched.

    Args:
        *args: as ``AgentLoopManagerTQ``.
        **kwargs: as ``AgentLoopManagerTQ``.

    Raises:
        ValueError: the configuration cannot work, training files lack or repeat a prompt id, or the state to resume
            from is damaged or of another estimator.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.session = session.current()
        self.session.check(self.config)
        state = state_to_resume(self.config)
        if state is not None:
            self.session.restore(state)
            logger.info("allocator restored from %s", state)
        self.session.folder = Path(str(pick(self.config, "trainer.default_local_dir", "checkpoints")))
        self.session.manager = self
        self._identified_a_batch = False
        self._found_features = False

    def generate_sequences(self, prompts: TensorDict) -> Any:
        """As the parent, after adding the counts to a training batch.

        Args:
            prompts: verl's batch, a row for each prompt. One that has counts already is a second round.

        Raises:
            ValueError: the prompts of the first training batch cannot be identified, or have none of the features.
        """
        if tensordict_utils.get(prompts, "validate", False):
            return super().generate_sequences(prompts)
        return super().generate_sequences(self._allocated(prompts))

    def _allocated(self, prompts: TensorDict) -> TensorDict:
        if COUNT_FIELD in prompts:
            return self._ordered(prompts, plain(prompts, ID_FIELD))
        mean = int(pick(self.config, "actor_rollout_ref.rollout.n", 1))
        ids = self._identify(prompts)
        if ids is None:
            return prompts  # stock verl
        features = self._features(prompts)
        if self.session.settings.rounds == 2:
            plan = self.session.plan_first(ids, mean, features=features)
        else:
            plan = self.session.plan(ids, mean, multiple=varying_rows_multiple(self.config), features=features)
        if len(plan.ids) < len(ids):
            self.session.warn_once(
                "repeats", "a batch holds a prompt more than once; its rows divide one number of rollouts"
            )
        tensordict_utils.assign_non_tensor_stack(prompts, ID_FIELD, ids)
        counts = plan.rows_of(ids).tolist()
        sent = zip(plain(prompts, "uid"), ids, counts, strict=True)
        self.session.sent.update({uid: prompt_id for uid, prompt_id, count in sent if count})
        if self.session.settings.allocation == "uniform":
            return prompts  # stock verl, except for the id
        tensordict_utils.assign_non_tensor_stack(prompts, COUNT_FIELD, counts)
        if self.session.settings.rounds == 2:
            self.session.first_round = FirstRound(plan, ids, prompts, mean)
        return self._ordered(prompts, ids)

    def _ordered(self, prompts: TensorDict, ids: list[PromptId]) -> TensorDict:
        """Return the rows in an order in which long rollouts start early."""
        lengths = self.session.predicted_lengths(ids)
        if lengths is None:
            return prompts
        if pick(self.config, "actor_rollout_ref.rollout.scheduling_policy") == "priority":
            # vLLM serves the lowest number first; 0 would be left out by verl, which is the same.
            rank = np.empty(lengths.size, np.int64)
            rank[np.argsort(-lengths, kind="stable")] = np.arange(lengths.size)
            tensordict_utils.assign_non_tensor_stack(prompts, "priority", rank.tolist())
        order = longest_first(lengths, len(self.agent_loop_workers))
        return tensordict_utils.index_select_tensor_dict(prompts, order.tolist())

    def _features(self, prompts: TensorDict) -> dict[str, list[Any]]:
        """Return the columns by which prompts are alike: those of the batch, or keys of extra_info.

        Raises:
            ValueError: the first batch has no value of one of them.
        """
        extras = plain(prompts, "extra_info") if "extra_info" in prompts else [None] * len(prompts)
        found = {
            name: [*plain(prompts, name)]
            if name in prompts
            else [extra.get(name) if isinstance(extra, Mapping) else None for extra in extras]
            for name in self.session.settings.columns
        }
        if not self._found_features:
            for name, values in found.items():
                if all(value is None for value in values):
                    keys = sorted({key for extra in extras if isinstance(extra, Mapping) for key in extra})
                    raise ValueError(
                        f"feature_columns: no prompt of the first batch has {name!r}; give names of columns of the "
                        f"data or of keys of extra_info, which are {keys}"
                    )
        self._found_features = True
        return found

    def _identify(self, prompts: TensorDict) -> list[PromptId] | None:
        """Return the ids of the batch; without ids the first batch is refused, a later one gets None and a warning.

        Uniform allocation needs no ids.
        """
        rows = {name: plain(prompts, name) for name in SEEN if name in prompts}
        try:
            ids = prompt_ids(rows, self.session.settings.prompt_id)
            if not self._identified_a_batch and len(ids) > 1 and len(set(ids)) == 1:
                raise ValueError(f"all {len(ids)} prompts of the first batch have the id {ids[0]!r}; make ids unique")
        except ValueError as error:
            if self.session.settings.allocation == "uniform":
                self.session.observes = False
                self.session.warn_once("identity", f"{error}. Uniform allocation works without, but nothing is logged")
                return None
            if not self._identified_a_batch:
                raise
            self.session.allocator.failures["identification"] += 1
            self.session.warn_once("identity", f"{error}; the batch gets rollout.n for every prompt")
            return None
        self._identified_a_batch = True
        kept_apart: list[PromptId] = [*apart(ids, rows)]
        if kept_apart != ids:
            self.session.warn_once(
                "clash", "rows of one id differ; they are kept apart by a hash behind the id. Make ids unique"
            )
        return kept_apart


def longest_first(lengths: FloatArray, workers: int) -> IntArray:
    """Return an order of rows that deals the longest ones to all workers in turn, each worker's longest first.

    verl cuts a batch into one contiguous piece for each worker, and a worker sends requests in the order of its rows.

    Args:
        lengths: (M,) predicted length of each row.
        workers: pieces that the batch is cut into.
    """
    size = max(-(-lengths.size // max(workers, 1)), 1)  # rows of a piece, as torch.chunk cuts
    place = np.arange(lengths.size)
    served = np.lexsort((place // size, place % size))  # the first row of every piece, the second of every piece...
    order = np.empty(lengths.size, np.int64)
    order[served] = np.argsort(-lengths, kind="stable")
    return order
