"""One process of a run in two rounds on several: trains and writes what this process saw.

Started by torchrun from ``test_two_rounds.py``: ``two_rounds_worker.py FOLDER``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import tiny
from knapsack_rl.trl import ALLOCATION_LOG, KnapsackGRPOTrainer


class WatchedTrainer(KnapsackGRPOTrainer):
    """Keeps the advantages of this process, and TRL's log of the step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.watched: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        logged = {name: list(self._logs[name]) for name in ("completion", "advantages")}
        items = int(output["num_items_in_batch"])
        self.watched.append({"advantages": output["advantages"].tolist(), "logged": logged, "items": items})
        return output


def main() -> None:
    folder = Path(sys.argv[1])
    generated: list[dict[str, Any]] = []
    trainer = tiny.trainer(
        WatchedTrainer, folder / "run", tiny.recording(tiny.has_digit_five, generated), rounds=2, num_generations=5,
        per_device_train_batch_size=15, log_allocations=True, ddp_backend="gloo",
    )  # fmt: skip
    trainer.train()
    torch.distributed.barrier()
    log = (folder / "run" / ALLOCATION_LOG).read_text().splitlines()
    found = {
        "world": trainer.accelerator.num_processes,
        "end": tiny.fingerprint(trainer.accelerator.unwrap_model(trainer.model)),
        "generated": generated,
        "watched": trainer.watched,
        "log": [json.loads(line) for line in log],
        "history": trainer.state.log_history,
    }
    tiny.leave(folder, found)


if __name__ == "__main__":
    main()
