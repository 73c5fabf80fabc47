"""What the rows of the accelerator say: claims, tables and the plot, as for other training runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from experiments.accelerator.__main__ import ARMS, QUICK_PLAN, Measurement, chosen_rate
from experiments.accelerator.train import PARTS
from experiments.claims import accuracy_table, better, by_arm, dearer, more_gradients
from experiments.contract import Finding, Options, Row, markdown_table, select
from experiments.measures import ESTIMATE_CLASSES
from experiments.pool import label
from experiments.statistics import at_least
from experiments.training import Claim, Table, Training
from knapsack_rl.report.comparison import accuracy_at_end

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "accelerator"


@dataclass(frozen=True)
class Accelerator(Training):
    """Runs that ``python -m experiments.accelerator`` has measured: here they are read, never made."""

    def pieces(self, options: Options) -> int:
        """One: reading the rows, or the dry run."""
        return 1

    def measure(self, options: Options, done: Callable[[str], None]) -> list[Row]:
        """Rows on record; with ``quick`` the dry run on the CPU.

        Raises:
            FileNotFoundError: there are no rows on record.
        """
        if options.quick:
            folder = options.runs / "quick"
            measurement = Measurement(folder / f"{NAME}.jsonl", None, "cpu", float("inf"), workers=1)
            measurement.run(QUICK_PLAN)
            rows = [row for part in ("throughput", "tuning", "training") for row in measurement.rows(part)]
            done("dry run")
            return rows
        from experiments import catalogue

        made_by = f"on a machine with an accelerator: python -m experiments.{NAME} --model FOLDER --rows {{rows}}"
        rows = catalogue.on_record(NAME, options.record, made_by)
        done("rows on record")
        return rows

    def findings(self, rows: Sequence[Row]) -> list[Finding]:
        """Claims with their figures and verdicts."""
        return super().findings(select(rows, part="training"))

    def figures(self, rows: Sequence[Row]) -> Callable[[str], str]:
        """Figures by the grammar of ``experiments.measures``, and the machine and the learning rate."""
        of_runs, known = super().figures(select(rows, part="training")), _facts(rows)
        return lambda name: known[name] if name in known else of_runs(name)

    def tables(self, rows: Sequence[Row]) -> dict[str, str]:
        """Tables by name: of the runs, of the learning rates tried, and of the parts of a step."""
        of_runs = super().tables(select(rows, part="training"))
        return of_runs | {"tuning": _tuning(rows), "throughput": _throughput(rows), "steps": _steps(rows)}

    def plot(self, rows: Sequence[Row]) -> Figure:
        """Accuracy, and rollouts with a gradient."""
        from experiments import plots

        return plots.training(select(rows, part="training"), self.arms, self.panels)


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    machines = [row["machine"] for row in rows]
    names = {key: ", ".join(sorted({machine[key] for machine in machines})) for key in machines[0]}
    tuned = select(rows, part="tuning")
    return names | {"learning rate": f"{chosen_rate(tuned):g}" if tuned else "–", "cut seed": _cut(rows)}


def _cut(rows: Sequence[Row]) -> str:
    """Knapsack minus uniform of a seed that was cut short, over the last three evaluations that both runs made."""
    curves = {row["arm"]: row["evaluations"] for row in select(rows, part="cut")}
    if len(curves) < 2:
        return "–"
    made = min(len(curve["accuracy"]) for curve in curves.values())
    ends = {arm: accuracy_at_end(curve["accuracy"][:made]) for arm, curve in curves.items()}
    return f"{100 * (ends['knapsack'] - ends['uniform']):+.1f}".replace("-", "−")


def _tuning(rows: Sequence[Row]) -> str:
    lines = []
    for row in sorted(select(rows, part="tuning"), key=lambda row: row["settings"]["learning_rate"]):
        accuracy = row["evaluations"]["accuracy"]
        middle = accuracy[len(accuracy) // 2]
        rate = f"{row['settings']['learning_rate']:g}"
        lines.append((rate, *(f"{100 * value:.1f} %" for value in (accuracy[0], middle, accuracy[-1]))))
    return markdown_table(("learning rate", "accuracy before", "half way", "at the end"), lines)


def _throughput(rows: Sequence[Row]) -> str:
    lines = []
    for row in select(rows, part="throughput"):
        settings, total = row["settings"], row["seconds_per_step"]
        lines.append(
            (
                settings["precision"],
                *("yes" if settings[saving] else "no" for saving in ("share_prefix", "skip_rows")),
                f"{1000 * total:.0f} ms",
                f"{row['rollouts_per_second']:,.0f}",
                f"{row['tokens_per_second']:,.0f}",
                *(f"{100 * row['seconds'][part] / total:.1f} %" for part in PARTS),
                f"{100 * row['rows_updated']:.0f} %",
                "–" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.1f} GB",
            )
        )
    header = (
        "format",
        "prefix shared",
        "rows skipped",
        "a step",
        "rollouts/s",
        "tokens/s",
        *PARTS,
        "rows in it",
        "memory",
    )
    return markdown_table(header, lines)


def _steps(rows: Sequence[Row]) -> str:
    """Seconds of a step and share of rows in the update, over all runs of an arm."""
    lines = []
    for arm in ARMS:
        runs = select(rows, part="training", arm=arm)
        steps, rollouts = (sum(run[key] for run in runs) for key in ("steps", "rollouts"))
        parts = {part: sum(run["seconds"][part] for run in runs) / steps for part in PARTS}
        updated = sum(run["rows_updated"] for run in runs) / rollouts
        milliseconds = [f"{1000 * seconds:.1f}" for seconds in (sum(parts.values()), *parts.values())]
        lines.append((label(arm), *milliseconds, f"{100 * updated:.1f} %"))
    return markdown_table(("policy", "a step, ms", *PARTS, "rows in the update"), lines)


ACCELERATOR = Accelerator(
    arms=ARMS,
    claims=(
        better("knapsack", "uniform",
               "SmolLM2 on an accelerator: at equal rollouts the Bayes filter ends above uniform N",
               "+2 to +4 points on average", on_the_way=True),
        better("knapsack", "paper", "SmolLM2 on an accelerator: the Bayes filter ends above the paper's rule",
               on_the_way=True),
        better("paper", "uniform", "SmolLM2 on an accelerator: the paper's rule ends above uniform N",
               "+2 to +4 points on average", on_the_way=True),
        dearer("uniform-2n", "knapsack",
               "SmolLM2 on an accelerator: for the final accuracy of the Bayes filter, uniform 2N generates about "
               "twice the rollouts", 2.0, "about 2 ×"),
        Claim(
            "SmolLM2 on an accelerator: for the final accuracy of the Bayes filter, uniform N generates more rollouts",
            "{{uniform / knapsack, rollouts}}; in seconds {{uniform / knapsack, seconds}}",
            partial(at_least, threshold=1.0, neutral=1.0),
        ),
        *more_gradients("knapsack", "SmolLM2 on an accelerator, Bayes filter"),
        *more_gradients("paper", "SmolLM2 on an accelerator, paper"),
    ),
    layout={
        "accuracy": accuracy_table(**{"seconds to it": "{row} / uniform, seconds"}),
        "run": Table(
            by_arm("accuracy before", "training success at the end", "no success at the last visit",
                   "rollouts with a gradient", "prompts with a gradient", "largest allocation",
                   "all correct at the end", "all wrong at the end")
        ),
        "rates": Table(
            {f"rollouts, {label(arm)}": f"{arm}, rollouts at estimate {{row}}" for arm in ("paper", "knapsack")},
            {name: name for name in ESTIMATE_CLASSES},
            "estimated success rate",
        ),
    },
    panels=("accuracy", "rollout_ratio"),
)  # fmt: skip
