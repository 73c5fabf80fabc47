"""Time a training step of KnapsackGRPOTrainer against the stock GRPOTrainer, at equal rollouts.

    python benchmarks/bench_step.py
    python benchmarks/bench_step.py --rounds 20 --steps 8

Both train the shipped model as ``knapsack-rl train`` does, 64 prompts x 8 rollouts a step, in one process. There are so
few prompts that groups are ragged from the third step on. Every round times a few steps of each trainer; the order
alternates, and ratios are taken within a round, so that a drift of the machine affects both. Processor time of one
thread is measured instead of wall-clock time, because the machine may be shared. The output is the median ratio, its
quartiles and the time spent in code that the stock trainer does not have; the target is a ratio of at most 1.01. A
model this small is a hard case, because the cost of allocation does not grow with the model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from knapsack_rl.tasks import base_model_path
from knapsack_rl.training.data import load_task
from knapsack_rl.training.settings import TrainSettings
from knapsack_rl.trl import KnapsackGRPOConfig, KnapsackGRPOTrainer

TARGET = 1.01
SETTINGS = TrainSettings(train_prompts=128, held_out_prompts=0)


class Timed(KnapsackGRPOTrainer):
    """A trainer that adds up the processor time of the code that the stock trainer does not have."""

    own_seconds = 0.0
    own_steps = 0

    def _plan_step(self, *args: Any) -> Any:
        started = time.process_time()
        found = super()._plan_step(*args)
        Timed.own_seconds += time.process_time() - started
        Timed.own_steps += 1
        return found

    def _finish_step(self, *args: Any) -> None:
        started = time.process_time()
        super()._finish_step(*args)
        Timed.own_seconds += time.process_time() - started


def seconds_per_step(trainer_class: type[GRPOTrainer], config_class: type[GRPOConfig], steps: int) -> float:
    """Return the processor time per step of a short training run, without set-up."""
    task = load_task(SETTINGS)
    path = str(base_model_path())
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": SETTINGS.budget,
            "num_generations": SETTINGS.rollouts_per_prompt,
            "max_completion_length": task.max_completion_tokens,
            "learning_rate": SETTINGS.learning_rate,
            "loss_type": SETTINGS.loss_type,
            "epsilon_high": SETTINGS.clip_high,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
        }
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(path),
            reward_funcs=[task.reward],
            args=config_class(**arguments),
            train_dataset=Dataset.from_list(list(task.train)),
            processing_class=AutoTokenizer.from_pretrained(path, padding_side="left"),
        )
        trainer.remove_callback(PrinterCallback)
        started = time.process_time()
        trainer.train()
        return (time.process_time() - started) / steps


def measure(rounds: int, steps: int) -> np.ndarray:
    """Return (rounds, 2) seconds per step: knapsack, stock."""
    rivals = ((Timed, KnapsackGRPOConfig), (GRPOTrainer, GRPOConfig))
    for rival in rivals:  # compiles and warms up
        seconds_per_step(*rival, 1)
    Timed.own_seconds, Timed.own_steps = 0.0, 0
    seconds = np.empty((rounds, 2))
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            seconds[turn, which] = seconds_per_step(*rivals[which], steps)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ratio; return 1 if it misses the target by more than its spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    seconds = measure(options.rounds, options.steps)
    ratio = seconds[:, 0] / seconds[:, 1]
    lower, median, upper = np.quantile(ratio, [0.25, 0.5, 0.75])
    knapsack, stock = np.median(seconds, axis=0) * 1e3
    print(f"step: knapsack {knapsack:.1f} ms, stock {stock:.1f} ms of processor time, {options.rounds} rounds")
    print(f"ratio {median:.3f}, quartiles {lower:.3f} to {upper:.3f}; target at most {TARGET}")
    own = Timed.own_seconds / Timed.own_steps * 1e3
    print(f"code of this project: {own:.2f} ms a step, {own / stock:.2%} of the stock step")
    return int(lower > TARGET)


if __name__ == "__main__":
    raise SystemExit(main())
