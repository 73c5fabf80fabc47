"""Stand-ins for the parts of verl 0.9 that the plug-in touches, so that it can be tested without verl.

They keep to what verl's source does: a batch cut into contiguous pieces for the workers, the number of rollouts popped
from the prompt, keys ``{uid}_{session}_{index}`` in the transfer queue, whole groups sampled. What the real ones do is
tested by ``make test-verl``.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np


class Batch:
    """A stand-in for TensorDict: columns, and values for the whole batch."""

    def __init__(self, columns: dict[str, list[Any]], shared: dict[str, Any] | None = None) -> None:
        self.columns, self.shared = columns, shared or {}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __contains__(self, name: str) -> bool:
        return name in self.columns or name in self.shared

    def __getitem__(self, name: str) -> Any:
        return self.columns[name] if name in self.columns else self.shared[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.columns.get(name, self.shared.get(name, default))

    def row(self, k: int) -> dict[str, Any]:
        return {name: values[k] for name, values in self.columns.items()} | self.shared


class KVBatchMeta:
    def __init__(self, keys: list[str], tags: list[dict[str, Any]], partition_id: str) -> None:
        self.keys, self.tags, self.partition_id = keys, tags, partition_id


class TransferQueue:
    """One partition's rows by key."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, dict[str, Any]]] = {"train": {}, "val": {}}

    def kv_batch_put(
        self, *, keys: list[str], partition_id: str, fields: Any = None, tags: list[dict[str, Any]] | None = None
    ) -> None:
        for row, key in enumerate(keys if fields is not None else ()):
            self.rows[partition_id][key] |= fields.row(row)

    def kv_batch_get(self, *, keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, list[Any]]:
        return {name: [self.rows[partition_id][key][name] for key in keys] for name in select_fields}


class World:
    """State that the stand-ins share: the queue, and the rewards of rollouts."""

    def __init__(self, seed: int = 0) -> None:
        self.queue = TransferQueue()
        self.rng = np.random.default_rng(seed)
        self.sent: list[list[str]] = []  # per worker of the newest batch, uids in the order in which they were sent
        self.received: list[dict[str, Any]] = []  # prompts as the workers got them
        self.fail = False
        self.estimators: dict[str, Any] = {}  # verl's registry

    def roll_out(self, prompt: dict[str, Any], default: int, partition: str) -> None:
        sessions = prompt.pop("__rollout_n__", default)
        rate = (prompt["extra_info"] or {}).get("rate", 0.5)
        for session in range(sessions):
            reward = float(self.rng.random() < rate)
            rewards = np.zeros(1 + session % 3, np.float32)
            rewards[-1] = reward
            self.queue.rows[partition][f"{prompt['uid']}_{session}_0"] = {
                **prompt,
                "rm_scores": rewards,
                "response_mask": np.array([1] * rewards.size + [0] * 3),  # a tool answers
                "extra_fields": {"reward_extra_info": {"acc": 1.0 - reward}},
                "_tag": {"response_len": rewards.size + 3},
            }


def install(monkeypatch: Any, world: World) -> None:
    """Install the stand-ins under the names that the plug-in imports."""

    class AgentLoopManagerTQ:
        def __init__(self, config: Any, llm_client: Any = None, teacher_client: Any = None, **kwargs: Any) -> None:
            self.config = config
            self.agent_loop_workers = list(range(config["actor_rollout_ref"]["rollout"]["agent"]["num_workers"]))

        def generate_sequences(self, prompts: Batch) -> None:
            rollout = self.config["actor_rollout_ref"]["rollout"]
            validate = prompts.get("validate", False)
            default = rollout["val_kwargs"]["n"] if validate else rollout["n"]
            size = -(-len(prompts) // len(self.agent_loop_workers))
            world.sent = []
            for start in range(0, len(prompts), size):
                rows = range(start, min(start + size, len(prompts)))
                world.sent.append([prompts["uid"][row] for row in rows])
                for row in rows:
                    prompt = prompts.row(row)
                    world.received.append(dict(prompt))
                    world.roll_out(prompt, default, "val" if validate else "train")

    class ReplayBuffer:
        def __init__(
            self,
            trainer_mode: str,
            trainer_config: Any,
            max_off_policy_threshold: int | None,
            max_off_policy_strategy: str,
            sampler_kwargs: Any,
            poll_interval: float = 2.0,
            refill_fn: Any = None,
        ) -> None:
            self.trainer_mode, self.sampler_kwargs, self.poll_interval = trainer_mode, sampler_kwargs, poll_interval

        def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
            rows = {key: row for key, row in world.queue.rows[partition_id].items() if not row.get("_sampled")}
            uids = list(dict.fromkeys(key.split("_")[0] for key in rows))[:batch_size]
            keys = [key for key in rows if key.split("_")[0] in uids]
            for key in keys:
                rows[key]["_sampled"] = True
            return KVBatchMeta(keys, [rows[key]["_tag"] for key in keys], partition_id), {"stock": 1.0}

    class ReplayBufferAsync(ReplayBuffer):
        pass

    class CheckpointCallback:
        def __init__(self, config: Any = None) -> None:
            self.config = config

    def register_adv_est(name: str) -> Any:
        def decorator(function: Any) -> Any:
            world.estimators[name] = function
            return function

        return decorator

    def find_latest_ckpt_path(path: str) -> str | None:
        tracker = Path(path) / "latest_checkpointed_iteration.txt"
        return f"{path}/global_step_{tracker.read_text()}" if tracker.exists() else None

    utils = types.ModuleType("verl.utils.tensordict_utils")
    utils.get = lambda batch, name, default=None: batch.get(name, default)
    utils.assign_non_tensor_stack = lambda batch, name, values: batch.columns.update({name: list(values)})
    utils.index_select_tensor_dict = lambda batch, rows: Batch(
        {name: [values[row] for row in rows] for name, values in batch.columns.items()}, batch.shared
    )
    utils.get_tensordict = Batch
    contents: dict[str, dict[str, Any]] = {
        "tensordict": {"TensorDict": Batch},
        "transfer_queue": {
            "kv_batch_get": world.queue.kv_batch_get,
            "kv_batch_put": world.queue.kv_batch_put,
            "KVBatchMeta": KVBatchMeta,
        },
        "verl": {},
        "verl.trainer": {},
        "verl.trainer.ppo": {},
        "verl.trainer.ppo.core_algos": {"register_adv_est": register_adv_est},
        "verl.trainer.ppo.v1": {"AgentLoopManagerTQ": AgentLoopManagerTQ},
        "verl.trainer.ppo.v1.replay_buffer": {"ReplayBuffer": ReplayBuffer, "ReplayBufferAsync": ReplayBufferAsync},
        "verl.trainer.ppo.checkpoint_callback": {"CheckpointCallback": CheckpointCallback},
        "verl.utils": {"tensordict_utils": utils},
        "verl.utils.checkpoint": {},
        "verl.utils.checkpoint.checkpoint_manager": {"find_latest_ckpt_path": find_latest_ckpt_path},
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of verl, with overrides by dotted path."""
    base: dict[str, Any] = {
        "algorithm": {"adv_estimator": "grpo"},
        "data": {"train_batch_size": 12, "train_files": None},
        "actor_rollout_ref": {
            "actor": {"ppo_mini_batch_size": 12},
            "rollout": {
                "n": 4,
                "val_kwargs": {"n": 1},
                "agent": {
                    "num_workers": 3,
                    "agent_loop_manager_class": "knapsack_rl.verl.KnapsackAgentLoopManager",
                },
            },
        },
        "trainer": {
            "n_gpus_per_node": 2,
            "nnodes": 1,
            "save_freq": 1,
            "default_local_dir": str(folder),
            "checkpoint_callback_class": "knapsack_rl.verl.KnapsackCheckpoint",
            "v1": {
                "trainer_mode": "sync",
                "sampler": {
                    "custom_sampler": {"path": "pkg://knapsack_rl.verl", "name": "KnapsackReplayBuffer"},
                    "sampler_kwargs": {},
                },
            },
        },
    }
    for path, value in changes.items():
        *parents, last = path.split(".")
        inner = base
        for part in parents:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return base
