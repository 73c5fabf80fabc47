"""The replay buffer: verl's own, which also observes the rewards of the groups that are trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import transfer_queue
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.ids import PromptId, numbered
from knapsack_rl.metrics import select_metrics
from knapsack_rl.verl import advantages as _registers_the_estimator  # noqa: F401
from knapsack_rl.verl import session
from knapsack_rl.verl.fields import ID_FIELD
from knapsack_rl.verl.launch import REFILL_KEY, VerlSettings, pick
from knapsack_rl.verl.two_rounds import FirstRound, announce, joined, second_request

MODEL_TOKENS = "response_mask"
"""verl's field with 1 for each token of a response that the model generated, 0 for those of tools."""


class _Observes:
    """Mixin of verl's replay buffers that opens the session of the run and observes the sampled groups."""

    def __init__(self, *args: Any, sampler_kwargs: Any = None, refill_fn: Any = None, **kwargs: Any) -> None:
        settings = VerlSettings.from_mapping(sampler_kwargs)
        self.session = session.start(settings)
        # The refill function is a method of the trainer, whose configuration is checked here, before workers start.
        # Without it, the manager does the checks.
        config = getattr(getattr(refill_fn, "__self__", None), "config", None)
        if config is not None:
            self.session.check(config)
        if kwargs["trainer_mode"] == "sync" and pick(config, REFILL_KEY, False):
            # verl gives these two to its own buffer only.
            kwargs |= {"sync_refill_failed_groups": True, "gen_batch_size": 1}
        self._absent: list[PromptId] = []  # prompts sampled without a row since the last step
        kwargs.setdefault("poll_interval", settings.poll_interval)
        super().__init__(*args, sampler_kwargs=sampler_kwargs, refill_fn=refill_fn, **kwargs)  # type: ignore[call-arg]

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """As the parent; the outcomes of a training batch are observed and the metrics added."""
        if partition_id != "val" and self.session.manager is None:
            raise ValueError(
                "the agent-loop manager of Knapsack RL is not in this process, so no prompt has an allocation; add "
                "++actor_rollout_ref.rollout.agent.agent_loop_manager_class=knapsack_rl.verl.KnapsackAgentLoopManager"
            )
        batch, metrics = super().sample(  # type: ignore[misc]
            global_steps=global_steps, partition_id=partition_id, batch_size=batch_size
        )
        if partition_id != "val":
            first, self.session.first_round = self.session.first_round, None
            if first is not None:
                batch, more = self._second_round(first, batch, global_steps)
                metrics = {**metrics, **more}
            metrics = {**metrics, **self._observe(batch, global_steps)}
        return batch, metrics

    def _second_round(self, first: FirstRound, batch: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """Generate the second round of a step; return the batch of both rounds, and the parent's metrics."""
        prompts = second_request(first, self.session, batch, self._read)
        if prompts is None:
            return batch, {}
        announce(prompts, step)
        self.session.manager.generate_sequences(prompts)
        rest, metrics = super().sample(  # type: ignore[misc]
            global_steps=step, partition_id=batch.partition_id, batch_size=len(prompts)
        )
        return joined(batch, rest), metrics

    def _evict_terminal_groups(self, global_steps: int, partition_id: str, eviction_reasons: Any) -> Any:
        """As the parent; the groups that it drops count as lost, with the rollouts that they have."""
        if partition_id != "val":
            stale, _, failed, _ = eviction_reasons
            self.session.survive("reporting", lambda: self._lose("stale", stale))
            self.session.survive("reporting", lambda: self._lose("failed", failed - stale))
        return super()._evict_terminal_groups(global_steps, partition_id, eviction_reasons)  # type: ignore[misc]

    def _materialize_batch(self, partition_id: str, selected_prompt_uids: list[str], partition_snapshot: Any) -> Any:
        """As the parent, noting prompts that were to have rollouts and have none."""
        batch = super()._materialize_batch(partition_id, selected_prompt_uids, partition_snapshot)  # type: ignore[misc]
        there = {_uid(key) for key in batch.keys}
        sent = ((uid, self.session.sent.pop(uid, None)) for uid in selected_prompt_uids)
        self._absent += [prompt_id for uid, prompt_id in sent if prompt_id is not None and uid not in there]
        return batch

    def _lose(self, cause: str, uids: set[str]) -> None:
        """Count groups of the training partition that verl is about to drop."""
        if not uids or not self.session.observes:
            return
        sent = {uid: self.session.sent.pop(uid, None) for uid in uids}
        tags = {key: tag for key, tag in self.partitions["train"].items() if _uid(key) in uids}  # type: ignore[attr-defined]
        if tags:  # these have their ids too, also if an earlier run sent them
            rows = KVBatchMeta(partition_id="train", keys=[*tags], tags=[*tags.values()])
            ids, _, lengths = read_outcomes(rows, "reward")
            plan, prompt_R = self.session.arrived(ids)
            self.session.lose(cause, plan, prompt_R, lengths)
        there = {_uid(key) for key in tags}
        self._lose_without_rows(cause, [id_ for uid, id_ in sent.items() if id_ is not None and uid not in there])

    def _lose_without_rows(self, cause: str, ids: list[PromptId]) -> None:
        if ids:
            self.session.lose(cause, self.session.arrived(ids)[0])

    def _read(self, batch: Any) -> tuple[list[str], FloatArray, FloatArray]:
        return read_outcomes(batch, self.session.settings.outcome)

    def _observe(self, batch: Any, step: int) -> dict[str, float]:
        if not self.session.observes:
            return {}
        read = self.session.survive("reading", lambda: self._read(batch))
        if read is None:  # training continues with the sampled batch; nothing is learned
            return {}
        ids, outcomes, lengths = read
        if self.session.advantage and len(ids) < len(batch.keys):
            self.session.warn_once(
                "turns",
                f"advantages over the {self.session.advantage}: sessions have several rows, and verl passes each of "
                "them to an estimator other than grpo as a rollout; use algorithm.adv_estimator=grpo for agents of "
                "several turns",
            )
        absent, self._absent = self._absent, []
        arrived = {*ids}  # a prompt may have rows of a second round, or of its other place in the batch
        self._lose_without_rows("failed", [prompt_id for prompt_id in absent if prompt_id not in arrived])
        plan, prompt_R = self.session.arrived(ids)
        wanted = self.session.advantage == "posterior-mean"
        learned = self.session.observe(plan, prompt_R, outcomes, lengths, step, expected=wanted)
        if wanted:
            uids = map(_uid, dict.fromkeys(key.rpartition("_")[0] for key in batch.keys))  # of each session
            self.session.expected = dict(zip(uids, learned.expected[prompt_R], strict=True))
        metrics = learned.metrics
        shown = select_metrics(metrics, self.session.settings.log_metrics)
        return {f"knapsack/{name}": number for name, number in shown.items()}


class _KnapsackReplayBuffer(_Observes, ReplayBuffer):
    pass


class _KnapsackReplayBufferAsync(_Observes, ReplayBufferAsync):
    pass


def KnapsackReplayBuffer(*, trainer_mode: str, **kwargs: Any) -> ReplayBuffer:  # noqa: N802 - called like a class
    """Return the replay buffer for a trainer mode; set ``trainer.v1.sampler.custom_sampler.name`` to this function.

    Args:
        trainer_mode: ``"sync"``, or one of verl's asynchronous modes.
        **kwargs: as verl's ``ReplayBuffer``; ``sampler_kwargs`` are the fields of
            :class:`~knapsack_rl.verl.launch.VerlSettings`.

    Raises:
        ValueError: a setting is unknown or out of range, or the configuration cannot work.
    """
    kind = _KnapsackReplayBuffer if trainer_mode == "sync" else _KnapsackReplayBufferAsync
    return kind(trainer_mode=trainer_mode, **kwargs)


def read_outcomes(batch: Any, outcome: str) -> tuple[list[str], FloatArray, FloatArray]:
    """Return (prompt ids, outcomes, tokens generated) of the sessions in a sampled batch.

    A session of several turns may have several rows; as in verl, the last one has the reward. The tokens are the
    model's in all of them, without those of tools.

    Args:
        batch: keys ``{uid}_{session}_{index}`` and partition, as the replay buffer returns them.
        outcome: ``"reward"`` or a key of ``reward_extra_info``.

    Raises:
        ValueError: a row was dispatched without an id, or its reward function returns no such value.
    """
    value = "rm_scores" if outcome == "reward" else "extra_fields"
    data = transfer_queue.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=[ID_FIELD, value, MODEL_TOKENS]
    )
    sessions, session_of = numbered([key.rpartition("_")[0] for key in batch.keys])
    lengths = np.zeros(len(sessions))
    np.add.at(lengths, session_of, [float(mask.sum()) for mask in data[MODEL_TOKENS]])
    newest: dict[int, int] = {}  # row of each session
    for row in sorted(range(len(batch.keys)), key=lambda row: int(batch.keys[row].rpartition("_")[2])):
        newest[session_of[row]] = row
    final = [newest[session] for session in range(len(sessions))]
    ids, values = list(data[ID_FIELD]), list(data[value])
    outcomes = [float(values[row].sum()) if outcome == "reward" else _extra(values[row], outcome) for row in final]
    return [getattr(ids[row], "data", ids[row]) for row in final], np.asarray(outcomes, dtype=np.float64), lengths


def _uid(key: str) -> str:
    """Return the uid of verl's key of a row."""
    return key.partition("_")[0]


def _extra(fields: Any, name: str) -> float:
    fields = getattr(fields, "data", fields)
    returned = fields.get("reward_extra_info") or {}
    if name not in returned:
        raise ValueError(f"the reward function returned no {name!r} beside its score but {sorted(returned)}")
    return float(returned[name])
