"""Write a run as one self-contained HTML page."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from knapsack_rl.groups import DIFFICULTY_CLASSES
from knapsack_rl.metrics import PARTS
from knapsack_rl.offline.recorded import read_run
from knapsack_rl.report import page, plots
from knapsack_rl.report.prompt_section import prompt_section
from knapsack_rl.report.uniform_runs import uniform_for
from knapsack_rl.runs.curves import tail_mean
from knapsack_rl.runs.log import RunLog

SHOWN_PROMPTS = 10


def write_report(run: str | Path | RunLog, output: str | Path | None = None) -> Path:
    """Write the page of a run; the page of an unfinished run says so.

    Args:
        run: A folder written by training or another log, or what :func:`read_run` returned for it.
        output: The page to write; by default `report.html` in the run folder, or beside the log.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: If there is no log.
        ImportError: If matplotlib is not installed.
    """
    run = run if isinstance(run, RunLog) else read_run(run)
    name = run.name
    body = [f"<h1>Training run {page.escape(name)}</h1>", page.paragraph(_lead(run), "soft")]
    body += [page.paragraph(text, "soft") for text in _success(run)]
    body += [page.paragraph(text, "notice") for text in _notices(run)]
    body.append(page.tiles(_key_figures(run)))
    body += _warnings(run)
    body.append(page.heading("Curves"))
    body.append(page.plots(page.plot(spec.name, spec.caption, spec.draw) for spec in run_plots(run)))
    body += prompt_section(run)
    body += _tables(run)
    target = run.page if output is None else Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    return page.write(target, f"Training run {name}", body)


def _lead(run: RunLog) -> str:
    config = run.config
    if not config:
        visits = run.visits.counts.size
        return (
            f"a log without settings: {run.rollouts.sum():,} rollouts in {visits:,} groups of {len(run.prompt_ids):,} "
            "prompts"
        )
    parts = [
        f"{config.get('allocation', 'unknown')} allocation",
        f"N = {config.get('rollouts_per_prompt', '?')} rollouts per prompt on average",
        f"{config.get('prompts_per_step', '?')} prompts per step",
    ]
    parts += [f"{key} {config[key]}" for key in ("model", "dataset", "seed") if config.get(key) is not None]
    return ", ".join(parts)


def _success(run: RunLog) -> list[str]:
    """Return what counted as a success in this run, if its log says so."""
    if not run.success_rules:
        return []
    first, *later = run.success_rules
    changes = [f"from step {step:,}: {text}" for step, text in later]
    return [
        f"A success is {'; '.join([first[1], *changes])}. {page.percent(run.success_share)} of all rollouts were one."
    ]


def _notices(run: RunLog) -> list[str]:
    notices: list[str] = []
    if not run.finished:
        planned = "" if run.planned_steps is None else f" of {run.planned_steps:,} planned"
        notices.append(f"This run is unfinished: {run.steps.size:,}{planned} steps are recorded.")
    if not run.held_out[1].size:
        notices.append("No held-out evaluation is recorded, so the accuracy is unknown.")
    elif run.held_out[1].size == 1:
        notices.append("Only one held-out evaluation is recorded, so there is no curve yet.")
    if run.success_share in (0.0, 1.0):
        notices.append(
            f"{'Every' if run.success_share else 'No'} scored rollout was a success, so allocation had nothing to go "
            "by. Check the reward functions, outcome_reward and success_threshold."
        )
    return notices + [f"{note[:1].upper()}{note[1:]}." for note in run.notes]


def _key_figures(run: RunLog) -> list[tuple[str, str, str]]:
    rollouts, accuracy = run.held_out
    start, end = (accuracy[0], accuracy[-1]) if accuracy.size else (math.nan, math.nan)
    since = "before training" if rollouts.size and rollouts[0] == 0 else "first evaluation"
    levels = (("Rollouts", run.effective_rollout_ratio), ("Prompts", run.effective_prompt_ratio))
    seconds = run.seconds[np.isfinite(run.seconds)]
    planned = run.steps.size if run.planned_steps is None else run.planned_steps
    return [
        ("Held-out accuracy", page.percent(float(end)), f"last evaluation; {since}: {page.percent(float(start))}"),
        *_against_uniform(run),
        ("Rollouts generated", f"{run.rollouts.sum():,}", f"{run.steps.size:,} of {planned:,} steps"),
        *(
            (
                f"{level} with a gradient",
                page.percent(tail_mean(ratio)),
                f"last 20 % of steps; first 20 %: {page.percent(tail_mean(ratio[::-1]))}",
            )
            for level, ratio in levels
        ),
        ("Unsolved prompts", page.percent(run.unsolved_share), "no success at their last visit"),
        (
            "Largest allocation",
            f"{run.max_budget.max():,}" if run.steps.size else page.MISSING,
            f"rollouts; smallest: {run.min_budget.min():,}" if run.steps.size else "",
        ),
        (
            "Allocation time",
            f"{1000 * np.median(seconds):.1f} ms" if seconds.size else page.MISSING,
            "median per step",
        ),
        *_step_time(run),
    ]


def _against_uniform(run: RunLog) -> list[tuple[str, str, str]]:
    """Return how few rollouts a run on the shipped task took to the final accuracy of recorded uniform runs."""
    recorded = uniform_for(run.config)
    if not recorded or run.held_out[1].size < 2:
        return []
    grpo, ratio = recorded[0], recorded[0].ratio(*run.held_out)
    value = "not reached" if math.isnan(ratio) else f"{ratio:.2f} ×"
    detail = f"of those that recorded runs of {grpo.name} took to {page.percent(grpo.final)}; one run is noisy"
    return [("Rollouts to uniform's accuracy", value, detail)]


def _step_time(run: RunLog) -> list[tuple[str, str, str]]:
    """Return the median seconds of a step with its parts, and the rows that updates left out, where they are logged."""
    seconds = {part: run.metric(f"knapsack/{part}_seconds")[1] for part in PARTS}
    parts = [f"{part} {np.median(spent):.2g} s" for part, spent in seconds.items() if spent.size]
    total, skipped = run.metric("step_time")[1], run.metric("knapsack/rows_skipped")[1]
    found = [("Step", f"{np.median(total):.2g} s", f"median; {', '.join(parts)}")] if total.size and parts else []
    if skipped.size:
        found.append(("Rows left out of updates", page.percent(float(skipped.mean())), "they have no gradient"))
    return found


def run_plots(run: RunLog) -> list[page.Plot]:
    """Return the plots of a run's page that its log allows."""
    figures: list[page.Plot] = []
    rollouts, accuracy = run.held_out
    if accuracy.size > 1:
        greedy, recorded = run.against_rollouts("held_out/greedy_accuracy"), uniform_for(run.config)
        caption = (
            "Success on held-out problems. Check how many rollouts each gain costs, and whether the curve has "
            "flattened; single evaluations are noisy."
        )
        others = []
        for runs in recorded:
            shown = runs.rollouts <= rollouts[-1]
            others.append((runs.name, runs.rollouts[shown], runs.accuracy[:, shown]))
        if recorded:
            caption += f" Uniform: mean and range of {len(recorded[0].accuracy)} recorded runs on this task."
        figures.append(
            page.Plot(
                "accuracy",
                caption,
                lambda ax: plots.held_out_accuracy(rollouts, accuracy, ax, greedy=greedy, others=others),
            )
        )
    if not run.visits.counts.size:
        return figures
    calibration = run.calibration()
    moved = int(run.transitions.sum())
    figures.append(
        page.Plot(
            "effective",
            "A group whose rewards are all equal teaches nothing. The rollout share can be raised by moving "
            "budget, the prompt share only by prompts of suitable difficulty. "
            "Faint: single steps; bold: moving average.",
            lambda ax: plots.effective_ratios(run.steps, run.effective_rollout_ratio, run.effective_prompt_ratio, ax),
        )
    )
    figures.append(
        page.Plot(
            "budgets",
            "Uniform allocation is a single bar. A long tail to the right means that a few hard prompts receive "
            "many rollouts; the scale is logarithmic, so a short bar is a rare event.",
            lambda ax: plots.budget_histogram(run.visits.counts, ax),
        )
    )
    figures.append(
        page.Plot(
            "estimates",
            "Who receives the budget: the mean, with a bar from the 10 % to the 90 % quantile. Prompts estimated as "
            "hard but solvable should get the most, those estimated as solved the least.",
            lambda ax: plots.budget_by_estimate(run.budget_by_estimate, ax),
        )
    )
    figures.append(
        page.Plot(
            "difficulty",
            "Success rates observed in each step (moving average): 1, [0.8, 1), (0.2, 0.8), (0, 0.2] and 0. "
            "The two outer classes carry no gradient; small groups fall into them more easily.",
            lambda ax: plots.difficulty_over_time(run.steps, run.difficulty_shares, ax),
        )
    )
    if moved:
        figures.append(
            page.Plot(
                "transitions",
                f"The {moved:,} prompts visited at least twice. Left of the diagonal: became easier; right of it: "
                "harder. The bottom right corner counts prompts that stayed unsolved. Shade: share of the row.",
                lambda ax: plots.transitions(run.transitions, ax),
            )
        )
    if calibration.visits.size:
        figures.append(
            page.Plot(
                "calibration",
                "Points on the diagonal mean that predictions can be trusted; bars are 95 % intervals. Brier score "
                f"{calibration.brier:.3f} (0 is perfect; always predicting the average gives "
                f"{calibration.brier_constant:.3f}).",
                lambda ax: plots.calibration(calibration, ax),
            )
        )
    return figures


def _warnings(run: RunLog) -> list[str]:
    """Return one box per warning."""
    if not run.warnings:
        return []
    parts = [page.heading("Warnings")]
    for warning in run.warnings:
        seen = page.escape(warning["seen"])
        parts.append(
            f'<div class="notice"><p><strong>{seen}</strong> First seen at step {warning["step"]:,}.</p>'
            + page.paragraph(f"Likely cause: {warning['cause']}")
            + page.paragraph(f"Remedy: {warning['remedy']}")
            + "</div>"
        )
    return parts


def _tables(run: RunLog) -> list[str]:
    tables: list[str] = []
    reasons = Counter(reason for reason in run.reasons if reason)
    if reasons:
        tables.append(page.heading("Reports of the allocator"))
        tables.append(
            page.table(
                ("reason", "steps"),
                [(text, f"{count:,}") for text, count in reasons.most_common()],
                caption=f"out of {run.steps.size:,} steps",
            )
        )
    tables += _most_rollouts(run)
    tables += _training_metrics(run)
    settings = page.table(
        ("setting", "value"), sorted(run.config.items()), caption="As the run was started", numeric=False
    )
    tables.append(page.details(f"Configuration ({len(run.config)} settings)", [settings]))
    return tables


def _most_rollouts(run: RunLog) -> list[str]:
    visits = run.visits
    if not visits.counts.size:
        return []
    size = len(run.prompt_ids)
    everyone = np.ones(visits.prompt.size)
    seen, rollouts, successes = (run.by_prompt(x) for x in (everyone, visits.counts, visits.successes))
    last = np.full(size, -1)
    last[visits.prompt[visits.scored > 0]] = visits.difficulty[
        visits.scored > 0
    ]  # the latest visit overwrites earlier ones
    top = np.argsort(-rollouts, kind="stable")[:SHOWN_PROMPTS]
    rows = [
        (
            run.prompt_ids[i],
            f"{seen[i]:,.0f}",
            f"{rollouts[i]:,.0f}",
            f"{successes[i]:,.0f}",
            DIFFICULTY_CLASSES[last[i]] if last[i] >= 0 else None,
        )
        for i in top
    ]
    header = ("prompt", "visits", "rollouts", "successes", "last visit")
    caption = f"{len(rows)} of {size:,} prompts, over the whole run"
    return [page.heading("Prompts with the most rollouts"), page.table(header, rows, caption=caption)]


METRIC_GROUPS = (
    ("Outcomes", ("reward", "knapsack/effective", "knapsack/all_", "knapsack/covered", "knapsack/class/",
                  "knapsack/outcome", "knapsack/reward", "knapsack/lost", "knapsack/solved", "frac_reward")),
    ("Allocation", ("knapsack/budget", "knapsack/expected_value", "knapsack/estimated", "knapsack/fallback",
                    "knapsack/allocation", "knapsack/largest", "knapsack/smallest")),
    ("Predictions", ("knapsack/predicted", "knapsack/realised", "knapsack/brier")),
    ("Completions", ("completions/", "num_tokens", "entropy")),
    ("Optimizer", ("loss", "grad_norm", "learning_rate", "clip_ratio", "kl", "epoch", "step_time",
                   "knapsack/rows", "knapsack/generation", "knapsack/scoring", "knapsack/update")),
)  # fmt: skip
"""Groups of metrics: title, and prefixes of the metrics' names."""


def _training_metrics(run: RunLog) -> list[str]:
    names = sorted({name for row in run.metrics for name in row} - {"step", "rollouts"})
    grouped: dict[str, list[tuple[Any, ...]]] = {title: [] for title in (*dict(METRIC_GROUPS), "Others")}
    for name in names:
        values = run.metric(name)[1]
        # The held-out curve has its own plot, and its evaluations are too few for a mean over 20 %.
        if values.size and not name.startswith("held_out/"):
            title = next((title for title, starts in METRIC_GROUPS if name.startswith(starts)), "Others")
            grouped[title].append((name, f"{tail_mean(values[::-1]):.4g}", f"{tail_mean(values):.4g}"))
    header = ("metric", "first 20 %", "last 20 %")
    tables = [page.table(header, rows, caption=title) for title, rows in grouped.items() if rows]
    if not tables:
        return []
    lead = page.paragraph("Means over the steps. The training reward depends on which prompts get rollouts.", "soft")
    return [page.details(f"Training metrics ({sum(map(len, grouped.values()))})", [lead, *tables])]
