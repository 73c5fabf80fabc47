"""What the rows of ``experiments.optimality`` say: table lines, a paragraph, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.contract import Finding, Row
from experiments.intervals import mean_interval
from experiments.optimality_cases import (
    DECADES,
    FALLBACK_ON_TRUTH,
    HIGHS,
    MIXTURES,
    OURS,
    PAPER,
    PAPER_RULE,
    RULES,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _some(rows: Sequence[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _optimal(rows: Sequence[Row]) -> tuple[int, int, float]:
    """(optimal instances, all instances, largest gap)."""
    return (
        sum(row["optimal"] for row in rows),
        sum(row["instances"] for row in rows),
        max((row["largest_gap"] for row in rows), default=0.0),
    )


def _share(rows: Sequence[Row]) -> str:
    optimal, every, largest = _optimal(rows)
    return f"{optimal:,} of {every:,} optimal, largest gap {_gap(largest)}"


def _gap(gap: float) -> str:
    return "0" if gap == 0.0 else f"{gap:.0e}"


def _seeds(rows: Sequence[Row]) -> int:
    return len({row["seed"] for row in rows})


def _milliseconds(rows: Sequence[Row], prompts: int, method: str, *, costs: bool = False) -> float:
    found = _some(rows, part="time", prompts=prompts, method=method, costs=costs)
    return float(np.median([row["milliseconds"] for row in found])) if found else float("nan")


def _lost(rows: Sequence[Row], mixture: str, rule: str) -> tuple[float, float, float]:
    return mean_interval([100 * row["lost"] for row in _some(rows, part="rules", mixture=mixture, rule=rule)])


def _largest_batch(rows: Sequence[Row]) -> int:
    """Prompts of the paper's batch, 256, or of the largest one timed with both methods."""
    sizes = [row["prompts"] for row in _some(rows, part="time", method=PAPER)]
    return 256 if 256 in sizes else max(sizes)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Lines of the table."""
    ours = _some(rows, part="gaps", method=OURS)
    plain, priced = _some(ours, costs=False), _some(ours, costs=True)
    false = sum(row["false_certificates"] for row in ours)
    seeds = _seeds(rows)
    found = []
    for claim, which in (
        ("The solver's allocations are optimal (a rollout costs one)", plain),
        ("The solver's allocations are optimal where rollouts have costs (not in the paper)", priced),
    ):
        optimal, every, largest = _optimal(which)
        small, medium = (_share(_some(which, size=size)) for size in ("small", "medium"))
        exact = optimal == every and false == 0
        near = largest < 1e-3 and false == 0
        found.append(
            Finding(
                claim,
                "exact by dynamic programming" if which is plain else "-",
                f"against enumeration: {small}; against HiGHS: {medium}; false certificates: {false}; {seeds} seeds",
                "holds" if exact else "holds in part" if near else "does not hold",
            )
        )
    prompts = _largest_batch(rows)
    own, paper = _milliseconds(rows, prompts, OURS), _milliseconds(rows, prompts, PAPER)
    found.append(
        Finding(
            f"Solving is negligible ({prompts} prompts, budget {8 * prompts}, N_up 128)",
            "1 to 2 s",
            f"{own:.2g} ms; the paper's dynamic program on the same machine {paper:.3g} ms; median, {seeds} seeds",
            "holds" if own < 1000 else "does not hold",
        )
    )
    paper_lost = [_lost(rows, mixture, PAPER_RULE)[0] for mixture in MIXTURES]
    bayes_lost = [_lost(rows, mixture, "empirical Bayes")[0] for mixture in MIXTURES]
    better = sum(b < p for b, p in zip(bayes_lost, paper_lost, strict=True))
    found.append(
        Finding(
            "A mean of 16 rewards with the fallback rule is enough: little value is lost against known rates",
            "-",
            f"{min(paper_lost):.1f} to {max(paper_lost):.1f} % lost over {len(MIXTURES)} mixtures of rates that stand "
            f"still (empirical Bayes: {min(bayes_lost):.1f} to {max(bayes_lost):.1f} %, less in {better}); "
            f"{seeds} seeds",
            "holds" if max(paper_lost) < 1 else "holds in part" if max(paper_lost) < 10 else "does not hold",
        )
    )
    return found


def paragraph(rows: Sequence[Row]) -> str:
    """Method, result, and what went against us."""
    gaps, times = _some(rows, part="gaps"), _some(rows, part="time")
    lines = [
        "Random knapsacks: five kinds of values (four value functions and tables that rise and fall), success rates of "
        "four mixtures with ties and with rates of 0 and 1, N_low from 0 to 2. Small ones (up to 4 prompts, N_up up to "
        "7) are compared with enumeration of every feasible allocation, medium ones (8 to 24 prompts, N_up 8 to 32) "
        "with HiGHS through `scipy.optimize.milp`, one binary variable per prompt and count, and a relative gap of 0. "
        f"A gap is relative to the best; up to 1e{DECADES[0]} it counts as rounding. "
        f"{_seeds(rows)} seeds.",
        "",
        "| size | cost per rollout | method | optimal | largest gap |",
        "| --- | --- | --- | --- | --- |",
    ]
    for size in ("small", "medium"):
        for costs in (False, True):
            for method in (OURS, PAPER, HIGHS):
                which = _some(gaps, size=size, costs=costs, method=method)
                if which:
                    optimal, every, largest = _optimal(which)
                    kind = "20 to 2000" if costs else "1"
                    lines.append(f"| {size} | {kind} | {method} | {optimal:,} of {every:,} | {_gap(largest)} |")
    certified = sum(row["certified"] for row in _some(gaps, method=OURS))
    every = sum(row["instances"] for row in _some(gaps, method=OURS))
    false = sum(row["false_certificates"] for row in _some(gaps, method=OURS))
    largest = max((row["certified_gap"] for row in _some(times, method=OURS, costs=True)), default=0.0)
    lines += [
        "",
        f"The certificate proved {certified:,} of the {every:,} allocations optimal by itself and claimed more than is "
        f"true {false} times; with costs, on batches as in training, its largest gap was {_gap(largest)} of the bound.",
        "",
        "Median milliseconds for batches as in training (budget 8 per prompt, N_low 2, N_up 128):",
        "",
        f"| prompts | {OURS} | {PAPER} | {HIGHS} | {OURS}, with costs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for prompts in sorted({row["prompts"] for row in times}):
        cells = [_milliseconds(times, prompts, method) for method in (OURS, PAPER, HIGHS)]
        cells.append(_milliseconds(times, prompts, OURS, costs=True))
        lines.append(f"| {prompts} | {' | '.join('–' if np.isnan(x) else f'{x:.3g}' for x in cells)} |")
    lines += [
        "",
        "Value lost against the optimum for the true rates, in per cent with 95 % intervals over seeds. Every prompt "
        "was visited once with 16 rollouts, and rates stand still, so that the loss is the rule's alone:",
        "",
        f"| rates | {' | '.join(RULES)} |",
        "| --- |" + " --- |" * len(RULES),
    ]
    for mixture in MIXTURES:
        cells_ = ["{:.1f} ({:.1f} to {:.1f})".format(*_lost(rows, mixture, rule)) for rule in RULES]
        lines.append(f"| {mixture} | {' | '.join(cells_)} |")
    lines += ["", _against_us(rows)]
    return "\n".join(lines)


def _against_us(rows: Sequence[Row]) -> str:
    """What the rows say that does not speak for this project."""
    said = []
    missed = [row for row in _some(rows, part="gaps", method=OURS) if row["optimal"] < row["instances"]]
    if missed:
        optimal, every, largest = _optimal(missed)
        kinds = sorted({f"{row['size']}, {row['value']}{', with costs' * row['costs']}" for row in missed})
        said.append(f"our solver missed {every - optimal} optima, by {_gap(largest)} at most ({'; '.join(kinds)})")
    paper = _some(rows, part="gaps", method=PAPER)
    if paper and _optimal(paper)[0] == _optimal(paper)[1]:
        said.append("the paper's dynamic program is optimal too: the gain of ours is time, not value")
    fallback = [_lost(rows, mixture, FALLBACK_ON_TRUTH)[0] for mixture in MIXTURES]
    said.append(f"told the true rates, the paper's fallback rule itself loses {max(fallback):.1f} % at most")
    better = [m for m in MIXTURES if _lost(rows, m, PAPER_RULE)[0] < _lost(rows, m, "empirical Bayes")[0]]
    if better:
        said.append(f"the paper's rule loses less than empirical Bayes where rates are {', '.join(better)}")
    unhelpful = [m for m in MIXTURES if _lost(rows, m, "window without fallback")[0] < _lost(rows, m, PAPER_RULE)[0]]
    if unhelpful:
        said.append(f"the fallback costs value where rates are {', '.join(unhelpful)}")
    return "Against us, or against the paper: " + "; ".join(said) + "."


def figure(rows: Sequence[Row]) -> Figure:
    """Gaps, time, and value lost by rules.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(15, 4.2), layout="constrained")
    gaps, times, lost = page.subplots(1, 3)
    _draw_gaps(rows, gaps)
    _draw_times(rows, times)
    _draw_lost(rows, lost)
    return page


def _style(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontweight="bold", fontsize="medium")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize="small")


def _draw_gaps(rows: Sequence[Row], ax: Axes) -> None:
    from knapsack_rl.report.plots import BLUE, GREEN, VERMILION

    width = 0.27
    for k, (method, colour) in enumerate(((OURS, BLUE), (PAPER, VERMILION), (HIGHS, GREEN))):
        which = _some(rows, part="gaps", method=method)
        counts = np.sum([row["histogram"] for row in which], axis=0)
        ax.bar(np.array(DECADES) + width * (k - 1), counts, width, color=colour, label=method, log=True)
    labels = ["exact", *(f"$10^{{{d}}}$" for d in DECADES[1:])]
    ax.set_xticks(DECADES[::2], labels[::2])
    ax.set(xlabel="relative gap to the best, up to", ylabel="instances (log scale)", ylim=(0.7, None))
    _style(ax, "Gaps to the optimum")


def _draw_times(rows: Sequence[Row], ax: Axes) -> None:
    from knapsack_rl.report.plots import BLUE, GREEN, ORANGE, VERMILION

    series = (
        (OURS, False, OURS, BLUE, "o-"),
        (OURS, True, f"{OURS}, with costs", ORANGE, "D-."),
        (PAPER, False, PAPER, VERMILION, "s--"),
        (HIGHS, False, HIGHS, GREEN, "^:"),
    )
    for method, costs, label, colour, line in series:
        which = _some(rows, part="time", method=method, costs=costs)
        sizes = sorted({row["prompts"] for row in which})
        if sizes:
            ax.plot(
                sizes, [_milliseconds(which, m, method, costs=costs) for m in sizes], line, color=colour, label=label
            )
    ax.set(xscale="log", yscale="log", xlabel="prompts in the batch", ylabel="milliseconds", ylim=(None, 1e6))
    _style(ax, "Time to solve")


def _draw_lost(rows: Sequence[Row], ax: Axes) -> None:
    from knapsack_rl.report.plots import CURVE_COLOURS

    height = 0.8 / len(RULES)
    for k, rule in enumerate(RULES):
        found = np.array([_lost(rows, mixture, rule) for mixture in MIXTURES])
        at = np.arange(len(MIXTURES)) + height * (k - (len(RULES) - 1) / 2)
        error = np.abs(found[:, 1:] - found[:, :1]).T
        ax.barh(at, found[:, 0], height, xerr=error, color=CURVE_COLOURS[k], label=rule, error_kw={"linewidth": 0.8})
    ax.set_yticks(range(len(MIXTURES)), list(MIXTURES))
    ax.invert_yaxis()
    ax.set(xlabel="value lost against known rates (%)")
    _style(ax, "What a rule loses")
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
