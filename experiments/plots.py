"""Plots of the pages, one function for each kind of experiment; each needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import estimation, gradient_fit, optimality, robustness
from experiments.accelerator.evidence import ACCELERATOR
from experiments.claims import TRAINING
from experiments.contract import Row, select
from experiments.extract import CLASS_SERIES
from experiments.gradient_fit import CLASSES, FORMULAS, GROUP_SIZES, TARGETS, Measured
from experiments.lab.evidence import HEADLINE
from experiments.measures import MEASURES
from experiments.optimality_cases import HIGHS, MIXTURES, OURS, PAPER, RULES
from experiments.pool import ARMS
from experiments.statistics import per_seed
from knapsack_rl.allocation.checks import FloatArray
from knapsack_rl.allocation.value import information_gain
from knapsack_rl.report import plots
from knapsack_rl.report.plots import BLACK, BLUE, CURVE_COLOURS, GREEN, GREY, MARKERS, ORANGE, VERMILION
from knapsack_rl.runs.calibration import Calibration
from knapsack_rl.runs.curves import Curve, mean_curve

GAIN_DRAWN = (-60, 105)
"""Limits of the axis of the gain captured, in per cent."""


def training(rows: Sequence[Row], arms: Sequence[str], names: Sequence[str]) -> Figure:
    """Panels side by side, three in a row at most.

    Args:
        rows: of training runs.
        arms: which arms, in the order of the legend.
        names: of panels: "accuracy", "accuracy by tokens", "rollout_ratio", "prompt_ratio", a measure
            (one dot per seed), or "budgets", "classes" or "transitions" with an arm.
    """
    columns = min(len(names), 2)
    height, width = -(-len(names) // columns), 7.0 if columns == 1 else 4.6
    figure = Figure(figsize=(width * columns, (4.0 if columns == 1 else 3.5) * height), layout="constrained")
    for ax, name in zip(np.atleast_1d(figure.subplots(height, columns)).ravel(), names, strict=True):
        _panel(rows, arms, name, ax)
    return figure


def accuracy_by_bed(beds: Mapping[str, tuple[Sequence[Row], Sequence[str]]]) -> Figure:
    """Held-out accuracy by rollouts, a panel for each bed.

    Args:
        beds: name to its rows and its arms, in the order of the legend.
    """
    figure = Figure(figsize=(5.2 * len(beds), 4.2), layout="constrained")
    for ax, (name, (rows, arms)) in zip(np.atleast_1d(figure.subplots(1, len(beds))), beds.items(), strict=True):
        _panel(rows, arms, "accuracy", ax)
        _title(ax, name)
    return figure


def _panel(rows: Sequence[Row], arms: Sequence[str], name: str, ax: Axes) -> None:
    kind, _, arm = name.partition(" ")
    runs = select(rows, arm=arm)
    if name in ("accuracy", "accuracy by tokens"):
        unit = "tokens" if "tokens" in name else "rollouts"
        plots.accuracy_by_policy(_by_arm(rows, arms, unit, "accuracy", "evaluations"), ax)
        ax.set_xlabel(f"{unit} generated")
    elif name in ("rollout_ratio", "prompt_ratio"):
        level = name.removesuffix("_ratio") + "s"
        plots.ratios_by_policy(_by_arm(rows, arms, "step", name), ax, level=level)
    elif kind == "budgets":
        budgets = [row["budget"] for row in runs]
        plots.budget_histogram(np.concatenate([np.repeat(part["rollouts"], part["visits"]) for part in budgets]), ax)
        _title(ax, f"Budgets: {ARMS[arm].label}")
    elif kind == "classes":
        series = [row["series"] for row in runs]
        shares = [np.mean([one[name] for one in series], axis=0) for name in CLASS_SERIES]
        plots.difficulty_over_time(series[0]["step"], np.stack(shares, axis=1), ax)
        _title(ax, f"Difficulty: {ARMS[arm].label}")
    elif kind == "transitions":
        plots.transitions(np.sum([row["classes"]["transitions"] for row in runs], axis=0, dtype=np.int64), ax)
        _title(ax, f"First to last visit: {ARMS[arm].label}")
    else:
        measure = MEASURES[name].of
        values = {ARMS[one].label: [v for v in per_seed(rows, one, measure).values() if np.isfinite(v)] for one in arms}
        plots.final_values(values, ax, quantity=name)


def _by_arm(rows: Sequence[Row], arms: Sequence[str], x: str, y: str, part: str = "series") -> dict[str, Curve]:
    """Mean curve over the seeds of each arm, by label."""
    return {
        ARMS[arm].label: mean_curve(
            (np.array(row[part][x], dtype=np.float64), np.array(row[part][y], dtype=np.float64))
            for row in select(rows, arm=arm)
        )
        for arm in arms
    }


def _title(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontweight="bold", fontsize="medium")


def _finish(ax: Axes, title: str) -> None:
    _title(ax, title)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize="small")


def gain_by_setting(rows: Sequence[Row]) -> Figure:
    """Gain captured against each setting; an environment a row."""
    places = list(dict.fromkeys(row["environment"] for row in rows))
    knobs = list(robustness.KNOBS.values())
    page = Figure(figsize=(15, 2.9 * len(places)), layout="constrained")
    axes = page.subplots(len(places), len(knobs), sharey=True, sharex="col", squeeze=False)
    for where, line in zip(places, axes, strict=True):
        for knob, ax in zip(knobs, line, strict=True):
            _gain(rows, where, knob, ax)
            ax.set_xlabel(knob if where == places[-1] else "")
        line[0].set_ylabel(f"{where}\ngain captured (%)")
    handles = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    page.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    return page


def _gain(rows: Sequence[Row], where: str, knob: str, ax: Axes) -> None:
    every = list(dict.fromkeys(row["policy"] for row in rows))
    for policy in dict.fromkeys(row["policy"] for row in select(rows, knob=knob)):
        found = robustness.curve(rows, where, knob, policy)
        style = every.index(policy)
        mean, deviation = (100 * np.array(part) for part in zip(*found.values(), strict=True))
        colour, x = CURVE_COLOURS[style], list(found)
        ax.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
        ax.plot(x, mean, color=colour, marker=MARKERS[style], markersize=4, linewidth=1.4, label=policy)
    if knob in (robustness.WINDOW, robustness.SAMPLED, robustness.PRIOR):
        ax.set_xscale("log", base=2)
    ax.axhline(0, color="#777777", linewidth=0.8)
    ax.set_ylim(*GAIN_DRAWN)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(color="#dddddd", linewidth=0.6)


def solver(rows: Sequence[Row]) -> Figure:
    """Time, and value lost by rules."""
    page = Figure(figsize=(11, 4.2), layout="constrained")
    times, lost = page.subplots(1, 2)
    _times(rows, times)
    _losses(rows, lost)
    return page


def _times(rows: Sequence[Row], ax: Axes) -> None:
    series = (
        (OURS, False, OURS, BLUE, "o-"),
        (OURS, True, f"{OURS}, with costs", ORANGE, "D-."),
        (PAPER, False, PAPER, VERMILION, "s--"),
        (HIGHS, False, HIGHS, GREEN, "^:"),
    )
    for method, costs, label, colour, line in series:
        which = select(rows, part="time", method=method, costs=costs)
        sizes = sorted({row["prompts"] for row in which})
        if sizes:
            ax.plot(
                sizes,
                [optimality.milliseconds(which, m, method, costs=costs) for m in sizes],
                line,
                color=colour,
                label=label,
            )
    ax.set(xscale="log", yscale="log", xlabel="prompts in the batch", ylabel="milliseconds", ylim=(None, 1e6))
    _finish(ax, "Time to solve")


def _losses(rows: Sequence[Row], ax: Axes) -> None:
    height = 0.8 / len(RULES)
    for k, rule in enumerate(RULES):
        found = np.array([optimality.lost(rows, mixture, rule) for mixture in MIXTURES])
        at = np.arange(len(MIXTURES)) + height * (k - (len(RULES) - 1) / 2)
        error = np.abs(found[:, 1:] - found[:, :1]).T
        ax.barh(at, found[:, 0], height, xerr=error, color=CURVE_COLOURS[k], label=rule, error_kw={"linewidth": 0.8})
    ax.set_yticks(range(len(MIXTURES)), list(MIXTURES))
    ax.invert_yaxis()
    ax.set(xlabel="value lost against known rates (%)")
    _finish(ax, "Value lost by rules")
    ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


AT = GROUP_SIZES.index(8)


def gradient_value(rows: Sequence[Row]) -> Figure:
    """Gains against success rate, growth with N, and correlations."""
    measured = Measured.of(rows)
    page = Figure(figsize=(16, 4), layout="constrained")
    own, others, growth, bars = page.subplots(1, 4)
    for target, ax in (("own", own), ("population", others)):
        _against_rate(measured, target, gradient_fit.fit(measured, target), ax)
    _growth(measured, growth)
    _correlations(measured, bars)
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
    _finish(ax, f"{TARGETS[target].capitalize()} (N = 8)")


def _growth(measured: Measured, ax: Axes) -> None:
    for k, (label, (low, high)) in enumerate(CLASSES.items()):
        gains, mixed = gradient_fit.shape_in_size(measured, low, high)
        ax.plot(GROUP_SIZES, gains, MARKERS[k] + "-", color=CURVE_COLOURS[k], markersize=4, label=label)
        ax.plot(GROUP_SIZES, mixed, "--", color=CURVE_COLOURS[k], linewidth=1)
    ax.plot([], [], "--", color=GREY, label="V(N, p)")
    ax.set(xscale="log", xlabel="rollouts N", ylabel="gain of the prompt itself, relative to N = 64")
    ax.set_xticks(GROUP_SIZES, [str(n) for n in GROUP_SIZES])
    ax.minorticks_off()
    _finish(ax, "Growth with N")


def _correlations(measured: Measured, ax: Axes) -> None:
    predicted = gradient_fit.predictions(measured.rates)
    height = 0.8 / len(FORMULAS)
    for k, name in enumerate(FORMULAS):
        found = [
            gradient_fit.correlation(measured, predicted[name], measured.by_target[t], by_rank=True) for t in TARGETS
        ]
        means = np.array([c.mean for c in found])
        error = np.array([[c.mean - c.low, c.high - c.mean] for c in found]).T.clip(min=0.0)
        at = np.arange(len(TARGETS)) + height * (k - (len(FORMULAS) - 1) / 2)
        ax.barh(at, means, height, xerr=error, color=CURVE_COLOURS[k], label=name, error_kw={"linewidth": 0.8})
    ax.set_yticks(range(len(TARGETS)), list(TARGETS.values()))
    ax.invert_yaxis()
    ax.axvline(0, color=BLUE, linewidth=0.5)
    ax.set(xlabel="Spearman correlation")
    _finish(ax, "Value against measurement")


def estimators(rows: Sequence[Row]) -> Figure:
    """Gain captured in the recorded run by seed, and reliability of the predictions under uniform allocation."""
    environments = {estimation.place(row): row["environment"] for row in rows}
    recorded, watched = environments[estimation.RECORDED], environments["watched"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    gains = {
        row["policy"]: [seed["gain_captured"] for seed in row["by_seed"].values()]
        for row in select(rows, environment=recorded)
        if not row["policy"].startswith("uniform")
    }
    plots.final_values(gains, left, quantity="gain captured")
    plots.reliability(
        {row["policy"]: _calibration(**row["reliability"]) for row in select(rows, environment=watched)}, right
    )
    return figure


def _calibration(predicted: list[float], realised: list[float], groups: list[int]) -> Calibration:
    return Calibration(np.array(predicted), np.array(realised), np.array(groups), np.nan, np.nan)


PLOTS: dict[str, Callable[[Sequence[Row]], Figure]] = {
    **{name: partial(training, arms=one.arms, names=one.panels) for name, one in TRAINING.items()},
    "robustness": gain_by_setting,
    "optimality": solver,
    "gradient-value": gradient_value,
    "estimation": estimators,
    "accelerator": ACCELERATOR.plot,
    "lab-headline": HEADLINE.plot,
}
"""The plot of each experiment, from its rows."""
