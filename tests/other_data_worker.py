"""One process of a run whose second process has another data set: ``other_data_worker.py FOLDER new|clash``.

Started by torchrun from ``test_faults.py``. ``new``: other prompts with other ids; ``clash``: the same ids for
other prompts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

import tiny
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.trl import KnapsackGRPOConfig, KnapsackGRPOTrainer


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    settings = {"per_device_train_batch_size": 8, "max_steps": 2, "ddp_backend": "gloo"}
    arguments = KnapsackGRPOConfig(**tiny.arguments(folder, **settings))
    data = tiny.dataset(24)
    rank = arguments.process_index
    if rank == 1:
        name = (lambda i: f"q{i[1:]}") if kind == "new" else (lambda i: i)
        data = data.map(lambda row: {"prompt": f"b{row['prompt']}", "prompt_id": name(row["prompt_id"])})
    allocator = KnapsackAllocator()
    found: dict[str, Any] = {"error": None}
    try:
        trainer = KnapsackGRPOTrainer(
            model=tiny.model(),
            reward_funcs=[tiny.has_digit_five],
            args=arguments,
            train_dataset=data,
            processing_class=tiny.tokenizer(),
            allocator=allocator,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    except ValueError as error:
        found["error"] = str(error)
    tracker = allocator.tracker
    found["rollouts"] = dict(zip(tracker.prompt_ids, tracker.records().rollouts.tolist(), strict=True))
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
