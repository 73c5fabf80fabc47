"""Write a comparison of runs as one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from knapsack_rl.offline.recorded import read_run
from knapsack_rl.report import page, plots
from knapsack_rl.report.comparison import (
    Policy,
    accuracy_curve,
    baseline_of,
    comparison_table,
    final_accuracy,
    policies,
)
from knapsack_rl.runs.curves import Curve, mean_curve, moving_average
from knapsack_rl.runs.log import FloatArray, RunLog

_LEVELS = {
    "rollouts": "The effective gradient ratio (moving average, mean over seeds, band from lowest to highest). An "
    "adaptive policy should lie above uniform; moving budget to the groups that vary explains part of that.",
    "prompts": "The same counted by prompts, which moving budget alone cannot raise by much. A policy that is "
    "higher here learns from prompts that taught nothing before.",
}

HEADER = (
    "policy",
    "seeds",
    "rollouts generated",
    "held-out accuracy at the end",
    "difference to baseline, points",
    "held-out accuracy, mean over the run",
    "its difference, points",
    "success on training prompts",
    "rollouts with a gradient",
    "prompts with a gradient",
    "unsolved prompts",
    "largest allocation",
    "rollouts to baseline's accuracy",
    "relative to baseline",
    "seconds of training",
    "seconds to baseline's accuracy",
    "relative to baseline, in seconds",
)


def write_comparison(runs: Sequence[str | Path | RunLog], output: str | Path) -> Path:
    """Write one page that compares runs by policy, averaging over seeds.

    Args:
        runs: Run folders or other logs, or what :func:`read_run` returned for them.
        output: The page to write, or an existing folder in which to write `comparison.html`.

    Returns:
        The path of the page.

    Raises:
        ValueError: If `runs` is empty, or two runs share policy and seed.
        FileNotFoundError: If a folder holds no log.
        ImportError: If matplotlib is not installed.
    """
    if not runs:
        raise ValueError("a comparison needs at least one run folder, got none")
    logs = [run if isinstance(run, RunLog) else read_run(run) for run in runs]
    groups, rows = policies(logs), comparison_table(logs)
    body = ["<h1>Comparison of allocation policies</h1>", page.paragraph(_lead(groups), "soft")]
    body += [page.paragraph(text, "notice") for text in _notices(groups)]
    body.append(_findings(rows))
    body.append(page.heading("Figures by policy"))
    # A column per policy: there are more figures than policies, and pages scroll vertically.
    columns = [_cells(row) for row in rows]
    figures = [(name, *cells) for name, *cells in zip(HEADER, *columns, strict=True)]
    body.append(page.table([str(cell) for cell in figures[0]], figures[1:], caption=_table_caption(rows)))
    body.append(page.heading("Curves"))
    body.append(page.plots(page.plot(spec.name, spec.caption, spec.draw) for spec in comparison_plots(groups)))
    body += _warnings(groups)
    body += _settings(groups)
    target = Path(output)
    if target.is_dir():
        target = target / "comparison.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    return page.write(target, "Comparison of allocation policies", body)


def _lead(groups: Sequence[Policy]) -> str:
    total = sum(len(policy.runs) for policy in groups)
    runs = f"{total} {'run' if total == 1 else 'runs'} of {len(groups)} {'policy' if len(groups) == 1 else 'policies'}"
    baseline = baseline_of(groups)
    return f"{runs}; " + (
        "no uniform policy among them, so there is no baseline" if baseline is None else f"baseline: {baseline.label}"
    )


def _notices(groups: Sequence[Policy]) -> list[str]:
    notices: list[str] = []
    for policy in groups:
        for seed, run in policy.runs.items():
            if not run.finished:
                use = (
                    "it is left out of the figures and curves below"
                    if any(other.finished for other in policy.runs.values())
                    else "its figures are those of its last step, and it is not compared with the baseline"
                )
                planned = "" if run.planned_steps is None else f" of {run.planned_steps:,}"
                notices.append(
                    f"{policy.label}, seed {seed}, is unfinished ({run.steps.size:,}{planned} steps): {use}."
                )
            if not run.held_out[1].size:
                notices.append(f"{policy.label}, seed {seed}, has no held-out evaluation.")
    return notices


def _interval(value: float | None, half: float | None, *, sign: bool = False) -> str | None:
    """Return a share in percent with the half-width of its interval."""
    if value is None:
        return None
    number = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    number = number.replace("-", "−")
    return number if half is None else f"{number} ± {100 * half:.1f}"


def _findings(rows: Sequence[dict[str, Any]]) -> str:
    """Return one sentence for each policy that can be compared with the baseline."""
    baseline = next((row for row in rows if row["baseline"]), None)
    items: list[str] = []
    for row in rows:
        if baseline is None or row["difference"] is None:
            continue
        half, gap = row["difference_interval"], row["difference"]
        side = "below" if gap < 0 else "above"
        text = (
            f"{row['policy']} ends {_interval(abs(gap), half)} points {side} {baseline['policy']} in held-out accuracy"
        )
        if row["rollouts"] != baseline["rollouts"]:
            text += f", with {row['rollouts']:,.0f} rollouts against {baseline['rollouts']:,.0f}"
        if half is None:
            text += " (one pair of seeds, so no interval)"
        elif abs(gap) <= half:
            text += " (the interval includes zero)"
        if row["rollouts_ratio"] is not None:
            text += f" and reaches the baseline's final accuracy with {row['rollouts_ratio']:.2f} times its rollouts"
        elif row["target_accuracy"] is not None and row["rollouts_to_target"] is None:
            text += " and does not reach the baseline's final accuracy"
        items.append(f"<li>{html.escape(text)}.</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of the comparison page as Markdown.

    Args:
        rows: From `comparison_table`.
    """
    lines = [HEADER, ["---"] * len(HEADER)]
    lines += [["–" if cell is None else str(cell) for cell in _cells(row)] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cells(row: dict[str, Any]) -> tuple[object, ...]:
    reached = row["rollouts_to_target"]
    missed = (
        "not reached"
        if not row["unfinished"] and row["accuracy"] is not None and row["target_accuracy"] is not None
        else None
    )
    difference = "baseline" if row["baseline"] else _interval(row["difference"], row["difference_interval"], sign=True)
    unfinished = f" ({row['unfinished']} unfinished)" if row["unfinished"] else ""
    return (
        row["policy"],
        f"{len(row['seeds'])}{unfinished}",
        f"{row['rollouts']:,.0f}",
        None if row["accuracy"] is None else f"{_interval(row['accuracy'], row['accuracy_interval'])} %",
        difference,
        None if row["mean_accuracy"] is None else f"{_interval(row['mean_accuracy'], row['mean_accuracy_interval'])} %",
        "baseline"
        if row["baseline"]
        else _interval(row["mean_difference"], row["mean_difference_interval"], sign=True),
        page.percent(row["training_success"]),
        page.percent(row["effective_rollouts"]),
        page.percent(row["effective_prompts"]),
        page.percent(row["unsolved_share"]),
        None if row["largest_allocation"] is None else f"{row['largest_allocation']:,}",
        missed if reached is None else f"{reached:,.0f}",
        None if row["rollouts_ratio"] is None else f"{row['rollouts_ratio']:.2f} ×",
        None if row["seconds"] is None else f"{row['seconds']:,.0f}",
        None if row["seconds_to_target"] is None else f"{row['seconds_to_target']:,.0f}",
        None if row["seconds_ratio"] is None else f"{row['seconds_ratio']:.2f} ×",
    )


def _table_caption(rows: Sequence[dict[str, Any]]) -> str:
    target = rows[0]["target_accuracy"]
    caption = (
        "Means over seeds; ± is the half-width of a 95 % t-interval of the mean. Differences are taken between runs "
        "of the same seed. Accuracy at the end is the mean of the last three evaluations. Success on training prompts "
        "(equally weighted) is the mean over the last 20 % of the steps, gradient shares are over all "
        "steps. Unsolved: no success at the last visit. Seconds are those of training steps, without evaluation, and "
        "depend on what else the machine did."
    )
    if target is not None:
        caption += (
            f" The baseline's accuracy at its end is {100 * target:.1f} %, from curves smoothed over three "
            "evaluations and averaged over seeds."
        )
    return caption


def comparison_plots(groups: Sequence[Policy]) -> list[page.Plot]:
    """Return the plots of a comparison page that the logs allow."""
    figures: list[page.Plot] = []
    accuracy = {policy.label: accuracy_curve(policy) for policy in groups}
    if any(curve.x.size > 1 for curve in accuracy.values()):
        figures.append(
            page.Plot(
                "accuracy",
                "Mean over seeds; the band spans the lowest and the highest seed. Compare at equal rollouts: a curve "
                "further to the left needs fewer rollouts for the same accuracy.",
                lambda ax: plots.accuracy_by_policy(accuracy, ax),
            )
        )
    finals = {policy.label: list(policy.per_seed(final_accuracy).values()) for policy in groups}
    if any(finals.values()):
        figures.append(
            page.Plot(
                "final",
                "The mean of the last three evaluations of each run; the bar is the mean of the runs. Where the dots "
                "of two policies overlap, the difference may be chance. Policies with a larger N have used more "
                "rollouts.",
                lambda ax: plots.final_values(finals, ax, quantity="held-out accuracy at the end"),
            )
        )
    shares: tuple[tuple[str, Callable[[RunLog], FloatArray]], ...] = (
        ("rollouts", lambda run: run.effective_rollout_ratio),
        ("prompts", lambda run: run.effective_prompt_ratio),
    )
    for level, share in shares:
        curves = {policy.label: _trend(policy, share) for policy in groups}
        if any(curve.x.size > 1 for curve in curves.values()):
            figures.append(
                page.Plot(
                    f"effective-{level}",
                    _LEVELS[level],
                    partial(plots.ratios_by_policy, curves, level=level),
                )
            )
    return figures


def _trend(policy: Policy, share: Callable[[RunLog], FloatArray]) -> Curve:
    """Return a share over the steps; each run is smoothed before the seeds are averaged."""
    runs = policy.compared.values()
    window = plots.trend_window(max(run.steps.size for run in runs))
    return mean_curve((run.steps, moving_average(share(run), window)) for run in runs)


def _warnings(groups: Sequence[Policy]) -> list[str]:
    """Return a table of all warnings."""
    rows = [
        (f"{policy.label}, seed {seed}", f"{row['step']:,}", row["seen"])
        for policy in groups
        for seed, run in policy.runs.items()
        for row in run.warnings
    ]
    if not rows:
        return []
    caption = "Each is reported once per run; the page of the run adds the likely cause and the remedy"
    return [page.heading("Warnings"), page.table(("run", "step", "seen"), rows, caption=caption, numeric=False)]


def _settings(groups: Sequence[Policy]) -> list[str]:
    """Return tables of the settings that differ between policies, of common settings, and of the runs."""
    names = sorted({name for policy in groups for run in policy.runs.values() for name in run.config} - {"seed"})
    differing: list[tuple[object, ...]] = []
    common: list[tuple[object, ...]] = []
    for name in names:
        values = [
            list(dict.fromkeys(str(run.config.get(name, page.MISSING)) for run in policy.runs.values()))
            for policy in groups
        ]
        if all(value == values[0] and len(value) == 1 for value in values):
            common.append((name, values[0][0]))
        else:
            differing.append((name, *(", ".join(value) for value in values)))
    labels = [policy.label for policy in groups]
    folders = [(f"{policy.label}, seed {seed}", run.name) for policy in groups for seed, run in policy.runs.items()]
    tables: list[str] = []
    for title, header, rows, caption in (
        (
            "Settings that differ",
            ("setting", *labels),
            differing,
            "Differences other than the policy weaken the comparison",
        ),
        ("Common settings", ("setting", "value"), common, "The same in every run"),
        ("Runs", ("run", "folder"), folders, "The page of each run shows budgets, difficulty and calibration"),
    ):
        if rows:
            table = page.table(header, rows, caption=caption, numeric=False)
            tables += [page.heading(title), table] if rows is differing else [page.details(title, [table])]
    return tables
