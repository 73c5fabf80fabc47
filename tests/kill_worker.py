"""Trains tiny models in child processes, kills them at given moments, resumes, and writes the outcome.

Started by ``test_kill.py``: ``kill_worker.py FOLDER MOMENTS STEPS``, moments as JSON ``[[kind, step, delay], ...]``: a
child is killed ``delay`` seconds after it announced the generation (g), the update (u) or the checkpoint (c) of a step.
Everything is imported once; the children are forked.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import tiny
from knapsack_rl.allocator import KnapsackAllocator
from knapsack_rl.runs.files import complete_checkpoints
from knapsack_rl.trl import ALLOCATION_LOG, KnapsackGRPOTrainer

SAVE_EVERY = 2
KNOWN = 16


class Announcing(KnapsackGRPOTrainer):
    """Announces what it is about to do."""

    def __init__(self, *args: Any, pipe: int, **kwargs: Any) -> None:
        self.pipe = pipe
        super().__init__(*args, **kwargs)

    def announce(self, kind: str, step: int) -> None:
        os.write(self.pipe, f"{kind}{step}\n".encode())

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.announce("g", self.state.global_step + 1)
        return super()._generate_and_score_completions(inputs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.announce("c", self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)


class AnnounceUpdate(TrainerCallback):
    def __init__(self, trainer: Announcing) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.announce("u", state.global_step + 1)


def informed() -> KnapsackAllocator:
    """Return an allocator that knows every prompt, so that the first epoch is ragged too."""
    allocator = KnapsackAllocator()
    for k in range(24):
        successes = (0, 1, 8, 16)[k % 4]
        allocator.observe([f"p{k}"] * KNOWN, [1.0] * successes + [0.0] * (KNOWN - successes))
    return allocator


def train(folder: Path, steps: int, pipe: int) -> None:
    """Train, or continue where a child was killed, and write the end of the run."""
    resume = bool(complete_checkpoints(folder))
    settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": SAVE_EVERY, "save_total_limit": 2}
    allocator = KnapsackAllocator() if resume else informed()  # its knowledge must come from the checkpoint
    extra = {"allocator": allocator, "pipe": pipe}
    trainer = tiny.trainer(Announcing, folder, extra=extra, log_allocations=True, **settings)
    trainer.add_callback(AnnounceUpdate(trainer))
    trainer.train(resume_from_checkpoint=True if resume else None)
    state = trainer.allocator.state_dict()
    digest = hashlib.sha1(json.dumps(state["header"], sort_keys=True).encode())
    for name, array in sorted(state["arrays"].items()):
        digest.update(name.encode() + array.tobytes())
    records = trainer.allocator.tracker.records()
    end = {
        "model": tiny.fingerprint(trainer.model),
        "allocator": digest.hexdigest(),
        "rollouts": dict(zip(trainer.allocator.tracker.prompt_ids, records.rollouts.tolist(), strict=True)),
        "successes": int(sum(records.newest_successes)),
        "steps": trainer.state.global_step,
    }
    (folder / "end.json").write_text(json.dumps(end))


def child(folder: Path, steps: int, moment: tuple[str, int, float] | None) -> bool:
    """Run a child, kill it at the moment; return whether it was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            train(folder, steps, writing)
        except BaseException:  # noqa: BLE001 - printed before the child ends
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as announced:
        for line in announced:
            if moment is not None and line.strip() == f"{moment[0]}{moment[1]}":
                time.sleep(moment[2])
                os.kill(pid, signal.SIGKILL)
                break
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and status:
        raise SystemExit(f"a run in {folder} failed with status {status}")
    return killed


def main() -> None:
    place, moments, steps = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    warm = informed()  # first calls before the forks
    warm.allocate(["p1", "p2"], 8)
    warm.observe(["p1", "p1", "p2"], [1.0, 0.0, 1.0])
    gc.freeze()
    found = []
    for number, moment in enumerate([None, *moments]):
        folder = place / str(number)
        folder.mkdir()
        killed = child(folder, steps, None if moment is None else tuple(moment))
        left = [path.name for path in complete_checkpoints(folder)]
        if killed:
            child(folder, steps, None)
        rows = [json.loads(line) for line in (folder / ALLOCATION_LOG).read_text().splitlines()]
        end = json.loads((folder / "end.json").read_text())
        found.append({"killed": killed, "left": left, "rows": rows, "end": end, "moment": moment})
    (place / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
