"""Time a training step of KnapsackGRPOTrainer against the stock GRPOTrainer, at equal rollouts.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --train-prompts 128
    python benchmarks/step_time.py --model smollm2-135m --dataset sums --prompts 8 --rollouts 8 --tokens 128 --rounds 3

Four trainers run the settings of ``knapsack-rl train`` in one process: stock, ours with all rows, ours without the rows
that have no gradient, and the same with prompts prefilled once for all their rollouts. Every round times the first
steps of a run of each; the order alternates, and ratios are taken within a round, so that a drift of the machine
affects all. With few training prompts, groups are ragged from the third step on. Processor time of one thread is
measured instead of wall-clock time, because the machine may be shared. The output is the median of each ratio with its
quartiles, the share of rows left out, and the time spent in code that the stock trainer does not have. The targets are
1.01 with all rows, and 0.65 without those that have no gradient, for the shipped model; the last trainer has that of
the one before. A model this small is a hard case, because the cost of allocation does not grow with the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from knapsack_rl.training.data import for_tokenizer, load_task
from knapsack_rl.training.models import batch_arguments, load_model, load_tokenizer
from knapsack_rl.training.settings import TrainSettings
from knapsack_rl.trl import KnapsackGRPOConfig, KnapsackGRPOTrainer

ALL, SOME, ONCE = "all rows", "rows with a gradient", "and prompts prefilled once"

TARGETS = {ALL: 1.01, SOME: 0.65, ONCE: 0.65}


@dataclasses.dataclass
class Times:
    """Seconds per step of a short run.

    Attributes:
        step: processor time of everything.
        own: processor time of the code that the stock trainer does not have, allocation and regrouping.
        skipped: share of rows left out.
    """

    step: float
    own: float = 0.0
    skipped: float = 0.0


class Timed(KnapsackGRPOTrainer):
    """A trainer that adds up the processor time of the code that the stock trainer does not have."""

    own_seconds = 0.0

    def _timed(self, call: Any, *args: Any) -> Any:
        started = time.process_time()
        found = call(*args)
        self.own_seconds += time.process_time() - started
        return found

    def _plan_step(self, *args: Any) -> Any:
        return self._timed(super()._plan_step, *args)

    def _finish_step(self, *args: Any) -> None:
        self._timed(super()._finish_step, *args)

    def _regroup(self, *args: Any) -> None:
        self._timed(super()._regroup, *args)


def run(settings: TrainSettings, kind: type[GRPOTrainer], **own: Any) -> Times:
    """Time a short training run, without set-up.

    Args:
        settings: of the run.
        kind: the trainer's class.
        **own: fields of the configuration that the stock trainer does not have.
    """
    tokenizer = load_tokenizer(settings)
    task = for_tokenizer(load_task(settings), tokenizer, settings.chat)
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": settings.steps,
            **batch_arguments(settings),
            "num_generations": settings.rollouts_per_prompt,
            "max_completion_length": task.max_completion_tokens,
            "learning_rate": settings.learning_rate,
            "loss_type": settings.loss_type,
            "epsilon_high": settings.clip_high,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
        }
        trainer = kind(
            model=load_model(settings, task, tokenizer),
            reward_funcs=[task.reward],
            args=(GRPOConfig if kind is GRPOTrainer else KnapsackGRPOConfig)(**arguments, **own),
            train_dataset=Dataset.from_list(list(task.train)),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        started = time.process_time()
        trainer.train()
        found = Times((time.process_time() - started) / settings.steps)
        if isinstance(trainer, Timed):
            found.own = trainer.own_seconds / settings.steps
            skipped = [row.get("knapsack/rows_skipped", 0.0) for row in trainer.state.log_history if "loss" in row]
            found.skipped = float(np.mean(skipped))
        return found


RIVALS: dict[str, tuple[type[GRPOTrainer], dict[str, Any]]] = {
    "stock": (GRPOTrainer, {}),
    ALL: (Timed, {"skip_zero_advantages": False, "share_prefill": False}),
    SOME: (Timed, {"skip_zero_advantages": True, "share_prefill": False}),
    ONCE: (Timed, {"skip_zero_advantages": True}),
}


def measure(settings: TrainSettings, rounds: int) -> dict[str, list[Times]]:
    """Return the times of each trainer, one per round."""
    for kind, own in RIVALS.values():  # compiles and warms up
        run(dataclasses.replace(settings, steps=1), kind, **own)
    found: dict[str, list[Times]] = {name: [] for name in RIVALS}
    for turn in range(rounds):
        for name in list(RIVALS)[:: 1 if turn % 2 else -1]:
            kind, own = RIVALS[name]
            found[name].append(run(settings, kind, **own))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ratios; return 1 if one misses its target by more than its spread."""
    default = TrainSettings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--model", default=default.model)
    parser.add_argument("--dataset", default=default.dataset)
    parser.add_argument("--prompts", type=int, default=default.prompts_per_step, help="prompts of a step")
    parser.add_argument("--rollouts", type=int, default=default.rollouts_per_prompt, help="rollouts per prompt")
    parser.add_argument("--rows-per-pass", type=int, default=0, help="rows of a pass; 0 for all of a step")
    parser.add_argument("--tokens", type=int, default=0, help="longest answer; 0 for the task's own")
    parser.add_argument("--train-prompts", type=int, default=default.train_prompts, help="prompts of the data set")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = TrainSettings(
        model=options.model,
        dataset=options.dataset,
        steps=options.steps,
        prompts_per_step=options.prompts,
        rollouts_per_prompt=options.rollouts,
        rollouts_per_pass=options.rows_per_pass,
        max_completion_tokens=options.tokens,
        train_prompts=options.train_prompts,
        held_out_prompts=0,
    )
    times = measure(settings, options.rounds)
    missed = False
    stock = np.array([found.step for found in times["stock"]])
    print(f"stock: {1e3 * np.median(stock):.0f} ms of processor time a step; {options.rounds} rounds")
    for name, target in TARGETS.items():
        ratio = np.array([found.step for found in times[name]]) / stock
        lower, median, upper = np.quantile(ratio, [0.25, 0.5, 0.75])
        own = float(np.median([found.own for found in times[name]]))
        skipped = float(np.mean([found.skipped for found in times[name]]))
        print(
            f"{name}: ratio {median:.3f}, quartiles {lower:.3f} to {upper:.3f}; {skipped:.0%} of the rows left out; "
            f"code of this project {1e3 * own:.1f} ms a step, {own / np.median(stock):.2%} of the stock step"
        )
        missed |= bool(options.model == default.model and lower > target)
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
