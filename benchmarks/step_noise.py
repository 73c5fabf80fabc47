"""How much of a step goes along the exact gradient of accuracy, by prompts and rollouts of the step.

    python benchmarks/step_noise.py --bed addition-dev --arm uniform-mean --steps 180
    python benchmarks/step_noise.py --bed addition-dev --arm known-matched --steps 260

A model of the lab is trained for some steps. At that checkpoint gradients of further steps are measured and none is
taken. Each step draws its prompts; its rollouts follow by rule from the success rates, which are known. Printed are
means and standard errors over the seeds of

* along: E[g] u / sqrt(E[g g]), where u is the exact gradient of held-out accuracy at length 1: the progress of a step
  whose length is held fixed, 1 if every step went in that direction;
* signal/noise: E[g] E[g] / (E[g g] - E[g] E[g]), without bias from pairs of different steps;
* rows with a gradient, in each step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.contract import markdown_table
from experiments.lab import beds
from experiments.lab.run import FULL, LabTrainer
from knapsack_rl.advantages import group_advantages
from knapsack_rl.allocation.checks import FloatArray, IntArray
from knapsack_rl.allocation.policies import allocate
from knapsack_rl.tasks.generated import Problem
from knapsack_rl.tasks.pretraining import answer_log_probs


@dataclass(frozen=True)
class Shape:
    """Prompts and rollouts of a step.

    Attributes:
        prompts: of the step.
        rollouts: per prompt, on average.
        value: that counts maximise with known rates; "" for uniform ones.
        minimum: least rollouts of a prompt.
    """

    prompts: int
    rollouts: int
    value: str = ""
    minimum: int = 2

    @property
    def label(self) -> str:
        """For the table."""
        rule = f"{self.value}, minimum {self.minimum}" if self.value else "uniform"
        return f"{self.prompts} × {self.rollouts}, {rule}"

    def counts(self, rates: FloatArray) -> IntArray:
        """(M,) rollouts of prompts with these success rates."""
        if not self.value:
            return np.full(rates.size, self.rollouts)
        return allocate(rates, rates.size * self.rollouts, self.minimum, 128, value=self.value).counts


SHAPES = (
    Shape(64, 8),
    Shape(64, 16),
    Shape(128, 4),
    *(Shape(64, 8, value) for value in ("likelihood", "likelihood-0.5")),
    *(Shape(128, 4, value) for value in ("likelihood", "likelihood-0.5")),
    Shape(128, 4, "likelihood-0.5", 0),
)


def direction_of_accuracy(trainer: LabTrainer) -> Tensor:
    """The exact gradient of held-out accuracy, at length 1."""
    model = trainer.policy.model
    rows = [Problem(row["prompt"], row["answer"], row["prompt_id"], 0) for row in trainer.data.held_out]
    logp, _ = answer_log_probs(model, rows)
    found = torch.autograd.grad(logp.sum(1).exp().mean(), [one for one in model.parameters() if one.requires_grad])
    flat = torch.cat([one.flatten() for one in found])
    return flat / flat.norm()


def gradient_of_step(trainer: LabTrainer, shape: Shape, batch: list[dict[str, Any]]) -> tuple[Tensor, int]:
    """The gradient that a step would go along, and its rows with an advantage."""
    counts = shape.counts(trainer.success_rates(batch))
    group = np.repeat(np.arange(len(batch)), counts)
    rows = [batch[place] for place in group]
    sampled, rewards = trainer.generate(rows)
    advantages = group_advantages(group, rewards, advantage="group-mean")
    given = torch.as_tensor(advantages, dtype=torch.float32)
    used, _ = trainer.policy.gradient(trainer.tokens_of(rows), sampled, given)
    flat = torch.cat([torch.zeros(0) if one is None else -one.flatten() for one in trainer.policy.gradients])
    trainer.policy.forget()
    return flat, used


def measure(trainer: LabTrainer, shape: Shape, steps: int, seed: int) -> tuple[float, float, float]:
    """Along, signal over noise, and rows with a gradient, over some steps.

    Args:
        trainer: at a checkpoint; the measurement does not train it.
        shape: of the steps.
        steps: that are measured, at least 2.
        seed: of the prompts.
    """
    direction, rng = direction_of_accuracy(trainer), np.random.default_rng(seed)
    found = []
    for _ in range(steps):
        chosen = rng.choice(len(trainer.data.train), shape.prompts, replace=False)
        found.append(gradient_of_step(trainer, shape, [trainer.data.train[place] for place in chosen]))
    gradients = torch.stack([gradient for gradient, _ in found])
    total = float(gradients.square().sum(1).mean())
    pairs = float(gradients.sum(0).square().sum()) - steps * total
    signal = pairs / (steps * (steps - 1))
    along = float(gradients.mean(0) @ direction) / total**0.5
    return along, signal / (total - signal), float(np.mean([rows for _, rows in found]))


def checkpoint(bed: str, arm: str, steps: int, seed: int, bases: Path) -> LabTrainer:
    """A model of the lab after some steps.

    Args:
        bed: name of a bed.
        arm: that trains it.
        steps: that it is trained.
        seed: of the run.
        bases: folder of the base models.
    """
    settings = replace(FULL, dataset=bed, arm=arm, seed=seed, steps=steps)
    with tempfile.TemporaryDirectory() as place:
        trainer = LabTrainer(settings, beds.base_folder(bed, bases, quick=False), "cpu", Path(place))
        for number, batch in zip(range(1, steps + 1), trainer.batches(), strict=False):
            trainer.step(batch, number)
    return trainer


def flags(description: str, example: str, steps: int) -> argparse.ArgumentParser:
    """A parser with the flags of :func:`checkpoint`, for seeds from 1000 on.

    Args:
        description: of the program.
        example: of its use.
        steps: to the checkpoint, by default.
    """
    parser = argparse.ArgumentParser(description=description, epilog=f"example: {example}")
    parser.add_argument("--bed", default="addition-dev", choices=beds.BEDS, help="task (default: %(default)s)")
    parser.add_argument("--arm", default="uniform-mean", help="that trains the checkpoint (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=steps, metavar="N", help="to the checkpoint (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="from 1000 on (default: %(default)s)")
    parser.add_argument("--bases", type=Path, default=Path("runs/experiments/lab"), metavar="DIR",
                        help="base models, made where there are none (default: %(default)s)")  # fmt: skip
    return parser


def parsed_by(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, least: dict[str, int]
) -> argparse.Namespace:
    """The flags that were given; exit status 2 for one that is below its least."""
    parsed = parser.parse_args(arguments)
    for name, minimum in least.items():
        if getattr(parsed, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}, got {getattr(parsed, name)}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 2 for bad input."""
    parser = flags(
        "Direction and noise of a step's gradient, by its prompts and rollouts.",
        "python benchmarks/step_noise.py --bed addition-dev --arm known-matched --steps 260",
        steps=180,
    )
    parser.add_argument(
        "--measured", type=int, default=24, metavar="N", help="steps of each row (default: %(default)s)"
    )
    parsed = parsed_by(parser, arguments, {"steps": 1, "seeds": 2, "measured": 2})
    torch.set_num_threads(1)
    table: dict[Shape, list[tuple[float, float, float]]] = {shape: [] for shape in SHAPES}
    for seed in range(1000, 1000 + parsed.seeds):
        trainer = checkpoint(parsed.bed, parsed.arm, parsed.steps, seed, parsed.bases)
        for shape, rows in table.items():
            rows.append(measure(trainer, shape, parsed.measured, seed))
            print(f"seed {seed}, {shape.label}: {', '.join(f'{one:.3g}' for one in rows[-1])}", file=sys.stderr)
    lines = []
    for shape, rows in table.items():
        mean, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / parsed.seeds**0.5
        lines.append((shape.label, *(f"{mean[k]:.2f} ± {error[k]:.2f}" for k in (0, 1)), f"{mean[2]:.0f}"))
    print(markdown_table(("step", "along", "signal/noise", "rows with a gradient"), lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
