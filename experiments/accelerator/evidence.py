"""What the rows of the accelerator say: claims, tables and the plot, as for other training runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from experiments.accelerator.__main__ import LATER, PLANS, QUICK_PLAN, Measurement, chosen_rate
from experiments.accelerator.tasks import MIXED
from experiments.accelerator.train import PARTS
from experiments.claims import accuracy_table, better, by_arm, dearer, more_gradients
from experiments.contract import Finding, Options, Row, markdown_table, select
from experiments.lab.evidence import claim_of_half
from experiments.measures import ESTIMATE_CLASSES
from experiments.pool import label
from experiments.statistics import at_least
from experiments.training import Claim, Table, Training
from knapsack_rl.report.comparison import accuracy_at_end

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "accelerator"
ARMS = ("uniform", "uniform-2n", "paper", "knapsack")
"""Arms of the first runs, in the order of tables."""
SECONDS = {"seconds to it": "{row} / uniform, seconds"}
NOTHING = "Nothing measured yet: no accelerator was at hand."


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
        found = super().findings(select(rows, part="training"))
        return found + [finding for later, own in _later(rows) for finding in later.findings(own)]

    def figures(self, rows: Sequence[Row]) -> Callable[[str], str]:
        """Figures by the grammar of ``experiments.measures``, and the machine and the learning rate."""
        of_runs, known = super().figures(select(rows, part="training")), _facts(rows)
        return lambda name: known[name] if name in known else of_runs(name)

    def tables(self, rows: Sequence[Row]) -> dict[str, str]:
        """Tables by name: of the runs, the learning rates tried, the parts of a step, and the later tasks."""
        of_runs = super().tables(select(rows, part="training"))
        own = {"tuning": _tuning(rows), "throughput": _throughput(rows), "steps": _steps(rows)}
        later = [f"On {one.task}:\n\n{one.tables(runs)['accuracy']}" for one, runs in _later(rows)]
        return of_runs | own | {"probes": _probes(rows), "later": "\n\n".join(later) or NOTHING}

    def plot(self, rows: Sequence[Row]) -> Figure:
        """Accuracy, and rollouts with a gradient."""
        from experiments import plots

        return plots.training(select(rows, part="training"), self.arms, self.panels)


def _later(rows: Sequence[Row]) -> list[tuple[Training, list[Row]]]:
    """Tasks of the later registration with at least two whole seeds, and their runs."""
    found = []
    for task, plan in PLANS.items():
        own = [row for row in select(rows, part=f"{LATER}training") if _task_of(row) == task]
        whole = set.intersection(*({row["seed"] for row in select(own, arm=arm)} for arm in plan.arms))
        if len(whole) > 1:
            layout = {"accuracy": accuracy_table(**SECONDS)}
            later = Training(tuple(plan.arms), _later_claims(task, plan.recommended), layout, task=task)
            found.append((later, [row for row in own if row["seed"] in whole]))
    return found


def _task_of(row: Row) -> str:
    dataset = row["settings"]["dataset"]
    return "reasoning-gym" if dataset.startswith(MIXED) else dataset.removesuffix("-few-shot")


def _later_claims(task: str, recommended: str) -> tuple[Claim, ...]:
    """Claims of the later registration.

    Args:
        task: of ``PLANS``.
        recommended: arm with the recommended setting.
    """
    where = f"SmolLM2 on {task}"
    return (
        better(recommended, "uniform", f"{where}: the recommended setting ends above uniform N", on_the_way=True),
        better(recommended, "uniform-2n", f"{where}: the recommended setting ends above uniform 2N"),
        better(recommended, "paper", f"{where}: the recommended setting ends above the paper's rule"),
        claim_of_half(recommended, where, "the recommended setting"),
    )


def _probes(rows: Sequence[Row]) -> str:
    """Success rates of the base model by task."""
    lines = [
        (f"`{row['settings']['dataset']}`", f"{100 * row['rate']:.1f} %", ", ".join(map(str, row["prompts"])))
        for row in select(rows, part="probe")
    ]
    return markdown_table(("task", "success rate", "prompts with 0, 1, ... successes"), lines) if lines else NOTHING


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    machines = [row["machine"] for row in rows if row["part"] in ("training", "cut")]
    names = {key: ", ".join(sorted({machine[key] for machine in machines})) for key in machines[0]}
    tuned = select(rows, part="tuning")
    shares = [f"{1000 * row['seconds']['allocation']:.0f}" for row in select(rows, part="throughput")]
    times = f"{min(shares, key=int)} to {max(shares, key=int)} ms" if shares else "–"
    return names | {
        "allocation time": times,
        "learning rate": f"{chosen_rate(tuned):g}" if tuned else "–",
        "cut seed": _cut(rows),
    }


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
        "accuracy": accuracy_table(**SECONDS),
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
