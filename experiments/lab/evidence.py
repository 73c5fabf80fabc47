"""What the rows of a registration say: claims, tables and the plot by bed, as for other training runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from experiments.claims import accuracy_table, better, by_arm, cheaper
from experiments.contract import Finding, Options, Row, markdown_table, select
from experiments.lab.__main__ import REGISTRATIONS, Lab, layout
from experiments.lab.beds import base_folder
from experiments.lab.registration import Registration, read
from experiments.lab.run import QUICK
from experiments.pool import label, labels
from experiments.training import Claim, Table, Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LabEvidence:
    """Runs that ``python -m experiments.lab`` has made: here they are read, never made.

    Figures and tables are named by the bed and a name of the training experiments: ``skills: uniform, rollouts``.

    Attributes:
        name: of the registration; its rows are those of the experiment ``lab-NAME``.
        claims: maps a bed to its claims.
        more: later registrations of further arms on the same beds, whose rows are in the same file.
    """

    name: str
    claims: Callable[[str], tuple[Claim, ...]]
    more: tuple[str, ...] = ()

    @cached_property
    def plan(self) -> Registration:
        """What is stated, with the arms of the later registrations."""
        first, *later = (read(REGISTRATIONS / f"{name}.md") for name in (self.name, *self.more))
        arms = dict.fromkeys(arm for one in (first, *later) for arm in one.arms)
        return replace(first, arms=tuple(arms))

    def pieces(self, options: Options) -> int:
        """One: reading the rows, or the dry run."""
        return 1

    def measure(self, options: Options, done: Callable[[str], None]) -> list[Row]:
        """Rows on record; with ``quick`` the dry run on one bed.

        Raises:
            FileNotFoundError: there are no rows on record.
        """
        from experiments import catalogue

        name = f"lab-{self.name}"
        if options.quick:
            plan = replace(self.plan, beds=("addition",), seeds=(0, 1), learning_rates=(1e-3,), steps=QUICK.steps)
            bases = {"addition": base_folder("addition", options.runs, quick=True)}
            lab = Lab(options.runs / f"{name}.jsonl", bases, float("inf"), 1, {"quick": True})
            lab.run(plan, QUICK)
            rows = [row for part in ("tuning", "training") for row in lab.rows(part)]
            done("dry run")
            return rows
        rows = catalogue.on_record(name, options.record, f"by python -m experiments.lab {self.name} --rows {{rows}}")
        done("rows on record")
        return rows

    def _on(self, bed: str, rows: Sequence[Row]) -> tuple[Training, list[Row]]:
        """The experiment on one bed, and its runs of whole seeds.

        An arm with fewer than half of the seeds of the first one is not shown yet, so that it hides no seeds of others.
        """
        own = [row for row in select(rows, part="training") if row["settings"]["dataset"] == bed]
        seeds = {arm: {row["seed"] for row in select(own, arm=arm)} for arm in self.plan.arms}
        enough = max(len(seeds[self.plan.arms[0]]) / 2, 1)
        arms = tuple(arm for arm in self.plan.arms if len(seeds[arm]) >= enough)
        whole = set.intersection(*(seeds[arm] for arm in arms)) if arms else set()
        claims = tuple(claim for claim in self.claims(bed) if claim.arms <= set(arms))
        return Training(arms, claims, _layout(arms)), [row for row in own if row["seed"] in whole]

    def _by_bed(self, rows: Sequence[Row]) -> dict[str, tuple[Training, list[Row]]]:
        """Experiment and runs of each bed with at least two whole seeds; on the others the runs are not finished."""
        found = {bed: self._on(bed, rows) for bed in self.plan.beds}
        return {bed: (training, own) for bed, (training, own) in found.items() if len({row["seed"] for row in own}) > 1}

    def findings(self, rows: Sequence[Row]) -> list[Finding]:
        """Claims with their figures and verdicts, bed by bed."""
        return [found for training, own in self._by_bed(rows).values() for found in training.findings(own)]

    def figures(self, rows: Sequence[Row]) -> Callable[[str], str]:
        """Figures by bed and name, and ``BED: seeds``."""
        by_bed = self._by_bed(rows)
        known = {bed: training.figures(own) for bed, (training, own) in by_bed.items()}

        def text(name: str) -> str:
            bed, _, figure = name.partition(": ")
            if bed not in by_bed:
                raise ValueError(f"figure {name!r} must start with a bed, {', '.join(by_bed)}, and a colon")
            if figure == "seeds":
                return str(len({row["seed"] for row in by_bed[bed][1]}))
            return known[bed](figure)

        return text

    def tables(self, rows: Sequence[Row]) -> dict[str, str]:
        """Tables by name and bed, and that of the learning rates."""
        found = {"rates": self._rates(rows)}
        for bed, (training, own) in self._by_bed(rows).items():
            found |= {f"{name} on {bed}": table for name, table in training.tables(own).items()}
        return found

    def _rates(self, rows: Sequence[Row]) -> str:
        """Accuracy over the run of the seed that chose the rates, the chosen rate of each arm in bold."""
        from experiments.measures import mean_accuracy

        plan, lines = self.plan, []
        tuned = select(rows, part="tuning")
        for bed in plan.beds:
            for arm in plan.arms:
                own = [row for row in select(tuned, arm=arm) if row["settings"]["dataset"] == bed]
                found = {row["settings"]["learning_rate"]: 100 * mean_accuracy(row) for row in own}
                if not found:
                    continue  # not run on this bed
                best = plan.chosen_rate(tuned, bed, arm)
                cells = [f"{found[rate]:.1f} %" if rate in found else "–" for rate in plan.learning_rates]
                marked = [
                    f"**{cell}**" if rate == best else cell
                    for rate, cell in zip(plan.learning_rates, cells, strict=True)
                ]
                lines.append((bed, label(arm), *marked))
        return markdown_table(("bed", "policy", *(f"{rate:g}" for rate in plan.learning_rates)), lines)

    def overview(self, rows: Sequence[Row]) -> str:
        """The README's table: accuracy at the end, as a difference to the first arm, and rollouts to that arm's."""
        figure, arms = self.figures(rows), {bed: training.arms for bed, (training, _) in self._by_bed(rows).items()}
        (first, *_), end = SHOWN, "accuracy at the end"

        def cells(bed: str, arm: str) -> tuple[str, str]:
            if arm not in arms[bed]:
                return "–", "–"
            if arm == first:
                return figure(f"{bed}: {arm}, {end}"), "1 ×"
            return figure(f"{bed}: {arm} - {first}, {end}"), figure(f"{bed}: {arm} / {first}, rollouts")

        header = [
            "policy",
            *(column for bed in arms for column in (f"{bed.replace('-', ' ')}: {end}", "rollouts to uniform's")),
        ]
        lines = [[label(arm), *(cell for bed in arms for cell in cells(bed, arm))] for arm in SHOWN]
        return markdown_table(header, lines)

    def plot(self, rows: Sequence[Row]) -> Figure:
        """Held-out accuracy by rollouts, a panel for each bed."""
        from experiments import plots

        parts = self._by_bed(rows)
        return plots.accuracy_by_bed(
            {bed: (own, [arm for arm in SHOWN if arm in training.arms]) for bed, (training, own) in parts.items()}
        )


def _layout(arms: Sequence[str]) -> dict[str, Table]:
    rivals = [arm for arm in arms if arm in RIVALS]
    own = [arm for arm in arms if arm not in RIVALS]
    tables = {name: replace(table, rows=labels(own)) for name, table in layout("uniform").items()}
    if rivals:
        with_ours = labels(arm for arm in ("uniform", *OURS, *rivals) if arm in arms)
        steps = Table(by_arm("steps", "rollouts", "rollouts with a gradient", "still unsolved", "seconds"), with_ours)
        tables |= {"rivals": Table(accuracy_table().columns, with_ours), "steps of rivals": steps}
    return tables


RIVALS = ("oversample", "skip", "sequential", "pilot-commit", "pilot-commit-2n", "c-grpo", "c-grpo-twice")
"""Arms that follow a rule of the field, at equal rollouts."""

OURS = ("recommended-twice", "recommended-posterior", "recommended-wide", "recommended")
"""The recommended setting, and what was recommended before it."""

SHOWN = (
    "uniform",
    "uniform-2n",
    "paper",
    "uniform-mean",
    "uniform-twice",
    "uniform-posterior-wide-twice",
    "recommended-posterior",
    "recommended-twice",
)
"""Arms of the plot and of the README's table."""


def claim_of_half(arm: str, place: str, who: str) -> Claim:
    """An arm needs at most half the rollouts of uniform allocation.

    Args:
        arm: name of the arm.
        place: bed or task that it is claimed of.
        who: the arm in words.
    """
    return cheaper(
        arm, "uniform", f"{place}: {who} needs at most half the rollouts of uniform N for its final accuracy"
    )


def headline_claims(bed: str) -> tuple[Claim, ...]:
    """What the registrations say would be refuted or not."""
    others = {
        "recommended-twice": (
            *("uniform", "uniform-twice", "uniform-posterior-wide-twice", "recommended-posterior"),
            *("recommended-queue", "uniform-half", "uniform-2n", *RIVALS),
        ),
        "recommended-posterior": (
            *("uniform", "uniform-posterior-wide", "uniform-posterior", "uniform-mean"),
            *("recommended-wide", "uniform-2n", *RIVALS),
        ),
        "recommended-wide": ("uniform", "uniform-mean", "uniform-mean-wide", "recommended", "uniform-2n"),
        "recommended": ("uniform-mean", "matched", *RIVALS),
    }
    return (
        claim_of_half("recommended-twice", bed, "the recommended setting"),
        claim_of_half("recommended-posterior", bed, "the same with one update a step"),
        claim_of_half("recommended-wide", bed, "with one update, over the mean of the group, it"),
        claim_of_half("recommended", bed, "that with 64 prompts a step"),
        claim_of_half("matched", bed, "that without shared knowledge"),
        claim_of_half("knapsack", bed, "the paper's value with the Bayes filter and GRPO's advantage"),
        claim_of_half("paper", bed, "the paper's rule"),
        *(_ends_above(bed, arm, other) for arm in OURS for other in others[arm]),
    )


def _ends_above(bed: str, arm: str, other: str) -> Claim:
    return better(arm, other, f"{bed}: {label(arm)} ends above {label(other)}", on_the_way=True)


HEADLINE = LabEvidence("headline", headline_claims, more=("wider", "rivals", "posterior", "twice", "queue", "smaller"))
