"""Checkpoint callbacks that write down what verl computed, while a step's data is still in the transfer queue."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import transfer_queue
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from knapsack_rl.verl import KnapsackCheckpoint

FIELDS = ["rm_scores", "advantages", "responses", "extra_info", "data_source", "response_mask"]


def record(trainer: Any, step: int) -> None:
    """One JSON line a step: for each rollout its prompt, response, reward and advantage."""
    tags = transfer_queue.kv_list("train").get("train", {})
    keys = [key for key, tag in tags.items() if not tag.get("is_prompt") and tag.get("status") == "success"]
    keys = [key for key in keys if not tags[key].get("is_padding", False)]
    # A group that was not sampled yet, in asynchronous modes, still has the entry of its prompt.
    keys = [key for key in keys if key.split("_")[0] not in tags]
    padding = len([key for key, tag in tags.items() if tag.get("is_padding", False)])
    data = transfer_queue.kv_batch_get(keys=keys, partition_id="train", select_fields=FIELDS)
    rows = []
    columns = {name: list(data[name]) for name in FIELDS}
    for k, key in enumerate(keys):
        extra, source = (getattr(columns[name][k], "data", columns[name][k]) for name in ("extra_info", "data_source"))
        mask = columns["response_mask"][k].bool()
        rows.append(
            {
                "key": key,
                "prompt": f"{source}/{extra['index']}",
                "response": columns["responses"][k].tolist(),
                "reward": float(columns["rm_scores"][k].sum()),
                "advantages": columns["advantages"][k][mask].tolist(),
            }
        )
    line = {"step": step, "pid": os.getpid(), "padding": padding, "rows": rows}
    with (Path(trainer.config.trainer.default_local_dir) / "recorded.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


class RecordingKnapsackCheckpoint(KnapsackCheckpoint):
    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, **kwargs: Any) -> None:
        super().on_save(trainer, global_step, checkpoint_dir, **kwargs)
        record(trainer, global_step)


class RecordingCheckpoint(CheckpointCallback):
    """For runs without the plug-in."""

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, **kwargs: Any) -> None:
        record(trainer, global_step)
