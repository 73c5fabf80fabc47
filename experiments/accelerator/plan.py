"""What runs of a 1.5B and a 7B model would cost on 8 to 64 accelerators: arithmetic, not a measurement.

``python -m experiments.accelerator.plan`` prints the tables of the page. Every input is either an assumption, named in
``ASSUMPTIONS`` and in the first table, or a figure on record: the share of rows with a gradient of a recorded run of a
1.5B model, and rollouts to the final accuracy of uniform allocation.

A step generates, trains, and does the rest. With R rollouts of L tokens after prompts of Q tokens, on G accelerators:

* Generation: all rollouts at once, R/G on each accelerator. Each of the T decoding steps, T the longest answer, reads
  the weights once and takes a fixed time to start; each token reads the keys and values of its rollout. Prefill is left
  out, as is the chance that rollouts do not fit into memory together.
* Training: 8 floating-point operations per parameter and token (forward 2, recomputed 2, backward 4) of prompt and
  answer; attention is left out.
* The rest: a fixed time to move weights to the generator, score and log.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import measures
from experiments.contract import Row, markdown_table, select
from experiments.statistics import Estimate
from experiments.trace import load_trace

FORWARD_AND_BACKWARD = 8
BYTES = 2
"""Of a number in bfloat16."""


@dataclass(frozen=True)
class Model:
    """Size of a model.

    Attributes:
        name: for tables.
        parameters: their number.
        layers: of the decoder.
        kv_width: width of all heads of the keys of a layer.
    """

    name: str
    parameters: float
    layers: int
    kv_width: int

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        return 2 * self.layers * self.kv_width * BYTES


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of accelerators and of the work.

    Attributes:
        flops: operations a second of an accelerator in bfloat16.
        bandwidth: bytes a second of its memory.
        train_share: of ``flops`` that training reaches.
        read_share: of ``bandwidth`` that decoding reaches.
        start_seconds: of a decoding step, besides reading.
        rest_seconds: of a step, besides generation and training.
        dollars: an accelerator and hour.
        prompts: of a step.
        rollouts: per prompt, on average.
        prompt_tokens: mean length of a prompt.
        answer_tokens: mean length of an answer.
        longest_tokens: length of the longest answer of a step.
        steps: of a run.
    """

    flops: float = 989e12
    bandwidth: float = 3.35e12
    train_share: float = 0.35
    read_share: float = 0.6
    start_seconds: float = 0.004
    rest_seconds: float = 10.0
    dollars: float = 2.5
    prompts: int = 256
    rollouts: int = 8
    prompt_tokens: int = 150
    answer_tokens: int = 1000
    longest_tokens: int = 3072
    steps: int = 1000


MODELS = (Model("1.5B", 1.54e9, 28, 256), Model("7B", 7.62e9, 28, 512))
"""Parameters, layers and key width of Qwen2.5, as published."""
ASSUMPTIONS = Assumptions()
ACCELERATORS = (8, 16, 32, 64)
BEDS = ("skills", "addition", "running-sums")
"""Of the lab, whose ratios are applied."""


@dataclass(frozen=True)
class Step:
    """Seconds of a step by part."""

    generation: float
    training: float
    rest: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.generation + self.training + self.rest


def step(model: Model, accelerators: int, trained: float, given: Assumptions = ASSUMPTIONS) -> Step:
    """Return the seconds of a step.

    Args:
        model: that is trained.
        accelerators: G.
        trained: rows that pass through the update, over all; above 1 where several updates are made.
        given: all else.
    """
    each = given.prompts * given.rollouts / accelerators
    reads = given.bandwidth * given.read_share
    weights = given.longest_tokens * (model.parameters * BYTES / reads + given.start_seconds)
    context = given.prompt_tokens + given.answer_tokens / 2
    generation = weights + each * given.answer_tokens * context * model.cache_bytes / reads
    work = FORWARD_AND_BACKWARD * model.parameters * each * (given.prompt_tokens + given.answer_tokens)
    return Step(generation, trained * work / (given.flops * given.train_share), given.rest_seconds)


def rows_with_gradient() -> float:
    """Share of rollouts in groups with successes and failures, over all visits of the recorded run of a 1.5B model."""
    trace = load_trace()
    mixed = (trace.successes > 0) & (trace.successes < trace.totals)
    return float(trace.totals[mixed].sum() / trace.totals.sum())


def tables(folder: Path) -> dict[str, str]:
    """Tables by name.

    Args:
        folder: of the rows on record.
    """
    return {"inputs": _inputs(), "cost": _cost(), "savings": _savings(folder)}


def _inputs() -> str:
    given, mixed = ASSUMPTIONS, rows_with_gradient()
    lines = [
        ("an accelerator in bfloat16", f"{given.flops / 1e12:.0f} TFLOP/s", "data sheet of an H100 SXM"),
        ("its memory", f"{given.bandwidth / 1e12:.2f} TB/s", "data sheet"),
        ("share of the first that training reaches", f"{100 * given.train_share:.0f} %", "assumption"),
        ("share of the second that decoding reaches", f"{100 * given.read_share:.0f} %", "assumption"),
        ("time to start a decoding step", f"{1000 * given.start_seconds:.0f} ms", "assumption"),
        ("the rest of a step: weights to the generator, scoring, logs", f"{given.rest_seconds:.0f} s", "assumption"),
        ("an accelerator and hour", f"${given.dollars:.2f}", "assumption"),
        ("a step", f"{given.prompts} prompts × {given.rollouts} rollouts", "setting of the paper"),
        (
            "tokens of a prompt and of an answer, mean",
            f"{given.prompt_tokens} and {given.answer_tokens:,}",
            "assumption",
        ),
        ("tokens of the longest answer of a step", f"{given.longest_tokens:,}", "assumption"),
        ("steps of a run", f"{given.steps:,}", "setting of the paper"),
        ("rows with a gradient", f"{100 * mixed:.0f} %", "recorded run of a 1.5B model, uniform, mean over its visits"),
    ]
    return markdown_table(("input", "value", "source"), lines)


def _cost() -> str:
    given, share, lines = ASSUMPTIONS, rows_with_gradient(), []
    for model in MODELS:
        for accelerators in ACCELERATORS:
            whole, skipped = (step(model, accelerators, rows) for rows in (1.0, share))
            hours = given.steps * skipped.seconds * accelerators / 3600
            parts = (whole.generation, whole.training, whole.rest)
            lines.append(
                (
                    model.name,
                    str(accelerators),
                    *(f"{seconds:.0f} s ({100 * seconds / whole.seconds:.0f} %)" for seconds in parts),
                    f"{whole.seconds:.0f} s",
                    f"{skipped.seconds:.0f} s",
                    f"{given.steps * skipped.seconds / 3600:.0f} h",
                    f"{hours:,.0f}",
                    f"${given.dollars * hours:,.0f}",
                )
            )
    header = ("model", "accelerators", "generation", "training, all rows", "rest", "a step",
              "a step, rows with a gradient", "a run", "accelerator hours", "cost")  # fmt: skip
    return markdown_table(header, lines)


def _savings(folder: Path) -> str:
    from experiments import catalogue

    lab, small = (select(catalogue.read(name, folder), part="training") for name in ("lab-headline", "accelerator"))
    recorded = [
        *((f"recommended setting, tiny model on {bed}", _on(bed, lab), "recommended-twice") for bed in BEDS),
        ("first default, SmolLM2-135M on sums", small, "knapsack"),
    ]
    given, share = ASSUMPTIONS, rows_with_gradient()
    runs = [(model, 8 * model_place) for model_place, model in ((1, MODELS[0]), (8, MODELS[1]))]
    header = ("if the ratios were those of", "rollouts to the final accuracy of uniform allocation",
              "rows through the update, per rollout",
              *(f"{model.name} on {count}, accelerator hours saved" for model, count in runs))  # fmt: skip
    lines = []
    for name, rows, arm in recorded:
        found, updated, cells = _ratio(rows, arm), _updated(rows, arm) / _updated(rows, "uniform"), []
        for model, count in runs:
            hours, own = (given.steps * step(model, count, s).seconds * count / 3600 for s in (share, share * updated))
            saved = [hours - own * end for end in (found.mean, found.high, found.low)]
            cells.append(f"{saved[0]:,.0f} [{saved[1]:,.0f}, {saved[2]:,.0f}] of {hours:,.0f}".replace("-", "−"))
        lines.append((name, found.times(), f"{updated:.2f} ×", *cells))
    return markdown_table(header, lines)


def _on(bed: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["settings"]["dataset"] == bed]


def _updated(rows: Sequence[Row], arm: str) -> float:
    """Rows that passed through all updates of an arm, over its rollouts."""
    runs = select(rows, arm=arm)
    return sum(run["rows_updated"] for run in runs) / sum(run["rollouts"] for run in runs)


def _ratio(rows: Sequence[Row], arm: str) -> Estimate:
    """Rollouts of an arm to the final accuracy of uniform allocation, over those of the latter."""
    return measures.estimate(measures.with_shortest(rows), f"{arm} / uniform, rollouts")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; exit status 2 if there are no rows on record."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.accelerator.plan",
        description="Cost of runs on 8 to 64 accelerators, from stated assumptions and figures on record.",
    )
    parser.add_argument("--record", type=Path, default=Path("docs/evidence"), metavar="DIR",
                        help="folder of the rows (default: %(default)s)")  # fmt: skip
    try:
        for name, table in tables(parser.parse_args(arguments).record).items():
            print(f"{name}:\n\n{table}\n")
    except OSError as error:
        print(f"experiments.accelerator.plan: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
