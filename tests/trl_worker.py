"""One process of a run on several: trains the named cases and writes what this process saw.

Started by torchrun from ``test_trl_distributed.py``: ``trl_worker.py FOLDER CASE...``.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

import tiny
from knapsack_rl.trl import ALLOCATION_LOG, KnapsackGRPOTrainer

TWO_REWARDS = {"rewards": (tiny.digit_sum, tiny.length_reward), "reward_weights": [0.3, 1.7]}
GDPO = TWO_REWARDS | {"multi_objective_aggregation": "normalize_then_sum"}

# 2 processes x 6 rows are 3 prompts x 4: already stock groups straddle the processes.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "steps per generation": {"steps_per_generation": 2, "gradient_accumulation_steps": 2},
    "dr_grpo, scale none": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo, scale batch": {"loss_type": "dapo", "scale_rewards": "batch"},
    "gdpo": GDPO,
    "none rewards": {"rewards": (tiny.sometimes_none,)},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "two weighted rewards": TWO_REWARDS,
    "iterable dataset": {"iterable": True},
    "tokens": {"budget_unit": "tokens", "steps_per_generation": 2, "gradient_accumulation_steps": 2},
    "prompt weighting": {"weighting": "prompt"},
    "over the mean": {"advantage": "group-mean", "rewards": (tiny.has_digit_five,)},
}


class WatchedTrainer(KnapsackGRPOTrainer):
    """Keeps the advantages of this process and the ones logged for all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.watched: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        everyone = len(output["advantages"]) * self.accelerator.num_processes
        logged = list(self._logs["advantages"])[-everyone:]
        self.watched.append({"advantages": output["advantages"].tolist(), "logged": logged})
        return output


def train(trainer_class: type, case: str, folder: Path, *, ragged: bool = False, **changes: Any) -> dict[str, Any]:
    """Train one case and return what this process saw."""
    settings = CASES[case] | changes
    rewards = list(settings.pop("rewards", (tiny.digit_sum,)))
    batches: list[dict[str, Any]] = []
    data = tiny.dataset(24)
    arguments = {"per_device_train_batch_size": 6, "max_steps": 3, "ddp_backend": "gloo"}
    if settings.pop("iterable", False):
        data = data.to_iterable_dataset()
    extra: dict[str, Any] = {}
    unit = settings.pop("budget_unit", "rollouts")
    if ragged:
        arguments |= {"log_allocations": True}
        extra["allocator"] = tiny.informed_allocator(budget_unit=unit)
    rewards[0] = tiny.recording(rewards[0], batches)
    trainer = tiny.trainer(trainer_class, folder, *rewards, data=data, extra=extra, **(arguments | settings))
    start = tiny.fingerprint(trainer.model)
    trainer.train()
    seen: dict[str, Any] = {
        "world": trainer.accelerator.num_processes,
        "start": start,
        "end": tiny.fingerprint(trainer.accelerator.unwrap_model(trainer.model)),
        "history": trainer.state.log_history,
        "batches": batches,
    }
    if isinstance(trainer, WatchedTrainer):
        state = trainer.allocator.state_dict()
        digest = hashlib.sha1(json.dumps(state["header"], sort_keys=True).encode())
        for name, array in sorted(state["arrays"].items()):
            digest.update(name.encode() + array.tobytes())
        records = trainer.allocator.tracker.records()
        seen |= {
            "watched": trainer.watched,
            "state": digest.hexdigest(),
            "rollouts": dict(zip(trainer.allocator.tracker.prompt_ids, records.rollouts.tolist(), strict=True)),
        }
    return seen


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    gc.freeze()  # each run ends with a garbage collection
    found: dict[str, Any] = {}
    for case in cases:
        place = folder / case.replace(" ", "_")
        found[case] = {
            "stock": train(GRPOTrainer, case, place / "stock"),
            "uniform": train(WatchedTrainer, case, place / "uniform", allocation="uniform"),
            "ragged": train(WatchedTrainer, case, place / "ragged", ragged=True),
        }
        log = place / "ragged" / ALLOCATION_LOG
        torch.distributed.barrier()
        found[case]["log"] = [json.loads(line) for line in log.read_text().splitlines()]
    tiny.leave(folder, found)


if __name__ == "__main__":
    main()
