"""Plots of training runs: each function takes data and an Axes, draws, and returns the Axes.

The caller chooses figure, backend and style; importing this module does not import matplotlib.
The colours are those of Okabe and Ito, distinguishable under the common forms of colour blindness. Curves that
share an Axes also differ in line style, so that they survive a greyscale print.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from knapsack_rl.groups import DIFFICULTY_CLASSES
from knapsack_rl.runs.curves import Curve, moving_average

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from knapsack_rl.runs.calibration import Calibration
    from knapsack_rl.runs.log import BudgetByEstimate

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW, BLACK = "#E69F00", "#56B4E9", "#F0E442", "#000000"
GREY = "#777777"

# Yellow is left out of the curves: a thin yellow line is invisible on white.
CURVE_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
CURVE_STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CLASS_COLOURS = (BLUE, SKY, YELLOW, ORANGE, VERMILION)

PERCENT = (-2, 102)
"""Limits of an axis of shares, so that a curve at 0 or 100 % is not hidden by the frame."""
LEAST_SPAN = 10.0
"""Fewest points that an axis of accuracies spans, so that a small change does not look large."""


def trend_window(steps: int) -> int:
    """Return an odd smoothing window of about one twentieth of the steps, at least 1."""
    return 2 * (steps // 40) + 1


def effective_ratios(steps: ArrayLike, rollout_level: ArrayLike, prompt_level: ArrayLike, ax: Axes) -> Axes:
    """Draw the shares of rollouts and prompts with a gradient: single steps (faint) and moving averages.

    Args:
        steps: Training steps (T).
        rollout_level: Rollouts in groups with a gradient over all rollouts (T).
        prompt_level: Groups with a gradient over all groups (T).
        ax: Where to draw.
    """
    x = np.asarray(steps)
    series = ((rollout_level, "of the rollouts", BLUE, "-"), (prompt_level, "of the prompts", VERMILION, "--"))
    for values, label, colour, style in series:
        ax.plot(x, 100 * np.asarray(values), color=colour, linewidth=0.8, alpha=0.3)
        trend = moving_average(values, trend_window(x.size))
        ax.plot(x, 100 * trend, color=colour, linestyle=style, linewidth=1.8, label=label)
    ax.set(xlabel="training step", ylabel="with a gradient (%)", ylim=PERCENT)
    _counting(ax.xaxis)
    _legend(ax)
    return _finish(ax, "Share of the work that carries a gradient")


def held_out_accuracy(
    rollouts: ArrayLike,
    accuracy: ArrayLike,
    ax: Axes,
    *,
    greedy: tuple[ArrayLike, ArrayLike] | None = None,
    others: Sequence[tuple[str, ArrayLike, ArrayLike]] = (),
) -> Axes:
    """Draw held-out accuracy against the rollouts generated so far.

    Args:
        rollouts: Rollouts generated before each evaluation.
        accuracy: Mean success of sampled answers, 0 to 1.
        ax: Where to draw.
        greedy: Rollouts and accuracy of greedy answers.
        others: Name, rollouts (E) and accuracy (S, E) of other runs by policy, drawn as mean and range.
    """
    who = "this run, " if others else ""
    looks = cycle(((GREY, "-."), (PURPLE, (0, (1, 1)))))
    for (name, generated, of_seeds), (colour, style) in zip(others, looks, strict=False):
        x, curves = np.asarray(generated), 100 * np.asarray(of_seeds)
        ax.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        ax.plot(x, curves.mean(axis=0), color=colour, linestyle=style, linewidth=1.4, label=name)
    y = 100 * np.asarray(accuracy)
    ax.plot(np.asarray(rollouts), y, color=BLUE, marker="o", markersize=4, label=f"{who}sampled")
    if greedy is not None and np.size(greedy[1]):
        ax.plot(
            np.asarray(greedy[0]),
            100 * np.asarray(greedy[1]),
            color=VERMILION,
            linestyle="--",
            marker="s",
            markersize=3.5,
            label=f"{who}greedy",
        )
    if len(ax.lines) > 1:
        _legend(ax)
    ax.set(xlabel="rollouts generated", ylabel="held-out accuracy (%)")
    _accuracies(ax)
    _counting(ax.xaxis)
    return _finish(ax, "Held-out accuracy")


def budget_histogram(counts: ArrayLike, ax: Axes) -> Axes:
    """Draw a histogram of rollouts per visit with a logarithmic count axis, so that the tail is visible.

    Args:
        counts: Rollouts of each visit.
        ax: Where to draw.
    """
    values = np.asarray(counts, dtype=np.int64)
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // 64))
    edges = np.arange(low, high + width + 1, width) - 0.5
    heights, _ = np.histogram(values, edges)
    ax.bar((edges[:-1] + edges[1:]) / 2, heights, width=width, color=BLUE, linewidth=0)
    average = float(values.mean())
    ax.axvline(average, color=VERMILION, linestyle="--", linewidth=1.4, label=f"mean {average:.1f}")
    ax.set_yscale("log")
    ax.set(xlabel="rollouts given to a prompt in one step", ylabel="visits (log scale)", ylim=(0.7, None))
    if low == high:
        ax.set_xlim(low - 5, high + 5)
    _counting(ax.xaxis)
    _counting(ax.yaxis, largest=int(heights.max()))
    _legend(ax)
    return _finish(ax, "How the budget is spread over visits")


def budget_by_estimate(data: BudgetByEstimate, ax: Axes) -> Axes:
    """Draw the mean budget against the estimated success rate, with bars from the 10 % to the 90 % quantile.

    Args:
        data: `RunLog.budget_by_estimate`; the group of unseen prompts is drawn left of zero.
        ax: Where to draw.
    """
    seen = np.isfinite(data.estimate)
    x = np.where(seen, data.estimate, -0.12)
    for chosen, colour, marker in ((seen, BLUE, "o"), (~seen, GREY, "D")):
        ax.vlines(x[chosen], data.low[chosen], data.high[chosen], color=colour, alpha=0.45, linewidth=5)
        ax.plot(x[chosen], data.mean[chosen], color=colour, marker=marker, markersize=5, linewidth=1.2)
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    labels = [f"{tick:g}" for tick in ticks]
    if not seen.all():
        ticks, labels = [-0.12, *ticks], ["unseen", *labels]
    ax.set_xticks(ticks, labels)
    ax.set(xlabel="estimated success rate before the step", ylabel="rollouts per prompt")
    ax.set_ylim(bottom=0)
    return _finish(ax, "Budget by estimated success rate")


def difficulty_over_time(steps: ArrayLike, shares: ArrayLike, ax: Axes) -> Axes:
    """Draw moving averages of the shares of the difficulty classes, stacked.

    Args:
        steps: Training steps (T).
        shares: Shares in the order of `DIFFICULTY_CLASSES`, shape (T, 5).
        ax: Where to draw.
    """
    x, trend = np.asarray(steps), moving_average(shares, trend_window(np.size(steps)))
    # The hardest class is at the bottom, so that easier means higher; the legend has the same order.
    ax.stackplot(
        x,
        100 * trend.T[::-1],
        labels=DIFFICULTY_CLASSES[::-1],
        colors=CLASS_COLOURS[::-1],
        linewidth=0.5,
        edgecolor="white",
    )
    ax.set(xlabel="training step", ylabel="prompts of the step (%)", ylim=(0, 100))
    _counting(ax.xaxis)
    if x.size > 1:
        ax.set_xlim(x[0], x[-1])
    ax.legend(
        reverse=True, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, handlelength=1, fontsize="small"
    )
    return _finish(ax, "Difficulty of the prompts", grid=False)


def transitions(matrix: ArrayLike, ax: Axes) -> Axes:
    """Draw prompts by difficulty class of first and last visit; numbers are prompts, shades are shares of a row.

    Args:
        matrix: Counts in the order of `DIFFICULTY_CLASSES`, rows first visit, columns last visit, shape (5, 5).
        ax: Where to draw.
    """
    counts = np.asarray(matrix)
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    ax.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        ax.text(column + 0.5, row + 0.5, f"{count:,}", ha="center", va="center", color=colour)
    names = [name.replace(" ", "\n") for name in DIFFICULTY_CLASSES]
    centres = np.arange(len(names)) + 0.5
    ax.set_xticks(centres, names, fontsize="small")
    ax.set_yticks(centres, names, fontsize="small")
    ax.invert_yaxis()
    ax.set(xlabel="last visit", ylabel="first visit")
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    return _finish(ax, "Where the prompts moved (number of prompts)", grid=False)


def calibration(data: Calibration, ax: Axes) -> Axes:
    """Draw the realised against the predicted share of groups with a gradient, with 95 % Wilson intervals.

    Args:
        data: The result of `RunLog.calibration`.
        ax: Where to draw.
    """
    share, size, z = data.realised, data.visits, 1.96
    centre = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z * np.sqrt(share * (1 - share) / size + z**2 / (4 * size**2)) / (1 + z**2 / size)
    _diagonal(ax, label="perfect")
    ax.vlines(100 * data.predicted, 100 * (centre - half), 100 * (centre + half), color=BLUE, linewidth=1.4)
    ax.plot(100 * data.predicted, 100 * share, color=BLUE, marker="o", markersize=4.5, linewidth=1.2, label="this run")
    return _finish_calibration(ax)


def reliability(curves: Mapping[str, Calibration], ax: Axes) -> Axes:
    """Draw the realised against the predicted share of groups with a gradient, one curve per policy.

    Args:
        curves: Binned predictions by label of the policy.
        ax: Where to draw.
    """
    _diagonal(ax)
    for index, (label, data) in enumerate(curves.items()):
        look = _look(index) | {"marker": _marker(index), "markersize": 4, "linewidth": 1.4}
        ax.plot(100 * data.predicted, 100 * data.realised, label=_label(label), **look)
    return _finish_calibration(ax)


def value_by_budget(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], ax: Axes, *, target: tuple[float, float]
) -> Axes:
    """Draw value against rollouts spent, one curve per policy.

    Args:
        curves: Rollouts, and value in percent of the target's, by label of the policy.
        ax: Where to draw.
        target: Rollouts and value of the recorded run.
    """
    for index, (label, (rollouts, values)) in enumerate(curves.items()):
        ax.plot(rollouts, values, marker=_marker(index), markersize=4, label=_label(label), **_look(index))
    ax.axhline(target[1], color=GREY, linestyle=":", linewidth=1.2)
    ax.plot([target[0]], [target[1]], color=BLACK, marker="*", markersize=11, linestyle="none", label="as it was")
    ax.set(xlabel="rollouts", ylabel="value, the run = 100")
    ax.set_xlim(left=0)
    _counting(ax.xaxis)
    _legend(ax)
    return _finish(ax, "Value of the rollouts")


def ratio_pairs(pairs: Mapping[str, tuple[float, float]], ax: Axes) -> Axes:
    """Draw the shares of rollouts and prompts with a gradient, one row per policy.

    Args:
        pairs: Both shares (0 to 1) by label of the policy.
        ax: Where to draw.
    """
    rows = np.arange(len(pairs))
    shares = 100 * np.array(list(pairs.values()), dtype=np.float64).reshape(len(pairs), 2)
    ax.hlines(rows, shares.min(axis=1), shares.max(axis=1), color=GREY, linewidth=1)
    for column, (label, colour, marker) in enumerate((("rollouts", BLUE, "o"), ("prompts", VERMILION, "s"))):
        size = 9 - 4 * column  # where both shares are equal, the square is on top of the circle
        ax.plot(shares[:, column], rows, marker, color=colour, markersize=size, label=label)
    ax.set_yticks(rows, [textwrap.fill(_label(label), 24) for label in pairs])
    ax.set_ylim(len(pairs) - 0.5, -0.5)
    ax.set(xlabel="with a gradient (%)", xlim=(0, 100))
    _legend(ax)
    return _finish(ax, "Share of the work that carries a gradient")


def rate_histogram(rates: ArrayLike, ax: Axes) -> Axes:
    """Draw a histogram of the success rates of visits.

    Args:
        rates: Success rates, 0 to 1.
        ax: Where to draw.
    """
    heights, edges = np.histogram(np.asarray(rates), bins=20, range=(0, 1))
    ax.bar((edges[:-1] + edges[1:]) / 2, heights, width=0.046, color=BLUE, linewidth=0)
    ax.set(xlabel="success rate", ylabel="groups", xlim=(0, 1))
    _counting(ax.yaxis)
    return _finish(ax, "Success rates of the groups")


def accuracy_by_policy(curves: Mapping[str, Curve], ax: Axes) -> Axes:
    """Draw mean held-out accuracy against rollouts, one curve per policy, with a band from lowest to highest seed.

    Args:
        curves: Rollouts and accuracy (0 to 1) by label of the policy.
        ax: Where to draw.
    """
    _bands(curves, ax)
    ax.set(xlabel="rollouts generated", ylabel="held-out accuracy (%)")
    _accuracies(ax)
    _counting(ax.xaxis)
    return _finish(ax, "Held-out accuracy")


def ratios_by_policy(curves: Mapping[str, Curve], ax: Axes, *, level: str) -> Axes:
    """Draw the effective gradient ratio over the steps, one curve per policy, with a band over the seeds.

    Args:
        curves: Steps and ratio (0 to 1) by label of the policy.
        ax: Where to draw.
        level: "rollouts" or "prompts", the units counted.
    """
    _bands(curves, ax)
    ax.set(xlabel="training step", ylabel=f"{level} with a gradient (%)", ylim=PERCENT)
    _counting(ax.xaxis)
    return _finish(ax, f"Share of the {level} that carry a gradient")


def final_values(values: Mapping[str, Sequence[float]], ax: Axes, *, quantity: str) -> Axes:
    """Draw one dot per seed and a bar at the mean, one row per policy.

    Args:
        values: Shares (0 to 1) of each seed by label of the policy.
        ax: Where to draw.
        quantity: Name of the measured quantity, the title of the plot.
    """
    for row, shares in enumerate(values.values()):
        colour = _look(row)["color"]
        points = 100 * np.asarray(shares, dtype=np.float64)
        ax.plot(points, np.full(points.size, row), "o", color=colour, alpha=0.7, markersize=6)
        if points.size:
            ax.plot([points.mean()] * 2, [row - 0.28, row + 0.28], color=colour, linewidth=2.2)
    ax.set_yticks(range(len(values)), [textwrap.fill(_label(label), 24) for label in values])
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.set_xlabel("%, one dot per seed")
    ax.margins(x=0.1)
    return _finish(ax, quantity[:1].upper() + quantity[1:])


def _look(index: int) -> dict[str, Any]:
    """Return colour and line style of a curve by its place."""
    return {
        "color": CURVE_COLOURS[index % len(CURVE_COLOURS)],
        "linestyle": CURVE_STYLES[index % len(CURVE_STYLES)],
    }


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _diagonal(ax: Axes, label: str | None = None) -> None:
    ax.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label=label)


def _finish_calibration(ax: Axes) -> Axes:
    ax.set(xlabel="predicted chance of a gradient (%)", ylabel="groups with a gradient (%)")
    ax.set(xlim=(0, 100), ylim=(0, 100))
    _legend(ax)
    return _finish(ax, "Predicted against realised gradients")


def _bands(curves: Mapping[str, Curve], ax: Axes) -> None:
    for index, (label, curve) in enumerate(curves.items()):
        if curve.x.size < 2:
            continue  # no line to draw; the policy keeps its colour in the other plots
        look = _look(index)
        ax.fill_between(curve.x, 100 * curve.low, 100 * curve.high, color=look["color"], alpha=0.15, linewidth=0)
        ax.plot(curve.x, 100 * curve.mean, linewidth=1.8, label=_label(label), **look)
    _legend(ax)


def _label(text: str) -> str:
    """Return untrusted text as a label; all such text reaches matplotlib through this function.

    Unprintable characters (control characters, lone surrogates, marks that reverse the writing direction) are replaced,
    and a space is put before a leading underscore, with which matplotlib would hide the curve from the legend. A text
    that is too long loses its middle, because labels often differ at the end.
    """
    shown = "".join(character if character.isprintable() else "\ufffd" for character in text)
    shown = f" {shown}" if shown.startswith("_") else shown
    return shown if len(shown) <= 52 else f"{shown[:24]}…{shown[-27:]}"


def _legend(ax: Axes) -> None:
    ax.legend(frameon=False, fontsize="small", handlelength=2.4)


def _accuracies(ax: Axes) -> None:
    """Set the vertical axis to at least ``LEAST_SPAN`` points inside the range of percentages."""
    low, high = ax.get_ylim()
    missing = max(LEAST_SPAN - (high - low), 0.0) / 2
    low, high = low - missing, high + missing
    # The part cut off at 0 or 100 % is added at the other end.
    low, high = low - max(high - PERCENT[1], 0.0), high + max(PERCENT[0] - low, 0.0)
    ax.set_ylim(max(low, PERCENT[0]), min(high, PERCENT[1]))


def _counting(axis: Axis, *, largest: int | None = None) -> None:
    """Label an axis with whole numbers: 12,000 rather than 12000 or 10^4.

    Args:
        axis: The axis.
        largest: Largest value on a logarithmic axis, None for a linear axis.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if largest is None:
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    else:
        # Powers of ten alone would leave a short axis with a single label.
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest < 200 else (1,)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _finish(ax: Axes, title: str, *, grid: bool = True) -> Axes:
    ax.set_title(title, loc="left", fontweight="bold", fontsize="medium")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if grid:
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return ax
