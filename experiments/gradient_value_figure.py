"""The plot of ``experiments.gradient_value``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.contract import Row
from experiments.gradient_fit import GROUP_SIZES, Measured, fit
from experiments.gradient_value_text import (
    CLASSES,
    RIVALS,
    TARGETS,
    correlation,
    predictions,
    shape_in_size,
)
from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.allocation.value import information_gain
from knapsack_rl.report.plots import BLACK, BLUE, CURVE_COLOURS, GREY, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AT = GROUP_SIZES.index(8)


def draw(rows: Sequence[Row]) -> Figure:
    """Gains against success rate, growth with N, and correlations."""
    from matplotlib.figure import Figure

    measured = Measured.of(rows)
    page = Figure(figsize=(16, 4), layout="constrained")
    own, others, growth, bars = page.subplots(1, 4)
    for target, ax in (("own", own), ("population", others)):
        _against_rate(measured, target, fit(rows, target), ax)
    _growth(measured, growth)
    _correlations(measured, bars)
    for ax in (own, others, growth, bars):
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.legend(frameon=False, fontsize="small")
    return page


def _scaled(shape: FloatArray, at: FloatArray, points: FloatArray, values: FloatArray) -> FloatArray:
    """A curve times the factor that brings it closest to the points."""
    here = np.interp(points, at, shape)
    return shape * float(here @ values) / float(here @ here)


def _against_rate(measured: Measured, target: str, fitted: dict[str, float], ax: Axes) -> None:
    gains = measured.relative(target)[:, AT]
    for k, step in enumerate(sorted(set(measured.step.tolist()))):
        mine = measured.step == step
        ax.plot(
            measured.rates[mine],
            gains[mine],
            MARKERS[k],
            color=CURVE_COLOURS[k],
            markersize=3,
            alpha=0.45,
            label=f"step {step}",
            rasterized=True,  # some thousand points would make most of the file
        )
    p = np.linspace(0.0, 1.0, 201)
    mixed = 1.0 - p**8 - (1.0 - p) ** 8
    shape = p ** fitted["success_exponent"] * (1.0 - p) ** fitted["failure_exponent"]
    for label, gain, style, colour in (("paper", information_gain(p), "-", BLACK), ("fitted", shape, "--", GREY)):
        ax.plot(p, _scaled(mixed * gain, p, measured.rates, gains), style, color=colour, label=label)
    ax.set(xlabel="success rate", ylabel="gain per step, relative to the stage's")
    ax.set_ylim(*np.quantile(gains, [0.005, 0.995]) * 1.1)
    ax.set_title(f"{TARGETS[target].capitalize()} (N = 8)", loc="left", fontweight="bold", fontsize="medium")


def _growth(measured: Measured, ax: Axes) -> None:
    for k, (label, (low, high)) in enumerate(CLASSES.items()):
        gains, mixed = shape_in_size(measured, low, high)
        ax.plot(GROUP_SIZES, gains, MARKERS[k] + "-", color=CURVE_COLOURS[k], markersize=4, label=label)
        ax.plot(GROUP_SIZES, mixed, "--", color=CURVE_COLOURS[k], linewidth=1)
    ax.plot([], [], "--", color=GREY, label="V(N, p)")
    ax.set(xscale="log", xlabel="rollouts N", ylabel="gain of the prompt itself, relative to N = 64")
    ax.set_xticks(GROUP_SIZES, [str(n) for n in GROUP_SIZES])
    ax.minorticks_off()
    ax.set_title("Growth with N", loc="left", fontweight="bold", fontsize="medium")


def _correlations(measured: Measured, ax: Axes) -> None:
    values = predictions(measured.rates)
    height = 0.8 / len(RIVALS)
    for k, name in enumerate(RIVALS):
        found = [correlation(measured, values[name], measured.by_target[t], by_rank=True) for t in TARGETS]
        means = np.array([c.mean for c in found])
        error = np.array([[c.mean - c.low, c.high - c.mean] for c in found]).T.clip(min=0.0)
        at = np.arange(len(TARGETS)) + height * (k - (len(RIVALS) - 1) / 2)
        ax.barh(at, means, height, xerr=error, color=CURVE_COLOURS[k], label=name, error_kw={"linewidth": 0.8})
    ax.set_yticks(range(len(TARGETS)), list(TARGETS.values()))
    ax.invert_yaxis()
    ax.axvline(0, color=BLUE, linewidth=0.5)
    ax.set(xlabel="Spearman correlation")
    ax.set_title("Value against measurement", loc="left", fontweight="bold", fontsize="medium")
