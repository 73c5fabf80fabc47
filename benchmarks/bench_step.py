"""Time a training step of KnapsackGRPOTrainer against the stock GRPOTrainer, at equal rollouts.

    python benchmarks/bench_step.py
    python benchmarks/bench_step.py --rounds 12 --steps 8

Both train the tiny model of the tests on the same prompts with the same number of rows per step, in one process.
Every round times a few steps of each; rounds alternate in order, and it is the ratio within a round that is compared,
so that a drift of the machine hits both. Processor time is measured, not time on the clock, because the machine may be
shared. The median ratio and its quartiles are printed; the target is a ratio of at most 1.01. The tiny model makes
this the worst case: what allocation costs does not grow with the model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import tiny
from knapsack_rl.trl import KnapsackGRPOConfig, KnapsackGRPOTrainer

TARGET = 1.01


def seconds_per_step(trainer_class: type[GRPOTrainer], config_class: type[GRPOConfig], steps: int) -> float:
    """Processor time per step of a short training run, set-up not included."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = tiny.arguments(
            Path(folder), max_steps=steps, per_device_train_batch_size=64, num_generations=8, max_completion_length=24
        )
        trainer = trainer_class(
            model=tiny.model(),
            reward_funcs=[tiny.digit_sum],
            args=config_class(**settings),
            train_dataset=tiny.dataset(96),
            processing_class=tiny.tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        started = time.process_time()
        trainer.train()
        return (time.process_time() - started) / steps


def measure(rounds: int, steps: int) -> np.ndarray:
    """(rounds, 2) seconds per step: knapsack, stock."""
    rivals = ((KnapsackGRPOTrainer, KnapsackGRPOConfig), (GRPOTrainer, GRPOConfig))
    for rival in rivals:  # compiles and warms up
        seconds_per_step(*rival, 1)
    seconds = np.empty((rounds, 2))
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            seconds[turn, which] = seconds_per_step(*rivals[which], steps)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ratio; 1 if it misses the target beyond its spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args(argv)
    seconds = measure(options.rounds, options.steps)
    ratio = seconds[:, 0] / seconds[:, 1]
    lower, median, upper = np.quantile(ratio, [0.25, 0.5, 0.75])
    knapsack, stock = np.median(seconds, axis=0) * 1e3
    print(f"step: knapsack {knapsack:.1f} ms, stock {stock:.1f} ms of processor time, {options.rounds} rounds")
    print(f"ratio {median:.3f}, quartiles {lower:.3f} to {upper:.3f}; target at most {TARGET}")
    return int(lower > TARGET)


if __name__ == "__main__":
    raise SystemExit(main())
