"""One run on a bed: the loop of ``experiments.accelerator``, evaluated without sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.accelerator.train import Settings, Trainer, train
from experiments.contract import Row
from experiments.extract import before_and_after
from experiments.lab.beds import bed
from experiments.lab.prompt_queue import PromptQueue
from experiments.lab.rounds import rule_of, step_in_rounds
from experiments.pool import ARMS
from experiments.rules import RULES
from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.allocation.policies import allocate
from knapsack_rl.plan import Plan
from knapsack_rl.runs.log import RunLog
from knapsack_rl.tasks.data import TaskData
from knapsack_rl.tasks.generated import Problem

FULL = Settings(
    dataset="addition",
    model="tiny",
    precision="float32",
    learning_rate=6e-4,
    steps=400,
    train_prompts=2048,
    held_out_prompts=512,
    eval_every=20,
    eval_samples=0,
    share_prefix=False,
)
"""Settings of every run; ``dataset`` is the name of the bed."""

QUICK = replace(
    FULL,
    steps=4,
    prompts_per_step=8,
    rollouts_per_prompt=4,
    max_rollouts=16,
    train_prompts=96,
    held_out_prompts=48,
    eval_every=2,
)
"""The same code in a second."""


class LabTrainer(Trainer):
    """A tiny model on a bed; its success rates are exact, so that an evaluation has no noise of its own."""

    rules = ("", "known", "queue", *RULES)

    def __init__(self, settings: Settings, model: Path | None, device: str, folder: Path | None = None) -> None:
        super().__init__(settings, model, device, folder)
        self.rule = rule_of(settings, [row["prompt_id"] for row in self.data.train])
        self.queue = PromptQueue(settings.mean) if ARMS[settings.arm].rule == "queue" else None
        self._base = _digest(self.policy.model)
        self._start = self.success_rates(self.data.train)

    def load(self) -> TaskData:
        """The prompts of the bed, with what they are alike by in the column ``grade``, and their reward."""
        one = bed(self.settings.dataset)
        task = one.data(self.settings.train_prompts, self.settings.held_out_prompts)
        train, held_out = ([{**row, "grade": row[one.grade]} for row in part] for part in (task.train, task.held_out))
        return replace(task, train=train, held_out=held_out)

    def plan(self, batch: Sequence[dict[str, Any]]) -> Plan:
        """The rollouts of a step; of the arm that knows the success rates, the optimum for them."""
        ids, allocator = [row["prompt_id"] for row in batch], self.session.allocator
        budget = len(ids) * self.settings.mean
        if self.queue is not None:
            self.session.note_features(ids, self.features(batch))
            self.queue.push(ids)
            return self.queue.plan(self.session, budget, len(ids))
        if ARMS[self.settings.arm].rule != "known":
            return super().plan(batch)
        rates, low, high = self.success_rates(batch), allocator.min_rollouts, allocator.max_rollouts
        found = allocate(rates, budget, low, high, value=allocator.value)
        return Plan(ids, self.session.adopt(ids, found.counts))

    def step(self, batch: Sequence[dict[str, Any]], number: int) -> None:
        """One step, in rounds if a rule asks for its rollouts."""
        if self.rule is None:
            super().step(batch, number)
        else:
            step_in_rounds(self, self.rule, batch, number)

    def success_rates(self, rows: Sequence[dict[str, Any]]) -> FloatArray:
        """Return the (P,) exact success rates of prompts at temperature 1: one sequence of tokens is right."""
        from knapsack_rl.tasks import pretraining

        problems = [Problem(row["prompt"], row["answer"], row["prompt_id"], 0) for row in rows]
        return pretraining.success_rates(self.policy.model, problems).double().numpy()

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy: the mean success rate, and that of greedy answers."""
        held_out = list(self.data.held_out)
        greedy = self._score(held_out, self.policy.sample(self.tokens_of(held_out), 0.0))
        return {
            "held_out/accuracy": float(self.success_rates(held_out).mean()),
            "held_out/greedy_accuracy": float(np.mean(greedy)),
        }

    def findings(self, log: RunLog) -> dict[str, Any]:
        """The training prompts by success rate before and after, and what tells base models apart."""
        ids = [row["prompt_id"] for row in self.data.train]
        end = self.success_rates(self.data.train)
        return {"exact": before_and_after(ids, self._start, end, log), "base": self._base}


def run(settings: Settings, bases: dict[str, Path], until: float = float("inf"), mark: Row | None = None) -> Row:
    """Train on a bed with one thread; returns the row of the run.

    Args:
        settings: of the run.
        bases: folder of the base model of each bed.
        until: time (of ``time.time``) after which no step is made but the first.
        mark: what the row says besides.
    """
    import torch

    torch.set_num_threads(1)
    return compact(train(settings, bases[settings.dataset], "cpu", until, LabTrainer)) | (mark or {})


def compact(row: Row) -> Row:
    """Return a row without what no table of the lab reads: rows of many runs are kept in the repository."""
    kept = {name: value for name, value in row.items() if name not in ("budget", "classes", "peak_memory_gb")}
    return kept | {"series": {name: row["series"][name] for name in ("step", "rollout_ratio", "prompt_ratio")}}


def _digest(model: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for weight in model.parameters():
        digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()
