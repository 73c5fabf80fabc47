"""One run: GRPO in a plain loop on one device, its allocation by the session that every engine uses."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from experiments.contract import Row
from experiments.extract import summarise
from experiments.pool import ARMS
from knapsack_rl.groups import Advantage, Weighting, group_advantages
from knapsack_rl.runs.files import METRICS_FILE, append_row
from knapsack_rl.runs.log import RunLog
from knapsack_rl.session import Plan, Session
from knapsack_rl.settings import AllocationSettings
from knapsack_rl.tasks import base_model_path
from knapsack_rl.tasks.data import DataRequest, TaskData
from knapsack_rl.tasks.registry import load_data

PARTS = ("generation", "scoring", "allocation", "update")
"""Parts of a step, in the order of tables."""

OF_THE_LOOP = ("weighting", "advantage", "feature_columns")
"""Settings of an arm that are not those of the allocation."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run.

    Attributes:
        arm: name of ``experiments.pool.ARMS``.
        seed: of the order of prompts and of sampling.
        learning_rate: constant.
        dataset: name of a task.
        model: what is trained; for the rows.
        precision: name of the torch format of the passes.
        steps: updates.
        prompts_per_step: M.
        rollouts_per_prompt: N, of which an arm may take a multiple.
        max_rollouts: most rollouts of a prompt.
        train_prompts: prompts that are trained on, in another order each time round.
        held_out_prompts: prompts that are never trained on.
        eval_every: steps between evaluations.
        eval_samples: samples of each held-out prompt at temperature 1, besides the greedy one.
        share_prefix: see ``Policy``.
        skip_rows: see ``Policy``.
    """

    arm: str = "uniform"
    seed: int = 0
    learning_rate: float = 1e-5
    dataset: str = "sums"
    model: str = "SmolLM2-135M-Instruct"
    precision: str = "bfloat16"
    steps: int = 240
    prompts_per_step: int = 64
    rollouts_per_prompt: int = 8
    max_rollouts: int = 128
    train_prompts: int = 1024
    held_out_prompts: int = 512
    eval_every: int = 10
    eval_samples: int = 4
    share_prefix: bool = True
    skip_rows: bool = True

    @property
    def mean(self) -> int:
        """Rollouts per prompt of this arm."""
        return self.rollouts_per_prompt * ARMS[self.arm].multiple

    @property
    def weighting(self) -> Weighting:
        """Weight of a prompt in the loss under this arm."""
        return ARMS[self.arm].settings.get("weighting", "auto")

    @property
    def advantage(self) -> Advantage:
        """Divisor of the advantages under this arm."""
        return ARMS[self.arm].settings.get("advantage", "group-std")

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """Columns of the data by which prompts share knowledge under this arm."""
        return ARMS[self.arm].settings.get("feature_columns", ())

    def session(self, folder: Path | None) -> Session:
        """The allocation of this arm; its log is written into the folder, if there is one.

        Raises:
            ValueError: the arm has a setting that this loop does not know.
        """
        own = {name: value for name, value in ARMS[self.arm].settings.items() if name not in OF_THE_LOOP}
        known = {spec.name for spec in fields(AllocationSettings)}
        if not set(own) <= known:
            raise ValueError(f"arm {self.arm!r} has {', '.join(sorted(set(own) - known))}, which needs the TRL trainer")
        settings = AllocationSettings(**{"max_rollouts": max(self.max_rollouts, self.mean), **own})
        return Session(settings, folder=folder, log_allocations=folder is not None)


QUICK = Settings(
    dataset="arithmetic",
    model="arithmetic-base",
    precision="float32",
    learning_rate=6e-4,
    steps=4,
    prompts_per_step=8,
    rollouts_per_prompt=4,
    max_rollouts=16,
    train_prompts=16,
    held_out_prompts=8,
    eval_every=2,
    eval_samples=1,
)
"""The same code on the small model that ships with the package; seconds on a CPU."""


class Trainer:
    """A model on a task.

    Args:
        settings: of the run.
        model: folder of the model; None for the one that ships with the package.
        device: name of the torch device.
        folder: for the logs; None for none.

    Raises:
        ValueError: the arm needs the TRL trainer.
    """

    rules: tuple[str, ...] = ("",)
    """Rules of arms that this trainer can follow."""

    def __init__(self, settings: Settings, model: Path | None, device: str, folder: Path | None = None) -> None:
        if ARMS[settings.arm].rule not in self.rules:
            raise ValueError(f"arm {settings.arm!r} follows the rule {ARMS[settings.arm].rule!r}, unknown to this loop")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from experiments.accelerator.policy import Policy

        logging.disable_progress_bar()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        place = model or base_model_path()
        self.settings, self.device, self.folder = settings, device, folder
        self.tokenizer = AutoTokenizer.from_pretrained(place)
        self.data = self.load()
        self._tokens = {row["prompt_id"]: self.tokenizer(row["prompt"])["input_ids"] for row in self._rows}
        network: Any = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, settings.precision))
        self.policy = Policy(
            network.to(device),
            list(self._tokens.values()),
            self._ends(network.config.vocab_size),
            max_tokens=self.data.max_completion_tokens,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            share_prefix=settings.share_prefix,
            skip_rows=settings.skip_rows,
        )
        self.session = settings.session(folder)
        self.rollouts, self.tokens, self.rows_updated = 0, 0, 0
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def load(self) -> TaskData:
        """The prompts of the run and their reward."""
        settings = self.settings
        return load_data(
            DataRequest(
                dataset=settings.dataset,
                train_prompts=settings.train_prompts,
                held_out_prompts=settings.held_out_prompts,
            )
        )

    @property
    def _rows(self) -> list[dict[str, Any]]:
        return [*self.data.train, *self.data.held_out]

    def _ends(self, vocabulary: int) -> list[bool]:
        """Which tokens end an answer: the model's own end, and every one with the task's stop in its text."""
        texts = self.tokenizer.batch_decode([[token] for token in range(vocabulary)])
        stop, own = self.data.stop, self.tokenizer.eos_token_id
        return [token == own or (bool(stop) and stop in text) for token, text in enumerate(texts)]

    def batches(self) -> Iterator[list[dict[str, Any]]]:
        """Batches of training rows, the same ones for every arm of a seed."""
        order = random.Random(self.settings.seed)  # noqa: S311 - reproducible order, not a secret
        waiting: list[dict[str, Any]] = []
        while True:
            if len(waiting) < self.settings.prompts_per_step:
                again = list(self.data.train)
                order.shuffle(again)
                waiting += again
            yield waiting[: self.settings.prompts_per_step]
            waiting = waiting[self.settings.prompts_per_step :]

    def plan(self, batch: Sequence[dict[str, Any]]) -> Plan:
        """The rollouts of a step."""
        features = {name: [row[name] for row in batch] for name in self.settings.feature_columns}
        return self.session.plan([row["prompt_id"] for row in batch], self.settings.mean, features=features)

    def step(self, batch: Sequence[dict[str, Any]], number: int) -> None:
        """Allocate, generate, score, update and learn from the outcomes."""
        import torch

        with self._timed("allocation"):
            plan = self.plan(batch)
            group = plan.expand()
        rows = [batch[place] for place in group]
        prompts = self.tokens_of(rows)
        with self._timed("generation"):
            sampled = self.policy.sample(prompts)
        with self._timed("scoring"):
            rewards = self._score(rows, sampled)
            lengths = sampled.lengths.tolist()
        with self._timed("update"):
            found = group_advantages(
                group, rewards, weighting=self.settings.weighting, advantage=self.settings.advantage
            )
            advantages = torch.as_tensor(found, dtype=torch.float32)
            self.rows_updated += self.policy.update(prompts, sampled, advantages)
        with self._timed("allocation"):
            self.session.observe(plan, group, rewards, lengths, step=number)
        self.rollouts, self.tokens = self.rollouts + len(rows), self.tokens + sum(lengths)

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy of sampled and of greedy answers."""
        held_out, samples = list(self.data.held_out), self.settings.eval_samples
        rows = held_out * samples + held_out
        heat = [1.0] * (len(held_out) * samples) + [0.0] * len(held_out)
        sampled = self.policy.sample(self.tokens_of(rows), heat)
        right = np.array(self._score(rows, sampled)) > 0
        return {
            "held_out/accuracy": float(right[: -len(held_out)].mean()),
            "held_out/greedy_accuracy": float(right[-len(held_out) :].mean()),
        }

    def tokens_of(self, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Token ids of the prompt of each row."""
        return [self._tokens[row["prompt_id"]] for row in rows]

    def findings(self, log: RunLog) -> dict[str, Any]:
        """What else the row of a run holds, given its log."""
        return {}

    def _score(self, rows: Sequence[dict[str, Any]], sampled: Any) -> list[float]:
        answers = [row[:length] for row, length in zip(sampled.tokens.tolist(), sampled.lengths.tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        return self.data.reward(completions=texts, **columns)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[part] += self._now() - started

    def _now(self) -> float:
        """Seconds on a clock, once the device has done what it was given."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def log(self, step: int) -> dict[str, Any]:
        """Evaluate, and write a line of metrics."""
        row = {
            "step": step,
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            "seconds": sum(self.seconds.values()),
            **self.evaluate(),
        }
        assert self.folder is not None
        append_row(self.folder / METRICS_FILE, row)
        return row


def train(
    settings: Settings,
    model: Path | None,
    device: str,
    until: float = float("inf"),
    kind: type[Trainer] = Trainer,
) -> Row:
    """Run an arm; evaluations do not count in its seconds.

    Args:
        settings: of the run.
        model: folder of the model; None for the one that ships with the package.
        device: name of the torch device.
        until: time (of ``time.time``) after which no step is made but the first.
        kind: of the trainer.

    Returns:
        The row of the run, ``finished`` if it made all its steps.
    """
    with tempfile.TemporaryDirectory() as place:
        trainer = kind(settings, model, device, Path(place))
        trainer.log(0)
        step = 0
        for batch in trainer.batches():
            if step >= settings.steps or (step and time.time() > until):
                break
            step += 1
            trainer.step(batch, step)
            if step % settings.eval_every == 0 or step == settings.steps:
                trainer.log(step)
        return _row(trainer, step, Path(place))


def _row(trainer: Trainer, steps: int, folder: Path) -> Row:
    settings, log = trainer.settings, RunLog.load(folder)
    summary = summarise(log)
    summary["evaluations"]["seconds"] = [round(row["seconds"], 3) for row in log.metrics]
    return {
        "part": "training",
        "arm": settings.arm,
        "seed": settings.seed,
        "settings": asdict(settings),
        "machine": machine(trainer.device),
        "finished": steps == settings.steps,
        **summary,
        **trainer.findings(log),
        "rows_updated": trainer.rows_updated,
        "seconds": {part: round(value, 3) for part, value in trainer.seconds.items()},
        "peak_memory_gb": peak_memory(trainer.device),
    }


def measure_throughput(settings: Settings, model: Path | None, device: str, steps: int) -> Row:
    """Time the parts of a step.

    Args:
        settings: of the variant.
        model: folder of the model; None for the one that ships with the package.
        device: name of the torch device.
        steps: that are timed, after three that are not.
    """
    trainer = Trainer(settings, model, device)
    batches = trainer.batches()
    for number in range(1, 4):
        trainer.step(next(batches), number)
    before, trainer.seconds = (trainer.rollouts, trainer.tokens, trainer.rows_updated), dict.fromkeys(PARTS, 0.0)
    for number in range(4, 4 + steps):
        trainer.step(next(batches), number)
    rollouts, tokens, updated = (
        after - early
        for after, early in zip((trainer.rollouts, trainer.tokens, trainer.rows_updated), before, strict=True)
    )
    total = sum(trainer.seconds.values())
    return {
        "part": "throughput",
        "settings": asdict(trainer.settings),
        "machine": machine(device),
        "steps": steps,
        "seconds_per_step": round(total / steps, 5),
        "seconds": {part: round(value / steps, 6) for part, value in trainer.seconds.items()},
        "rollouts_per_second": round(rollouts / total, 1),
        "tokens_per_second": round(tokens / total, 1),
        "rows_updated": round(updated / rollouts, 4),
        "peak_memory_gb": peak_memory(device),
    }


def machine(device: str) -> dict[str, str]:
    """Device and versions."""
    import torch
    import transformers

    import knapsack_rl

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "knapsack_rl": knapsack_rl.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def peak_memory(device: str) -> float | None:
    """Most memory that tensors took on the device, in GB of 10^9 bytes; None on a CPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None
