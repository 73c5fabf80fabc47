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
from typing import Any

from experiments.accelerator.tasks import CANDIDATES, GSM8K, MIXED
from experiments.accelerator.train import QUICK, Settings, Trainer, measure_success, measure_throughput, train
from experiments.contract import Row, select
from experiments.measures import best_rate
from experiments.rows_file import RowsFile, is_of

ARMS = ("uniform", "uniform-2n", "paper", "knapsack", "recommended-plain-twice")
LEARNING_RATES = (5e-6, 1e-5, 2e-5, 4e-5)
TUNING_SEED, TUNING_STEPS = 1000, 60
TUNED = "uniform"
"""Arm whose learning rate all arms have, but for the recommended setting."""
THROUGHPUT_STEPS = 10
LATER = "later "
"""In front of the parts of runs that were registered on 2026-11-28; those before are of other code and arms."""
PROBED_PROMPTS = 64
RATES = (0.02, 0.9)
"""A task is trained on if the base model's success rate lies between these."""

EXAMPLE = """example:
  python -m experiments.accelerator --model FOLDER --rows docs/evidence/accelerator.jsonl --seconds 480 --workers 8
  python -m experiments.accelerator --model FOLDER --rows docs/evidence/accelerator.jsonl --task gsm8k --copy FOLDER
"""


@dataclass(frozen=True)
class Plan:
    """What is measured, in this order; a piece whose row is there is left out.

    Attributes:
        base: settings that all pieces share.
        arms: of the comparison; the last is the recommended setting.
        seeds: of the comparison; outermost, so that whole seeds are there first.
        learning_rates: of which one is chosen for the last arm, and one by ``TUNED`` for all others.
        tuning_steps: steps of the runs that choose it.
        throughput_steps: steps that are timed.
        candidates: data sets whose success rates are measured first; those within ``RATES`` are trained on. None: the
            data set of ``base`` as it is.
        fewest: candidates without which nothing is trained.
        mark: in front of the names of its parts in the file.
    """

    base: Settings = field(default_factory=Settings)
    arms: Sequence[str] = ARMS
    seeds: Sequence[int] = (0, 1, 2, 3)
    learning_rates: Sequence[float] = LEARNING_RATES
    tuning_steps: int = TUNING_STEPS
    throughput_steps: int = THROUGHPUT_STEPS
    candidates: Sequence[str] = ()
    fewest: int = 1
    mark: str = LATER

    @property
    def recommended(self) -> str:
        """Arm with the recommended setting, which has a learning rate of its own."""
        return self.arms[-1]

    def probes(self) -> list[Settings]:
        """What the success rate of the base model is measured on."""
        few = replace(self.base, train_prompts=min(PROBED_PROMPTS, self.base.train_prompts))
        return [replace(few, dataset=dataset) for dataset in self.candidates]

    def chosen(self, rows: Sequence[Row]) -> Plan | None:
        """This plan on the candidates that the base model solves neither hardly ever nor nearly always.

        Args:
            rows: of :meth:`probes`.

        Returns:
            None if they are fewer than ``fewest``.
        """
        if not self.candidates:
            return self
        rates = {row["settings"]["dataset"]: row["rate"] for row in rows}
        found = [dataset for dataset in self.candidates if RATES[0] < rates[dataset] < RATES[1]]
        if len(found) < self.fewest:
            return None
        parts = [dataset.removeprefix(MIXED) for dataset in found]
        dataset = found[0] if len(found) == 1 else MIXED + ";".join(parts)
        return replace(self, base=replace(self.base, dataset=dataset), candidates=())

    def throughput(self) -> list[Settings]:
        """Variants of a step: neither saving, one of them, both; and both in float32."""
        still = replace(self.base, learning_rate=0.0)  # so that every variant has the same work
        savings = [(share, skip) for share in (False, True) for skip in (False, True)]
        short = [replace(still, share_prefix=share, skip_rows=skip) for share, skip in savings]
        return [*short, *({replace(still, precision="float32")} - set(short))]

    def tuning(self) -> list[Settings]:
        """Runs that choose the learning rates, on a seed that is not reported."""
        short = replace(self.base, seed=TUNING_SEED, steps=self.tuning_steps)
        return [
            replace(short, arm=arm, learning_rate=rate)
            for arm in (TUNED, self.recommended)
            for rate in self.learning_rates
        ]

    def training(self, tuned: Sequence[Row]) -> list[Settings]:
        """Runs of the comparison.

        Args:
            tuned: rows of :meth:`tuning`, all of them.
        """
        rates = {arm: chosen_rate(tuned, arm if arm == self.recommended else TUNED) for arm in self.arms}
        return [
            replace(self.base, arm=arm, seed=seed, learning_rate=rates[arm]) for seed in self.seeds for arm in self.arms
        ]

    @property
    def pieces(self) -> int:
        """How many there are, of a task that is trained on, after the probes."""
        return len(self.throughput()) + len(self.tuning()) + len(self.seeds) * len(self.arms)


RECOMMENDED = ("uniform", "uniform-2n", "paper", "recommended-plain-twice")
LONGER = Settings(
    steps=200, held_out_prompts=256, eval_every=20, eval_samples=2, rows_per_pass=64, rows_at_once=1024
)  # fmt: skip
"""Settings of tasks whose answers and prompts are longer than those of ``sums``."""

PLANS = {
    "sums": Plan(),
    "gsm8k": Plan(LONGER, RECOMMENDED, candidates=(GSM8K,)),
    "reasoning-gym": Plan(
        LONGER,
        # What the problems of a generator have in common is the column "grade".
        (*RECOMMENDED[:-1], "recommended-twice"),
        candidates=[MIXED + name for name in CANDIDATES],
        fewest=3,
    ),
}
"""What is measured, by task."""

QUICK_PLAN = Plan(QUICK, ARMS, (0,), (3e-4, 6e-4), 2, 1, mark="")


def quick(plan: Plan) -> Plan:
    """A plan with next to nothing to do, for any model on a CPU.

    Args:
        plan: of ``PLANS``.
    """
    base = replace(QUICK, dataset=plan.base.dataset, model="any", train_prompts=6, held_out_prompts=3)
    base = replace(base, steps=2, rollouts_per_prompt=2, prompts_per_step=3, rows_at_once=4)
    candidates, fewest = plan.candidates[:2], min(plan.fewest, 2)
    return replace(QUICK_PLAN, base=base, arms=plan.arms, candidates=candidates, fewest=fewest, mark=LATER)


def chosen_rate(rows: Sequence[Row], arm: str = TUNED) -> float:
    """The learning rate of the highest held-out accuracy, averaged over a run.

    Args:
        rows: of the part "tuning".
        arm: whose runs count.
    """
    return best_rate(select(rows, arm=arm))


class Measurement(RowsFile):
    """Measures the pieces of a plan that have no row yet.

    Args:
        rows: file that rows are appended to.
        model: folder of the model; None for the one that ships with the package.
        device: name of the torch device.
        until: time (of ``time.time``) at which all work has ended.
        workers: runs side by side on the device; 1 works in this process.
        copy: file or folder of a published data set, instead of the hub.
    """

    def __init__(
        self, rows: Path, model: Path | None, device: str, until: float, workers: int, copy: Path | None = None
    ) -> None:
        super().__init__(rows, until, workers)
        self.on: dict[str, Any] = {"model": model, "device": device, "kind": partial(Trainer, copy=copy)}

    def run(self, plan: Plan) -> int:
        """Measure; returns the number of pieces that were not finished in time."""
        probes = self.measure("probe", plan.probes(), partial(measure_success, **self.on))
        known = self._of("probe", plan.probes())
        for row in known:
            print(f"the base model solves {100 * row['rate']:.1f} % of {row['settings']['dataset']}", flush=True)
        if probes:
            return probes + plan.pieces
        chosen = plan.chosen(known)
        if chosen is None:
            low, high = (f"{100 * rate:g} %" for rate in RATES)
            print(f"nothing is trained: fewer than {plan.fewest} tasks lie between {low} and {high}", flush=True)
            return 0
        return self._train(chosen)

    def _of(self, part: str, pieces: Sequence[Settings]) -> list[Row]:
        """Rows of these pieces."""
        return [row for row in self.rows(part) if any(is_of(row, piece) for piece in pieces)]

    def _train(self, plan: Plan) -> int:
        throughput = partial(measure_throughput, steps=plan.throughput_steps, **self.on)
        left = self.measure(plan.mark + "throughput", plan.throughput(), throughput, alone=True)
        work = partial(train, until=self.until, **self.on)
        left += self.measure(plan.mark + "tuning", plan.tuning(), work)
        tuned = self._of(plan.mark + "tuning", plan.tuning())
        if len(tuned) < len(plan.tuning()):
            return left + len(plan.seeds) * len(plan.arms)
        print("learning rates:", ", ".join(f"{arm} {chosen_rate(tuned, arm):g}" for arm in (TUNED, plan.recommended)))
        return left + self.measure(plan.mark + "training", plan.training(tuned), work)

    def summary(self, row: Row) -> str:
        """What is printed of a row."""
        return _summary(row)


def _summary(row: Row) -> str:
    if "rate" in row:
        return f"success rate {row['rate']}, prompts by successes {row['prompts']}"
    if "seconds_per_step" in row:
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
    parser.add_argument("--task", choices=PLANS, default="sums", help="what is trained on (default: sums)")
    parser.add_argument("--copy", type=Path, metavar="PATH", help="copy of GSM8K, instead of the hub")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="seeds 0 to N-1 (default: 4)")
    parser.add_argument(
        "--quick", action="store_true", help="the same on next to nothing, on the CPU; its figures mean nothing"
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
        raise ValueError("--model must name the folder of SmolLM2-135M-Instruct; --quick on sums needs none")
    if parsed.quick and parsed.model is None and parsed.task != "sums":
        raise ValueError(f"--quick --task {parsed.task} needs --model, the folder of any model that reads text")
    if not parsed.quick and not torch.cuda.is_available():
        raise ValueError("torch sees no accelerator; --quick runs the same code on the CPU")
    until = time.time() + parsed.seconds
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes side by side
    device = "cpu" if parsed.quick else "cuda"
    plan = replace(PLANS[parsed.task], seeds=range(parsed.seeds))
    if parsed.quick:
        plan = QUICK_PLAN if parsed.model is None else quick(plan)
    left = Measurement(parsed.rows, parsed.model, device, until, parsed.workers, parsed.copy).run(plan)
    print(f"{left} pieces left", flush=True)
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
