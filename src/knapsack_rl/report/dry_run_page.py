"""The result of a dry run as text and as one self-contained HTML page."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from knapsack_rl.offline.dry_run import ASSUMPTION, KNAPSACK, LIMIT, DryRun, Row
from knapsack_rl.report import page, plots

HEADER = (
    "policy",
    "budget",
    "rollouts",
    "value, the run = 100",
    "rollouts with a gradient",
    "prompts with a gradient",
)


def summary(result: DryRun) -> str:
    """Return the result as Markdown: overview, table, rollouts at equal value, assumption and notes."""
    lines = [overview(result), "", f"| {' | '.join(HEADER)} |", "| --- " * len(HEADER) + "|"]
    lines += [f"| {' | '.join(cell or page.MISSING for cell in cells(result, row))} |" for row in result.shown]
    lines += [
        "",
        *(savings(result, policy) for policy in result.equal_value),
        "",
        f"Assumption: {ASSUMPTION}",
        method(result),
    ]
    lines += [f"Note: {note}." for note in result.notes]
    return "\n".join(lines)


def overview(result: DryRun) -> str:
    """Return one sentence on the log."""
    log = result.log
    return (
        f"{log.source}: {log.totals.sum():,} rollouts, {log.prompt.size:,} groups of {len(log.prompt_ids):,} prompts, "
        f"{log.steps.size:,} steps"
    )


def method(result: DryRun) -> str:
    """Return two sentences on how the figures were computed."""
    settings = result.settings
    seeds = f"{settings.seeds} {'seed' if settings.seeds == 1 else 'seeds'}"
    return (
        "Method: each prompt's successes and rollouts are smoothed over its visits with a Gaussian kernel of "
        f"{settings.bandwidth:g} visits; their ratio is taken for its true rate. The recorded batches are replayed "
        f"with rewards drawn at these rates ({seeds}); value is the sum of V(N, p) over all visits, the cold "
        "start included."
    )


def cells(result: DryRun, row: Row) -> list[str | None]:
    """Return the cells of a row of the table."""
    relative, spread = None, ""
    if result.recorded.value > 0:
        scale = 100 / result.recorded.value
        spread = "" if math.isnan(row.value_deviation) else f" ± {scale * row.value_deviation:.1f}"
        relative = f"{scale * row.value:.1f}{spread}"
    return [
        row.policy,
        f"{100 * row.budget:g} %",
        f"{row.rollouts:,.0f}",
        relative,
        page.percent(row.effective_rollouts),
        page.percent(row.effective_prompts),
    ]


def savings(result: DryRun, policy: str) -> str:
    """Return one sentence on the rollouts at equal value."""
    rollouts, saved = result.equal_value[policy], result.saved(policy)
    if result.recorded.value <= 0:
        return f"{policy}: no group of this log has any value, so there is nothing to save."
    if math.isnan(rollouts):
        return f"{policy}: the recorded budget does not buy the value of the run."
    bound = "at most " if result.at_least(policy) else ""
    return (
        f"{policy}: the value of the run for {bound}{rollouts:,.0f} rollouts, "
        f"{'at least ' if bound else ''}{100 * saved:.1f} % fewer."
    )


def write_dry_run(result: DryRun, output: Path) -> Path:
    """Write the page.

    Args:
        result: from :func:`knapsack_rl.offline.dry_run.dry_run`.
        output: the file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    title = "Dry run of rollout allocation"
    body = [f"<h1>{title}</h1>", page.paragraph(overview(result), "soft"), page.paragraph(ASSUMPTION, "notice")]
    body += [page.paragraph(f"{note[:1].upper()}{note[1:]}.", "soft") for note in result.notes]
    body.append(page.tiles(_tiles(result)))
    body.append(page.heading("The recorded run and its alternatives"))
    table = [[cell if cell is not None else page.MISSING for cell in cells(result, row)] for row in result.shown]
    body.append(page.table(HEADER, table, caption="Means over the seeds ± standard deviation of the value"))
    body.append(page.heading("The value of the run for fewer rollouts"))
    body += [page.paragraph(savings(result, policy)) for policy in result.equal_value]
    body.append(page.heading("Plots"))
    body.append(page.plots(_plots(result)))
    body.append(page.paragraph(method(result), "soft"))
    output.parent.mkdir(parents=True, exist_ok=True)
    return page.write(output, title, body)


def _tiles(result: DryRun) -> list[tuple[str, str, str]]:
    recorded, knapsack = result.recorded, result.row(KNAPSACK, 1.0)
    saved = result.saved(KNAPSACK)
    figure = page.MISSING if math.isnan(saved) else f"{'≥ ' if result.at_least(KNAPSACK) else ''}{100 * saved:.0f} %"
    return [
        ("rollouts saved", figure, "by the knapsack, at equal value"),
        (
            "rollouts with a gradient",
            f"{100 * recorded.effective_rollouts:.0f} → {100 * knapsack.effective_rollouts:.0f} %",
            "as it was → knapsack, same budget",
        ),
        (
            "prompts with a gradient",
            f"{100 * recorded.effective_prompts:.0f} → {100 * knapsack.effective_prompts:.0f} %",
            "moving budget alone does not raise this",
        ),
        (
            "value",
            f"{100 * knapsack.value / recorded.value:.0f} %" if recorded.value > 0 else page.MISSING,
            "of the recorded run's, knapsack, same budget",
        ),
    ]


def _plots(result: DryRun) -> list[str]:
    policies = list(result.equal_value)
    scale = 100 / result.recorded.value if result.recorded.value > 0 else 0.0
    found = []
    if scale:
        rows = {name: [row for row in result.rows if row.policy == name] for name in policies}
        curves = {
            name: ([row.rollouts for row in members], [scale * row.value for row in members])
            for name, members in rows.items()
        }
        found.append(
            page.plot(
                "value",
                f'Where a curve crosses the dotted line it buys the value of the run. "{LIMIT}" is the upper limit of '
                "any allocation.",
                partial(plots.value_by_budget, curves, target=(result.recorded.rollouts, 100.0)),
            )
        )
    same = [result.recorded, *(result.row(name, 1.0) for name in policies)]
    found.append(
        page.plot(
            "ratios",
            "Both shares at the recorded budget. The first can be raised by moving budget alone; a policy that lowers "
            "the second reaches fewer prompts.",
            partial(
                plots.ratio_pairs,
                {row.policy: (row.effective_rollouts, row.effective_prompts) for row in same},
            ),
        )
    )
    found.append(
        page.plot(
            "rates",
            "The smoothed success rates that the replay takes as the truth, one entry per group. Allocation can save "
            "where many groups are at the two ends.",
            partial(plots.rate_histogram, result.rates),
        )
    )
    if result.calibration.visits.size:
        found.append(
            page.plot(
                "reliability",
                "Can the knapsack's predictions be trusted? On the diagonal, yes. Brier score "
                f"{result.calibration.brier:.3f}; always predicting the average gives "
                f"{result.calibration.brier_constant:.3f}.",
                partial(plots.reliability, {KNAPSACK: result.calibration}),
            )
        )
    return found
