"""``python -m experiments.lab REGISTRATION --rows FILE``: run what a registration states, a row for each run."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from experiments.accelerator.train import Settings
from experiments.claims import accuracy_table, by_arm
from experiments.contract import Row
from experiments.lab import beds
from experiments.lab.registration import Registration, commit_of, read
from experiments.lab.run import FULL, QUICK, run
from experiments.rows_file import RowsFile, is_of
from experiments.training import Table, Training

REGISTRATIONS = Path(__file__).parent / "registrations"
EXAMPLES = """examples:
  python -m experiments.lab headline --rows docs/evidence/lab-headline.jsonl
      run what registrations/headline.md states; started again, it goes on where it stopped
  python -m experiments.lab headline --rows docs/evidence/lab-headline.jsonl --report
      tables of the rows that are there
  python -m experiments.lab headline --rows smoke.jsonl --beds skills --seeds 2 --steps 20
      a first look; the registration need not be committed, and the figures mean nothing
  python -m experiments.lab headline --rows quick.jsonl --quick
      the same code on next to nothing, in seconds
"""


class Lab(RowsFile):
    """Runs of a registration that have no row yet.

    Args:
        rows: file that rows are appended to.
        bases: folder of the base model of each bed.
        until: time (of ``time.time``) at which all work has ended.
        workers: runs side by side; 1 works in this process.
        mark: what every row says besides.
    """

    def __init__(self, rows: Path, bases: dict[str, Path], until: float, workers: int, mark: Row) -> None:
        super().__init__(rows, until, workers)
        self.mark = mark
        self.work = partial(run, bases=bases, until=until, mark=mark)

    def rows(self, part: str) -> list[Row]:
        """Rows of a part; those of trials do not stand in for registered runs, nor the other way round."""
        return [row for row in super().rows(part) if ("quick" in row) == ("quick" in self.mark)]

    def run(self, plan: Registration, shared: Settings) -> int:
        """Choose the learning rates, then train; returns the number of runs that were not finished in time.

        Args:
            plan: what is run.
            shared: settings of every run.
        """
        tuning = plan.tuning(shared)
        left = self.measure("tuning", tuning, self.work)
        if left:
            return left + len(plan.seeds) * len(plan.beds) * len(plan.arms)
        tuned = self.of("tuning", tuning)
        for name in plan.beds:
            chosen = [f"{arm} {plan.chosen_rate(tuned, name, arm):g}" for arm in plan.arms]
            print(f"learning rates on {name}: {', '.join(chosen)}", flush=True)
        return self.measure("training", plan.training(shared, tuned), self.work)

    def of(self, part: str, wanted: Sequence[Settings]) -> list[Row]:
        """Rows of a part that belong to these settings."""
        return [row for row in self.rows(part) if any(is_of(row, one) for one in wanted)]

    def summary(self, row: Row) -> str:
        """What is printed of a row."""
        settings, accuracy = row["settings"], row["evaluations"]["accuracy"]
        seconds = sum(row["seconds"].values()) / row["steps"]
        return (
            f"{settings['dataset']}, rate {settings['learning_rate']:g}: accuracy {accuracy[0]:.3f} to "
            f"{accuracy[-1]:.3f}, {seconds:.2f} s a step"
        )

    def report(self, plan: Registration, shared: Settings) -> str:
        """Tables of the runs that are there, by bed."""
        tuning = plan.tuning(shared)
        tuned = self.of("tuning", tuning)
        if len(tuned) < len(tuning):
            return f"{len(tuned)} of {len(tuning)} runs that choose the learning rates are there"
        rows, text = self.of("training", plan.training(shared, tuned)), []
        for name in plan.beds:
            own = [row for row in rows if row["settings"]["dataset"] == name]
            there = tuple(arm for arm in plan.arms if any(row["arm"] == arm for row in own))
            if plan.arms[0] in there:
                tables = Training(there, (), layout(plan.arms[0])).tables(own)
                text += [f"## {name}", *(f"{title}:\n\n{table}" for title, table in tables.items())]
        return "\n\n".join(text) or "no runs are there"


def layout(baseline: str) -> dict[str, Table]:
    """Tables of the runs on a bed.

    Args:
        baseline: arm that the others are compared with.
    """
    cost = {f"{unit} to it": f"{{row}} / {baseline}, {unit}" for unit in ("tokens", "seconds")}
    return {
        "accuracy": accuracy_table(baseline, **cost),
        "prompts": Table(by_arm("unsolved at the end", "still unsolved", "rollouts with a gradient",
                                "prompts with a gradient", "tokens", "seconds")),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; exit status 1 if something was not finished in time, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.lab",
        description="Train tiny models by what a registration states, and append a row for each run to a file. "
        f"Beds: {'; '.join(f'{name}: {one.about}' for name, one in beds.BEDS.items())}.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("registration", metavar="REGISTRATION", help="name in registrations/, or a Markdown file")
    parser.add_argument(
        "--rows", type=Path, required=True, metavar="FILE", help="JSON lines; what it holds is not run again"
    )
    parser.add_argument("--report", action="store_true", help="print tables of the rows that are there; run nothing")
    parser.add_argument("--beds", metavar="NAMES", help="of the registered beds only these, with commas between them")
    parser.add_argument("--arms", metavar="NAMES", help="likewise of the arms; others may be on record already")
    parser.add_argument("--seeds", type=int, metavar="N", help="only the first N registered seeds")
    parser.add_argument("--steps", type=int, metavar="N", help="another number of steps: rows are marked as quick")
    parser.add_argument("--quick", action="store_true", help="tiny models, 4 steps, the first 2 seeds and rates")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs side by side (default: 2)")
    parser.add_argument("--seconds", type=float, metavar="S", help="end within this time (default: no limit)")
    parser.add_argument("--bases", type=Path, default=Path("runs/experiments/lab"), metavar="DIR",
                        help="base models, made where there are none (default: %(default)s)")  # fmt: skip
    try:
        return _main(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"experiments.lab: {error}", file=sys.stderr)
        return 2


def _main(parsed: argparse.Namespace) -> int:
    for name in ("workers", "seeds", "steps"):
        if getattr(parsed, name) is not None and getattr(parsed, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(parsed, name)}")
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would appear between the lines of progress
    path = Path(parsed.registration)
    path = path if path.suffix else REGISTRATIONS / f"{parsed.registration}.md"
    plan = _chosen(read(path), parsed)
    shared = QUICK if parsed.quick else FULL
    trial = parsed.quick or parsed.steps is not None
    if parsed.report:
        print(Lab(parsed.rows, {}, 0.0, 1, {"quick": True} if trial else {}).report(plan, shared))
        return 0
    mark = {"quick": True} if trial else {"registration": path.stem, "commit": commit_of(path)}
    until = time.time() + (parsed.seconds or float("inf"))
    bases = {name: beds.base_folder(name, parsed.bases, quick=parsed.quick) for name in plan.beds}
    left = Lab(parsed.rows, bases, until, parsed.workers, mark).run(plan, shared)
    print(f"{left} runs left", flush=True)
    return int(left > 0)


def _chosen(plan: Registration, parsed: argparse.Namespace) -> Registration:
    """The part of a registration that the flags ask for."""
    chosen_beds, arms = _part("beds", plan.beds, parsed.beds), _part("arms", plan.arms, parsed.arms)
    plan = replace(plan, beds=chosen_beds, arms=arms)
    if parsed.quick:
        plan = replace(plan, seeds=plan.seeds[:2], learning_rates=plan.learning_rates[:2], steps=QUICK.steps)
    return replace(plan, seeds=plan.seeds[: parsed.seeds], steps=parsed.steps or plan.steps)


def _part(flag: str, registered: tuple[str, ...], wanted: str | None) -> tuple[str, ...]:
    """The names that a flag asks for; all where it is not given."""
    names = registered if wanted is None else tuple(wanted.split(","))
    if not set(names) <= set(registered):
        raise ValueError(f"--{flag} must be among the registered {', '.join(registered)}, got {wanted!r}")
    return names


if __name__ == "__main__":
    sys.exit(main())
