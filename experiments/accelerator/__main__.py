"""``python -m experiments.accelerator``: measure on this machine's accelerator and append rows to a file.

Rows in the file are not measured again, so that a machine at hand for some minutes at a time is enough. Needs torch and
transformers; the model is a folder, such as the one that ``knapsack-rl train --model smollm2-135m`` makes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from experiments.accelerator.train import QUICK, Settings, measure_throughput, train
from experiments.contract import Row
from experiments.measures import mean_accuracy
from experiments.rows_file import RowsFile

ARMS = ("uniform", "uniform-2n", "paper", "knapsack")
LEARNING_RATES = (5e-6, 1e-5, 2e-5, 4e-5)
TUNING_SEED, TUNING_STEPS = 1000, 60
THROUGHPUT_STEPS = 10

EXAMPLE = """example:
  python -m experiments.accelerator --model FOLDER --rows docs/evidence/accelerator.jsonl --seconds 480 --workers 8
"""


@dataclass(frozen=True)
class Plan:
    """What is measured, in this order; a piece whose row is there is left out.

    Attributes:
        base: settings that all pieces share.
        arms: of the comparison.
        seeds: of the comparison; outermost, so that whole seeds are there first.
        learning_rates: of which one is chosen.
        tuning_steps: steps of the runs that choose it.
        throughput_steps: steps that are timed.
    """

    base: Settings = field(default_factory=Settings)
    arms: Sequence[str] = ARMS
    seeds: Sequence[int] = (0, 1, 2, 3)
    learning_rates: Sequence[float] = LEARNING_RATES
    tuning_steps: int = TUNING_STEPS
    throughput_steps: int = THROUGHPUT_STEPS

    def throughput(self) -> list[Settings]:
        """Variants of a step: neither saving, one of them, both; and both in float32."""
        still = replace(self.base, learning_rate=0.0)  # so that every variant has the same work
        savings = [(share, skip) for share in (False, True) for skip in (False, True)]
        short = [replace(still, share_prefix=share, skip_rows=skip) for share, skip in savings]
        return [*short, *({replace(still, precision="float32")} - set(short))]

    def tuning(self) -> list[Settings]:
        """Runs of uniform allocation that choose the learning rate, on a seed that is not reported."""
        seed = TUNING_SEED
        return [replace(self.base, seed=seed, steps=self.tuning_steps, learning_rate=r) for r in self.learning_rates]

    def training(self, learning_rate: float) -> list[Settings]:
        """Runs of the comparison."""
        return [
            replace(self.base, arm=arm, seed=seed, learning_rate=learning_rate)
            for seed in self.seeds
            for arm in self.arms
        ]


QUICK_PLAN = Plan(QUICK, ARMS, (0,), (3e-4, 6e-4), 2, 1)


def chosen_rate(rows: Sequence[Row]) -> float:
    """The learning rate of the highest held-out accuracy, averaged over a run of uniform allocation.

    Args:
        rows: of the part "tuning".
    """
    best = max(rows, key=mean_accuracy)
    return float(best["settings"]["learning_rate"])


class Measurement(RowsFile):
    """Measures the pieces of a plan that have no row yet.

    Args:
        rows: file that rows are appended to.
        model: folder of the model; None for the one that ships with the package.
        device: name of the torch device.
        until: time (of ``time.time``) at which all work has ended.
        workers: runs side by side on the device; 1 works in this process.
    """

    def __init__(self, rows: Path, model: Path | None, device: str, until: float, workers: int) -> None:
        super().__init__(rows, until, workers)
        self.model, self.device = model, device

    def run(self, plan: Plan) -> int:
        """Measure; returns the number of pieces that were not finished in time."""
        throughput = partial(measure_throughput, model=self.model, device=self.device, steps=plan.throughput_steps)
        left = self.measure("throughput", plan.throughput(), throughput, alone=True)
        work = partial(train, model=self.model, device=self.device, until=self.until)
        left += self.measure("tuning", plan.tuning(), work)
        if len(self.rows("tuning")) < len(plan.learning_rates):
            return left + len(plan.training(0.0))
        rate = chosen_rate(self.rows("tuning"))
        print(f"learning rate {rate:g}", flush=True)
        return left + self.measure("training", plan.training(rate), work)

    def summary(self, row: Row) -> str:
        """What is printed of a row."""
        return _summary(row)


def _summary(row: Row) -> str:
    if row["part"] == "throughput":
        return f"{row['seconds_per_step']} s a step, {row['rollouts_per_second']} rollouts/s"
    curve, rate = row["evaluations"], row["settings"]["learning_rate"]
    return (
        f"rate {rate:g}, {row['steps']} steps, {sum(row['seconds'].values()):.0f} s, "
        f"accuracy {curve['accuracy'][0]:.3f} to {curve['accuracy'][-1]:.3f}, {row['peak_memory_gb']} GB"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; exit status 1 if something was not finished in time, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.accelerator",
        description="Train SmolLM2-135M on one accelerator, several runs side by side, and append rows to a file.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument(
        "--rows", type=Path, required=True, metavar="FILE", help="JSON lines; what it holds is not redone"
    )
    parser.add_argument("--seconds", type=float, default=480.0, metavar="S", help="end within this time (default: 480)")
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="runs side by side (default: 8)")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="seeds 0 to N-1 (default: 4)")
    parser.add_argument(
        "--quick", action="store_true", help="the same on a tiny model, on the CPU; its figures mean nothing"
    )
    parsed = parser.parse_args(arguments)
    try:
        return _run(parsed)
    except (ValueError, OSError) as error:
        print(f"experiments.accelerator: {error}", file=sys.stderr)
        return 2


def _run(parsed: argparse.Namespace) -> int:
    import torch

    for name in ("workers", "seeds"):
        if getattr(parsed, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(parsed, name)}")
    if not parsed.quick and parsed.model is None:
        raise ValueError("--model must name the folder of SmolLM2-135M-Instruct; --quick needs none")
    if not parsed.quick and not torch.cuda.is_available():
        raise ValueError("torch sees no accelerator; --quick runs the same code on the CPU")
    until = time.time() + parsed.seconds
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes side by side
    device = "cpu" if parsed.quick else "cuda"
    plan = QUICK_PLAN if parsed.quick else Plan(seeds=range(parsed.seeds))
    left = Measurement(parsed.rows, parsed.model, device, until, parsed.workers).run(plan)
    print(f"{left} pieces left", flush=True)
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
