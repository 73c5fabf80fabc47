"""One process of a run on two: trains with and without the rows that have no gradient, and writes what it saw.

Started by torchrun from ``test_trl_skip.py``: ``skip_worker.py FOLDER STEPS [CASE...]``.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import tiny
from knapsack_rl.trl import KnapsackGRPOTrainer
from test_trl_skip import Compared

CASES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo", "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
    "bnpo": {"loss_type": "bnpo", "gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
    "grpo, one row at a time": {
        "loss_type": "grpo",
        "gradient_accumulation_steps": 16,
        "per_device_train_batch_size": 1,
        "num_iterations": 2,
    },
    "few answers succeed": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4, "rare": True},
}


def rare(completions: list[str], **_: Any) -> list[float]:
    """Successes so rare that a process often has no row with a gradient."""
    return [float(completion.startswith("55")) for completion in completions]


def trained(kind: type[KnapsackGRPOTrainer], folder: Path, steps: int, **settings: Any) -> Any:
    rewards = [rare] if settings.pop("rare", False) else []
    extra = {"model": tiny.model().double(), "allocator": tiny.informed_allocator()}
    settings = {"ddp_backend": "gloo", "max_steps": steps, "learning_rate": 1e-3} | settings
    trainer = tiny.trainer(kind, folder, *rewards, extra=extra, **settings)
    trainer.train()
    return trainer


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    gc.freeze()  # each run ends with a garbage collection
    found: dict[str, Any] = {}
    for case in sys.argv[3:] or CASES:
        settings = CASES[case]
        compared = trained(Compared, folder, steps, **settings)
        every = trained(KnapsackGRPOTrainer, folder, steps, skip_zero_advantages=False, **settings)
        models = [trainer.accelerator.unwrap_model(trainer.model) for trainer in (compared, every)]
        pairs = zip(*(model.parameters() for model in models), strict=True)
        found[case] = {
            "differences": compared.differences,
            "norms": compared.norms,
            "rows": compared.rows,
            "apart": max(float((a - b).abs().max()) for a, b in pairs),
            "moved": max(
                float((a - b).abs().max())
                for a, b in zip(models[0].parameters(), tiny.model().double().parameters(), strict=True)
            ),
            "fingerprint": tiny.fingerprint(models[0]),
        }
    tiny.leave(folder, found)


if __name__ == "__main__":
    main()
